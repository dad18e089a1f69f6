"""The laws of the Triton backend of mips_topk, in Triton's interpreter where no GPU is."""

import numpy
import pytest
import torch
from mips_topk_triton_cases import (
    DEVICE,
    DTYPES,
    INF,
    NAN,
    ORDERS,
    QUIET,
    check,
    integers,
    planner,
    search,
    small_sorts,  # noqa: F401, a fixture
)
from optional_hypothesis import given, settings, st

import realm_kernels as rk
from realm_kernels.mips_topk import gpu, reference, triton_plan
from realm_kernels.mips_topk import triton as backend
from realm_kernels.testing import assert_same_topk

pytest.importorskip("triton")

from realm_kernels.mips_topk import triton_launch, triton_scan, triton_search  # noqa: E402

pytestmark = QUIET


@pytest.mark.parametrize("rows", DTYPES)
@pytest.mark.parametrize("queries", DTYPES)
def test_any_pair_of_dtypes(queries, rows):
    check(torch.randn(2, 12).to(DTYPES[queries]), torch.randn(100, 12).to(DTYPES[rows]), 5)


def test_the_default_plan():
    check(torch.randn(2, 12), torch.randn(130, 12), 3, plan_for=triton_plan.plan_for)


@pytest.mark.parametrize("order", ORDERS)
def test_adversarial_orders(order):
    table = torch.ones(117, 8)
    table[:, 0] = ORDERS[order](117).float()
    queries = torch.zeros(2, 8)
    queries[:, 0] = torch.tensor([1.0, -3.0])
    check(queries, table.bfloat16(), 7)


@pytest.mark.parametrize("N,k", [(1, 1), (7, 6), (8, 8), (9, 3), (31, 31), (33, 5), (129, 65)])
def test_sizes_around_groups_and_tiles(N, k):
    check(torch.randn(2, 9), torch.randn(N, 9), k)


@pytest.mark.parametrize("k", [1, 9, 50])
def test_ties_go_to_the_smaller_id_whatever_the_split(k):
    queries, table = integers(2, 5), integers(90, 5)
    check(queries, list(table.tensor_split(3)), k)
    check(queries, [table[:40], table[:0], table[:40]], k)  # rows repeated across shards


def test_batch_and_k_do_not_matter():
    queries, table = torch.randn(6, 12), torch.randn(100, 12)
    scores, indices = search(queries, table, 20)
    assert_same_topk(search(queries[4:5], table, 20), (scores[4:5], indices[4:5]))
    assert_same_topk(search(queries, table, 3), (scores[:, :3], indices[:, :3]))


def test_nan_and_infinities():
    queries, table = torch.randn(4, 6), torch.randn(70, 6)
    table[3], table[40, 2], table[41, 1] = NAN, INF, -INF
    table[42], table[60] = INF, -INF
    queries[1, 4], queries[2, 0], queries[3] = NAN, INF, 0.0
    check(queries, table, 6)
    check(queries[1:3], table.to(torch.float16), 70)


def test_minus_infinity_is_a_score_and_comes_before_the_padding():
    check(torch.ones(1, 1), torch.tensor([[-INF], [1.0], [NAN]]), 3)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e15, 1e19, 3e38], ids=lambda s: f"scale{s:g}")
def test_tiny_and_huge_values(scale):
    queries, table = torch.randn(3, 11), torch.randn(50, 11).clamp(-1, 1) * scale
    queries[1] *= scale
    check(queries, table, 5)


def test_gaps_that_the_scan_cannot_see():
    """Products near 2^24 that cancel, and scores one ulp apart: the rescoring must rank them."""
    table = torch.zeros(96, 24)
    table[:, ::3], table[:, 1::3] = 2.0**12, -(2.0**12)
    table[:, 2::3] = torch.rand(96, 8) * 2.0**-12
    check(torch.ones(2, 24) * torch.tensor([2.0**12, 2.0**-12]).view(2, 1), table, 9)
    table = torch.ones(96, 16) / 16
    table[40, 0] += 2.0**-20
    table[77] = table[40]
    table[77, 15] += 2.0**-23
    check(torch.ones(1, 16), table, 3)


def test_excluded_and_masked_rows_never_return():
    queries, table = integers(3, 4), integers(90, 4)
    exclude, row_mask = torch.randint(-1, 90, (3, 9)), torch.rand(90) < 0.5
    row_mask[40:60] = False
    check(queries, list(table.tensor_split(2)), 90, exclude.t().contiguous().t(), row_mask)
    table[41], exclude[0] = NAN, torch.tensor([90, 2**40, -7, -(2**40), 3, 3, 3, -1, -1])
    check(queries, table, 5, exclude, row_mask)


def test_nothing_left_gives_padding_without_a_repair():
    before = gpu.repairs(DEVICE)
    scores, indices = search(
        torch.randn(2, 4), torch.randn(90, 4), 3, None, torch.zeros(90, dtype=torch.bool)
    )
    assert (indices == -1).all() and (scores == -INF).all()
    search(torch.full((2, 4), NAN), torch.randn(90, 4), 3)
    assert gpu.repairs(DEVICE) == before
    exclude = torch.arange(90).expand(2, 90)
    assert (search(torch.randn(2, 4), torch.randn(90, 4), 3, exclude)[1] == -1).all()


