"""What tests of these ops are made of: comparison with a bound, poisoned memory, the oracle of top-k."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN (integers: the largest value), so nothing unwritten survives."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch fills fresh memory only in this mode
    # Its attributes are properties that no stub tells of.
    deterministic_memory: Any = torch.utils.deterministic
    fill = deterministic_memory.fill_uninitialized_memory
    deterministic_memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        deterministic_memory.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float, what: str = "value") -> None:
    """|actual - expected| <= bound, infinities and NaN in the same places; names the worst position.

    expected and bound are float64; bound broadcasts over expected.
    """
    assert actual.shape == expected.shape, (
        f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    )
    if actual.numel() == 0:
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    bound = torch.as_tensor(bound, dtype=torch.float64, device=expected.device).expand_as(expected)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    excess = torch.where(same, -torch.inf, (actual - expected).abs() - bound)
    excess = torch.where(excess.isnan(), torch.inf, excess)  # NaN or infinity on one side only
    worst = int(excess.argmax())
    position = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), expected.shape))
    assert excess.flatten()[worst] <= 0, (
        f"{what}: worst at {position}: got {actual[position]:.9g}, expected {expected[position]:.9g}, "
        f"bound {bound[position]:.3g}"
    )


def oracle_mips_topk(
    queries: Tensor,
    table: Tensor,
    k: int,
    exclude: Tensor | None = None,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """mips_topk by Python loops and a sort, written apart from the reference it judges. For small inputs."""
    scores, indices = [], []
    for b, query in enumerate(queries.double().tolist()):
        candidates = []
        for row_id, row in enumerate(table.double().tolist()):
            score = _canonical_score(query, row)
            excluded = exclude is not None and row_id in exclude[b].tolist()
            masked = row_mask is not None and not bool(row_mask[row_id])
            if not (math.isnan(score) or excluded or masked):
                candidates.append((-score, row_id))
        best = sorted(candidates)[:k]
        best += [(math.inf, -1)] * (k - len(best))
        scores.append([-negated + 0.0 for negated, _ in best])
        indices.append([row_id for _, row_id in best])
    return torch.tensor(scores).view(len(queries), k), torch.tensor(indices, dtype=torch.int64).view(-1, k)


def _canonical_score(query: list[float], row: list[float]) -> float:
    p = [0.0] * 8
    for d, (q, x) in enumerate(zip(query, row, strict=True)):
        p[d % 8] += q * x
    total = ((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7]))
    return float(torch.tensor(total, dtype=torch.float64).float()) + 0.0


def assert_same_topk(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Same ids and same bits of the scores; names the first query and place where they differ."""
    scores, indices = (x.cpu() for x in actual)
    want_scores, want_indices = (x.cpu() for x in expected)
    assert indices.shape == want_indices.shape, (
        f"shape {list(indices.shape)}, expected {list(want_indices.shape)}"
    )
    different = (indices != want_indices) | (scores.view(torch.int32) != want_scores.view(torch.int32))
    if bool(different.any()):
        b, j = (int(x) for x in different.nonzero()[0])
        raise AssertionError(
            f"{int(different.sum())} of {different.numel()} differ, first at query {b}, place {j}: got id "
            f"{int(indices[b, j])} score {float(scores[b, j])!r}, expected id {int(want_indices[b, j])} "
            f"score {float(want_scores[b, j])!r}"
        )
