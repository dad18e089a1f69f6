"""How a public op refuses an argument: one sentence with the op, the argument, the rule and what came."""

from __future__ import annotations

from collections.abc import Sequence, Sized

import torch
from torch import Tensor
from torch.autograd import forward_ad

LONGEST_REPR = 60  # characters of a value that an error shows
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")


def describe(value: object) -> str:
    """What a user passed, short enough for an error message."""
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f" ({dtype_name(value.layout)})"
        return f"{dtype_name(value.dtype)}{list(value.shape)} on {value.device}{layout}"
    kind = type(value).__name__
    if hasattr(value, "shape") and hasattr(value, "dtype"):  # an array of another library
        return f"{kind} {value.dtype}{list(value.shape)}"
    shown = repr(value)
    if len(shown) <= LONGEST_REPR:
        return f"{kind} {shown}"
    length = f" of {len(value)}" if isinstance(value, Sized) else ""
    return f"{kind}{length}, {' '.join(shown[:LONGEST_REPR].split())}..."


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

    `legend` names the axes, as "[B, D]". A non-tensor is a TypeError, everything else a ValueError, but for
    a tensor with a forward-mode tangent: a NotImplementedError.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor {legend}, got {describe(value)}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else describe(value)
        raise ValueError(f"{op}: {name} must be a dense Tensor {legend}, got {kind}")
    # Torch hands an op without a formula for tangents the plain values, and the tangent it returns is zero.
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"{op}: {name} must carry no forward-mode tangent (torch.func.jvp, forward_ad): "
            "only backward derivatives are offered"
        )
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


def device_named(op: str, device: object) -> torch.device:
    """The device that a user named. Raises ValueError where torch knows none such, or finds no GPU."""
    try:
        named = torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        raise ValueError(f"{op}: device must be one that torch knows, got {describe(device)}") from None
    if named.type == "cuda" and (named.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{op}: device must be there, got {named} where torch finds {torch.cuda.device_count()} GPUs"
        )
    return named
