"""What every op says of a wrong argument: one line, whatever came, and no wrong number in silence."""

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import realm_kernels as rk
from realm_kernels.validation import describe

SCORES, SPANS = torch.randn(2, 4), torch.randn(2, 4, 5)
TABLE = torch.randn(30, 8)
VECTOR = torch.ones(16)
TOKENS = torch.randn(2, 7, 16)


def marginal_loss(scores):
    return rk.marginal_loss(scores, -torch.ones(2, 4, 5))


def linear_marginal_loss(scores):
    return rk.linear_marginal_loss(
        scores, torch.ones(2, 4, 3, 8), TABLE, torch.zeros(2, 3, dtype=torch.int64)
    )


def span_marginal_loss(scores):
    return rk.span_marginal_loss(scores, SPANS, SPANS > 0)


def mips_topk(queries):
    return rk.mips_topk(queries, TABLE, 3).scores


def score_spans(start):
    return rk.score_spans(start, TOKENS, VECTOR, norm_weight=VECTOR, norm_bias=VECTOR, max_width=2)


CALLS = [
    (marginal_loss, SCORES),
    (linear_marginal_loss, SCORES),
    (span_marginal_loss, SCORES),
    (mips_topk, torch.randn(3, 8)),
    (score_spans, TOKENS),
]
every_op = pytest.mark.parametrize("call, first", CALLS, ids=[call.__name__ for call, _ in CALLS])


@pytest.mark.parametrize(
    "value, said",
    [
        (np.zeros((3, 16), np.float32), "ndarray float32[3, 16]"),
        ("table", "str 'table'"),
        (2.0, "float 2.0"),
        (torch.zeros(2, 3), "float32[2, 3] on cpu"),
        (torch.zeros(2, 3).to_sparse(), "float32[2, 3] on cpu (sparse_coo)"),
    ],
)
def test_a_value_is_named_by_what_matters_of_it(value, said):
    assert describe(value) == said


@pytest.mark.parametrize("value", [[True] * 50, [torch.randn(50, 16)] * 2, "x" * 1000, {1: "a\nb" * 99}])
def test_a_large_value_is_one_short_line(value):
    said = describe(value)
    assert said.startswith(f"{type(value).__name__} of {len(value)}, ") and said.endswith("...")
    assert "\n" not in said and len(said) < 100


@every_op
def test_only_dense_tensors_are_taken(call, first):
    nested = torch.nested.nested_tensor([torch.ones(8)], layout=torch.jagged)
    for other in (first.to_sparse(), first.to_mkldnn(), nested):
        with pytest.raises(ValueError, match=rf"^{call.__name__}: \w+ must be a dense Tensor \["):
            call(other)


@every_op
def test_a_forward_mode_tangent_is_refused_and_not_dropped(call, first):
    with pytest.raises(
        NotImplementedError, match=rf"^{call.__name__}: \w+ must carry no forward-mode tangent"
    ):
        torch.func.jvp(call, (first,), (first,))
    with forward_ad.dual_level():
        call(first)  # no tangent: nothing is lost
        with pytest.raises(NotImplementedError, match="only backward derivatives"):
            call(forward_ad.make_dual(first, first))


@every_op
def test_a_tensor_that_outlived_its_transform_is_taken(call, first):
    """Torch leaves a wrapper around it, which has no memory of its own."""
    kept = []

    def keep(tensor):
        kept.append(tensor * 1)
        return tensor.sum()

    torch.func.grad(keep)(first)
    assert torch._C._functorch.is_dead_tensor_wrapper(kept[0])
    assert torch.equal(call(kept[0]), call(first))


@pytest.mark.parametrize("eps", ["x", None, True])
def test_eps_is_a_number(eps):
    with pytest.raises(TypeError, match="^score_spans: eps must be a float, got "):
        rk.score_spans(TOKENS, TOKENS, VECTOR, norm_weight=VECTOR, norm_bias=VECTOR, max_width=2, eps=eps)


@pytest.mark.parametrize("device", ["junk", "cuda:99", 1.5])
def test_a_device_is_one_that_is_there(device, tmp_path):
    table = rk.ShardedTable.from_tensors([TABLE])
    table.save(tmp_path)
    with pytest.raises(ValueError, match=r"^ShardedTable.to: device must be .*, got "):
        table.to(device)
    with pytest.raises(ValueError, match=r"^ShardedTable.open: device must be .*, got "):
        rk.ShardedTable.open(tmp_path, device=device)
