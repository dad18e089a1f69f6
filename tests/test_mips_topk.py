"""The laws of mips_topk, for every backend that runs here (Triton's own file: test_mips_topk_triton.py)."""

import functools
import itertools
import threading

import pytest
import torch
from optional_hypothesis import given, settings, st

import realm_kernels as rk
from realm_kernels.backends import valid_names
from realm_kernels.testing import assert_same_topk, oracle_mips_topk

CPU = [name for name in valid_names() if name.startswith("cpu:")]
# Every way to search: each backend over the rows, each instruction set also over their int8 codes.
WAYS = ["reference", *CPU, *(f"{name}-int8" for name in CPU)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


def search_by(way, queries, table, k, **arguments):
    """rk.mips_topk by one of the WAYS."""
    name, _, codes = way.partition("-")
    if codes:
        sharded = rk.ShardedTable.from_tensors([table]) if isinstance(table, torch.Tensor) else table
        table = sharded.quantize(codes)
    with rk.use_backend(name):
        return rk.mips_topk(queries, table, k, **arguments)


@pytest.fixture(params=WAYS)
def search(request):
    return functools.partial(search_by, request.param)


def integers(*shape, low=-2, high=3):
    """Integer-valued floats: every tie is real."""
    return torch.randint(low, high, shape).float()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "B,N,D,k",
    [
        pytest.param(*shape, id="B{}-N{}-D{}-k{}".format(*shape))
        for shape in [
            (1, 1, 1, 1),
            (3, 17, 7, 17),
            (2, 63, 8, 3),
            (7, 64, 9, 64),
            (8, 33, 16, 5),
            (13, 100, 31, 1),
            (30, 70, 33, 6),
        ]
    ],
)
def test_equals_the_loop_oracle(search, dtype, B, N, D, k):
    queries, table = torch.randn(B, D), torch.randn(N, D).to(dtype)
    assert_same_topk(search(queries, table, k), oracle_mips_topk(queries, table, k))


@pytest.mark.parametrize("query_dtype,table_dtype", list(itertools.product(DTYPES, DTYPES)), ids=dtype_id)
def test_any_pair_of_dtypes(search, query_dtype, table_dtype):
    queries, table = torch.randn(4, 20).to(query_dtype), torch.randn(50, 20).to(table_dtype)
    assert_same_topk(search(queries, table, 7), oracle_mips_topk(queries, table, 7))


@pytest.mark.parametrize("B", [1, 2, 6, 9])
def test_ties_go_to_the_smaller_id(search, B):
    queries, table = integers(B, 5), integers(200, 5)
    for k in (1, 10, 199):
        assert_same_topk(search(queries, table, k), oracle_mips_topk(queries, table, k))


