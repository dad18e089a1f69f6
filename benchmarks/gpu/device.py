"""The GPU that torch sees, told as one JSON line: `python -m benchmarks.gpu.device`. Asked for by a child."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


class NoDevice(Exception):
    """Says why there is no CUDA device, in one line."""


def device() -> dict[str, Any]:
    """name, capability, bytes, versions. Raises NoDevice."""
    done = subprocess.run([sys.executable, "-m", __name__], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    told = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    if not told:
        said = done.stderr.strip().splitlines()
        raise NoDevice(f"no CUDA device: {said[-1] if said else 'torch does not tell why'}")
    if "why_not" in told:
        raise NoDevice(f"no CUDA device: {told['why_not']}")
    return told


def _look() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return {"why_not": f"torch {torch.__version__} ({built}) sees none"}
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
    }


if __name__ == "__main__":
    print(json.dumps(_look()))
