"""What a search takes beside its arguments and its result: peaks of resident memory, in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import realm_kernels as rk

LIMIT = 64 << 20
FORMS = ["rows", "int8"] if hasattr(rk.ShardedTable, "quantize") else ["rows"]
# B, k, threads, dtype of the rows: lists of k candidates for many queries and threads; several query blocks.
SEARCHES = [
    (512, 100, 2, "float32"),
    (512, 2000, 2, "float32"),
    (512, 2000, 8, "float32"),
    (1100, 8, 4, "bfloat16"),
]

SCRIPT = """
import json, sys, torch, realm_kernels as rk

def resident(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(what)) << 10

for batch, k, threads, dtype, form in json.loads(sys.argv[1]):
    torch.set_num_threads(threads)
    table = torch.randn(16_000, 128).to(getattr(torch, dtype))
    if form == "int8":
        table = rk.ShardedTable.from_tensors([table]).quantize("int8")
    queries = torch.randn(batch, 128)
    rk.mips_topk(queries[:1], table, 1)  # what only a first call needs: code, threads
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the peak is now what is resident
    before = resident("VmRSS")
    scores, indices = rk.mips_topk(queries, table, k)
    print(resident("VmHWM") - before - scores.nbytes - indices.nbytes)
"""


@pytest.fixture(scope="module")
def peaks():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of memory is read from Linux's /proc")
    cases = [(*search, form) for search in SEARCHES for form in FORMS]
    # The allocator gives back what is freed, so that no case hides the next one's peak; more threads than
    # cores do not spin.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(cases)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(zip(cases, map(int, result.stdout.split()), strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: "B{}-k{}-threads{}-{}".format(*s))
def test_a_search_takes_64_mebibytes_at_most(peaks, search, form):
    peak = peaks[(*search, form)]
    assert 0 < peak <= LIMIT, f"{peak / 2**20:.1f} MiB"
