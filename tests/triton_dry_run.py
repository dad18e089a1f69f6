"""Launches Triton kernels as a GPU's own JIT would, for a GPU that is not here: they compile, nothing runs.

`python tests/triton_dry_run.py ARCH`, a process of its own, as under TRITON_INTERPRET=1 nothing is compiled.
What a launch gets from its host code is specialised by Triton itself: an integer that is 1 becomes a
constant, one beyond 2^31 has 64 bits, options are the compiler's. Prints a JSON line for each launch.
"""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import realm_kernels as rk
from benchmarks.gpu import served, small
from realm_kernels.linear_marginal_loss import triton as linear_marginal_loss
from realm_kernels.linear_marginal_loss.products import TensorCoreProducts
from realm_kernels.marginal_loss import triton as marginal_loss
from realm_kernels.mips_topk import triton as mips_topk
from realm_kernels.mips_topk import triton_coded, triton_launch
from realm_kernels.score_spans import triton as score_spans
from realm_kernels.span_marginal_loss import triton as span_marginal_loss
from realm_kernels.table import device_codes, quantized

MULTIPROCESSORS, MAX_GRID = 132, (2**31 - 1, 65535, 65535)
SHARED_BYTES = 227 << 10
SERVING = (mips_topk, marginal_loss, linear_marginal_loss, span_marginal_loss, score_spans)


class Utilities:
    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": MULTIPROCESSORS}

    def load_binary(self, name, kernel, shared, device):
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads that are allowed


class Launcher:
    """Takes what the driver would be given, and refuses what it would refuse."""

    def __init__(self, source, metadata):
        self.source, self.metadata = source, metadata

    def __call__(self, x, y, z, stream, function, packed, launch, enter, leave, *arguments):
        names = self.source.fn.arg_names
        grid = (x, y, z)
        # A grid of no program is not launched.
        assert all(0 <= size <= most for size, most in zip(grid, MAX_GRID, strict=True)), grid
        kinds = self.source.signature.values()
        for name, kind, argument in zip(names, kinds, arguments, strict=True):
            if kind.startswith("*"):
                assert isinstance(argument, torch.Tensor), (name, kind, argument)
            elif kind.startswith("i"):
                bits = int(kind[1:])
                assert -(2 ** (bits - 1)) <= argument < 2 ** (bits - 1), (name, kind, argument)
        shared, warps = self.metadata.shared, self.metadata.num_warps
        kernel = f"{self.source.fn.__module__}:{self.source.fn.__name__}"
        print(json.dumps({"kernel": kernel, "grid": grid, "shared": shared, "warps": warps}), flush=True)


class Driver:
    """Of a GPU of this architecture, as far as a launch asks it."""

    def __init__(self, architecture):
        self.utils, self.launcher_cls = Utilities(), Launcher
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return self.target


def serve_the_cpu():
    """Tensors of the CPU stand for those of the GPU."""
    for module in SERVING:
        object.__setattr__(module.BACKEND, "refuses", lambda *arguments: None)
    rk.ShardedTable.pin_memory = lambda self: self
    quantized._empty_panels = lambda shards: device_codes.empty(shards, torch.device("cpu"))
    for module in (triton_launch, triton_coded):
        module.scan_programs = lambda device, per_processor: MULTIPROCESSORS * per_processor
    served.GPU = small.GPU = "cpu"


def multiply():
    """The first product of linear_marginal_loss: on the CPU no library product returns float32."""
    for rows, words, width, dtype in ((32, 300, 128, torch.bfloat16), (5, 70, 37, torch.float16)):
        products = TensorCoreProducts(torch.randn(words, width).to(dtype), torch.float32)
        hidden, logits = torch.randn(rows, width).to(dtype), torch.empty(words, rows)
        targets = torch.zeros(rows, dtype=torch.int64)
        linear_marginal_loss.EpiloguePasses().score_(products, hidden, logits, None, targets)


def main(architecture):
    assert not triton.knobs.runtime.interpret
    driver.set_active(Driver(architecture))
    serve_the_cpu()
    for op, (_, calls) in small.CALLS.items():
        for number, call in enumerate(calls):
            torch.manual_seed(number)
            print(json.dumps({"call": f"{op} {number}"}), flush=True)
            with rk.use_backend("triton"):
                call()
    multiply()


if __name__ == "__main__":
    main(int(sys.argv[1]))
