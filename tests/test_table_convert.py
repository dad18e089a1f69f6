"""realm-kernels table verify, info, convert: the rows come and go whole, damage and pickles are one line."""

import json
import os
import pickle
import resource

import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import realm_kernels as rk
from realm_kernels.cli import app
from realm_kernels.table import formats

ROWS = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))


class Bomb:
    def __reduce__(self):
        return os.abort, ()


def run(*arguments):
    return CliRunner().invoke(app, ["table", *map(str, arguments)])


def rows_of(path):
    return torch.cat(list(rk.ShardedTable.open(path, verify=True).shards))


def write_npy(path):
    np.save(path / "a.npy", ROWS.numpy())
    return path / "a.npy"


def write_npz(path):
    np.savez(path / "a.npz", embeddings=ROWS.numpy(), ids=np.arange(50))
    return path / "a.npz"


def write_safetensors(path):
    safetensors.torch.save_file({"rows": ROWS, "bias": torch.zeros(6)}, path / "a.safetensors")
    return path / "a.safetensors"


def write_faiss(path):
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatL2(6)
    index.add(ROWS.numpy())
    faiss.write_index(index, str(path / "a.faiss"))
    return path / "a.faiss"


def write_bin(path):
    """As a published REALM checkpoint is shipped."""
    torch.save({"block_emb": ROWS, "reader.weight": torch.zeros(3, 3)}, path / "pytorch_model.bin")
    (path / "config.json").write_text("{}")
    return path


def write_checkpoint_in_shards(path):
    safetensors.torch.save_file({"block_emb": ROWS}, path / "model-00002-of-00002.safetensors")
    index = {"weight_map": {"block_emb": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def write_table(path):
    rk.ShardedTable.from_tensors([ROWS]).save(path / "table", shard_rows=7)
    return path / "table"


SOURCES = [
    write_npy, write_npz, write_safetensors, write_faiss, write_bin, write_checkpoint_in_shards, write_table,
]  # fmt: skip


@pytest.mark.parametrize("write", SOURCES, ids=lambda write: write.__name__[6:])
def test_every_source_becomes_the_same_table(tmp_path, monkeypatch, write):
    monkeypatch.setattr(formats, "PIECE_BYTES", 300)  # 12 rows
    source = write(tmp_path)
    pieces = list(formats.open_source(source).pieces())
    assert max(piece.shape[0] for piece in pieces) <= 12
    result = run("convert", source, tmp_path / "out", "--shard-rows", 20)
    assert result.exit_code == 0 and "50 rows" in result.output, result.output
    assert torch.equal(rows_of(tmp_path / "out"), ROWS)
    assert run("convert", source, tmp_path / "half", "--dtype", "bfloat16").exit_code == 0
    assert torch.equal(rows_of(tmp_path / "half"), ROWS.bfloat16())


def test_several_files_are_joined_in_their_order(tmp_path):
    for name, part in zip("ba", ROWS.split(30), strict=True):
        np.save(tmp_path / f"{name}.npy", part.numpy())
    assert run("convert", tmp_path / "b.npy", tmp_path / "a.npy", tmp_path / "out").exit_code == 0
    assert torch.equal(rows_of(tmp_path / "out"), ROWS)


@pytest.mark.parametrize("name", ["x.npy", "x.safetensors", "x.faiss"])
@pytest.mark.parametrize("edited", [False, True], ids=["whole", "tombstones"])
def test_what_is_written_for_others_is_what_they_read(tmp_path, monkeypatch, name, edited):
    monkeypatch.setattr(formats, "PIECE_BYTES", 300)
    table, out, expected = write_table(tmp_path), tmp_path / name, ROWS
    if edited:
        with rk.TableEditor(table) as editor:
            editor.tombstone([0, 20, 49])
        expected = torch.cat([ROWS[1:20], ROWS[21:49]])
    assert run("convert", table, out).exit_code == 0
    if name == "x.npy":
        read = torch.from_numpy(np.load(out, allow_pickle=False))
    elif name == "x.safetensors":
        tensors = safetensors.torch.load_file(out)
        read = tensors["rows"]
        if edited:
            assert tensors["ids"].tolist() == [i for i in range(50) if i not in (0, 20, 49)]
    else:
        faiss = pytest.importorskip("faiss")
        index = faiss.read_index(str(out))
        assert index.metric_type == faiss.METRIC_INNER_PRODUCT
        read = torch.from_numpy(index.reconstruct_n(0, index.ntotal))
    assert torch.equal(read, expected)
    again = run("convert", table, out)
    assert again.exit_code == 1 and "nothing is overwritten" in again.output
    assert sorted(os.listdir(tmp_path)) == ["table", name]


def test_a_file_larger_than_the_memory_allowed_is_converted(tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 64)}
        )
        file.truncate(file.tell() + (1 << 28))  # 256 MiB, a hole
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # the threads of the parent are not there any more, and would be waited for
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (112 << 20), -1))
        try:
            source = formats.open_source(tmp_path / "a.npy")
            rows = sum(formats.import_sources([source], tmp_path / "out", torch.float16, 1 << 18))
            os._exit(0 if rows == 1 << 20 else 2)
        except BaseException:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


