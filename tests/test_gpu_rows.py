"""The rows of the GPU benchmark and what is told of them, with the CPU in the place of the GPU."""

import json
from pathlib import Path

import pytest

import realm_kernels as rk
from benchmarks import hopper_scan, report, roofline
from benchmarks.gpu import mips_topk, rows, sanitize, served, summary, targets, tests, timing
from benchmarks.gpu.processes import Outcome
from benchmarks.gpu.served import forced_backends
from realm_kernels import native
from realm_kernels.backends import Backend
from realm_kernels.linear_marginal_loss import op as linear_op
from realm_kernels.mips_topk import cuda

OPS = list(rows.MODULES)


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
        if "order" not in row.told and row.told["shape"]["dtype"] in mips_topk.TABLES
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
    assert forced_backends(linear_op.BACKENDS) == ["triton:epilogue", "torch"]


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
            if (
                row.implementation in (rows.OURS, "torch", "torch eager")
                and kind not in seen
                and ("pinned" not in row.group and "streamed" not in row.group)
            ):
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
        entry("small shape", rows.OURS, 0.001),
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
    assert shape in text and "small shape" not in text and "left out, 2 rows: no time was left" in text
    assert "| small shape |" in (tmp_path / "summary.md").read_text()
    assert json.loads((tmp_path / "summary.json").read_text())["tests"]["mips_topk"]["passed"] == 1


def test_a_promise_is_judged_by_its_worst_case():
    def search(batch, k, dtype, median, limit, **peers):
        shape = {"op": "mips_topk", "N": 13_353_718, "D": 128, "B": batch, "k": k, "dtype": dtype}
        group = f"mips_topk {dtype} B={batch} k={k}"
        told = {"shape": shape, "limit_seconds": limit, "extra_bytes": batch << 20}
        mine = entry(group, rows.OURS, median) | {}
        mine["extra_info"] |= told
        others = [entry(group, name.replace("_", " "), time, shape=shape) for name, time in peers.items()]
        return [mine, *others]

    results = results_of(
        *search(1, 8, "bfloat16", 1.0, 0.9, torch=8.0),
        *search(64, 8, "bfloat16", 1.0, 0.7, torch=2.0),
        *search(512, 8, "bfloat16", 2.0, 1.2, torch=12.0, faiss_GPU=5.0, ours_cuda=1.0),
        *search(512, 100, "bfloat16", 2.5, 1.2, torch=12.0),
        *search(512, 8, "int8", 1.0, 0.6),
    )
    lines = {told: (worst, kept) for told, worst, kept, _ in targets.promises_of(results)[1]}
    assert lines["B <= 64: share of the memory limit"] == ("0.70", "NOT kept")
    assert lines["B >= 256: share of the matrix limit"] == ("0.48", "NOT kept")
    assert lines["bfloat16's time over int8's"] == ("2.00", "kept")
    assert lines["time of k = 100 over k = 8"] == ("1.25", "kept")
    assert lines["B = 512: torch's time over ours"] == ("4.80", "NOT kept")
    assert lines["B = 512: the best other peer's"] == ("2.50", "kept")
    assert lines["any shape: torch's time over ours"] == ("2.00", "kept")
    assert lines["extra memory of a search, MiB"] == ("512.00", "NOT kept")
    assert lines["linear loss: torch.compile's time over ours"] == ("–", "not measured")


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


def test_plain_tables_keep_their_columns():
    assert report.plain_of((["a", "bb"], [["ccc", "1"], ["d", "22"]])) == "a    bb\n---  --\nccc   1\nd    22"


H200 = cuda.Processors(multiprocessors=132, large_clusters=32)


@pytest.mark.skipif(native.cuda is None, reason="the CUDA module was not built")
def test_the_hopper_scan_is_told_line_by_line(cpu_for_gpu, monkeypatch, capsys):
    """All but the launches themselves, on the CPU: plans, workspaces, passes, codes, the table."""
    launched = []

    def launch(queries, piece, exclude, scores, indices, workspace, batch, *, with_maxima, whole):
        plan = cuda.plan_for(batch, piece, piece.rows.shape[1], scores.shape[1], 0, queries.dtype, H200)
        assert queries.shape[0] == scores.shape[0] == indices.shape[0] <= plan["batch"]
        assert workspace.numel() == plan["bytes"]
        launched.append((piece.scanned(), queries.shape[0], with_maxima, whole))

    monkeypatch.setattr(hopper_scan, "time_calls", timing.time_calls)
    monkeypatch.setattr(cuda, "load", lambda device: H200)
    monkeypatch.setattr(cuda, "launch", launch)
    monkeypatch.setattr(roofline, "measure_bandwidth", lambda device: 4.3e12)
    monkeypatch.setattr(roofline, "measure_matrix_rate", lambda dtype, device: 7.9e14)
    hopper_scan.measure(shrink=10_000, device="cpu")
    lines = capsys.readouterr().out.splitlines()
    calls = sum(len(calls) for _, _, _, calls in hopper_scan.TABLES)
    assert len(lines) == 2 + calls and all("shape=" in line for line in lines[2:])
    assert {line.split("shape=")[1].split()[0] for line in lines[2:]} == {"wide", "deep", "narrow"}
    assert {scanned for scanned, *_ in launched} == {"bfloat16", "int8"}
    assert {parts for *_, with_maxima, whole in launched for parts in [(with_maxima, whole)]} == {
        (False, True),
        (True, False),
        (True, True),
    }
