"""The one importer of the compiled modules, and what is known about them."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

# torch comes first: its OpenMP runtime (soname libgomp.so.1) must be loaded when the CPU module asks for it.
import torch


def _load(name: str) -> tuple[ModuleType | None, str]:
    """The compiled module, or None and the reason why it is missing."""
    try:
        return importlib.import_module(f"realm_kernels.{name}"), ""
    except ModuleNotFoundError:
        return None, f"realm_kernels.{name} was not built ({_mend()})"
    except ImportError as error:
        return None, f"realm_kernels.{name} does not load: {error}"


def _mend() -> str:
    here = Path(__file__).resolve().parent
    if (here.parent / "CMakeLists.txt").exists():
        return f"this is the source tree, {here}: run `make build` there, or start Python elsewhere"
    return "reinstall with a compiler at hand to build it"


cpu, cpu_missing = _load("_cpu")
cuda, cuda_missing = _load("_cuda")


def triton_missing() -> str:
    """Why Triton kernels cannot be built here; empty where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return ""


def cuda_unusable() -> str:
    """Why the CUDA module cannot run here; empty where it can."""
    if cuda is None:
        return cuda_missing
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    driver, runtime = cuda.driver_version(), cuda.runtime_version()
    # Minor versions of one CUDA major release run on each other's drivers.
    if driver // 1000 < runtime // 1000:
        return f"the driver serves CUDA {driver // 1000}.x, the module was built with {runtime // 1000}.x"
    return ""


@dataclass(frozen=True)
class BuildInfo:
    """What was compiled, what of it runs on this machine, and why the rest does not."""

    version: str
    torch: str
    cpu: str
    cpu_instruction_sets: tuple[str, ...]
    threads: str
    triton: str
    cuda: str
    cuda_architectures: tuple[str, ...]

    def __str__(self) -> str:
        def show(value: object) -> str:
            return (", ".join(value) or "none") if isinstance(value, tuple) else str(value)

        return "\n".join(f"{field.name:<22}{show(getattr(self, field.name))}" for field in fields(self))


def build_info() -> BuildInfo:
    """What of the library was compiled and what runs here; print it and put it into a bug report.

    >>> import realm_kernels as rk
    >>> print(rk.build_info())          # doctest: +SKIP
    """
    from . import __version__

    if importlib.util.find_spec("triton") is not None:
        triton = importlib.import_module("triton").__version__
    else:
        triton = triton_missing()
    return BuildInfo(
        version=__version__,
        torch=torch.__version__,
        cpu=f"compiled by {cpu.compiler()}" if cpu is not None else cpu_missing,
        cpu_instruction_sets=tuple(cpu.instruction_sets()) if cpu is not None else (),
        threads=cpu.threading() if cpu is not None else "none",
        triton=triton,
        cuda=cuda_unusable() or f"CUDA {cuda.runtime_version() // 1000} runtime, linked statically",  # type: ignore[union-attr]
        cuda_architectures=tuple(cuda.architectures().split()) if cuda is not None else (),
    )
