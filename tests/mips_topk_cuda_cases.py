"""The CUDA kernels of mips_topk on the model of a GPU (tests/cuda_model), and inputs that the tests share."""

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from realm_kernels.table import device_codes, quantized

ROOT = Path(__file__).parent.parent
NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCANNED = {torch.bfloat16: 0, torch.float16: 1, torch.int8: 2}
SHAPES = {"wide": 0, "deep": 1, "narrow": 2}
INF, NAN = float("inf"), float("nan")
TILE, GROUP, GROUPS, QUAD = 128, 32, 4, 512  # rows of a tile, of a group; groups of a tile; rows of a quad


def compiler():
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def build(folder, mutation=None):
    """The model as a shared library; mutation: (header, text, replacement) to build it with a mistake."""
    sources = ROOT / "csrc"
    if mutation is not None:
        header, text, replacement = mutation
        shutil.copytree(sources / "cuda", folder / "cuda")
        path = folder / "cuda" / header
        original = path.read_text()
        assert original.count(text) == 1, f"{header}: {text!r} must stand there once"
        path.write_text(original.replace(text, replacement))
        sources = folder
    library = folder / "model.so"
    model = ROOT / "tests/cuda_model"
    command = [compiler(), "-std=c++17", "-O2", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
    if mutation is not None:
        command.append("-w")  # what a mistake leaves unused is not the point
    command += ["-shared", "-fPIC", f"-I{sources}", f"-I{model}", model / "model.cpp", "-o", library]
    subprocess.run(command, check=True, timeout=300)
    return Model(library)


class Model:
    def __init__(self, library):
        self._library = ctypes.CDLL(str(library))
        for name in ("model_scan", "model_search"):
            getattr(self._library, name).restype = ctypes.c_char_p

    def words(self, maxima):
        """Words of tiles [T] as the scan makes them, of maxima [T, 4] of their groups, float32."""
        words = torch.empty(maxima.shape[0], dtype=torch.int32)
        self._library.model_words(words.shape[0], pointer(maxima.contiguous()), pointer(words))
        return words

    def maxima(self, words):
        """(no less than the maxima of the groups [..., 4] float64, no more than those of the tiles [...])."""
        groups = torch.empty(*words.shape, GROUPS, dtype=torch.float64)
        least = torch.empty(*words.shape)
        self._library.model_maxima(
            words.numel(), pointer(words.contiguous()), pointer(groups), pointer(least)
        )
        return groups, least

    def scan(self, shape, queries, rows, *, blocks, workers=1, cluster=1, row_mask=None, seed=0):
        """(maxima of the groups [B, T, 4], norms of quads) by one shape of the scan; all in its dtype."""
        (B, D), N = queries.shape, rows.shape[0]
        words = torch.full((B, -(-N // TILE)), -1, dtype=torch.int32)  # NaN
        norms = torch.zeros(-(-N // QUAD))
        error = self._library.model_scan(
            *(SCANNED[rows.dtype], SHAPES[shape], pointer(queries), pointer(rows), B, N, D),
            *(ctypes.c_int64(rows.stride(0)), pointer(row_mask), blocks, workers, cluster),
            *(pointer(words), ctypes.c_int64(words.shape[1]), pointer(norms), ctypes.c_uint64(seed)),
        )
        if error is not None:
            raise RuntimeError(error.decode())
        return self.maxima(words)[0], norms

    def search(self, queries, rows, k, exclude=None, row_mask=None, codes=None, **how):
        """A whole search of one piece. how: threads of a block, kept, selected, shape, first_row, seed."""
        (B, D), N = queries.shape, rows.shape[0]
        result = Found(torch.full((B, k), NAN), torch.full((B, k), -99), torch.zeros(1, dtype=torch.int64))
        tensors = [queries, rows, row_mask, exclude, *(codes or [None] * 3)]
        tensors += [result.scores, result.indices, result.counter]
        pointers = (ctypes.c_void_p * 10)(*(None if t is None else t.data_ptr() for t in tensors))
        shape = how.get("shape")
        numbers = (ctypes.c_int64 * 16)(
            *(B, N, D, k, 0 if exclude is None else exclude.shape[1]),
            *(SCANNED[torch.int8 if codes else rows.dtype], NUMBERS[queries.dtype], NUMBERS[rows.dtype]),
            *(rows.stride(0), how.get("first_row", 0)),
            *((codes[0].shape[1], codes[0].shape[2]) if codes else (0, 0)),
            *(how.get("threads", 32), how.get("kept", 0), how.get("selected", 0)),
            0 if shape is None else SHAPES[shape] + 1,
        )
        error = self._library.model_search(
            pointers, numbers, ctypes.c_uint64(how.get("seed", 0)), pointer(result.told)
        )
        if error is not None:
            raise RuntimeError(error.decode())
        return result


@dataclass
class Found:
    scores: torch.Tensor
    indices: torch.Tensor
    counter: torch.Tensor

    def __post_init__(self):
        self.told = torch.zeros(4, dtype=torch.int64)

    @property
    def repairs(self):
        return int(self.counter)

    @property
    def chosen(self):
        """Groups of all queries whose rows were rescored."""
        return int(self.told[3])

    @property
    def shape(self):
        return list(SHAPES)[int(self.told[0])]


def pointer(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def encode(rows, group=32):
    """(codes int8 [N / G, G, D32], mean [D], bounds [N / G, 3]) as the table makes them for a GPU."""
    (codes,), (bounds,) = device_codes.empty([rows], rows.device, group)
    mean = quantized.sample_mean([rows])
    device_codes.encode(rows, mean, codes, bounds)
    return codes, mean, bounds


def integers(*shape, low=-2, high=3):
    return torch.randint(low, high, shape).float()


ORDERS = {
    "ascending": lambda n: torch.arange(n),
    "descending": lambda n: torch.arange(n).flip(0),
    "organ-pipe": lambda n: torch.minimum(torch.arange(n), torch.arange(n).flip(0)),
    "all-equal": lambda n: torch.ones(n),
    "all-negative": lambda n: -1 - torch.arange(n) % 37,
    "top-k-in-one-group": lambda n: torch.where((torch.arange(n) >= 64) & (torch.arange(n) < 72), 9.0, -1.0),
    "one-per-group": lambda n: torch.where(torch.arange(n) % 32 == 5, 9.0 + torch.arange(n), -1.0),
    "last-partial-tile": lambda n: torch.where(torch.arange(n) >= n - 3, 5.0, 0.0),
    "every-row-twice": lambda n: torch.arange(n) // 2,
}


def ordered_table(order, N, D=8):
    """Two queries, and rows of bfloat16 whose first column is in an adversarial order."""
    table = torch.ones(N, D)
    table[:, 0] = ORDERS[order](N).float()
    queries = torch.zeros(2, D)
    queries[:, 0] = torch.tensor([1.0, -3.0])
    return queries, table.bfloat16()


def special_rows(D=8):
    """Queries and rows with NaN and infinities, a tile of tombstones, zeros."""
    queries, rows = torch.randn(4, D), torch.randn(290, D)
    rows[3], rows[40, 2], rows[41, 1] = NAN, INF, -INF
    rows[42], rows[60] = INF, -INF
    rows[128:256] = NAN
    queries[1, 4], queries[2, 0], queries[3] = NAN, INF, 0.0
    return queries, rows.bfloat16()