ORDERS = {
    "ascending": lambda n: torch.arange(n),
    "descending": lambda n: torch.arange(n).flip(0),
    "organ-pipe": lambda n: torch.minimum(torch.arange(n), torch.arange(n).flip(0)),
    "all-equal": lambda n: torch.ones(n),
    "all-negative": lambda n: -1 - torch.arange(n) % 37,
    "top-k-in-one-group": lambda n: torch.where(
        (torch.arange(n) >= 512) & (torch.arange(n) < 522), 9.0, -1.0
    ),
    "one-per-group": lambda n: torch.where(torch.arange(n) % 128 == 5, 9.0 + torch.arange(n), -1.0),
    "in-the-last-partial-tile": lambda n: torch.where(torch.arange(n) >= n - 3, 5.0, 0.0),
    "every-row-twice": lambda n: torch.arange(n) // 2,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("B", [1, 8])
def test_adversarial_orders(search, order, B):
    N, D, k = 1029, 8, 10
    table = torch.zeros(N, D)
    table[:, 0] = ORDERS[order](N).float()
    table[:, 1] = 1.0
    queries = torch.zeros(B, D)
    queries[:, 0] = torch.arange(1, B + 1)
    expected = (table[:, 0].double() * queries[:, :1].double()).float()  # exact in float32
    best = expected.sort(dim=1, descending=True, stable=True)
    assert_same_topk(search(queries, table, k), (best.values[:, :k], best.indices[:, :k]))


@pytest.mark.parametrize("N", [1, 15, 16, 17, 31, 32, 33, 1023, 1024, 1025])
def test_sizes_around_the_tiles(search, N):
    queries, table = torch.randn(9, 12), torch.randn(N, 12)
    for k in {1, max(1, N - 1), N}:
        expected = search_by("reference", queries, table, k)
        assert_same_topk(search(queries, table, k), expected)


def test_gaps_of_one_ulp_are_seen(search):
    one = torch.tensor(1.0)
    up = torch.nextafter(one, torch.tensor(2.0))
    table = torch.ones(300, 16) / 16
    table[137, 0] += 2.0**-20
    table[255] = table[137]
    table[255, 15] += float(up - one)
    scores, indices = search(torch.ones(1, 16), table, 3)
    assert indices.tolist() == [[255, 137, 0]]
    assert scores[0, 0] > scores[0, 1] > scores[0, 2]


def test_cancellation_that_float32_cannot_see(search):
    """Products near 2^24 that cancel: a float32 scan alone would rank these rows wrongly."""
    table = torch.zeros(64, 24)
    table[:, ::3], table[:, 1::3] = 2.0**12, -(2.0**12)
    table[:, 2::3] = torch.rand(64, 8) * 2.0**-12
    queries = torch.ones(3, 24) * torch.tensor([2.0**12, 1.0, 2.0**-12]).view(3, 1)
    assert_same_topk(search(queries, table, 9), oracle_mips_topk(queries, table, 9))


@pytest.mark.parametrize("B", [1, 3, 9])
def test_nan_and_infinities(search, B):
    queries, table = torch.randn(B, 6), torch.randn(90, 6)
    table[3], table[40, 2], table[41, 1] = NAN, INF, -INF
    table[42] = INF  # inf - inf for most queries
    table[60] = -INF
    for k in (1, 10, 90):
        assert_same_topk(search(queries, table, k), oracle_mips_topk(queries, table, k))


def test_a_nan_query_returns_nothing(search):
    queries = torch.randn(3, 6)
    queries[1, 4] = NAN
    scores, indices = search(queries, torch.randn(40, 6), 5)
    assert indices[1].tolist() == [-1] * 5 and scores[1].tolist() == [-INF] * 5
    assert (indices[0] >= 0).all() and (indices[2] >= 0).all()


def test_minus_infinity_is_a_score_and_comes_before_the_padding(search):
    table = torch.tensor([[-INF], [1.0], [NAN]])
    scores, indices = search(torch.ones(1, 1), table, 3)
    assert indices.tolist() == [[1, 0, -1]] and scores.tolist() == [[1.0, -INF, -INF]]


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e15, 1e19, 3e38], ids=lambda s: f"scale{s:g}")
@pytest.mark.parametrize("B", [4, 30])
def test_tiny_and_huge_values(search, scale, B):
    """Subnormal products, scores beyond float16, sums that overflow float32 on the way to a finite score."""
    queries, table = torch.randn(B, 11), (torch.randn(120, 11).clamp(-1, 1) * scale)
    queries[1] *= scale
    for rows in (table, table.bfloat16()):
        assert_same_topk(search(queries, rows, 9), oracle_mips_topk(queries, rows, 9))


def test_flushing_subnormals_changes_nothing(search):
    queries, table = torch.randn(8, 10), torch.randn(70, 10) * 1e-40
    expected = oracle_mips_topk(queries, table, 5)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        # The reference runs on torch's own arithmetic, which this switch does change.
        if search.args != ("reference",):
            assert_same_topk(search(queries, table, 5), expected)
    finally:
        torch.set_flush_denormal(False)


def test_negative_zero_becomes_zero(search):
    scores, _ = search(torch.tensor([[-1.0]]), torch.zeros(4, 1), 4)
    assert scores.view(torch.int32).tolist() == [[0] * 4]


@pytest.mark.parametrize("B", [1, 10])
def test_excluded_and_masked_rows_never_return(search, B):
    queries, table = integers(B, 4), integers(150, 4)
    exclude = torch.randint(-1, 150, (B, 20))
    row_mask = torch.rand(150) < 0.5
    for k in (1, 12, 150):
        got = search(queries, table, k, exclude=exclude, row_mask=row_mask)
        assert_same_topk(got, oracle_mips_topk(queries, table, k, exclude, row_mask))


def test_nothing_left_gives_padding(search):
    queries, table = torch.randn(2, 4), torch.randn(30, 4)
    scores, indices = search(queries, table, 3, row_mask=torch.zeros(30, dtype=torch.bool))
    assert (indices == -1).all() and (scores == -INF).all()
    every_id = torch.arange(30).expand(2, 30)
    assert (search(queries, table, 3, exclude=every_id).indices == -1).all()


