"""TableWriter: what it refuses, and that it writes once."""

import os

import pytest
import torch

import realm_kernels as rk


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"dim": 3.0}, TypeError, "dim must be an int, got float 3.0"),
        ({"dim": True}, TypeError, "dim must be an int, got bool True"),
        ({"shard_rows": 0}, ValueError, "shard_rows must be at least 1, got 0"),
        (
            {"dtype": torch.int8},
            ValueError,
            "dtype must be one of float32, bfloat16, float16, got torch.int8",
        ),
        ({"dtype": "float32"}, ValueError, "dtype must be one of float32, bfloat16, float16, got 'float32'"),
    ],
    ids=["dim-0", "dim-float", "dim-bool", "shard-rows-0", "int8", "dtype-name"],
)
def test_bad_arguments_are_refused_before_anything_is_touched(tmp_path, arguments, error, message):
    with pytest.raises(error, match="^TableWriter: " + message):
        rk.TableWriter(tmp_path / "t", **{"dim": 3, "dtype": torch.float32} | arguments)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([1.0], TypeError, r"rows must be a Tensor \[n, dim\], got list"),
        (torch.zeros(3), ValueError, r"rows must be \[n, dim\], 2 axes, got float32\[3\]"),
        (torch.zeros(2, 3).int(), ValueError, "rows must be of dtype float32, bfloat16, float16, got int32"),
    ],
    ids=["list", "one-axis", "int32"],
)
def test_bad_rows_are_refused(tmp_path, rows, error, message):
    with (
        pytest.raises(error, match="^TableWriter: " + message),
        rk.TableWriter(tmp_path / "t", dim=3, dtype=torch.float32) as writer,
    ):
        writer.append(rows)
    assert os.listdir(tmp_path) == []


def test_a_writer_writes_once_and_inside_its_block(tmp_path):
    writer = rk.TableWriter(tmp_path / "t", dim=3, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="append works inside the `with` block only"):
        writer.append(torch.zeros(1, 3))
    with writer:
        writer.append(torch.zeros(1, 3))
        with pytest.raises(RuntimeError, match="nothing is committed"):
            writer.committed()
    assert writer.committed().rows == 1
    with pytest.raises(RuntimeError, match="append works inside"):
        writer.append(torch.zeros(1, 3))
    with pytest.raises(RuntimeError, match="a writer writes once"), writer:
        pass


def test_ids_of_a_copy_must_grow(tmp_path):
    with rk.TableWriter(tmp_path / "t", dim=3, dtype=torch.float32) as writer:
        writer.append(torch.ones(2, 3), torch.tensor([4, -7]))
        with pytest.raises(ValueError, match="^TableWriter: ids must grow, from 7 on, got"):
            writer.append(torch.ones(1, 3), torch.tensor([6]))
        with pytest.raises(ValueError, match=r"ids must be \[n\] = \[1\]"):
            writer.append(torch.ones(1, 3), torch.tensor([8, 9]))
        writer.append(torch.ones(1, 3))
    table = rk.ShardedTable.open(tmp_path / "t", verify=True)
    assert table.ids(torch.arange(3)).tolist() == [4, 6, 7] and table.row_mask.tolist() == [True, False, True]
