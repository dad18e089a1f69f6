"""What tests of these ops are made of: comparison with a bound, poisoned memory, the laws of a valid top-k."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN (integers: their largest value), so that nothing unwritten survives."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch fills fresh memory only in this mode
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float, what: str = "value") -> None:
    """|actual - expected| <= bound everywhere, equal infinities and NaN in the same places; names the worst position.

    expected and bound are float64; bound broadcasts over expected.
    """
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
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
