"""What mips_topk refuses, and in which words."""

import re

import pytest
import torch

import realm_kernels as rk

Q, T = torch.zeros(2, 8), torch.zeros(30, 8)
IDS = torch.zeros(2, 3, dtype=torch.int64)
MASK = torch.ones(30, dtype=torch.bool)

REFUSED = {
    "k-zero": (ValueError, (Q, T, 0), {}, "k must be in [1, N=30], got 0"),
    "k-above-N": (ValueError, (Q, T, 31), {}, "k must be in [1, N=30], got 31"),
    "k-float": (TypeError, (Q, T, 3.0), {}, "k must be an int, got float 3.0"),
    "k-bool": (TypeError, (Q, T, True), {}, "k must be an int, got bool True"),
    "empty-table": (ValueError, (Q, T[:0], 1), {}, "k must be in [1, N=0], got 1"),
    "queries-list": (TypeError, ([[0.0]], T, 3), {}, "queries must be a Tensor [B, D], got list"),
    "queries-rank": (ValueError, (Q[0], T, 3), {}, "queries must be [B, D], 2 axes, got float32[8] on cpu"),
    "queries-dtype": (
        ValueError,
        (Q.double(), T, 3),
        {},
        "queries must be of dtype float32, bfloat16, float16",
    ),
    "queries-no-width": (ValueError, (Q[:, :0], T[:, :0], 3), {}, "queries must be [B, D] with D >= 1"),
    "table-width": (
        ValueError,
        (Q, T[:, :7], 3),
        {},
        "table must be [N, D] = [any, 8], got float32[30, 7] on cpu",
    ),
    "table-dtype": (
        ValueError,
        (Q, T.int(), 3),
        {},
        "table must be of dtype float32, bfloat16, float16, got int32",
    ),
    "table-device": (ValueError, (Q, T.to("meta"), 3), {}, "table must be on cpu with the other arguments"),
    "table-list": (
        TypeError,
        (Q, [T], 3),
        {},
        "table must be a Tensor [N, D], ShardedTable or DistributedTable, got list",
    ),
    "exclude-dtype": (
        ValueError,
        (Q, T, 3),
        {"exclude": IDS.int()},
        "exclude must be of dtype int64, got int32",
    ),
    "exclude-batch": (ValueError, (Q, T, 3), {"exclude": IDS[:1]}, "exclude must be [B, E] = [2, any]"),
    "exclude-range": (
        ValueError,
        (Q, T, 3),
        {"exclude": IDS + 30},
        "row ids in [0, N=30) or -1, got ids from 30",
    ),
    "exclude-negative": (
        ValueError,
        (Q, T, 3),
        {"exclude": IDS - 2},
        "row ids in [0, N=30) or -1, got ids from -2",
    ),
    "mask-length": (
        ValueError,
        (Q, T, 3),
        {"row_mask": MASK[:29]},
        "row_mask must be [N] = [30], got bool[29]",
    ),
    "mask-dtype": (
        ValueError,
        (Q, T, 3),
        {"row_mask": MASK.float()},
        "row_mask must be of dtype bool, got float32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_op_argument_rule_and_what_came(case):
    error, args, kwargs, words = REFUSED[case]
    with pytest.raises(error, match="^mips_topk: .*" + re.escape(words)):
        rk.mips_topk(*args, **kwargs)


def test_a_sharded_table_receives_no_gradient():
    table = rk.ShardedTable.from_tensors([T.clone()])
    table.shards[0].requires_grad_()
    with pytest.raises(ValueError, match="mips_topk: table must be a plain Tensor to receive a gradient"):
        rk.mips_topk(Q, table, 3)
