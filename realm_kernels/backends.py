"""Which backend serves a call: the caller's choice with `use_backend`, the first that can otherwise."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from . import native

# Every name use_backend() knows, in the order in which a call tries them.
NAMES = ("cpu", "cuda", "triton", "triton:epilogue", "torch", "reference")


class _Forced(threading.local):
    # A class attribute: every call of every op asks, and a missing attribute is slow to miss.
    name: str | None = None


_local = _Forced()
_warned: set[str] = set()


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    refuses(*arguments) says why it cannot serve these arguments of the op's forward, or returns None. One
    with default=False is reached by use_backend() only: a CUDA kernel until it has won on a GPU.
    """

    name: str
    refuses: Callable[..., str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    default: bool = True


@dataclass(frozen=True)
class Explanation:
    """What a call would do. `limit` says which times bound it on any machine; nothing was computed."""

    op: str
    backend: str
    plan: str
    bytes: int
    flops: int
    limit: str

    def __str__(self) -> str:
        return (
            f"{self.op}: backend {self.backend}\n"
            f"  plan   {self.plan}\n"
            f"  bytes  {self.bytes:,}\n"
            f"  flops  {self.flops:,} ({self.flops / max(self.bytes, 1):.1f} per byte)\n"
            f"  limit  {self.limit}"
        )


def forced_backend() -> str | None:
    """The name given to the innermost use_backend() of this thread, or None."""
    return _local.name


def forced_variant() -> str:
    """The instruction set of the forced name, as "avx2" of "cpu:avx2"; empty where none was given."""
    name = _local.name
    return name[len("cpu:") :] if name is not None and name.startswith("cpu:") else ""


def valid_names() -> tuple[str, ...]:
    instruction_sets = native.cpu.instruction_sets() if native.cpu is not None else ()
    return NAMES + tuple(f"cpu:{name}" for name in instruction_sets)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force a backend for the calls of this thread inside the `with` block; None gives the choice back.

    name: "cpu", "cuda", "triton", "torch" (torch's own matrix products, any device), "reference", one
        instruction set of the CPU backend as "cpu:avx2", or "triton:epilogue": linear_marginal_loss through a
        first product of our own, unmeasured.
    Raises ValueError for a name that is unknown or cannot run on this machine.

    >>> import torch, realm_kernels as rk
    >>> with rk.use_backend("reference"):
    ...     top = rk.mips_topk(torch.randn(2, 8), torch.randn(100, 8), 5)
    """
    if name is not None and name not in valid_names():
        raise ValueError(f"use_backend: name must be one of {', '.join(valid_names())} here, got {name!r}")
    previous = forced_backend()
    _local.name = name
    try:
        yield
    finally:
        _local.name = previous


def choose(op: str, backends: Sequence[Backend], *arguments: Any) -> Backend:
    """The backend that serves `op` for these arguments. Raises ValueError where a forced one cannot."""
    forced = forced_backend()
    if forced is not None:
        return _forced(op, forced, backends, arguments)
    for backend in backends:
        if backend.default and backend.refuses(*arguments) is None:
            if backend.name == "reference":
                _warn_once(op, backends, arguments)
            return backend
    raise ValueError(f"{op}: no backend serves this call: {_reasons(backends, arguments)}")


def _forced(op: str, forced: str, backends: Sequence[Backend], arguments: Sequence[Any]) -> Backend:
    name = "cpu" if forced.startswith("cpu:") else forced
    for backend in backends:
        if backend.name == name:
            reason = backend.refuses(*arguments)
            if reason is not None:
                raise ValueError(f"{op}: use_backend({forced!r}) cannot serve this call: {reason}")
            return backend
    names = ", ".join(backend.name for backend in backends)
    raise ValueError(f"{op}: use_backend({forced!r}) names a backend this op lacks; it has {names}")


def _warn_once(op: str, backends: Sequence[Backend], arguments: Sequence[Any]) -> None:
    if op not in _warned:
        _warned.add(op)
        reasons = _reasons(backends, arguments)
        if reasons:
            warnings.warn(f"{op}: the slow reference serves this call: {reasons}", stacklevel=3)


def _reasons(backends: Sequence[Backend], arguments: Sequence[Any]) -> str:
    refusals = ((backend.name, backend.refuses(*arguments)) for backend in backends if backend.default)
    return "; ".join(f"{name}: {reason}" for name, reason in refusals if reason)


_explainers: dict[Callable[..., Any], Callable[..., Explanation]] = {}


def explained_by(explainer: Callable[..., Explanation]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a public op with the function that answers explain() for it, given the op's arguments."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _explainers[function] = explainer
        return function

    return register


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """What `function(*args, **kwargs)` would do: backend, plan, bytes, flops, limit. Computes nothing.

    The arguments are checked as in the call itself. Raises ValueError for a function that is no op of ours.

    >>> import torch, realm_kernels as rk
    >>> print(rk.explain(rk.mips_topk, torch.randn(2, 8), torch.randn(100, 8), 5))      # doctest: +SKIP
    """
    if function not in _explainers:
        known = ", ".join(sorted(known.__name__ for known in _explainers))
        raise ValueError(f"explain: function must be one of {known}, got {function!r}")
    return _explainers[function](*args, **kwargs)