def test_a_repair_is_made_where_the_certificate_fails_and_only_there():
    before = gpu.repairs(DEVICE)
    check(torch.randn(2, 16), torch.randn(100, 16), 4)
    check(torch.zeros(2, 16), torch.randn(100, 16), 4)  # every score 0, exactly: ties go to selected groups
    assert gpu.repairs(DEVICE) == before
    queries = torch.cat([torch.randn(1, 16), torch.zeros(1, 16), torch.randn(1, 16)])
    table = torch.randn(1, 16).expand(100, 16)
    check(queries, table, 4)
    assert gpu.repairs(DEVICE) == before + 2
    table = torch.cat([table, torch.randn(30, 16)])
    check(queries, table, 20, plan_for=planner(selected=2))  # more rows than the selected groups hold
    assert gpu.repairs(DEVICE) == before + 5


def test_the_filter_of_many_groups_keeps_the_best():
    before = gpu.repairs(DEVICE)
    check(torch.randn(2, 8), torch.randn(300, 8), 3, plan_for=planner(slack=4))
    assert gpu.repairs(DEVICE) == before
    table = torch.ones(300, 8)  # all reach the floor, more than the filter keeps
    table[::5] = torch.randn(8)
    check(torch.randn(1, 8), table, 3, plan_for=planner(slack=4))


def test_a_small_workspace_only_makes_more_passes():
    queries, table = torch.randn(5, 12), torch.randn(60, 12)
    few = planner()

    def tiny(*args):
        return triton_plan.fit_batch(few(*args), 12, 5_500)

    assert tiny(5, 60, 12, 5, 0, torch.float32, torch.float32).batch == 2
    assert_same_topk(search(queries, table, 5, plan_for=tiny), search(queries, table, 5))


def test_wide_rows_go_through_the_scan_in_blocks():
    check(torch.randn(2, 150), torch.randn(60, 150), 5)
    check(torch.randn(2, 150).bfloat16(), torch.randn(60, 150).bfloat16(), 5)


def test_layout_does_not_matter():
    queries, table = torch.randn(2, 13), torch.randn(40, 13)
    expected = search(queries, table, 6)
    wide = torch.full((40, 40), NAN)
    wide[:, 3:16] = table
    misaligned = torch.full((40 * 13 + 1,), NAN)[1:].view(40, 13).copy_(table)
    for layout in (wide[:, 3:16], table.t().contiguous().t(), misaligned, table.repeat_interleave(2, 0)[::2]):
        assert_same_topk(triton_search.search(queries.to(DEVICE), [layout.to(DEVICE)], 6), expected)
    assert_same_topk(search(queries.t().contiguous().t(), table, 6), expected)


@pytest.mark.parametrize("first_row", [2**31 - 1, 2**33])
def test_rows_and_ids_beyond_two_to_the_thirty_one(first_row):
    """Rows 2^31 elements apart, of a table whose other pages are never touched; ids that need 64 bits."""
    storage = torch.UntypedStorage(2 * (2**31 + 8), device=DEVICE)
    table = torch.empty(0, dtype=torch.bfloat16, device=DEVICE).set_(storage).as_strided((2, 8), (2**31, 1))
    table.copy_(torch.tensor([[1.0] * 8, [2.0] * 8]))
    exclude = torch.tensor([[-1], [first_row + 1]], device=DEVICE)
    piece = triton_launch.Piece(torch.ones(2, 8, device=DEVICE), table, first_row, exclude, None)
    plan = planner()(2, 2, 8, 2, 1, torch.float32, torch.bfloat16)
    for scores, indices in (
        triton_search._search_piece(piece, 2, plan),
        triton_search._search_densely(piece, 2),
    ):
        assert indices.tolist() == [[first_row + 1, first_row], [first_row, -1]]
        assert scores.tolist() == [[16.0, 8.0], [8.0, -INF]]


@pytest.mark.parametrize("rows", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-38, 1e4])
def test_the_bound_holds_for_every_row_and_is_tight(rows, scale):
    """U >= the canonical score of each row of its group, by no more than twice the derived error."""
    queries = torch.randn(4, 40)
    table = (torch.randn(64, 40) * scale).to(DTYPES[rows])
    piece = triton_launch.Piece(
        queries.to(DEVICE), table.to(DEVICE), 0, torch.empty(4, 0, dtype=torch.int64), None
    )
    plan = planner()(4, 64, 40, 3, 0, queries.dtype, table.dtype, triton_plan.SHARED_BYTES)
    space = triton_launch.Workspace(plan, piece.queries)
    triton_launch.Block(piece, plan, space, 0, 4).scan()
    slope, offset = space.slope[:4, None].double(), space.offset[:4, None].double()
    bound = space.group_max.double() + space.group_norm.double() * slope + offset  # [4, 8]
    scores = reference.canonical_scores(queries[:, None], table[None]).view(4, 8, 8).double()
    best = scores.amax(2).to(DEVICE)
    assert (bound >= best).all()
    norms = table.double().norm(dim=1).view(8, 8).amax(1) + 40 * 2.0**-63  # what flushed squares may hide
    # The query is rounded to nearest; the row is cut to tf32, or exact.
    rounding = {"f32": 2.0**-11 + 2.0**-10, "f16": 2.0**-11, "bf16": 2.0**-9}[rows]
    error = queries.double().norm(dim=1)[:, None] * norms * (rounding + 50 * 2.0**-22)
    assert (bound - best <= 2 * error.to(DEVICE)).all()


