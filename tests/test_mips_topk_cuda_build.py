"""The Hopper kernels of mips_topk as nvcc makes them: registers, spills, instructions, memory, plans."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from realm_kernels import native

ROOT = Path(__file__).parent.parent
SHARED_BYTES = 227 << 10
REGISTERS = 65536  # of a multiprocessor
SCAN_THREADS, SEARCH_THREADS = 384, 512
# What ptxas says where a wgmma waits for the one before, or setmaxnreg has no effect.
COMPLAINTS = re.compile(r"Potential Performance Loss|C7508|C7510|C7519|C7520|setmaxnreg ignored|are spilled")
NVCC = shutil.which("nvcc") or shutil.which(
    "nvcc", path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"
)


def cuobjdump():
    triton = pytest.importorskip("triton")
    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")
needs_module = pytest.mark.skipif(native.cuda is None, reason="the CUDA module was not built")


class Compiled:
    """One source for one architecture: what ptxas said, and SASS and resources of each kernel."""

    def __init__(self, source, architecture, folder):
        self.cubin = folder / f"{Path(source).stem}-{architecture}.cubin"
        self._process = subprocess.Popen(
            [NVCC, "-std=c++17", f"-I{ROOT}/csrc", "-cubin", "-o", self.cubin, ROOT / "csrc" / source]
            + [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas=-v,-warn-spills"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self):
        self.said = self._process.communicate(timeout=600)[0]
        assert self._process.returncode == 0, self.said
        text = subprocess.run(
            [cuobjdump(), "-sass", self.cubin], capture_output=True, text=True, check=True
        ).stdout
        parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.M)
        self.sass = dict(zip(parts[1::2], parts[2::2], strict=True))
        usage = subprocess.run(
            [cuobjdump(), "--dump-resource-usage", self.cubin], capture_output=True, text=True, check=True
        ).stdout
        found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        self.registers = {name: int(registers) for name, registers, _, _ in found}
        self.spills = {name: int(stack) + int(local) for name, _, stack, local in found}
        return self


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cubin")
    sources = [
        ("cuda/sm90/mips_topk_scan.cu", "90a"),
        ("cuda/mips_topk.cu", "90a"),
        ("cuda/mips_topk.cu", "100a"),
    ]
    running = [Compiled(source, architecture, folder) for source, architecture in sources]
    return [one.finish() for one in running]


@needs_nvcc
def test_nothing_spills_and_no_product_waits_for_another(compiled):
    for one in compiled:
        assert not COMPLAINTS.search(one.said), one.said
        assert set(one.spills.values()) == {0}
        assert not any(re.search(r"\b(LDL|STL)\b", sass) for sass in one.sass.values())


@needs_nvcc
def test_the_budget_of_instantiations(compiled):
    """Of mips_topk_scan.cu: three types in three shapes, five empty epilogues. And what codes change."""
    scan, search, _ = compiled
    assert len(scan.sass) == 9 + 5
    assert sorted(re.findall(r"mips_topk_([a-z]+)_kernel", " ".join(search.sass))) == [
        "prepare",
        "repair",
        "rescore",
        "rescore",
        "select",
        "select",
    ]


@needs_nvcc
def test_the_scan_is_made_of_wgmma_and_tma(compiled):
    for name, sass in compiled[0].sass.items():
        wanted = "IGMMA" if "Int8" in name else "HGMMA"
        products = set(re.findall(r"\b([HIQ]GMMA\.\S+?x\S+?x\S+?)\.", sass))
        columns = 64 if "ShapeE2" in name else 128
        depth = 32 if "Int8" in name else 16
        assert products == {f"{wanted}.64x{columns}x{depth}"}, (name, products)
        assert re.search(r"\bUTMALDG\.2D \[", sass), name
        # Registers go from the producer to the consumers.
        assert len(re.findall(r"USETMAXREG", sass)) == 2, name
        if "ShapeE0" in name:
            # kWide, of one to four panels: each has two places that issue a product, 4 wgmma a panel of which
            # the last commits, and two waits for the product before the one under way.
            assert len(re.findall(rf"\b{wanted}\b", sass)) == 2 * 4 * (1 + 2 + 3 + 4), name
            assert len(re.findall(rf"\b{wanted}\b.*gsb0", sass)) == 2 * 4, name
            assert len(re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1", sass)) == 2 * 4, name


@needs_nvcc
def test_blocks_that_stream_queries_share_them_in_clusters(compiled):
    for name, sass in compiled[0].sass.items():
        is_deep = "ShapeE1" in name
        assert ("UTMALDG.2D.MULTICAST" in sass) == is_deep, name
        # All of a cluster meet before the first load and after the last arrival, and nothing else waits for
        # what was stored to be seen by the whole device.
        meetings = 2 if is_deep else 0
        for instruction in ("UCGABAR_ARV", "UCGABAR_WAIT", r"MEMBAR\.\w+\.GPU"):
            assert len(re.findall(rf"\b{instruction}\b", sass)) == meetings, (name, instruction)
        # Consumers, with a block of queries or two, free a stage within a tile and after it, in both blocks.
        arrivals = len(re.findall(r"SYNCS\.ARRIVE\.TRANS64\.RED\.A1T0", sass))
        assert arrivals == (4 if is_deep else 0), name


@needs_nvcc
def test_rows_and_maxima_are_read_sixteen_bytes_at_a_time(compiled):
    for name, sass in compiled[1].sass.items():
        wide = len(re.findall(r"LDG\.E\.128", sass))
        if "select" in name:
            assert wide >= 4, name  # of as many quads, before the first of them is looked at
        elif "rescore" in name or "repair" in name:
            assert wide >= 2 * (4 + 1) + 2 * (2 + 1), (
                name
            )  # an unrolled loop and its rest for each type of rows


@needs_nvcc
def test_registers_are_as_designed(compiled):
    scan, search, _ = compiled
    for name, registers in scan.registers.items():
        assert registers * SCAN_THREADS <= REGISTERS, name
    for name, registers in search.registers.items():
        blocks = 2 if "select_kernelILb0" in name or "rescore_kernelILb0" in name else 1
        assert registers * SEARCH_THREADS * blocks <= REGISTERS, name


H200_SHAPE = dict(N=13_353_718, k=8, E=0, scanned="bfloat16", exact=True, group=0, clusters=32)


def plan(B, D, **changes):
    s = H200_SHAPE | changes
    sizes = [B, s["N"], D, s["k"], s["E"]]
    device = 132, s["clusters"]
    return native.cuda.mips_topk_plan((sizes, s["scanned"], s["exact"], s["group"], *device, 256 << 20))


@needs_module
@pytest.mark.parametrize(
    "B,D,changes,shape,stages",
    [
        pytest.param(1, 128, {}, "narrow", 12, id="B1-D128"),
        pytest.param(64, 768, {}, "narrow", 7, id="B64-D768"),
        pytest.param(65, 128, {}, "wide", 12, id="B65-D128"),
        pytest.param(512, 128, {}, "wide", 6, id="B512-D128"),
        pytest.param(512, 768, {}, "deep", 4, id="B512-D768"),
        pytest.param(128, 768, {}, "deep", 7, id="B128-D768"),
        pytest.param(512, 128, dict(scanned="int8", group=128), "wide", 10, id="B512-D128-int8"),
    ],
)
def test_plans_for_an_h200(B, D, changes, shape, stages):
    found = plan(B, D, **changes)
    assert (found["shape"], found["stages"]) == (shape, stages)
    assert found["shared_bytes"] <= SHARED_BYTES
    assert found["bytes"] <= 256 << 20
    assert found["batch"] >= min(B, 256)  # enough queries a pass that reading the table is not the limit


@needs_module
def test_every_plan_keeps_to_its_budgets():
    for B in (1, 17, 64, 65, 129, 512, 513, 4096, 100_000):
        for N in (1, 31, 129, 10_000, 1_000_000, 100_000_000, 1 << 30):
            for D in (1, 8, 64, 128, 192, 256, 320, 768, 1024, 8192):
                for k in (1, 8, 100, 2048):
                    for changes in ({}, {"exact": False}, {"scanned": "int8", "group": 64}):
                        found = plan(B, D, N=N, k=min(k, N), **changes)
                        assert found["shared_bytes"] <= SHARED_BYTES
                        assert 1 <= found["batch"] <= B
                        assert found["bytes"] <= 256 << 20 or found["batch"] == 1
                        assert found["stages"] >= 3
                        assert found["selected"] * 32 >= min(k, N)


@needs_module
@pytest.mark.parametrize("D", [128, 768])
@pytest.mark.parametrize("N", [100_000, H200_SHAPE["N"]])
@pytest.mark.parametrize("clusters", [0, 32])
def test_blocks_of_the_scan_share_out_the_device(N, D, clusters):
    for B in range(65, 16_000, 97):
        found = plan(B, D, N=N, clusters=clusters)
        cluster = found["cluster"]
        assert cluster == (1 if found["shape"] != "deep" else 4 if clusters else 2)
        processors = 4 * clusters if cluster == 4 else 132
        queries = -(-min(B, found["batch"]) // 64)  # blocks of 64
        columns = -(-queries // (4 if found["shape"] == "deep" else 8))  # of the grid
        workers, rest = divmod(found["blocks"], columns * cluster)
        assert rest == 0
        # Steps of all waves, against tiles shared out evenly.
        tiles = -(-N // 128)
        steps = -(-found["blocks"] // processors) * -(-tiles // (workers * cluster))
        assert steps <= 1.15 * (tiles * columns / processors) + 8, (B, found)


@needs_module
def test_clusters_of_four_are_used_where_they_cover_the_device():
    for clusters, cluster in ((33, 4), (32, 4), (31, 4), (30, 2), (0, 2)):
        found = plan(128, 768, clusters=clusters)
        assert (found["cluster"], found["blocks"]) == (cluster, 4 * clusters if cluster == 4 else 132)
        assert plan(128, 128, clusters=clusters)["cluster"] == 1


@needs_module
def test_the_module_does_not_need_a_driver_to_load():
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf")
    needed = subprocess.run([readelf, "-d", native.cuda.__file__], capture_output=True, text=True, check=True)
    assert "libcuda.so" not in needed.stdout
