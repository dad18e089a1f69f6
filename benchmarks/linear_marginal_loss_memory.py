"""python -m benchmarks.linear_marginal_loss_memory: peak memory of a step, beyond inputs and gradients.

Each implementation runs in a process of its own, and the system counts: the high-water mark of resident
memory during a second step, over what was resident before it, less its gradients. Linux, glibc.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

from .linear_marginal_loss_cases import DTYPES, IMPLEMENTATIONS, SHAPES, inputs


def _resident(what: str) -> int:
    """Bytes of this process: VmRSS, now resident, or VmHWM, the most of it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {what}")


def measure(dtype: str, shape: str, batch: int, implementation: str) -> tuple[int, int]:
    """Bytes beyond inputs and gradients, and of those the float32 sum of d_weight that ours keeps."""
    tensors = inputs(batch, 20, *SHAPES[shape], DTYPES[dtype])
    for _ in range(2):  # the first step loads code and compiles it
        for tensor in tensors[:4]:
            tensor.grad = None
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept of the first step is not this one's
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        IMPLEMENTATIONS[implementation](*tensors).backward()
    gradients = sum(tensor.grad.nbytes for tensor in tensors[:4])
    return _resident("VmHWM") - before - gradients, tensors[2].numel() * 4


def main() -> None:
    if len(sys.argv) > 1:
        dtype, shape, batch, implementation = sys.argv[1:]
        print(*measure(dtype, shape, int(batch), implementation))
        return
    names = [name for name in IMPLEMENTATIONS if name != "realm_kernels"]
    print("MB beyond inputs and gradients; ours also without its float32 sum of d_weight\n")
    print("| shape | ours | ours, without the sum |", " | ".join(names), "|")
    print("| --- " * (3 + len(names)) + "|")
    for shape, (width, vocabulary) in SHAPES.items():
        for dtype in DTYPES:
            for batch in (4, 16):
                extra = {}
                for name in IMPLEMENTATIONS:
                    command = [sys.executable, "-m", "benchmarks.linear_marginal_loss_memory"]
                    told = subprocess.run(
                        [*command, dtype, shape, str(batch), name], capture_output=True, text=True, check=True
                    )
                    extra[name], total = (int(word) / 1e6 for word in told.stdout.split())
                ours = extra.pop("realm_kernels")
                cells = [f"{ours:.0f}", f"{ours - total:.0f}", *(f"{extra[name]:.0f}" for name in names)]
                print(f"| {dtype}, B = {batch}, H = {width}, V = {vocabulary} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
