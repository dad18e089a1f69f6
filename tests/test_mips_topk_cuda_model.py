"""The CUDA kernels of mips_topk, the very source that nvcc compiles, on a model of a GPU.

The model (tests/cuda_model) switches threads at random, delays TMA and wgmma as long as they may be delayed,
and decodes descriptors and swizzles as the PTX ISA has them. So tiles, fragments, addresses, phases of
barriers and everything after the scan are tested here; instructions and clocks are not.
"""

import mips_topk_cuda_cases as cases
import pytest
import torch
from mips_topk_cuda_cases import GROUPS, INF, NAN, ORDERS, QUAD, TILE, integers

from realm_kernels.mips_topk import reference
from realm_kernels.testing import assert_same_topk

pytestmark = pytest.mark.skipif(cases.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.build(tmp_path_factory.mktemp("cuda_model"))


def draw(dtype, *shape):
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape).to(dtype)
    return (torch.randn(*shape).clamp(-4, 4) * 16).round().div(16).to(dtype)  # sums of products are exact


SCANS = [
    # shape, dtype, B, N, D, blocks of queries, workers, masked
    pytest.param("wide", torch.bfloat16, 130, 300, 128, 4, 2, False, id="wide-B130-two-workers"),
    pytest.param("wide", torch.bfloat16, 512, 260, 128, 8, 1, False, id="wide-B512-as-REALM"),
    pytest.param("wide", torch.bfloat16, 300, 400, 96, 3, 2, True, id="wide-two-query-blocks-masked"),
    pytest.param("wide", torch.float16, 128, 400, 256, 2, 3, True, id="wide-float16-four-panels"),
    pytest.param("wide", torch.int8, 256, 400, 128, 4, 2, False, id="wide-int8"),
    pytest.param("deep", torch.bfloat16, 128, 200, 768, 2, 2, False, id="deep-D768"),
    pytest.param("deep", torch.bfloat16, 250, 300, 328, 4, 1, True, id="deep-ragged-D-masked"),
    pytest.param("deep", torch.int8, 70, 300, 1040, 3, 1, True, id="deep-int8-three-blocks"),
    pytest.param("deep", torch.bfloat16, 300, 700, 192, 3, 2, True, id="deep-two-query-blocks-masked"),
    pytest.param("deep", torch.float16, 66, 100, 320, 2, 2, False, id="deep-blocks-without-rows"),
    pytest.param("narrow", torch.bfloat16, 5, 700, 128, 1, 2, False, id="narrow-B5"),
    pytest.param("narrow", torch.bfloat16, 64, 400, 768, 1, 1, True, id="narrow-more-panels-than-stages"),
    pytest.param("narrow", torch.bfloat16, 9, 900, 320, 1, 1, False, id="narrow-stages-of-either-group"),
    pytest.param("narrow", torch.float16, 33, 500, 64, 1, 1, True, id="narrow-float16"),
    pytest.param("narrow", torch.int8, 33, 500, 64, 1, 2, True, id="narrow-int8"),
]


def read_of_words(maxima):
    """What a word says of the maxima of its groups [..., 4], by arithmetic instead of bits."""
    largest = maxima.amax(-1, keepdim=True).double()
    _, exponent = torch.frexp(largest.abs())
    unit = torch.exp2(
        exponent.double() - 12
    )  # of 20 bits eleven are a fraction, beside the one that is implied
    rounded = torch.where(largest.isfinite() & (largest != 0), (largest / unit).ceil() * unit, largest)
    _, exponent = torch.frexp(rounded.abs())
    exponent[rounded == 0] = -126
    gap = largest - maxima.double()
    # Of 2^(exponent - 1) * {1/16, 1/8, ... 4} the largest that the gap reaches.
    steps = torch.exp2(exponent.unsqueeze(-1) - 1 + torch.arange(-4.0, 3.0, dtype=torch.float64))
    reached = torch.where(steps <= gap.unsqueeze(-1), steps, 0.0).amax(-1)
    return torch.where(rounded.isfinite(), rounded - reached, rounded)


