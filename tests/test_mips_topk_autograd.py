"""Gradients of mips_topk, and its manners inside torch: opcheck, compile, autocast."""

import pytest
import torch

import realm_kernels as rk
from realm_kernels.backends import valid_names
from realm_kernels.testing import assert_same_topk, assert_within

BACKENDS = ["reference"] + [name for name in valid_names() if name.startswith("cpu:")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with rk.use_backend(request.param):
        yield request.param


def oracle_gradients(queries, table, indices, d_scores):
    queries, table = queries.detach().double().requires_grad_(), table.detach().double().requires_grad_()
    rows = table[indices.clamp(min=0)]
    scores = (queries[:, None] * rows).sum(-1).where(indices >= 0, 0.0)
    return torch.autograd.grad(scores, (queries, table), d_scores.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "needs", [(True, True), (True, False), (False, True)], ids=["both", "queries", "table"]
)
def test_gradients_equal_the_oracle(backend, dtype, needs):
    queries = torch.randn(5, 9).requires_grad_(needs[0])
    table = torch.randn(21, 9).to(dtype).requires_grad_(needs[1])
    row_mask = torch.zeros(21, dtype=torch.bool)
    row_mask[:6] = True  # fewer than k: the padding must receive and send nothing
    scores, indices = rk.mips_topk(queries, table, 8, row_mask=row_mask)
    d_scores = torch.randn(5, 8)
    wanted = [x for x in (queries, table) if x.requires_grad]
    got = iter(torch.autograd.grad(scores, wanted, d_scores))
    # Sums of at most 8 (queries) or 5 (table) float32 products, then one rounding to the argument's dtype.
    rows = table.detach().double()[indices.clamp(min=0)]
    found = (indices >= 0).double()
    for argument, oracle, magnitude in zip(
        (queries, table),
        oracle_gradients(queries, table, indices, d_scores),
        (
            (d_scores.double().abs() * found)[..., None].mul(rows.abs()).sum(1),
            torch.zeros(21, 9, dtype=torch.float64).index_add_(
                0,
                indices.clamp(min=0).flatten(),
                (
                    (d_scores.double().abs() * found)[..., None] * queries.detach().double().abs()[:, None]
                ).flatten(0, 1),
            ),
        ),
        strict=True,
    ):
        if argument.requires_grad:
            gradient = next(got)
            assert gradient.dtype == argument.dtype
            rounding = torch.finfo(argument.dtype).eps / 2
            assert_within(
                gradient, oracle, magnitude * 9 * 2**-24 + (oracle.abs() + 1e-7) * rounding, "gradient"
            )


def test_a_query_that_finds_nothing_sends_nothing_to_the_table(backend):
    queries, table = torch.randn(3, 8), torch.randn(12, 8, requires_grad=True)
    queries[1] = torch.nan
    queries[2] = 0.0
    (gradient,) = torch.autograd.grad(rk.mips_topk(queries, table, 12).scores, table, torch.ones(3, 12))
    assert torch.equal(gradient, queries[0].expand(12, 8))


def test_gradients_are_deterministic_and_repeatable(backend):
    queries, table = torch.randn(50, 8, requires_grad=True), torch.randn(12, 8, requires_grad=True)
    scores, _ = rk.mips_topk(queries, table, 12)
    weights = torch.randn_like(scores)
    first = torch.autograd.grad(scores, (queries, table), weights, retain_graph=True)
    second = torch.autograd.grad(scores, (queries, table), weights)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_graph_keeps_the_rows_not_the_table():
    """The table may be overwritten between forward and backward: an index refresh does just that."""
    queries, table = torch.randn(3, 8, requires_grad=True), torch.randn(40, 8)
    scores, indices = rk.mips_topk(queries, table, 4)
    expected = table[indices].sum(1)
    table.zero_()
    scores.sum().backward()
    assert_within(
        queries.grad, expected.double(), 4 * 2**-23 * expected.abs().max().item() + 1e-6, "d_queries"
    )


def test_no_gradient_no_gathered_rows():
    queries, table = torch.randn(3, 8), torch.randn(40, 8, requires_grad=True)
    scores, _ = rk.mips_topk(queries, table, 4)
    saved = [x for x in scores.grad_fn.saved_tensors if x is not None and x.dim() == 3]
    assert saved == []
    with torch.no_grad():
        assert not rk.mips_topk(queries.requires_grad_(), table, 4).scores.requires_grad


def test_indices_are_not_differentiable_and_second_derivatives_are_refused():
    queries = torch.randn(3, 8, requires_grad=True)
    scores, indices = rk.mips_topk(queries, torch.randn(40, 8), 4)
    assert not indices.requires_grad
    (gradient,) = torch.autograd.grad(scores.sum(), queries, create_graph=True)
    with pytest.raises(RuntimeError, match="mips_topk: the gradient is itself not differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck(grad):
    queries, table = torch.randn(4, 8, requires_grad=grad), torch.randn(30, 8, requires_grad=grad)
    exclude, row_mask = torch.randint(-1, 30, (4, 3)), torch.rand(30) < 0.9
    op = torch.ops.realm_kernels.mips_topk.default
    torch.library.opcheck(op, (queries, [table], 5, exclude, row_mask, grad, []))
    torch.library.opcheck(op, (queries, [table.detach()[:20], table.detach()[20:]], 5, None, None, grad, []))


def test_compiles_as_one_graph():
    def step(queries, table):
        scores, indices = rk.mips_topk(queries * 2, table, 5)
        return scores.sum(), indices

    queries, table = torch.randn(4, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    expected, expected_indices = step(queries, table)
    expected_gradients = torch.autograd.grad(expected, (queries, table))
    got, indices = torch.compile(step, fullgraph=True, backend="aot_eager")(queries, table)
    assert torch.equal(indices, expected_indices)
    gradients = torch.autograd.grad(got, (queries, table))
    for gradient, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, want)


def test_autocast_casts_nothing():
    queries, table = torch.randn(4, 64, requires_grad=True), torch.randn(30, 64)
    expected = rk.mips_topk(queries, table, 5)
    (want,) = torch.autograd.grad(expected.scores.sum(), queries)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = rk.mips_topk(queries, table, 5)
        (gradient,) = torch.autograd.grad(got.scores.sum(), queries)
    assert_same_topk(got, expected)
    assert torch.equal(gradient, want)
