"""`make gpu-build`: the extension, in place, for the GPU that is here and no other."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from .processes import Outcome, run_logged

SECONDS = 110


def architecture(capability: tuple[int, int]) -> str:
    """CMake's name of the machine code of this GPU alone: with the features only it has, where it has any."""
    major, minor = capability
    return f"{major}{minor}{'a' if major >= 9 else ''}-real"


def build(device: dict[str, Any], out: Path, seconds: float = SECONDS) -> Outcome:
    environment = os.environ | {
        "REALM_KERNELS_CUDA": "1",
        "REALM_KERNELS_CUDA_ARCHITECTURES": architecture(tuple(device["capability"])),
        # cmake and ninja lie beside an interpreter that has them as packages.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    return run_logged(command, out / "build.log", seconds, environment)
