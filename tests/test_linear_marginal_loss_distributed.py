"""linear_marginal_loss with its vocabulary or its documents over ranks: as on one, or one clear error."""

import linear_marginal_loss_distributed_cases as cases
import pytest
import ranks_pool
import torch
from linear_marginal_loss_cases import make_case

SIZES = [2, 4]
sizes = pytest.mark.parametrize("size", SIZES, ids="W{}".format)
splits = pytest.mark.parametrize("split", ["vocabulary", "documents"])


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    pool = ranks_pool.Pool(max(SIZES), tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


def succeed(results):
    for rank, result in enumerate(results):
        if isinstance(result, Exception):
            raise AssertionError(f"rank {rank}: {getattr(result, 'where', result)}")
    return results


@splits
@sizes
def test_everything_is_as_on_one_rank(pool, size, split):
    succeed(pool.run(cases.as_on_one_rank, size, split, range(40)))


@splits
@pytest.mark.parametrize("name", cases.ADVERSARIAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_no_worse_than_torch_on_one_rank(pool, split, name, dtype):
    if name == "common offset" and dtype == torch.float16:
        pytest.skip("2^24 is no float16")
    succeed(pool.run(cases.adversarial, 4, split, name, dtype, None))


@pytest.mark.parametrize("name, share", [("plain", 2.0**-14), ("H=123", 2.0**-12), ("V=30522", 2.0**-5)])
def test_an_error_in_one_rank_s_d_hidden_is_noticed(pool, name, share):
    """The bound grows with V, so of a large vocabulary the error must be larger."""
    for told in succeed(pool.run(cases.planted, 2, name, share)):
        assert ": hidden: worst at" in told
    assert succeed(pool.run(cases.planted, 2, name, 0.0)) == ["", ""]


@splits
@pytest.mark.parametrize("name", ["plain", "V=1", "common offset", "masked words"])
@pytest.mark.parametrize(
    "backend,dtype",
    [("torch", torch.float32), ("triton", torch.float32), ("triton:epilogue", torch.bfloat16)],
    ids=str,
)
def test_a_backend_may_be_chosen_across_ranks(pool, split, name, backend, dtype):
    pytest.importorskip("triton")
    succeed(pool.run(cases.adversarial, 2, split, name, dtype, backend))


@splits
@sizes
def test_what_masks_hide_is_never_looked_at(pool, size, split):
    succeed(pool.run(cases.masks_hide, size, split))


@splits
def test_a_second_backward_and_a_second_call_give_the_same_bits(pool, split):
    succeed(pool.run(cases.backward_twice, 2, split))


@sizes
def test_the_posterior_comes_with_a_split_vocabulary(pool, size):
    succeed(pool.run(cases.posterior, size))


@sizes
def test_a_dtensor_weight_says_by_itself_how_it_is_split(pool, size):
    succeed(pool.run(cases.dtensor, size))


@splits
@sizes
def test_what_travels_is_what_the_readme_counts(pool, size, split):
    """B=4, K=8, M=5, H=16, one chunk."""
    rows, width = 4 * 8 * 5, 16
    header, bias, statistics, d_hidden = 80, 8, 24 * rows, 4 * rows * width
    of_documents = 8 * 4 * (2 + 3) + 8 * 4 * 2  # of marginal_loss, mode "sequence", float64
    for forward, backward in succeed(pool.run(cases.bytes_received, size, split)):
        if split == "vocabulary":
            assert forward == (size - 1) * (header + bias + statistics) + d_hidden
        else:
            assert forward == (size - 1) * (header + 2 * of_documents)
        assert backward == 0


@splits
def test_explain_tells_the_part_of_this_rank(pool, split):
    for backend, plan, flops in succeed(pool.run(cases.explained, 2, split)):
        assert backend == "torch" and flops
        assert plan.endswith("1 products, of 2 ranks' " + ("words" if split == "vocabulary" else split))


REFUSED = {
    # (the rank that raises its own error, its words); the other is told which rank it was.
    "hidden": (1, "linear_marginal_loss: hidden must be a Tensor [B, K, M, H], got NoneType None"),
    "weight": (1, "linear_marginal_loss: weight must be [V, H] = [any, 16]"),
    "backend": (
        1,
        "linear_marginal_loss across ranks: use_backend('reference') names a backend this op lacks",
    ),
    # None: every rank says the same.
    "batch": (None, "linear_marginal_loss: B must be the same on all ranks, got 2 on rank 0 and 1 on rank 1"),
    "mode": (None, "mode, reduction and the other options (told by checksum) must be the same on all ranks"),
    "requires_grad": (
        None,
        "requires_grad, mode, reduction and the other options (told by checksum) must be",
    ),
    "targets": (None, "linear_marginal_loss: targets (and doc_mask, where the vocabulary is split) (told by"),
    "range": (None, "linear_marginal_loss: targets must be in [0, V=37) or ignore_index=-100, got values"),
    "both": (None, "linear_marginal_loss: group and a split vocabulary must not come together, got both"),
    "nothing": (None, "linear_marginal_loss: some rank must bring"),
}


@splits
@pytest.mark.parametrize("name", REFUSED)
def test_what_one_rank_refuses_no_rank_waits_for(pool, split, name):
    culprit, words = REFUSED[name]
    for rank, error in enumerate(pool.run(cases.refused, 2, split, name)):
        assert isinstance(error, Exception), f"rank {rank} returned {error!r}"
        if culprit in (None, rank):
            assert words in str(error) and isinstance(error, (TypeError, ValueError)), error.where
        else:
            assert f"rank {culprit} refused its arguments; its own error says why" in str(error)


def test_the_posterior_of_split_documents_is_refused():
    with pytest.raises(ValueError, match="return_posterior must be False with a group, got True"):
        make_case().loss(return_posterior=True, group="any")


def test_without_a_process_group_the_error_says_what_is_missing():
    for name in ("group", "vocabulary_group"):
        with pytest.raises(ValueError, match="^linear_marginal_loss: group must be an initialised process"):
            make_case().loss(**{name: "world"})
