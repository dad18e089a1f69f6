"""What the tests of the Triton backend of mips_topk share: small plans, comparison with the reference.

The interpreter is slow, so tables have a hundred rows or two and plans are shrunk: small groups, sorts of
32 keys, little slack. Every round of the tournaments, the filter, several query blocks and the repair are met
all the same.
"""

import dataclasses

import pytest
import torch

from realm_kernels.mips_topk import reference, triton_plan
from realm_kernels.testing import assert_same_topk

pytest.importorskip("triton")

from realm_kernels.mips_topk import triton_search  # noqa: E402

# The interpreter computes in numpy, which remarks on every infinity and on loop bounds that are arrays.
QUIET = [
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS_ON = [DEVICE]  # where search() puts the rows; a test may say "cpu"
INF, NAN = float("inf"), float("nan")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@pytest.fixture(autouse=True)
def small_sorts(monkeypatch):
    monkeypatch.setattr(triton_plan, "SORT_KEYS", 32)
    monkeypatch.setattr(triton_plan, "FILTER_KEYS", 64)
    monkeypatch.setattr(triton_plan, "REPAIR_LOOK", 8)


def planner(group=8, slack=2, **changes):
    """A maker of plans with small groups and k + E + slack of them selected."""

    def plan_for(batch, num_rows, dim, k, num_excluded, *rest, **more):
        plan = triton_plan.plan_for(batch, num_rows, dim, k, num_excluded, *rest, **more)
        size = more.get("code_group") or group
        num_groups = -(-num_rows // size)
        wanted = min(k, triton_plan.MAX_K) + num_excluded + slack
        selected = triton_plan.power_of_two(min(wanted, num_groups, triton_plan.MAX_SELECTED), 2)
        small = dict(group=size, num_groups=num_groups, block_n=32, selected=selected, repair_parts=2)
        return triton_plan.fit_batch(dataclasses.replace(plan, **(small | changes)), dim, 1 << 20)

    return plan_for


def search(queries, table, k, exclude=None, row_mask=None, plan_for=None, codes=()):
    shards = [shard.to(ROWS_ON[-1]) for shard in (table if isinstance(table, list) else [table])]
    rest = [None if x is None else x.to(DEVICE) for x in (exclude, row_mask)]
    plan_for = plan_for or planner()
    return triton_search.search(queries.to(DEVICE), shards, k, *rest, codes=codes, planner=plan_for)


def check(queries, table, k, exclude=None, row_mask=None, plan_for=None, codes=()):
    shards = table if isinstance(table, list) else [table]
    expected = reference.forward(queries, shards, k, exclude, row_mask)
    assert_same_topk(search(queries, table, k, exclude, row_mask, plan_for, codes), expected)


def integers(*shape, low=-2, high=3):
    return torch.randint(low, high, shape).float()


ORDERS = {
    "ascending": lambda n: torch.arange(n),
    "descending": lambda n: torch.arange(n).flip(0),
    "organ-pipe": lambda n: torch.minimum(torch.arange(n), torch.arange(n).flip(0)),
    "all-equal": lambda n: torch.ones(n),
    "all-negative": lambda n: -1 - torch.arange(n) % 37,
    "top-k-in-one-group": lambda n: torch.where((torch.arange(n) >= 64) & (torch.arange(n) < 72), 9.0, -1.0),
    "one-per-group": lambda n: torch.where(torch.arange(n) % 8 == 5, 9.0 + torch.arange(n), -1.0),
    "last-partial-tile": lambda n: torch.where(torch.arange(n) >= n - 3, 5.0, 0.0),
    "every-row-twice": lambda n: torch.arange(n) // 2,
}