def test_a_word_bounds_the_maxima_of_its_groups(model):
    maxima = torch.randn(20_000, 4) * torch.exp2(torch.randint(-30, 30, (20_000, 1)).float())
    maxima[5000:10_000] += 30 * maxima[5000:10_000, :1].abs()  # a mean
    maxima[::7, 2], maxima[::11] = -INF, maxima[::11].abs().neg()
    rare = torch.tensor([INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1e-36, 3.4e38, -3.4e38, 1.0])
    maxima = torch.cat([maxima, torch.cartesian_prod(*[rare] * 4)])
    largest = maxima.amax(1)
    groups, least = model.maxima(model.words(maxima))
    assert (groups >= maxima).all() and (groups.amax(1) >= largest).all()
    assert (least <= largest)[largest > -INF].all()
    usual = slice(20_000)
    assert torch.equal(groups[usual], read_of_words(maxima[usual]))
    assert (groups.amax(1) - largest <= largest.abs() / 2048)[usual].all()
    assert (largest - least <= largest.abs() / 512)[usual].all()


def check_scan(model, shape, dtype, B, N, D, blocks, workers, masked, seed=0, cluster=None):
    queries, rows = draw(dtype, B, D), draw(dtype, N, D)
    row_mask = torch.rand(N) < 0.5 if masked else None
    cluster = cluster or (2 if shape == "deep" else 1)
    how = {"workers": workers, "cluster": cluster, "row_mask": row_mask, "seed": seed}
    maxima, norms = model.scan(shape, queries, rows, blocks=blocks, **how)
    scores = queries.double() @ rows.double().T  # [B, N]
    # What is not there scores 0, the zeros that TMA fills in, or nothing where a mask looks at it.
    scores = torch.nn.functional.pad(scores, (0, -N % TILE), value=-INF if masked else 0.0)
    lengths = torch.nn.functional.pad(rows.double().norm(dim=1), (0, -N % QUAD))
    if masked:
        scores[:, :N][:, ~row_mask] = -INF
        lengths[:N][~row_mask] = 0.0
    best = scores.view(B, -1, GROUPS, TILE // GROUPS).amax(3)
    assert torch.equal(maxima, read_of_words(best))
    if dtype == torch.int8:
        return
    longest = lengths.view(-1, QUAD).amax(1)
    assert ((norms.double() - longest).abs() <= (D + 8) * 2.0**-23 * longest).all()


@pytest.mark.parametrize("shape,dtype,B,N,D,blocks,workers,masked", SCANS)
def test_the_scan_finds_the_maximum_of_every_group(model, shape, dtype, B, N, D, blocks, workers, masked):
    check_scan(model, shape, dtype, B, N, D, blocks, workers, masked)


@pytest.mark.parametrize(
    "shape,blocks,N,D",
    [
        ("wide", 2, 128 * 14, 64),
        ("deep", 2, 128 * 14, 64),
        ("narrow", 1, 128 * 14, 64),
        ("narrow", 1, 640, 768),
    ],
    ids=["wide", "deep", "narrow", "narrow-768"],
)
@pytest.mark.parametrize("seed", range(4))
def test_no_order_of_threads_and_transfers_matters(model, shape, blocks, N, D, seed):
    """More panels than stages: each is used again, in orders that chance makes, memory quick or slow."""
    check_scan(model, shape, torch.bfloat16, 40, N, D, blocks, 1, False, seed)


@pytest.mark.parametrize("cluster", [1, 4])
@pytest.mark.parametrize("B,blocks", [(66, 2), (130, 3), (500, 4)])
def test_clusters_of_any_size_find_the_same(model, cluster, B, blocks):
    """Of four, with fewer blocks of queries than ranks, with as many, and in two columns of the grid."""
    for seed in range(2):
        check_scan(model, "deep", torch.bfloat16, B, 128 * 9 - 5, 192, blocks, 1, True, seed, cluster)


# Mistakes that such kernels are prone to. The model must notice each: by wrong numbers or a deadlock.
MISTAKES = {
    "a stage is not waited for": (
        "sm90/scan.h",
        "        barrier_wait(ring.full + item.at.stage + p, item.at.parity);\n",
        "",
    ),
    "the producer does not wait": (
        "sm90/scan_parts.h",
        "barrier_wait(ring.empty + at.stage, at.empty_parity());",
        "",
    ),
    "a parity is off": ("sm90/layout.h", "return parity ^ 1; }", "return parity; }"),
    "rows stride by seven atoms": (
        "sm90/layout.h",
        "(encoded(kAtomBytes) << 32)",
        "(encoded(kAtomBytes - 128) << 32)",
    ),
    "a step along K is 64 bytes": (
        "sm90/layout.h",
        "encoded(kStepBytes) * static_cast<uint64_t>(step)",
        "encoded(2 * kStepBytes) * static_cast<uint64_t>(step)",
    ),
    "maxima are taken while the product is under way": (
        "sm90/scan.h",
        "multiply<kPanels>(odd, other);\n      wgmma_wait<1>(even);",
        "multiply<kPanels>(odd, other);\n      wgmma_wait<2>(even);",
    ),
    "a tile is freed by one block of queries of two": (
        "sm90/scan.h",
        "if (item.block + kConsumerGroups >= blocks) {\n#",
        "if (item.block == group) {\n#",
    ),
    "a group lets a tile pass unseen": (
        "sm90/scan.h",
        "      barrier_wait(ring.full + at.stage, at.parity);\n      arrive_warp(ring.empty + at.stage);\n",
        "      arrive_warp(ring.empty + at.stage);\n",
    ),
    "fragments lie otherwise": (
        "sm90/layout.h",
        "2 * (thread % 4) + i % 2;",
        "2 * (thread % 4) + i / 2 % 2;",
    ),
}
WORD_MISTAKES = {
    "a maximum is rounded to the nearest": (
        "mips_topk_words.h",
        "(bits + (~sign & kGaps)) & ~kGaps",
        "(bits + kGaps / 2) & ~kGaps",
    ),
    "a negative maximum is rounded downward": (
        "mips_topk_words.h",
        "(bits + (~sign & kGaps)) & ~kGaps",
        "(bits + kGaps) & ~kGaps",
    ),
    "a gap is told too large by one": ("mips_topk_words.h", "+ kGapOffset;", "+ kGapOffset + 1;"),
    "the sign of a gap of nothing counts": ("mips_topk_words.h", " & 0x7FFFFFFFu);", ");"),
    "the least maximum is the rounded one": (
        "mips_topk_words.h",
        "bits == 0 ? 0 : bits - kGaps - 1",
        "bits",
    ),
}
CLUSTER_MISTAKES = {
    "a block is told twice that a stage is free and the other one never": (
        "sm90/scan_parts.h",
        "barrier_arrive_at(barrier, static_cast<uint32_t>(lane));",
        "barrier_arrive(barrier);",
    ),
    "a stage is free when the warps of its own block are done": (
        "sm90/scan_parts.h",
        "const int readers = cluster * kConsumerWarps",
        "const int readers = kConsumerWarps",
    ),
    "a block announces the bytes that it loads itself": (
        "sm90/scan_parts.h",
        "static_cast<uint32_t>(plan.stage_bytes)",
        "static_cast<uint32_t>((plan.stage_bytes + kStageBytes) / 2)",
    ),
    "both blocks load the same queries": ("sm90/scan_parts.h", "int b = share.rank;", "int b = 0;"),
    "queries are loaded for one block": ("sm90/scan_parts.h", "(1 << a.cluster) - 1", "1 << share.rank"),
    "others load before the barriers are made": (
        "sm90/scan_parts.h",
        "    cluster_sync();  // before",
        "    __syncthreads();  // before",
    ),
    "a block ends while others arrive at it": (
        "sm90/scan.h",
        "    cluster_sync();  // the others",
        "    // ",
    ),
    "a block without rows takes no part": (
        "sm90/layout.h",
        "ceil_div(num_rows, cluster * kTileRows) * cluster",
        "ceil_div(num_rows, kTileRows)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES | CLUSTER_MISTAKES, ids=lambda m: m.replace(" ", "-"))
def test_the_model_notices_mistakes(tmp_path, mistake):
    broken = cases.build(tmp_path, (MISTAKES | CLUSTER_MISTAKES)[mistake])
    if mistake in CLUSTER_MISTAKES:
        scan = ("deep", torch.bfloat16, 250, 128 * 9, 192, 4)  # an odd number of tiles
    elif "pass" in mistake:
        scan = ("narrow", torch.bfloat16, 5, 128 * 5, 768, 1)  # more panels than stages
    else:
        scan = ("wide", torch.bfloat16, 250, 128 * 9, 128, 4)
    for seed in range(10):
        try:
            check_scan(broken, *scan, 1, False, seed, 4 if mistake in CLUSTER_MISTAKES and seed % 2 else None)
        except (AssertionError, RuntimeError):
            return
    pytest.fail("every run was right")


@pytest.mark.parametrize("mistake", WORD_MISTAKES, ids=lambda m: m.replace(" ", "-"))
def test_mistakes_in_words_are_noticed(tmp_path, mistake):
    broken = cases.build(tmp_path, WORD_MISTAKES[mistake])
    with pytest.raises(AssertionError):
        test_a_word_bounds_the_maxima_of_its_groups(broken)


def check(model, queries, rows, k, exclude=None, row_mask=None, **how):
    found = model.search(queries, rows, k, exclude, row_mask, **how)
    expected = reference.forward(queries, [rows], k, exclude, row_mask)
    assert_same_topk((found.scores, found.indices), expected)
    return found


@pytest.mark.parametrize("queries", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_queries_over_bfloat16_rows(model, queries):
    check(model, torch.randn(3, 24).to(queries), torch.randn(300, 24).bfloat16(), 5)


def test_float16_over_float16(model):
    check(model, torch.randn(3, 128).half(), torch.randn(300, 128).half(), 8)


@pytest.mark.parametrize("order", ORDERS)
def test_adversarial_orders(model, order):
    queries, rows = cases.ordered_table(order, 327)
    check(model, queries, rows, 7)


@pytest.mark.parametrize("N,k", [(1, 1), (7, 6), (31, 31), (32, 3), (33, 33), (127, 5), (128, 9), (129, 65)])
def test_sizes_around_groups_and_tiles(model, N, k):
    check(model, torch.randn(2, 16), torch.randn(N, 16).bfloat16(), k)


@pytest.mark.parametrize("shape", ["narrow", "wide", "deep"])
def test_every_shape_gives_the_same(model, shape):
    queries, rows = integers(3, 72), integers(390, 72).bfloat16()
    check(model, queries, rows, 9, shape=shape)


def test_batches_around_the_blocks_of_queries(model):
    rows = torch.randn(150, 64).bfloat16()
    for B in (64, 65):
        assert check(model, torch.randn(B, 64), rows, 3).shape == ("narrow" if B == 64 else "wide")


def test_wide_rows(model):
    assert check(model, torch.randn(66, 840), torch.randn(140, 840).bfloat16(), 3).shape == "deep"
    assert check(model, torch.randn(3, 840), torch.randn(140, 840).bfloat16(), 3).shape == "narrow"


def test_nan_and_infinities(model):
    queries, rows = cases.special_rows()
    for k in (6, 200):
        check(model, queries, rows, k, threads=64)


def test_a_tile_of_tombstones_needs_no_repair(model):
    rows = torch.randn(400, 16).bfloat16()
    rows[100:300] = NAN
    assert check(model, torch.randn(3, 16), rows, 5).repairs == 0


def test_minus_infinity_is_a_score_and_comes_before_the_padding(model):
    rows = torch.tensor([[-INF], [1.0], [NAN]]).bfloat16().expand(3, 8).contiguous()
    check(model, torch.ones(1, 8), rows, 3)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e15, 1e19, 3e38], ids=lambda s: f"scale{s:g}")
def test_tiny_and_huge_values(model, scale):
    queries, rows = torch.randn(3, 16), (torch.randn(150, 16).clamp(-1, 1) * scale).bfloat16()
    queries[1] *= scale
    check(model, queries, rows, 5)


def test_gaps_that_the_scan_cannot_see(model):
    table = torch.zeros(96, 24)
    table[:, ::3], table[:, 1::3] = 2.0**12, -(2.0**12)
    table[:, 2::3] = torch.rand(96, 8) * 2.0**-12
    check(model, torch.ones(2, 24) * torch.tensor([2.0**12, 2.0**-12]).view(2, 1), table.bfloat16(), 9)


def test_excluded_and_masked_rows_never_return(model):
    queries, rows = integers(3, 8), integers(300, 8).bfloat16()
    exclude, row_mask = torch.randint(-1, 300, (3, 9)), torch.rand(300) < 0.5
    row_mask[40:170] = False
    check(model, queries, rows, 100, exclude, row_mask)
    rows[41], exclude[0] = NAN, torch.tensor([300, 2**40, -7, -(2**40), 3, 3, 3, -1, -1])
    check(model, queries, rows, 5, exclude, row_mask)


def test_nothing_left_gives_padding_without_a_repair(model):
    rows = torch.randn(300, 8).bfloat16()
    found = check(model, torch.randn(2, 8), rows, 3, None, torch.zeros(300, dtype=torch.bool))
    assert found.repairs == 0
    assert check(model, torch.full((2, 8), NAN), rows, 3).repairs == 0
    check(model, torch.randn(2, 8), rows[:40].contiguous(), 3, torch.arange(40).expand(2, 40).contiguous())


def test_a_repair_is_made_where_the_certificate_fails_and_only_there(model):
    assert check(model, torch.randn(2, 16), torch.randn(600, 16).bfloat16(), 4).repairs == 0
    queries = torch.cat([torch.randn(1, 16), torch.zeros(1, 16), torch.randn(1, 16)])
    rows = torch.randn(1, 16).bfloat16().expand(900, 16).contiguous()
    assert check(model, queries, rows, 4).repairs == 2  # zero scores are exact: ties go to the chosen groups
    assert check(model, torch.randn(3, 16), torch.randn(900, 16).bfloat16(), 70, selected=2).repairs == 3


def test_groups_that_cannot_reach_the_floor_are_not_rescored(model):
    queries, rows = torch.randn(3, 16), torch.randn(12_800, 16)
    queries[:, 0] = 2.0
    for mean in (0.0, 20.0):  # of the scores some ten standard deviations
        rows[:, 0] = mean + torch.randn(12_800)
        found = check(model, queries, rows.bfloat16(), 4, threads=64)
        assert found.repairs == 0 and 3 * 2 <= found.chosen <= 3 * 9, mean
    # Rows below the floor by their own group alone: of a tile with the best row the other groups stay unread.
    rows = torch.full((1280, 8), -1.0)
    rows[::160, 0] = 50.0  # eight groups in eight tiles
    found = check(model, torch.ones(1, 8), rows.bfloat16(), 8)
    assert found.repairs == 0 and found.chosen == 8


@pytest.mark.parametrize("codes", [False, True])
def test_blocks_take_several_shares_where_more_groups_are_chosen_than_tiles_kept(model, codes):
    queries, rows = integers(2, 8), torch.ones(1100, 8).bfloat16()
    rows[0::32, 0] = integers(35).bfloat16()  # all groups of a tile may hold one of the first
    queries[:, 0] = 0
    coded = cases.encode(rows) if codes else None
    assert check(model, queries, rows, 5, codes=coded, kept=6, selected=24).chosen >= 2 * 20


def test_more_keys_than_the_buffer_holds(model):
    """Thirty-two threads keep 288 keys: the buffer is cut again and again."""
    check(model, torch.randn(2, 8), torch.randn(5000, 8).bfloat16(), 100, kept=110)
    queries, rows = cases.ordered_table("ascending", 5000)
    check(model, queries, rows, 100, kept=110)


def test_ids_beyond_two_to_the_thirty_one(model):
    first_row = 2**33
    queries, rows = integers(2, 8), integers(50, 8).bfloat16()
    exclude = torch.tensor([[first_row + 3], [-1]])
    scores, indices = reference.forward(queries, [rows], 9, torch.tensor([[3], [-1]]), None)
    found = model.search(queries, rows, 9, exclude, first_row=first_row)
    assert_same_topk((found.scores, found.indices), (scores, indices + first_row))


def test_rows_with_padding_between_them(model):
    wide = torch.full((300, 40), NAN).bfloat16()
    wide[:, :20] = torch.randn(300, 20)
    check(model, torch.randn(3, 20), wide[:, :20], 6)


@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("B", [3, 70])
def test_int8_codes(model, rows, B):
    queries, table = torch.randn(B, 40), (torch.randn(330, 40) + 3).to(rows)
    found = check(model, queries, table, 5, codes=cases.encode(table, 32 if B == 3 else 64))
    assert found.repairs <= B // 20


def test_int8_codes_of_awkward_rows(model):
    queries, rows = cases.special_rows()
    check(model, queries, rows, 6, codes=cases.encode(rows))
    check(model, queries, rows, 6, None, torch.rand(290) < 0.3, codes=cases.encode(rows, 128))
    constant = torch.ones(300, 16)
    constant[70, 3] = 1e6  # an outlier makes every other code of its group 0
    check(model, torch.randn(2, 16), constant, 9, codes=cases.encode(constant))
    check(model, torch.zeros(2, 16), constant, 9, codes=cases.encode(constant))


@pytest.mark.parametrize("order", ORDERS)
def test_int8_codes_in_adversarial_orders(model, order):
    queries, rows = cases.ordered_table(order, 327)
    check(model, queries, rows, 7, codes=cases.encode(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_their_codes_rule_out_are_not_read(model, dtype):
    query, table = torch.randn(1, 40), torch.randn(330, 40).to(dtype)
    expected = reference.forward(query, [table], 5, None, None)
    codes = cases.encode(table)
    scores = (query @ table.float().T)[0]
    table[scores < scores.median()] = INF  # were one of them read it would come first, or as NaN
    found = model.search(query, table, 5, codes=codes, selected=11)  # every group
    assert_same_topk((found.scores, found.indices), expected)
    assert found.repairs == 0


def test_a_floor_that_too_few_rows_reach_is_noticed(model):
    """Codes of a row with NaN are those of the mean, which promises a row that is never returned."""
    table = torch.full((640, 8), NAN)
    table[::64] = torch.randn(10, 8) * 0.1
    table[::64, 0] = torch.tensor([9.0, 8.0, 7.0] + [-5.0] * 7)
    queries = torch.zeros(2, 8)
    queries[:, 0] = torch.tensor([1.0, -1.0])
    found = check(model, queries, table, 5, codes=cases.encode(table))
    assert found.repairs >= 1
    check(model, queries, table, 5, torch.tensor([[0, 64, -1], [128, 192, 0]]), codes=cases.encode(table))
