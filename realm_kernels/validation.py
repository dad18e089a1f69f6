"""How a public op refuses an argument: one sentence with the op, the argument, the rule and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(value: object) -> str:
    """What a user passed, short enough for an error message."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)}{list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def check_tensor(
    op: str,
    name: str,
    value: object,
    legend: str,
    sizes: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
) -> None:
    """Raise unless `value` is a tensor of shape `sizes` (None: any), of `dtypes`, on `device` (None: any).

    `legend` names the axes, as "[B, D]". A non-tensor is a TypeError, everything else a ValueError.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor {legend}, got {describe(value)}")
    shape = value.shape
    if len(shape) != len(sizes):
        raise ValueError(f"{op}: {name} must be {legend}, {len(sizes)} axes, got {describe(value)}")
    # Every op passes here with every tensor: most have the very shape, and a generator is slower than a loop.
    for have, want in () if shape == sizes else zip(shape, sizes, strict=True):
        if want is not None and have != want:
            rule = ", ".join("any" if want is None else str(want) for want in sizes)
            raise ValueError(f"{op}: {name} must be {legend} = [{rule}], got {describe(value)}")
    if value.dtype not in dtypes:
        allowed = ", ".join(dtype_name(d) for d in dtypes)
        raise ValueError(f"{op}: {name} must be of dtype {allowed}, got {describe(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name} must be on {device} with the other arguments, got {describe(value)}")


def check_choice(op: str, name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
