"""Every CUDA kernel, compiled for GPUs that are not here: registers, stack, spills, tensor cores, instances.

To add a kernel, add a line to KERNELS.
"""

from dataclasses import dataclass

import cuda_compile
import pytest

from benchmarks.kernels import cuda_kernels

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(cuda_compile.find_nvcc() is None, reason="no nvcc"),
]
MOST_REGISTERS = 255  # of a thread, by the architecture


@dataclass(frozen=True)
class Kernel:
    """instances: of each architecture it is compiled for, at most, and why so many. matrix: in the SASS of
    each instance, one of these and no other."""

    instances: int
    why: str
    matrix: tuple[str, ...] = ()


# Each instance costs seconds of every build and bytes of every wheel.
KERNELS = {
    "marginal_loss_fwd_kernel": Kernel(4, "one a float type that torch tensors have"),
    "marginal_loss_bwd_kernel": Kernel(4, "one a float type that torch tensors have"),
    "mips_topk_prepare_kernel": Kernel(1, ""),
    "mips_topk_scan_kernel": Kernel(
        14,
        "wide, deep and narrow shapes of bfloat16, float16 and int8; five without maxima, for the benchmark",
        ("HGMMA", "IGMMA"),
    ),
    "mips_topk_select_kernel": Kernel(2, "of maxima of rows, and of codes"),
    "mips_topk_rescore_kernel": Kernel(2, "of rows, and of those that their codes leave possible"),
    "mips_topk_repair_kernel": Kernel(1, ""),
}


@pytest.fixture(scope="module")
def found():
    return cuda_compile.all_resources()


def test_every_kernel_is_listed_and_compiled_for_its_architectures(found, capsys):
    """Also prints what each needs."""
    with capsys.disabled():
        print("\n" + cuda_compile.table(found))
    assert set(KERNELS) == set(cuda_kernels()) == {one.kernel for one in found}
    everywhere = {
        f"sm_{name}" for source in cuda_compile.sources() for name in cuda_compile.architectures_of(source)
    }
    assert {one.architecture for one in found} == everywhere


def test_nothing_spills_or_lives_in_local_memory(found):
    for one in found:
        assert (one.stack, one.spills) == (0, 0), f"{one.architecture} {one.instance}"
        assert 0 < one.registers <= MOST_REGISTERS


def test_instances_keep_to_their_budget(found):
    for kernel, architecture in {(one.kernel, one.architecture) for one in found}:
        count = sum((one.kernel, one.architecture) == (kernel, architecture) for one in found)
        assert count <= KERNELS[kernel].instances, f"{kernel} for {architecture}: {KERNELS[kernel].why}"


def test_the_tensor_cores_are_used_as_meant(found):
    for one in found:
        meant = KERNELS[one.kernel].matrix
        assert len(one.matrix) == bool(meant) and set(one.matrix) <= set(meant), f"{one}"


def test_what_ptxas_says_is_read():
    entry = "Compiling entry function '{}' for '{}'\n{} bytes stack frame, "
    entry += "{} bytes spill stores, {} bytes spill loads"
    scan, plain = "_ZN2rk12_GLOBAL__N_111scan_kernelIfEEvNS_6ParamsE", "_Z12plain_kernelv"
    text = f"""{entry.format(scan, "sm_90a", 8, 12, 4)}
Used 168 registers, used 1 barriers, 8 bytes cumulative stack size, 5120 bytes smem, 488 bytes cmem[0]
{entry.format(plain, "sm_80", 0, 0, 0)}
Used 10 registers, used 0 barriers, 352 bytes cmem[0]"""
    sass = f"""code for sm_90a
		Function : {scan}
        /*0330*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
		Function : {plain}
        /*1810*/                   HGMMA.64x8x16.F16 RZ, gdesc[URZ], RZ, !UPT, gsb0 ;"""
    first, second = cuda_compile.parse(text, cuda_compile.matrix_instructions(sass))
    assert (first.kernel, first.architecture, first.registers, first.shared) == (
        "scan_kernel",
        "sm_90a",
        168,
        5120,
    )
    assert (first.stack, first.spills, first.matrix) == (8, 16, ("HGMMA",))
    assert (second.registers, second.shared, second.stack, second.spills) == (10, 0, 0, 0)
