"""What `make gpu` decides without looking at a GPU: the gate, the time, crashes, the tables."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import realm_kernels as rk
from benchmarks import kernels, report, roofline
from benchmarks.gpu import bench, build, rows, sanitize, served, small, summary, tests, timing
from benchmarks.gpu.processes import Outcome, run_logged
from benchmarks.gpu.runner import run_rows
from benchmarks.gpu.served import forced_backends
from realm_kernels.backends import Backend

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


def test_all_parts_together_take_less_than_ten_minutes():
    assert tests.SECONDS + sanitize.SECONDS + bench.SECONDS < 600


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


def test_every_test_file_that_a_gpu_makes_a_difference_to_is_run_there():
    listed = {part for selections in tests.TESTS.values() for each in selections for part in each}
    pattern = re.compile(r"torch\.cuda\.is_available\(\)|mark\.gpu\b|cuda_unusable\(\)")
    files = {
        f"tests/{path.name}"
        for path in (ROOT / "tests").glob("test_*.py")
        if pattern.search(path.read_text())
    }
    assert files - {"tests/test_gpu_harness.py", "tests/test_triton_interpreter.py"} <= listed
    assert all((ROOT / part).exists() for part in listed if part.startswith("tests/"))
    assert set(OPS) <= set(tests.TESTS)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_rows_have_names_of_their_own_and_peers_beside_ours(op, quick):
    found = rows.rows_of(op, quick)
    assert len({row.name for row in found}) == len(found)
    ours = [row for row in found if row.implementation == rows.OURS]
    assert ours and any(not row.is_ours for row in found)
    groups = {row.group for row in found}
    for row in ours:
        assert set(row.told.get("compare", {}).values()) <= groups or "order" in row.told
        assert row.told.get("peers_of", row.group) in groups or "order" in row.told


def test_the_grid_is_that_of_the_promise():
    shapes = {
        tuple(row.told["shape"][name] for name in ("N", "D", "B", "k"))
        for row in rows.rows_of("mips_topk", False)
        if "order" not in row.told
    }
    batches = (1, 16, 64, 128, 256, 512, 1024, 4096)
    sizes = ((13_353_718, 128), (10_000, 128), (1_000_000, 128), (1_000_000, 768))
    assert shapes == {(*size, batch, k) for size in sizes for batch in batches for k in (8, 100)}


def test_a_backend_beside_the_default_is_measured_too():
    def backend(name, default=True):
        return Backend(name, refuses=lambda: None, forward=lambda: None, default=default)

    assert forced_backends([backend("cpu"), backend("triton"), backend("cuda", False)]) == ["cuda"]
    assert forced_backends([backend("cuda"), backend("triton"), backend("reference")]) == ["triton"]
    assert forced_backends([backend("torch"), backend("reference")]) == []


@pytest.fixture
def cpu_for_gpu(monkeypatch):
    """Rows are prepared, run and checked on the CPU; clocks and limits are made up."""

    def time_calls(function):
        function()
        return timing.Times(2.0, 1.0, 3.0, 5)

    monkeypatch.setattr(served, "GPU", "cpu")
    monkeypatch.setattr(timing, "time_calls", time_calls)
    monkeypatch.setattr(timing, "extra_bytes", lambda function: 7)
    monkeypatch.setattr(timing, "replay_of", lambda function: function)
    monkeypatch.setattr(roofline, "limit_seconds", lambda *arguments: 1.0)


def quick_rows():
    for op in OPS:
        seen = set()
        for row in rows.rows_of(op, True):
            kind = (row.implementation, row.group.split()[1], "order" in row.told)
            if row.implementation in (rows.OURS, "torch", "torch eager") and kind not in seen:
                seen.add(kind)
                yield row


@pytest.mark.parametrize("row", list(quick_rows()), ids=lambda row: row.name.replace(" ", "-"))
def test_a_row_is_prepared_run_and_checked(row, cpu_for_gpu):
    found = rows.measure(row)
    assert found["group"] == row.group and found["stats"]["median"] == 2.0
    assert found["extra_info"]["limit_seconds"] == 1.0 and found["extra_info"]["extra_bytes"] == 7
    assert ("repairs" in found["extra_info"]) == (row.is_ours and "mips_topk" in row.group)


def test_a_wrong_answer_has_no_time(cpu_for_gpu, monkeypatch):
    row = next(row for row in rows.rows_of("mips_topk", True) if row.is_ours)
    right = rk.mips_topk
    monkeypatch.setattr(rk, "mips_topk", lambda *arguments: rk.TopK(*(x.flip(1) for x in right(*arguments))))
    with pytest.raises(AssertionError, match="answer differs"):
        rows.measure(row)


def entry(group, implementation, median, **told):
    told = {"implementation": implementation, "limit_seconds": median / 2} | told
    return {"group": group, "extra_info": told, "stats": {"median": median}}


def results_of(*entries, left_out=None):
    info = {"gpu": {}, "limits": {"copy_gigabytes_per_second": 4300.0}, "missing_peers": ["cuVS"]}
    return {"benchmarks": list(entries), "left_out": left_out or {}, "machine_info": info}


def test_the_table_tells_times_limits_memory_repairs_and_ratios(tmp_path):
    shape = "mips_topk bfloat16 N=13353718 D=128 B=1 k=8"
    ours = entry(shape, rows.OURS, 0.002, extra_bytes=3 << 20, repairs=1, replay_seconds=0.001)
    results = results_of(
        ours,
        entry(shape, "torch", 0.010),
        entry("other", rows.OURS, 0.001),
        left_out={"a | b": "no time was left", "c | d": "no time was left"},
    )
    header, body = summary.speeds_of(results)
    line = dict(zip(header, body[0], strict=True))
    assert line == {
        "shape": shape,
        "ours, ms": "2.000",
        "of the limit": "50%",
        "replayed, ms": "1.000",
        "extra MiB": "3",
        "repairs": "1",
        "x torch": "5.00",
    }
    assert dict(zip(header, body[1], strict=True))["x torch"] == "–"
    device = {"name": "some GPU", "capability": [9, 0], "torch": "2", "triton": "3"}
    whole = summary.Summary(device, tmp_path, results=results, tests={"mips_topk": tests.Verdict(passed=1)})
    whole.write()
    assert whole.ok
    text = whole.text()
    assert shape in text and "other" not in text and "left out, 2 rows: no time was left" in text
    assert "| other |" in (tmp_path / "summary.md").read_text()
    assert json.loads((tmp_path / "summary.json").read_text())["tests"]["mips_topk"]["passed"] == 1


@pytest.mark.parametrize(
    "parts",
    [
        {"tests": {"mips_topk": tests.Verdict(passed=1, failed=1)}},
        {"findings": [sanitize.Finding("memcheck", False, "1 error")]},
        {"build": Outcome(1, 1.0, Path("build.log"))},
        {"results": results_of(left_out={"a | ours": "AssertionError: the answer differs from"})},
    ],
    ids=lambda parts: next(iter(parts)),
)
def test_whatever_is_wrong_is_the_exit_status(parts, tmp_path):
    assert not summary.Summary({}, tmp_path, **parts).ok
    assert summary.Summary({}, tmp_path).ok


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


def test_every_kernel_is_watched():
    pattern = re.compile(sanitize.kernel_pattern())
    for name in kernels.triton_kernels() + kernels.cuda_kernels():
        assert pattern.search(name)
    assert not pattern.search("void at::native::vectorized_elementwise_kernel<4, float>")
    assert set(small.CALLS) == {"mips_topk", "marginal_loss", "linear_marginal_loss"}


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


def test_plain_tables_keep_their_columns():
    assert report.plain_of((["a", "bb"], [["ccc", "1"], ["d", "22"]])) == "a    bb\n---  --\nccc   1\nd    22"
