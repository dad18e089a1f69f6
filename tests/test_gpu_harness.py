"""What `make gpu` decides without looking at a GPU: the gate, the time, crashes, the tables."""

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import kernels
from benchmarks.gpu import bench, build, rows, sanitize, small, summary, tests
from benchmarks.gpu.__main__ import PARTS, ends_of
from benchmarks.gpu.processes import run_logged
from benchmarks.gpu.runner import run_rows

ROOT = Path(__file__).parent.parent
OPS = list(rows.MODULES)

# Speaks as benchmarks.gpu.rows does; what a row does stands in its name.
CHILD = """
import json, os, sys, time
print("a library says hello")
print(json.dumps({"limits": {"copy": 1.0}}), flush=True)
for name in sys.stdin.read().splitlines():
    print(json.dumps({"begins": name}), flush=True)
    if name.startswith("crash"):
        print("illegal memory access", flush=True)
        os._exit(139)
    if name.startswith("hang"):
        time.sleep(60)
    if name.startswith("slow"):
        time.sleep(0.5)
    if name.startswith("fail"):
        print(json.dumps({"name": name, "failed": "ValueError: no"}), flush=True)
    else:
        print(json.dumps({"name": name, "entry": {"group": name}}), flush=True)
"""


def run(names, seconds=30.0, row_seconds=10.0, child=CHILD):
    return run_rows([sys.executable, "-c", child], names, time.monotonic() + seconds, row_seconds)


def test_a_row_that_ends_its_process_takes_no_other_with_it():
    found = run(["a", "crash", "b", "fail", "c"])
    assert [entry["group"] for entry in found.entries] == ["a", "b", "c"]
    assert found.limits == {"copy": 1.0}
    assert found.left_out == {
        "crash": "ended its process with status 139: illegal memory access",
        "fail": "ValueError: no",
    }


def test_a_row_that_hangs_is_stopped_and_told():
    found = run(["a", "hang", "b"], row_seconds=0.7)
    assert [entry["group"] for entry in found.entries] == ["a", "b"]
    assert found.left_out == {"hang": "hung for 1 s"}


def test_what_the_time_is_too_short_for_is_told():
    names = [f"slow {i}" for i in range(40)]
    began = time.monotonic()
    found = run(names, seconds=3.0)
    assert time.monotonic() - began < 8
    assert 1 <= len(found.entries) < 40
    assert set(found.left_out.values()) == {"no time was left"}
    assert len(found.entries) + len(found.left_out) == 40


def test_a_child_that_cannot_begin_ends_the_matter():
    found = run(["a", "b"], child="import sys; sys.exit('no module named torch')")
    assert found.entries == [] and set(found.left_out) == {"a", "b"}
    assert "no module named torch" in found.left_out["a"]
    assert run(["a"], child="pass").left_out == {"a": "the process ended before it"}


def test_there_is_no_speed_where_tests_are_red_or_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure_op", lambda *arguments: pytest.fail("it was measured"))
    verdicts = {
        "mips_topk": tests.Verdict(passed=9, failed=1),
        "marginal_loss": tests.Verdict(passed=9, died=1),
        "span_marginal_loss": tests.Verdict(skipped=3),
    }
    tests.remember(verdicts, tmp_path)
    results = bench.bench(OPS, {}, tmp_path, quick=True)
    assert results["benchmarks"] == []
    reasons = {why.split(":")[0] for why in results["left_out"].values()}
    assert reasons == {"its GPU tests are RED", "its GPU tests have not run on these sources"}
    assert len(results["left_out"]) == sum(len(rows.rows_of(op, True)) for op in OPS)


def test_a_backend_that_is_asked_for_has_a_gate_of_its_own(tmp_path, monkeypatch):
    """Red tests of the CUDA backend take no speed from the default one, nor the other way round."""
    measured = []
    monkeypatch.setattr(
        bench, "measure_op", lambda op, named, *rest: measured.extend(named) or bench.Results()
    )
    red, green = tests.Verdict(passed=9, failed=1), tests.Verdict(passed=9)
    for triton, cuda in ((green, red), (red, green)):
        measured.clear()
        tests.remember({"marginal_loss": triton, "marginal_loss cuda": cuda}, tmp_path)
        left_out = bench.bench(["marginal_loss"], {}, tmp_path, quick=True)["left_out"]
        assert measured and all(name.endswith("| ours cuda") == (cuda is green) for name in measured)
        assert left_out and all(name.endswith("| ours cuda") == (cuda is red) for name in left_out)
    whose = {tests.verdict_of("marginal_loss", s) for s in tests.selections("marginal_loss")}
    assert whose == {"marginal_loss", "marginal_loss cuda"}
    assert tests.verdict_of("mips_topk", ["tests/test_mips_topk_cuda.py", "-m", "gpu"]) == "mips_topk cuda"