@pytest.mark.parametrize("D", [1, 8, 128, 1024])
def test_the_bound_covers_a_sum_that_truncates(D):
    """A tensor core emulated at its worst: operands cut to tf32, every addition cut to 2^-22 towards zero."""
    generator = numpy.random.default_rng(D)
    for sign in (0.0, -1.0):  # all positive, where every cut goes the same way; and mixed, where sums cancel
        q, x = (generator.uniform(sign, 1.0, (200, D)).astype(numpy.float32) for _ in "qx")
        q_cut, x_cut = ((a.view(numpy.int32) & -0x2000).view(numpy.float32).astype(float) for a in (q, x))
        total = numpy.zeros(200)
        for d in range(D):
            mantissa, exponent = numpy.frexp(total + q_cut[:, d] * x_cut[:, d])
            total = numpy.ldexp(numpy.trunc(mantissa * 2.0**23) / 2.0**23, exponent)
        norms = numpy.linalg.norm(q_cut, axis=1) * numpy.linalg.norm(x.astype(float), axis=1)
        exact = (q_cut * x.astype(float)).sum(1)
        relative = triton_plan.plan_for(1, 100, D, 1, 0, torch.float32, torch.float32).relative
        assert (abs(total - exact) <= relative * norms).all()


@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_small_input_equals_the_reference(data):
    B, N, D = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 19))
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1.0, 1.0, -1.0, INF, -INF, NAN, 1e-45, 3e38])
    usual = data.draw(st.sampled_from([9, len(special)]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))

    def draw(*shape):
        return special[torch.randint(usual, shape, generator=generator)]

    exclude = torch.randint(-1, N, (B, data.draw(st.integers(0, 3))), generator=generator)
    row_mask = torch.rand(N, generator=generator) < 0.8
    check(draw(B, D), draw(N, D), data.draw(st.integers(1, N)), exclude, row_mask)


def test_equal_inputs_give_equal_bits():
    queries, table = torch.randn(3, 16), integers(100, 16).to(torch.bfloat16)
    assert_same_topk(search(queries, table, 9), search(queries, table, 9))


def test_the_op_runs_forward_and_backward():
    queries = torch.randn(2, 8, device=DEVICE, requires_grad=True)
    table = torch.randn(40, 8, device=DEVICE, requires_grad=True)
    with rk.use_backend("triton"):
        assert rk.explain(rk.mips_topk, queries, table, 3).backend == "triton"
        top = rk.mips_topk(queries, table, 3)
        top.scores.sum().backward()
    torch.testing.assert_close(queries.grad, table[top.indices].sum(1).detach())
    with rk.use_backend("reference"):
        assert_same_topk(rk.mips_topk(queries, table, 3), top)


def test_no_query_gives_no_result():
    scores, indices = search(torch.empty(0, 4), torch.randn(9, 4), 3)
    assert scores.shape == indices.shape == (0, 3)


@pytest.mark.skipif(DEVICE == "cuda", reason="this is about CPU tensors")
def test_cpu_tensors_are_served_only_when_forced(monkeypatch):
    arguments = (torch.randn(1, 4), [torch.randn(9, 4)], 3, None, None)
    assert "serves CUDA tensors" in backend.refuses(*arguments)
    with rk.use_backend("triton"):
        assert backend.refuses(*arguments) is None
        monkeypatch.setattr(triton_scan, "INTERPRETED", False)
        with pytest.raises(ValueError, match="TRITON_INTERPRET"):
            rk.mips_topk(arguments[0], arguments[1][0], 3)


@pytest.mark.parametrize("N", [1000, 10**6, 13_353_718, 1 << 30])
@pytest.mark.parametrize("k", [1, 8, 100, 2048])
def test_plans_keep_to_the_workspace(N, k, monkeypatch):
    monkeypatch.undo()
    for B in (1, 512, 4096):
        plan = triton_plan.plan_for(B, N, 128, min(k, N), 2, torch.bfloat16, torch.bfloat16)
        assert triton_plan.workspace_bytes(plan, 128) <= gpu.WORKSPACE_BYTES
        assert plan.num_groups * plan.group >= N and 1 <= plan.batch <= B
        assert plan.selected >= min(k, triton_plan.MAX_K, plan.num_groups)
        assert triton_plan.sort_keys(plan.num_groups, plan.selected) <= 4096