def test_an_empty_exclusion_list_excludes_nothing(search):
    queries, table = torch.randn(2, 4), torch.randn(30, 4)
    none = torch.empty(2, 0, dtype=torch.int64)
    assert_same_topk(search(queries, table, 3, exclude=none), search(queries, table, 3))


def test_no_query_gives_no_result(search):
    scores, indices = search(torch.empty(0, 4), torch.randn(9, 4), 3)
    assert scores.shape == indices.shape == (0, 3)


def test_batch_k_and_threads_do_not_matter(search):
    queries, table = torch.randn(40, 24), torch.randn(3000, 24)
    whole = search(queries, table, 100)
    assert_same_topk(search(queries[17:18], table, 100), (whole.scores[17:18], whole.indices[17:18]))
    assert_same_topk(search(queries, table, 10), (whole.scores[:, :10], whole.indices[:, :10]))
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            assert_same_topk(search(queries, table, 100), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shards", [1, 2, 33])
def test_the_split_into_shards_does_not_matter(search, shards):
    queries, table = integers(5, 6), integers(500, 6)
    whole = search(queries, table, 50)
    sharded = rk.ShardedTable.from_tensors(list(table.tensor_split(shards)))
    assert_same_topk(search(queries, sharded, 50), whole)


def test_layout_does_not_matter(search):
    queries, table = torch.randn(6, 13), torch.randn(80, 13)
    expected = search(queries, table, 9)
    wide = torch.full((80, 40), NAN)
    wide[:, 3:16] = table
    misaligned = torch.full((80 * 13 + 1,), NAN)[1:].view(80, 13).copy_(table)
    for layout in (wide[:, 3:16], table.t().contiguous().t(), misaligned, table.repeat_interleave(2, 0)[::2]):
        assert_same_topk(search(queries, layout, 9), expected)
    assert_same_topk(search(queries.t().contiguous().t(), table, 9), expected)
    expanded = table[:1].expand(80, 13)
    assert search(queries, expanded, 4).indices.tolist() == [[0, 1, 2, 3]] * 6


def test_rows_beyond_two_to_the_thirty_one_elements(search):
    """64-bit offsets: two rows, 2^31 elements apart, of a table that is never touched in between."""
    storage = torch.empty(0, dtype=torch.bfloat16).set_(
        torch.UntypedStorage(2 * (2**31 + 8))  # lazily mapped: a few pages are ever used
    )
    table = storage.as_strided((2, 8), (2**31, 1))
    table.copy_(torch.tensor([[1.0] * 8, [2.0] * 8]))
    scores, indices = search(torch.ones(1, 8), table, 2)
    assert indices.tolist() == [[1, 0]] and scores.tolist() == [[16.0, 8.0]]


def test_two_threads_may_search_at_once():
    queries, table = torch.randn(30, 32), torch.randn(20000, 32)
    expected = rk.mips_topk(queries, table, 20)
    results = [None] * 4

    def search(slot):
        results[slot] = rk.mips_topk(queries, table, 20)

    threads = [threading.Thread(target=search, args=(slot,)) for slot in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert_same_topk(result, expected)


def test_a_wide_k_and_a_wide_row(search):
    queries, table = torch.randn(3, 1031), torch.randn(60, 1031)
    assert_same_topk(search(queries, table, 60), oracle_mips_topk(queries, table, 60))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_small_input_equals_the_oracle(data):
    B, N, D = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 19))
    k = data.draw(st.integers(1, N))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, INF, -INF, NAN, 1e-45, 3e38])
    weights = torch.tensor(
        [3, 1, 9, 9, 9, 9, *data.draw(st.sampled_from([(0, 0, 0, 0, 0), (1, 1, 1, 3, 1)]))]
    )

    def draw(*shape):
        choice = torch.multinomial(weights.float(), max(1, shape[0] * shape[1]), True, generator=generator)
        return special[choice[: shape[0] * shape[1]]].view(shape)

    queries, table = draw(B, D), draw(N, D)
    exclude = torch.randint(-1, N, (B, data.draw(st.integers(0, 4))), generator=generator)
    row_mask = torch.rand(N, generator=generator) < 0.8
    expected = oracle_mips_topk(queries, table, k, exclude, row_mask)
    for way in WAYS:
        found = search_by(way, queries, table, k, exclude=exclude, row_mask=row_mask)
        assert_same_topk(found, expected)