def test_tests_that_were_out_of_time_are_neither_red_nor_green(tmp_path):
    verdict = tests.Verdict(passed=9, stopped=1)
    tests.remember({"mips_topk": verdict}, tmp_path)
    assert bench.gate("mips_topk", tests.known_verdicts(tmp_path)) == ""
    assert not summary.Summary({}, tmp_path, tests={"mips_topk": verdict}).ok
    assert str(verdict) == "UNFINISHED: 9 passed, 0 failed, 0 skipped, 1 processes out of time"


def test_what_is_stopped_may_write_what_it_has(tmp_path):
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('half')"
    outcome = run_logged([sys.executable, "-c", code], tmp_path / "log", 1.0)
    assert outcome.returncode is None and outcome.tail() == "half"


def test_a_part_is_interrupted_in_a_background_job_too(tmp_path):
    """Where a shell has made SIGINT one that is ignored, by this process and by what it starts."""
    part = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('half')"
    code = f"""
import pathlib, signal, sys
from benchmarks.gpu import processes
processes.heed_interrupts()
log = pathlib.Path({str(tmp_path / "log")!r})
print(processes.run_logged([sys.executable, "-c", {part!r}], log, 1.0).tail())
"""
    background = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", code]
    done = subprocess.run(background, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "half\n"), done.stderr


def test_green_tests_open_the_gate_until_a_source_changes(tmp_path, monkeypatch):
    tests.remember({"mips_topk": tests.Verdict(passed=1)}, tmp_path)
    assert bench.gate("mips_topk", tests.known_verdicts(tmp_path)) == ""
    monkeypatch.setattr(tests, "fingerprint", lambda: "another")
    assert bench.gate("mips_topk", tests.known_verdicts(tmp_path)) != ""


def test_the_time_is_shared_out_and_ends_with_the_whole():
    ends = bench.shares(OPS, 100.0)
    assert list(ends) == OPS and ends[OPS[-1]] == pytest.approx(100.0)
    assert list(ends.values()) == sorted(ends.values())
    assert bench.shares(["span_marginal_loss"], 60.0) == {"span_marginal_loss": pytest.approx(60.0)}
    assert set(bench.SHARES) == set(OPS)


def test_all_parts_together_take_less_than_ten_minutes_and_what_settles_most_comes_first():
    assert list(PARTS) == ["build", "test", "bench", "sanitize"]
    assert sum(PARTS.values()) <= 570  # and some seconds to look for a device and to end what is late
    ends = ends_of(list(PARTS), None)
    assert ends["build"] == build.SECONDS and ends["test"] == build.SECONDS + tests.SECONDS
    assert ends["sanitize"] == sum(PARTS.values())
    assert ends_of(["bench"], None) == {"bench": bench.SECONDS}
    assert ends_of(["test", "sanitize"], 5.0)["sanitize"] == pytest.approx(300.0)


