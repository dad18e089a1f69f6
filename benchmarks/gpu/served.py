"""Which of our backends a row is about, and where it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import realm_kernels as rk
from realm_kernels.backends import Backend

GPU_BACKENDS = ("cuda", "triton", "torch")
GPU = "cuda"  # where the inputs of every row are


def on_gpu(backend: Backend) -> bool:
    return backend.name.partition(":")[0] in GPU_BACKENDS


def forced_backends(backends: Sequence[Backend]) -> list[str]:
    """Those that serve a GPU beside the one that a call gets by default: each is measured too."""
    found = [backend for backend in backends if on_gpu(backend)]
    default = next((backend for backend in found if backend.default), None)
    return [backend.name for backend in found if backend is not default]


def served_by(backend: str | None, function: Callable[[], object]) -> Callable[[], object]:
    if backend is None:
        return function

    def forced() -> object:
        with rk.use_backend(backend):
            return function()

    return forced
