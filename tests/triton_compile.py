"""Compiles Triton kernels for GPUs that are not here: `python tests/triton_compile.py ARCH < cases.json`.

A process of its own, as test processes run with TRITON_INTERPRET=1, under which nothing is compiled. Reads a
list of [kernel, arguments, warps, registers], writes a JSON line for each: registers, spills, shared memory,
matrix instructions.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
# The type of both operands: the last of the PTX name, or the kind on sm_100.
OPERANDS = re.compile(r"(?:wgmma\.mma_async|mma\.sync)\.\S+?\.(\w+)\.\1\b|tcgen05\.mma\S*?\.(kind::\w+)")
WARP = 32
# Apart from what float64 exp and log begin with: a look at the high word, and a first guess of a quotient.
FLUSHES = re.compile(r"(?<!abs)(?<!rcp\.approx)\.ftz")


def compiled(kernel, arguments, architecture, warps, registers):
    """arguments: by name a type ("*bf16", "i32", "i32:16" for a multiple of 16), or ["constant", value]."""
    module, _, name = kernel.partition(":")
    function = getattr(importlib.import_module(module), name)
    missing = set(function.arg_names) ^ set(arguments)
    if missing:
        raise SystemExit(f"{kernel}: these arguments are missing or unknown: {sorted(missing)}")
    signature, constants, attributes = {}, {}, {}
    for place, argument in enumerate(function.arg_names):
        kind = arguments[argument]
        if isinstance(kind, list):
            signature[argument], constants[(place,)] = "constexpr", kind[1]
            continue
        signature[argument], _, multiple = kind.partition(":")
        if kind.startswith("*") or multiple:
            attributes[(place,)] = [["tt.divisibility", int(multiple or 16)]]
    source = ASTSource(function, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "maxnreg": registers}
    return triton.compile(source, target=GPUTarget("cuda", architecture, WARP), options=options)


def resources(binary):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL"))
    ptx = binary.asm["ptx"]
    return {
        "registers": registers,
        "spills": stack + local,
        "shared": binary.metadata.shared,
        "matrix": [name for name in MATRIX_INSTRUCTIONS if name in ptx],
        "operands": sorted({a or b for a, b in OPERANDS.findall(ptx)}),
        "flushes": bool(FLUSHES.search(ptx)),
        "pipelined": "cp.async" in ptx,
    }


if __name__ == "__main__":
    for kernel, arguments, warps, registers in json.load(sys.stdin):
        binary = compiled(kernel, arguments, int(sys.argv[1]), warps, registers)
        print(json.dumps(resources(binary)), flush=True)