def test_a_process_of_tests_is_read_by_what_it_wrote(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text(
        """<testsuites><testsuite><testcase classname="a" name="one"/>
        <testcase classname="a" name="two"><failure message="no&#10;more"/></testcase>
        <testcase classname="a" name="three"><skipped message="needs a CUDA device"/></testcase>
        <testcase classname="a" name="four"><error message="broken"/></testcase></testsuite></testsuites>"""
    )
    verdict = tests.Verdict()
    tests.read_junit(path, verdict)
    assert (verdict.passed, verdict.failed, verdict.skipped) == (1, 2, 1)
    assert not verdict.is_green and len(verdict.problems) == 2
    assert verdict.reasons == {"needs a CUDA device": 1}


def test_every_test_file_that_looks_for_a_gpu_is_run_there():
    assert set(tests.OPS) == set(OPS)
    listed = {op: [selection[0] for selection in tests.selections(op)] for op in [*OPS, tests.REST]}
    assert all(listed.values())
    assert "tests/test_mips_topk_triton.py" in listed["mips_topk"]
    assert "tests/test_linear_marginal_loss_device.py" in listed["linear_marginal_loss"]
    assert ["tests/test_table_sharded.py", "-m", "gpu"] in tests.selections("table")
    # Nothing that a GPU is mentioned in is left out, but for what is named.
    mentioned = {path.name for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text()}
    assert mentioned - tests.NOT_THERE <= {Path(name).name for names in listed.values() for name in names}


def file_of(module, folder):
    """The project's file of that name, seen from `folder`, or None."""
    places = [base.joinpath(*module.split(".")).with_suffix(".py") for base in (ROOT, ROOT / "tests", folder)]
    return next((place for place in places if place.exists()), None)


def imported_at_the_top(path):
    """Names of the packages that importing a file of the project imports."""
    names, seen, left = set(), set(), [path]
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module] if node.module else []
                left += filter(
                    None,
                    (file_of(f"{node.module or ''}.{a.name}".strip("."), path.parent) for a in node.names),
                )
            else:
                continue
            for module in modules:
                if file := file_of(module, path.parent):
                    left.append(file)
                elif not (isinstance(node, ast.ImportFrom) and node.level):
                    names.add(module.partition(".")[0])
    return names


def test_what_runs_on_a_gpu_needs_no_more_than_is_promised():
    """Anything else is imported where it is needed, and skipped where it is missing."""
    promised = {"torch", "numpy", "triton", "pytest", "realm_kernels", "benchmarks"} | sys.stdlib_module_names
    files = {ROOT / selection[0] for op in [*OPS, tests.REST] for selection in tests.selections(op)}
    files |= set((ROOT / "benchmarks/gpu").glob("*.py")) | {ROOT / "tests/conftest.py"}
    wanted = {path.name: sorted(imported_at_the_top(path) - promised) for path in files}
    assert {name: lacks for name, lacks in wanted.items() if lacks} == {}


@pytest.mark.parametrize(
    "status,text,ok",
    [
        (0, "========= ERROR SUMMARY: 0 errors", True),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", True),
        (99, "========= ERROR SUMMARY: 3 errors", False),
        (0, "", False),
        (1, "========= ERROR SUMMARY: 0 errors", False),
        (None, "========= ERROR SUMMARY: 0 errors", False),
    ],
)
def test_a_sanitizer_is_clean_only_where_it_says_so_and_the_program_ended_well(status, text, ok, tmp_path):
    (tmp_path / "log").write_text(text)
    assert sanitize.read_finding("memcheck", status, tmp_path / "log").ok is ok


@pytest.mark.parametrize("status", [0, 1, sanitize.ERRORS, None])
def test_a_planted_fault_is_found_where_the_tool_says_so_however_the_program_ended(status, tmp_path):
    for text, found in (("ERROR SUMMARY: 2 errors", True), ("ERROR SUMMARY: 0 errors", False), ("", False)):
        (tmp_path / "log").write_text(f"========= {text}")
        assert sanitize.finds_errors(sanitize.read_finding("memcheck", status, tmp_path / "log")) is found


def test_every_kernel_is_watched():
    """A filter is a part of a kernel's name: no pattern."""
    options = sanitize.kernel_filters()
    assert set(options[::2]) == {"--kernel-regex"}
    parts = [option.removeprefix("kns=") for option in options[1::2]]
    assert parts[0] == "faulty_kernel" and all(re.fullmatch(r"\w+", part) for part in parts)

    def is_watched(name):
        return any(part in name for part in parts)

    assert all(map(is_watched, [name.rpartition(":")[2] for name in kernels.triton_kernels()]))
    assert all(map(is_watched, kernels.cuda_kernels()))
    assert not is_watched("void at::native::vectorized_elementwise_kernel<4, float>")
    assert set(small.CALLS) == set(OPS)


@pytest.mark.parametrize("capability,name", [((8, 0), "80-real"), ((8, 6), "86-real"), ((9, 0), "90a-real")])
def test_a_build_is_for_the_gpu_at_hand(capability, name):
    assert build.architecture(capability) == name


def test_without_a_gpu_it_says_so_in_one_line():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "test"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"make gpu: no CUDA device: torch \S+ \(built .*\) sees none\n", done.stderr)
