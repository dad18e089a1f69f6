"""Rows by id from pinned shards: the kernel of the gradient of queries over a table of the host."""

from contextlib import contextmanager

import pytest
import torch
from mips_topk_triton_cases import DEVICE, DTYPES, QUIET

from realm_kernels.mips_topk import gpu, reference, triton_gather
from realm_kernels.mips_topk.triton_gather import gather_pinned

pytestmark = QUIET


def bits(rows):
    return rows.view(torch.int32 if rows.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 12, 130])
def test_rows_are_copied_bit_for_bit_and_none_is_zeros(dim, dtype):
    """Shards of any size, empty ones too; rows that are strided, NaN and infinite; ids again and again."""
    table = torch.randn(37, 2 * dim).to(DTYPES[dtype])[:, ::2]
    table[3], table[20, 0], table[36] = torch.nan, torch.inf, -torch.inf
    shards = [table[:5], table[5:5], table[5:30], table[30:]]
    indices = torch.cat([torch.arange(37), torch.tensor([-1, 36, 0, 4, 5, 29, 30, -1])]).view(5, 9)
    on_device = [shard.pin_memory() if DEVICE == "cuda" else shard for shard in shards]
    found = gather_pinned(on_device, indices.to(DEVICE)).cpu()
    assert torch.equal(bits(found), bits(reference.gather_rows(shards, indices)))
    assert torch.equal(bits(found[indices >= 0]), bits(table.contiguous()[indices[indices >= 0]]))


def test_no_id_gives_no_row():
    shards = [torch.randn(4, 6).pin_memory() if DEVICE == "cuda" else torch.randn(4, 6)]
    assert gather_pinned(shards, torch.empty(0, 3, dtype=torch.int64, device=DEVICE)).shape == (0, 3, 6)


def test_it_is_launched_on_the_device_of_the_ids(monkeypatch):
    """The backward of a search may run while another device is the current one."""
    current, launched = [], []

    @contextmanager
    def on_device(device):
        current.append(device)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid):
            launched.append(list(current))
            return kernel[grid]

    kernel = triton_gather.gather_kernel
    monkeypatch.setattr(gpu, "on_device", on_device)
    monkeypatch.setattr(triton_gather, "gather_kernel", Kernel())
    rows = torch.randn(4, 6).pin_memory() if DEVICE == "cuda" else torch.randn(4, 6)
    indices = torch.tensor([1, 3], device=DEVICE)
    gather_pinned([rows, rows], indices)
    assert launched == 2 * [[indices.device]]
