"""python -m benchmarks.resources: what every GPU kernel needs, by the compilers alone; no GPU is asked.

Registers, shared memory, spills and instructions of the tensor cores: of the Triton kernels with constants
that their launches choose (the cases of tests/triton_compile_cases.py), of the CUDA kernels where nvcc is.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The cases stand beside the laws that hold for them.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def main() -> None:
    import cuda_compile
    import test_triton_compile

    print(test_triton_compile.table(test_triton_compile.compile_everything()))
    if cuda_compile.find_nvcc() is None:
        print("\nno nvcc, so nothing of csrc/cuda: put it on PATH or set CUDA_HOME or CUDACXX")
    else:
        print("\n" + cuda_compile.table(cuda_compile.all_resources()))


if __name__ == "__main__":
    main()
