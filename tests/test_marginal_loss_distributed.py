"""marginal_loss over documents split over ranks: one loss, the gradients of one rank, or one clear error."""

import time

import marginal_loss_distributed_cases as cases
import pytest
import ranks_pool
import torch
from marginal_loss_cases import CASES, MODES, answer, rounded

import realm_kernels as rk
from realm_kernels.marginal_loss.plan import traffic
from realm_kernels.testing import assert_within

SIZES = [2, 4]


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


def joined(shards, shape):
    """The documents of all ranks, in the order of the ranks."""
    parts = [torch.tensor(x, dtype=torch.float64).view(shape[0], -1, *shape[2:]) for x in shards]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_loss_and_gradients_are_the_oracles_rounded_once(pool, size, mode):
    """The bounds of one process, on all that is known to break a marginal likelihood."""
    results = succeed(pool.run(cases.adversarial, size, mode))
    for name, inputs in CASES.items():
        losses, loss_dtypes, gradients, dtypes = zip(*(result[name] for result in results), strict=True)
        # Of every rank the same bits; NaN does not compare, and no case has a NaN loss.
        assert all(loss == losses[0] for loss in losses) and len(set(loss_dtypes)) == 1, name
        expected = answer(name, mode)
        wide = torch.float64 in (inputs.scores.dtype, inputs.log_likelihood.dtype)
        dtype = torch.float64 if wide else torch.float32
        assert loss_dtypes[0] == str(dtype)
        loss = torch.tensor(losses[0], dtype=dtype)
        assert_within(
            loss, expected.loss, rounded(expected.loss_bound, expected.loss, dtype), f"{name}: loss"
        )
        for key, value, stray in (
            ("scores", expected.d_scores, expected.d_scores_bound),
            ("log_weight", expected.d_scores, expected.d_scores_bound),
            ("log_likelihood", expected.d_log_likelihood, expected.d_log_likelihood_bound),
        ):
            leaf = getattr(inputs, key)
            if leaf is None:
                continue
            assert {each[key] for each in dtypes} == {str(leaf.dtype)}
            found = joined([each[key] for each in gradients], leaf.shape)
            assert_within(found, value, rounded(stray, value, leaf.dtype), f"{name}: d_{key}")


@pytest.mark.parametrize("size", SIZES)
def test_everything_is_as_on_one_rank(pool, size):
    succeed(pool.run(cases.as_on_one_rank, size, range(60)))


def test_documents_that_explain_the_answer_alike_are_left_where_they_are(pool):
    succeed(pool.run(cases.documents_alike, 4))


def test_nan_and_infinity_of_one_rank_reach_that_loss_on_all(pool):
    succeed(pool.run(cases.wild_on_one_rank, 4))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_the_forward_moves_the_bytes_of_the_model_and_the_backward_none(pool, size, mode):
    for rank, (received, plan) in enumerate(succeed(pool.run(cases.bytes_received, size, mode))):
        assert received == traffic(size, 5, 3, mode)
        assert plan == (
            f"B=5 K={rank} M=3 {mode} mode, float64 inside, of {size} ranks' documents; receives {received} "
            "bytes over gloo"
        )


def test_a_group_of_some_ranks(pool):
    succeed(pool.run(cases.in_a_subgroup, 3))


def test_a_second_derivative_is_refused(pool):
    for error in pool.run(cases.differentiated_twice, 2):
        assert str(error) == "marginal_loss: second derivatives are not offered with a group"


REFUSED = {
    # (the rank that raises its own error, its words); the other is told which rank it was.
    "scores": (1, "marginal_loss: scores must be a Tensor [B, K], got NoneType None"),
    "doc_mask": (1, "marginal_loss: doc_mask must be [B, K] = [2, 3], got bool[2, 6] on cpu"),
    "backend": (1, "marginal_loss across ranks: use_backend('triton') names a backend this op lacks"),
    # None: every rank says the same.
    "batch": (None, "must be the same on all ranks, got B=2, M=4, mode 'sequence', reduction 'mean', no"),
    "tokens": (None, "B=2, M=1, mode 'sequence', reduction 'mean', no token_mask on rank 1"),
    "mode": (None, "M=4, mode 'token', reduction 'mean', no token_mask on rank 1"),
    "reduction": (None, "M=4, mode 'sequence', reduction 'sum', no token_mask on rank 1"),
    "token_mask": (None, "a token_mask of CRC "),
    "one token_mask": (None, "no token_mask on rank 0 and B=2, M=4, mode 'sequence', reduction 'mean', a"),
    "no document": (None, "marginal_loss: scores must be [B, K] with K >= 1 on some rank, got K=0 on all"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_one_rank_refuses_no_rank_waits_for(pool, case):
    start = time.monotonic()
    errors = pool.run(cases.refused, 2, case)
    assert time.monotonic() - start < ranks_pool.TIMEOUT
    culprit, words = REFUSED[case]
    for rank, error in enumerate(errors):
        assert isinstance(error, Exception), f"rank {rank} returned {error!r}"
        if culprit in (None, rank):
            assert words in str(error) and isinstance(error, (TypeError, ValueError)), error.where
        else:
            assert isinstance(error, RuntimeError)
            assert f"rank {culprit} refused its arguments; its own error says why" in str(error)


def test_ranks_that_make_different_calls_are_told(pool):
    errors = pool.run(cases.refused, 2, "mixed")
    assert "rank 1 came to from_local where rank 0 came to marginal_loss" in str(errors[0])
    assert "rank 0 came to marginal_loss where rank 1 came to from_local" in str(errors[1])


def test_without_a_process_group_the_error_says_what_is_missing():
    with pytest.raises(ValueError, match=r"^marginal_loss: group must be an initialised process group"):
        rk.marginal_loss(torch.randn(2, 3), -torch.rand(2, 3), group="world")
