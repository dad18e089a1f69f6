"""block_records.npy, the text of the blocks: a numpy object array of bytes, read without unpickling.

Such a file is a header and a pickle, and numpy reads it by executing the pickle. Here a reader that knows the
two dozen opcodes numpy.save writes for an array of bytes walks through them and notes where each record lies:
nothing is called, whatever the file names, and an opcode or a name beyond those is refused. The file is
mapped; 13 million records cost 8 bytes each until they are asked for.
"""

from __future__ import annotations

import mmap
import os
import pickletools
import re
import shutil
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

BLOCK_RECORDS = "block_records.npy"

# What names of a pickle may be: numpy 1 and 2 differ in the first. They are compared, never imported.
_RECONSTRUCT = (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"))
_NDARRAY, _DTYPE = ("numpy", "ndarray"), ("numpy", "dtype")

_BYTES = {0x43: (1, "<B"), 0x42: (4, "<I"), 0x8E: (8, "<Q")}  # SHORT_BINBYTES, BINBYTES, BINBYTES8
_TEXT = {0x8C: (1, "<B"), 0x58: (4, "<I")}  # SHORT_BINUNICODE, BINUNICODE
_INTEGERS = {0x4B: (1, "<B"), 0x4D: (2, "<H"), 0x4A: (4, "<i")}  # BININT1, BININT2, BININT
_CONSTANTS = {0x4E: None, 0x88: True, 0x89: False}  # NONE, NEWTRUE, NEWFALSE
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}  # TUPLE1, TUPLE2, TUPLE3
_PUTS, _GETS = {0x71: (1, "<B"), 0x72: (4, "<I")}, {0x68: (1, "<B"), 0x6A: (4, "<I")}
_PROTO, _FRAME, _MEMOIZE, _GLOBAL, _STACK_GLOBAL = 0x80, 0x95, 0x94, 0x63, 0x93
_MARK, _TUPLE, _LIST, _APPEND, _APPENDS = 0x28, 0x74, 0x5D, 0x61, 0x65
_REDUCE, _BUILD, _STOP = 0x52, 0x62, 0x2E
_LONGEST_NAME = 64
_HEADER = re.compile(rb"\{'descr': '\|O', 'fortran_order': False, 'shape': \((\d{1,18}),\), \} *\n")
_MARKER = object()
_UINT32 = struct.Struct("<I").unpack_from


class BlockRecords(Sequence[bytes]):
    """The records of a file, in order; `records[i]` reads one."""

    def __init__(self, path: Path, data: mmap.mmap, places: array[int]) -> None:
        self.path, self._data, self._places = path, data, places

    @classmethod
    def open(cls, path: Path) -> BlockRecords:
        """Raises ValueError where the file is anything but an object array of bytes; nothing is executed."""
        try:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            start, count = _header(data)
            places = _Pickle(data, start).read(count)
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, struct.error, IndexError) as error:
            reason = "it is cut short or damaged" if isinstance(error, struct.error | IndexError) else error
            raise ValueError(
                f"{path} is refused: it must be an object array of bytes as numpy.save writes it, and "
                f"nothing in it was executed: {reason}"
            ) from error
        return cls(path, data, places)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, length = _extent(self._data, self._places[index])
        return self._data[start : start + length]


def write_records(records: Sequence[bytes], path: Path) -> None:
    """What numpy.save writes, and so what the port reads."""
    partial = path.with_name(f"{path.name}.partial")
    if isinstance(records, BlockRecords):
        shutil.copyfile(records.path, partial)
    else:
        values = np.empty(len(records), dtype=object)
        values[:] = records
        with partial.open("wb") as file:
            np.save(file, values)
    os.replace(partial, path)


class _Bytes(NamedTuple):
    place: int  # of the opcode


class _Name(NamedTuple):
    module: str
    name: str


class _Made(NamedTuple):
    """What a pickle would have made: "array" or "dtype"."""

    kind: str


