"""Every error a user of score_spans can see."""

from __future__ import annotations

from torch import Tensor

from ..marginal_loss.checks import DTYPES
from ..validation import check_tensor, describe

OP = "score_spans"


def check(
    start: Tensor,
    end: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    max_width: int,
    eps: float,
) -> None:
    """Raise TypeError or ValueError for arguments the op does not take."""
    if not isinstance(start, Tensor):
        raise TypeError(f"{OP}: start must be a Tensor [..., T, S], got {describe(start)}")
    if start.dim() < 2 or start.shape[-2] < 1 or start.shape[-1] < 1:
        raise ValueError(f"{OP}: start must be [..., T, S] with T >= 1 and S >= 1, got {describe(start)}")
    check_tensor(OP, "start", start, "[..., T, S]", start.shape, DTYPES)
    check_tensor(OP, "end", end, "[..., T, S]", start.shape, (start.dtype,), start.device)
    width = (start.shape[-1],)
    for name, tensor in (("weight", weight), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_tensor(OP, name, tensor, "[S]", width, DTYPES, start.device)
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"{OP}: bias must be a Tensor [] or [1], or None, got {describe(bias)}")
        check_tensor(OP, "bias", bias, "[] or [1]", (1,) if bias.dim() == 1 else (), DTYPES, start.device)
    if isinstance(max_width, bool) or not isinstance(max_width, int):
        raise TypeError(f"{OP}: max_width must be an int, got {describe(max_width)}")
    if not 1 <= max_width <= start.shape[-2]:
        raise ValueError(f"{OP}: max_width must be in [1, T={start.shape[-2]}], got {max_width}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{OP}: eps must be a float, got {describe(eps)}")
    if not eps > 0:
        raise ValueError(f"{OP}: eps must be above 0, got {eps!r}")
