"""One fixture times an implementation and notes what the report needs."""

import time

import pytest
import torch

from . import peers, roofline

# Calls before those that count, until that much time is spent: code is loaded and compiled, and where memory
# is fragmented the system makes huge pages of it, some tenths of a second in each of the first four calls.
WARM_UP_CALLS, WARM_UP_SECONDS = 5, 2.0
# Calls that count, if they take no more than that: of a few short ones the median is the machine's mood.
ROUNDS, ROUNDS_SECONDS = 100, 1.0


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="one small shape of each op, to see that all runs")


def pytest_report_teststatus(report):
    """No letter for what was left out: of --quick that is nearly all."""
    return ("skipped", "", "") if report.skipped else None


@pytest.fixture
def quick(request):
    return request.config.getoption("--quick")


@pytest.fixture
def measure(benchmark, quick):
    """measure(name, function, bytes_moved=, flops=): time it as one implementation of its group.

    The limit is that of a library's matrix product in `dtype`, unless the caller knows a nearer one. The
    report takes the median of as many calls as fit a second, 100 at most, and of `least` at least: fewer for
    a peer that takes seconds.
    """

    def run(name, function, *, bytes_moved=0, flops=0, dtype=torch.float32, limit_seconds=None, least=5):
        if limit_seconds is None:
            limit_seconds = roofline.limit_seconds(bytes_moved, flops, dtype)
        benchmark.extra_info.update(implementation=name, limit_seconds=limit_seconds)
        start = time.perf_counter()
        for _ in range(WARM_UP_CALLS):
            begin = time.perf_counter()
            function()
            end = time.perf_counter()
            if end > start + (0.0 if quick else WARM_UP_SECONDS):
                break
        fitting = int(ROUNDS_SECONDS / max(end - begin, 1e-9))
        return benchmark.pedantic(function, rounds=2 if quick else max(least, min(fitting, ROUNDS)))

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["read_gigabytes_per_second"] = roofline.measure_bandwidth() / 1e9
    machine_info["float32_matrix_gigaflops"] = roofline.measure_matrix_rate(torch.float32) / 1e9
    machine_info["bfloat16_matrix_gigaflops"] = roofline.measure_matrix_rate(torch.bfloat16) / 1e9
    for kind in ("float32", "bfloat16", "int8"):
        machine_info[f"{kind}_multiply_add_gigaops"] = roofline.measure_multiply_adds(kind) / 1e9
    machine_info["threads"] = torch.get_num_threads()
    machine_info["missing_peers"] = peers.missing()
