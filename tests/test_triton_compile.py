"""Every Triton kernel of the project, compiled for GPUs that are not here: registers, shared memory, spills.

To add a kernel, add its cases to CASES in triton_compile_cases.py.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from triton_compile_cases import ARCHITECTURES, CASES, OPERANDS

from benchmarks.kernels import launched_functions, triton_kernels

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux"),
]
ROOT = Path(__file__).parent.parent
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # of one program, at most


def cases_for(architecture):
    return [case for case in CASES if architecture in case.architectures]


@pytest.fixture(scope="module")
def results():
    return compile_everything()


def compile_everything():
    """What the compiler says, by (case name, architecture)."""
    with ThreadPoolExecutor() as pool:
        by_architecture = list(pool.map(compile_all, ARCHITECTURES))
    return {
        (case.name, architecture): found
        for architecture, every in zip(ARCHITECTURES, by_architecture, strict=True)
        for case, found in zip(cases_for(architecture), every, strict=True)
    }


def compile_all(architecture):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    cases = cases_for(architecture)
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("triton_compile.py"), str(architecture)],
        input=json.dumps([(case.kernel, case.arguments, case.warps, case.registers) for case in cases]),
        capture_output=True,
        text=True,
        env=environment,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode != 0:
        raise AssertionError(f"sm_{architecture}, {cases[len(found)].name}: {done.stderr[-3000:]}")
    return found


def table(results):
    """A line a case and architecture."""
    lines = [f"{'kernel':<42}{'sm':>5}{'registers':>11}{'spills':>8}{'shared':>9}  matrix"]
    for (name, architecture), found in sorted(results.items()):
        numbers = f"{found['registers']:>11}{found['spills']:>8}{found['shared']:>9}"
        matrix = ", ".join(found["matrix"] + found["operands"])
        lines.append(f"{name:<42}{architecture:>5}{numbers}  {matrix}".rstrip())
    return "\n".join(lines)


def test_every_kernel_of_the_package_is_compiled():
    """Found in the sources: none is forgotten here, and what is launched is called a kernel."""
    assert {case.kernel for case in CASES} == set(triton_kernels())
    assert launched_functions() - {name.rpartition(":")[2] for name in triton_kernels()} == set()


def test_every_kernel_compiles_for_every_architecture(results, capsys):
    """Also prints what each needs."""
    with capsys.disabled():
        print("\n" + table(results))
    kernels = {case.kernel for case in CASES}
    compiled = {(case.kernel, architecture) for case in CASES for architecture in case.architectures}
    assert compiled == {(kernel, architecture) for kernel in kernels for architecture in ARCHITECTURES}


def test_every_call_of_the_small_shapes_is_launched_as_a_gpu_would():
    """Specialised by Triton's own JIT from what the host code hands it, not as the cases say by hand."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folders = [str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("triton_dry_run.py"), "90"],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, folders))},
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"after {told[-3:]}: {done.stderr[-3000:]}"
    launched = {line["kernel"] for line in told if "kernel" in line}
    # Here rows in pinned memory are where the ids are, and gathered by torch.
    missing = {name.rpartition(":")[2] for name in set(triton_kernels()) - launched}
    assert missing <= {"gather_kernel"}


@pytest.mark.parametrize(
    "case,architecture",
    [
        pytest.param(case, architecture, id=f"{case.name.replace(' ', '-')}-sm{architecture}")
        for case in CASES
        for architecture in case.architectures
    ],
)
def test_nothing_spills_and_the_matrix_instruction_is_the_one_meant(results, case, architecture):
    found = results[case.name, architecture]
    assert found["spills"] == 0
    assert found["shared"] <= SHARED_BYTES[architecture]
    assert not found["flushes"], "subnormal numbers would be flushed"
    if case.matrix:
        assert any(case.matrix[architecture] in instruction for instruction in found["matrix"])
        for word in set(case.name.split()) & set(OPERANDS):
            assert set(found["operands"]) & set(OPERANDS[word]), found["operands"]
        assert found["pipelined"]