BAD = {
    "a.pkl": (lambda p: p.write_bytes(pickle.dumps(Bomb())), "a pickle can run any program .* never is"),
    "a.npy": (lambda p: np.save(p, np.array([Bomb()], dtype=object), allow_pickle=True), "must be .n, D."),
    "b.npy": (lambda p: p.write_bytes(b"\x93NUMPY\x01\x00v\x00{"), "this is no .npy array"),
    "c.npy": (
        lambda p: p.write_bytes(write_npy(p.parent).read_bytes()[:-1]),
        "needs 1328 bytes, the file has",
    ),
    "d.npy": (lambda p: np.save(p, np.asfortranarray(ROWS.numpy())), "column after column"),
    "a.npz": (lambda p: p.write_bytes(b"PK"), "the archive is damaged"),
    "b.npz": (lambda p: np.savez(p, x=ROWS.numpy(), y=ROWS.numpy()), "key must be one of its arrays, x, y"),
    "a.bin": (
        lambda p: torch.save({"block_emb": Bomb()}, p),
        "it must hold tensors only, and nothing is exec",
    ),
    "a.safetensors": (lambda p: p.write_bytes(b"\xff" * 40), "the file is damaged"),
    "a.faiss": (lambda p: p.write_bytes(b"IxHN" + b"\0" * 60), "a faiss file must be a flat index"),
    "b.faiss": (
        lambda p: p.write_bytes(formats._head(".faiss", 5, 2, torch.float32, False)),
        r"\[5, 2\] must",
    ),
    "a.txt": (lambda p: p.write_text("1 2 3"), "the name must end in one of .npy, .npz"),
    "missing.npy": (lambda p: None, "No such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_source_that_cannot_be_one_is_one_line_and_leaves_nothing(tmp_path, name):
    make, message = BAD[name]
    make(tmp_path / name)
    result = run("convert", tmp_path / name, tmp_path / "out")
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    (line,) = [line for line in result.output.splitlines() if line.startswith("realm-kernels:")]
    assert name in line
    with pytest.raises((ValueError, OSError), match=message):
        formats.open_source(tmp_path / name)


def test_the_index_of_a_checkpoint_cannot_point_outside_its_folder(tmp_path):
    write_checkpoint_in_shards(tmp_path)
    for shard in ("../secret.safetensors", "/etc/passwd", 7):
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"block_emb": shard}})
        )
        with pytest.raises(ValueError, match="a shard must be a file in this folder"):
            formats.open_source(tmp_path)


def test_verify_names_every_file_that_any_flipped_byte_is_in(tmp_path):
    table = write_table(tmp_path)
    with rk.TableEditor(table) as editor:
        editor.tombstone([0, 20])
    assert run("verify", table).exit_code == 0
    files = sorted(path for path in table.iterdir() if path.stat().st_size > 0)
    assert len(files) == 9
    for number, path in enumerate(files):
        raw = path.read_bytes()
        for position in {0, len(raw) - 1, *range(number, len(raw), 211)}:
            damaged = bytearray(raw)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            problems = rk.table.verify(table)
            assert len(problems) == 1 and path.name in problems[0], (path.name, position)
        path.write_bytes(raw)
    files[1].write_bytes(files[1].read_bytes()[:-1])
    files[2].unlink()
    result = run("verify", table)
    damaged = [line for line in result.output.splitlines() if line.startswith("damaged:")]
    assert result.exit_code == 1 and len(damaged) == 2
    assert files[1].name in damaged[0] + damaged[1] and files[2].name in damaged[0] + damaged[1]


def test_info_tells_what_is_there(tmp_path):
    table = write_table(tmp_path)
    with rk.TableEditor(table) as editor:
        editor.tombstone([0, 20])
        editor.append(ROWS)
    words = " ".join(run("info", table).output.replace("│", " ").split())
    for line in (
        "version 2",
        "rows 98",
        "tombstones 2",
        "next id 100",
        "width 6",
        "dtype float32",
        "shards 9",
    ):
        assert line in words
    missing = run("info", tmp_path)
    assert missing.exit_code == 1 and "this is not a table" in missing.output


@pytest.mark.parametrize("command", ["verify", "info", "convert"])
def test_help_shows_an_example(command):
    result = CliRunner().invoke(app, ["table", command, "--help"])
    assert result.exit_code == 0 and f"realm-kernels table {command}" in " ".join(result.output.split())