class _Pickle:
    """The stack machine of a pickle, with places for bytes, and names for what it would have called."""

    def __init__(self, data: mmap.mmap, start: int) -> None:
        self.data, self.at = data, start
        self.stack: list[Any] = []
        # What was memoised: the place of bytes, or -1 - i for the i-th other value.
        self.memo: array[int] = array("q")
        self.others: list[Any] = []
        self.records: array[int] | None = None
        self.state: Any = None

    def read(self, count: int) -> array[int]:
        """The places of the `count` records of the array."""
        if self.data[self.at] != _PROTO or self.data[self.at + 1] not in (3, 4, 5):
            raise ValueError("its pickle has no protocol of 3 to 5")
        self.at += 2
        while (code := self.data[self.at]) != _STOP:
            self._step(code)
        expected = (1, (count,), _Made("dtype"), False, self.records)
        if self.records is None or self.stack != [_Made("array")] or self.state != expected:
            raise ValueError("its pickle makes something else than one array of bytes")
        if len(self.records) != count:
            raise ValueError(f"its header promises {count} records, its pickle has {len(self.records)}")
        return self.records

    def _step(self, code: int) -> None:
        place = self.at
        self.at += 1
        if code in _BYTES:
            start, length = _extent(self.data, place)
            if start + length > len(self.data):
                raise IndexError
            self.at = start + length
            self.stack.append(_Bytes(place))
        elif code == _MEMOIZE:
            self._memoize(len(self.memo))
        elif code in _PUTS:
            self._memoize(self._number(*_PUTS[code]))
        elif code in _GETS:
            found = self.memo[self._number(*_GETS[code])]
            self.stack.append(_Bytes(found) if found >= 0 else self.others[-1 - found])
        elif code == _MARK:
            self.stack.append(_MARKER)
            if self.records is not None and self.stack[-2] is self.records:
                self._batch()
        elif code in (_APPEND, _APPENDS):
            items = self._pop_to_mark() if code == _APPENDS else [self.stack.pop()]
            records = self.records
            if records is None or self.stack[-1] is not records:
                raise self._refused(code, place)
            for item in items:
                if not isinstance(item, _Bytes):
                    raise ValueError(f"the record before byte {place} is not bytes")
                records.append(item.place)
        elif code in _TEXT:
            self.stack.append(self._text(self._number(*_TEXT[code])))
        elif code in _INTEGERS:
            self.stack.append(self._number(*_INTEGERS[code]))
        elif code in _CONSTANTS:
            self.stack.append(_CONSTANTS[code])
        elif code in _TUPLES:
            count = _TUPLES[code]
            self.stack[-count:] = [tuple(self.stack[-count:])]
        elif code == _TUPLE:
            self.stack.append(tuple(self._pop_to_mark()))
        elif code == _LIST and self.records is None:
            self.records = array("q")
            self.stack.append(self.records)
        elif code == _GLOBAL:
            self.stack.append(self._name(self._line(), self._line()))
        elif code == _STACK_GLOBAL:
            name, module = self.stack.pop(), self.stack.pop()
            self.stack.append(self._name(module, name))
        elif code == _REDUCE:
            arguments, called = self.stack.pop(), self.stack.pop()
            self.stack.append(self._made(called, arguments))
        elif code == _BUILD:
            state = self.stack.pop()
            if self.stack[-1] == _Made("array") and self.state is None:
                self.state = state
            elif self.stack[-1] != _Made("dtype"):
                raise self._refused(code, place)
        elif code == _FRAME:
            self.at += 8
        else:
            raise self._refused(code, place)

    def _batch(self) -> None:
        """Records that follow each other, each memoised at once: what _step would do, four times as fast.

        It stops before anything else and leaves that to _step.
        """
        data, at, memo, found = self.data, self.at, self.memo, array("q")
        while True:
            code = data[at]
            if code == 0x43:  # SHORT_BINBYTES
                end = at + 2 + data[at + 1]
            elif code == 0x42:  # BINBYTES
                end = at + 5 + _UINT32(data, at + 1)[0]
            elif code == _FRAME:
                at += 9
                continue
            else:
                break
            put = data[end]
            if put == _MEMOIZE:
                end += 1
            elif put == 0x72 and _UINT32(data, end + 1)[0] == len(memo):  # LONG_BINPUT
                end += 5
            else:
                break
            memo.append(at)
            found.append(at)
            at = end
        self.at = at
        if code == _APPENDS and self.records is not None:
            self.at += 1
            self.stack.pop()  # the mark
            self.records.extend(found)
        else:
            self.stack += map(_Bytes, found)

    def _memoize(self, slot: int) -> None:
        if slot != len(self.memo):
            raise ValueError(f"its pickle memoises {slot} where {len(self.memo)} is next")
        value = self.stack[-1]
        if isinstance(value, _Bytes):
            self.memo.append(value.place)
        else:
            self.others.append(value)
            self.memo.append(-len(self.others))

    def _name(self, module: Any, name: Any) -> _Name:
        if (module, name) not in (*_RECONSTRUCT, _NDARRAY, _DTYPE):
            raise ValueError(f"its pickle names {module}.{name}")
        return _Name(module, name)

    def _made(self, called: Any, arguments: Any) -> _Made:
        """numpy's own two calls: an empty array to be filled, and the dtype of objects."""
        if called in _RECONSTRUCT and isinstance(arguments, tuple) and arguments[:2] == (_NDARRAY, (0,)):
            return _Made("array")
        if called == _DTYPE and arguments in (("O8", False, True), ("O4", False, True)):
            return _Made("dtype")
        name = ".".join(called) if isinstance(called, _Name) else "something"
        raise ValueError(f"its pickle calls {name} as numpy.save does not")

    def _pop_to_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARKER:
            at -= 1
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def _number(self, size: int, form: str) -> int:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += size
        return value

    def _text(self, length: int) -> str:
        if length > _LONGEST_NAME:
            raise ValueError(f"its pickle has a text of {length} bytes")
        self.at += length
        return self.data[self.at - length : self.at].decode("ascii", "replace")

    def _line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + _LONGEST_NAME)
        if end < 0:
            raise ValueError(f"its pickle has a long name at byte {self.at}")
        text = self._text(end - self.at)
        self.at += 1
        return text

    def _refused(self, code: int, place: int) -> ValueError:
        names = {opcode.code: opcode.name for opcode in pickletools.opcodes}
        what = names.get(chr(code), f"{code:#04x}")
        return ValueError(f"its pickle has the opcode {what} at byte {place}")


def _header(data: mmap.mmap) -> tuple[int, int]:
    """Where the pickle begins, and how many records the header of a list of objects promises."""
    (length,) = struct.unpack_from("<H", data, 8)
    header = _HEADER.fullmatch(data[10 : 10 + length])
    if data[:8] != b"\x93NUMPY\x01\x00" or header is None:
        raise ValueError("its header is not that of a list of objects")
    return 10 + length, int(header[1])


def _extent(data: mmap.mmap, place: int) -> tuple[int, int]:
    """Where the bytes pushed by the opcode at `place` begin, and how many they are."""
    size, form = _BYTES[data[place]]
    return place + 1 + size, struct.unpack_from(form, data, place + 1)[0]
