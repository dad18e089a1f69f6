"""block_records.npy is read as numpy.save wrote it, and nothing that a file asks for is ever called."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from realm_model.published.records import BlockRecords, write_records

GOLDEN = Path(__file__).parent / "goldens" / "realm" / "openqa" / "block_records.npy"
RECORDS = [b"", b"a", b"b" * 255, b"c" * 256, "d\u00e9".encode(), b"e" * 70_000, b"(\x94."]


def objects(values):
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def header(count):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": (count,)})
    return file.getvalue()


def refused(path, *words):
    with pytest.raises(ValueError) as caught:
        BlockRecords.open(path)
    message = str(caught.value)
    assert path.name in message and "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("numpy", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("records", [RECORDS, [], [b"one"], [b"%0300d" % i for i in range(1200)]])
def test_what_numpy_saves_is_read(tmp_path, protocol, numpy, records):
    """Of any protocol it used (3 when the published files were made), by numpy 1 and by numpy 2."""
    path = tmp_path / "block_records.npy"
    content = pickle.dumps(objects(records), protocol=protocol)
    here = b"numpy._core.multiarray"
    assert content.count(here) == 1
    there = numpy.encode() + b".multiarray"
    content = content.replace(b"\x8c" + bytes([len(here)]) + here, b"\x8c" + bytes([len(there)]) + there)
    path.write_bytes(header(len(records)) + content.replace(here, there))
    assert list(BlockRecords.open(path)) == records


def test_records_are_written_as_numpy_would_and_copied_as_they_are(tmp_path):
    path, copy = tmp_path / "a.npy", tmp_path / "b.npy"
    write_records(RECORDS, path)
    assert list(np.load(path, allow_pickle=True)) == RECORDS
    opened = BlockRecords.open(path)
    assert len(opened) == len(RECORDS) and opened[-1] == RECORDS[-1] and opened[1:3] == RECORDS[1:3]
    with pytest.raises(IndexError):
        opened[len(RECORDS)]
    write_records(opened, copy)
    assert copy.read_bytes() == path.read_bytes()


def test_a_record_that_occurs_twice_is_read_twice(tmp_path):
    """pickle writes the same object once and refers to it after that."""
    block = b"the same object"
    write_records([block, b"other", block, block], tmp_path / "a.npy")
    assert (tmp_path / "a.npy").read_bytes().count(block) == 1
    assert list(BlockRecords.open(tmp_path / "a.npy")) == [block, b"other", block, block]


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_that_wants_to_run_something_is_refused_and_does_not(tmp_path, protocol):
    path, trace = tmp_path / "block_records.npy", tmp_path / "trace"
    values = objects([b"good", Touch(trace)])
    for content in (pickle.dumps(values, protocol), pickle.dumps(Touch(trace), protocol)):
        path.write_bytes(header(2) + content)
        refused(path, "block_records.npy is refused", "nothing in it was executed")
        assert not trace.exists()
    np.load(path, allow_pickle=True)
    assert trace.exists()  # the file does what it is feared for


@pytest.mark.parametrize(
    ("opcodes", "word"),
    [
        (b"cos\nsystem\n(X\x02\x00\x00\x00ls\x85R.", "os.system"),
        (b"\x8c\x02os\x8c\x06system\x93.", "os.system"),
        (b"(S'ls'\nios\nsystem\n.", "STRING"),
        (b"(ios\nsystem\n.", "INST"),
        (b"\x82\x01.", "EXT1"),
        (b"cnumpy\nndarray\n)\x81.", "EMPTY_TUPLE"),
        (b"cnumpy\nndarray\nK\x05\x85R.", "numpy.ndarray"),
        (b"Pname\n.", "PERSID"),
        (b"K\x01.", "something else"),
        (b"]]", "EMPTY_LIST"),
        (b"X\xff\xff\x00\x00", "a text of 65535 bytes"),
        (b"B\xff\xff\xff\x7f.", "cut short"),
        (b"\x8e" + b"\xff" * 8, "cut short"),
        (b"h\x00.", "cut short or damaged"),
        (b"e.", "cut short or damaged"),
        (b"\xff", "0xff"),
    ],
)
def test_opcodes_that_numpy_does_not_write_are_refused(tmp_path, opcodes, word):
    path = tmp_path / "block_records.npy"
    path.write_bytes(header(1) + b"\x80\x03" + opcodes)
    refused(path, word)


@pytest.mark.parametrize("value", ["text", 1, None, ("a",)], ids=str)
def test_a_record_that_is_not_bytes_is_refused(tmp_path, value):
    path = tmp_path / "block_records.npy"
    np.save(path, objects([b"good", value]), allow_pickle=True)
    refused(path, "is not bytes")


def test_another_array_is_refused(tmp_path):
    path = tmp_path / "block_records.npy"
    np.save(path, np.arange(3))
    refused(path, "its header is not that of a list of objects")
    np.save(path, objects([b"a", b"b"]).reshape(1, 2), allow_pickle=True)
    refused(path, "its header is not that of a list of objects")
    path.write_bytes(header(3) + pickle.dumps(objects([b"a", b"b"])))
    refused(path, "something else than one array of bytes")
    path.write_bytes(b"")
    refused(path)
    refused(tmp_path / "nowhere.npy", "cannot read")


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    whole, path = GOLDEN.read_bytes(), tmp_path / "block_records.npy"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refused(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, GOLDEN.stat().st_size - 1), byte=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_changes_the_text_alone(tmp_path, place, byte):
    content, path = bytearray(GOLDEN.read_bytes()), tmp_path / "block_records.npy"
    content[place] = byte
    path.write_bytes(content)
    try:
        records = BlockRecords.open(path)
    except ValueError as error:
        assert "block_records.npy" in str(error)
    else:
        assert len(records) == 6 and all(isinstance(record, bytes) for record in records)
