"""Documents from files: JSONL, TSV, and SQuAD's JSON. Every error names the file and the line.

.jsonl   {"id": ..., "title": ..., "text": ...} a line; "spans": [[begin, end], ...], characters of the
         text, may give its salient spans
.tsv     id, title, text; or in the order of a header, as DPR's psgs_w100.tsv has one (id, text, title)
.json    {"data": [{"title": ..., "paragraphs": [{"context": ...}]}]}, as SQuAD's
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A longer line is a file that is not what its name says, and would be held in memory whole.
MAX_LINE_BYTES = 8 << 20
COLUMNS = ("id", "title", "text")

# Sees the number of bytes read so far.
See = Callable[[int], None]


@dataclass(frozen=True)
class Document:
    """id: unique in the corpus. spans: salient spans of the text in characters, None where nobody gave any.
    source: where it was read, for errors.
    """

    id: str
    title: str
    text: str
    spans: tuple[tuple[int, int], ...] | None = None
    source: str = ""


def _unseen(read: int) -> None:
    pass


def read_files(paths: Iterable[Path], see: See) -> Iterator[Document]:
    """read_documents of several files, one after the other."""
    before = 0
    for path in paths:
        yield from read_documents(path, lambda read, before=before: see(before + read))  # type: ignore[misc]
        before += path.stat().st_size


def read_documents(path: str | Path, see: See = _unseen) -> Iterator[Document]:
    """The documents of a file, one at a time; the form is told by the suffix.

    Raises ValueError, naming the file and the line, for another suffix, a file that cannot be read, invalid
    UTF-8, a line longer than 8 MiB, a field that lacks, an empty id or text, and spans outside of the text.
    """
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".tsv": _read_tsv, ".json": _read_squad}
    if path.suffix not in readers:
        raise ValueError(f"{path} must end in {', '.join(readers)}: the suffix tells the form")
    try:
        yield from readers[path.suffix](path, see)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error


def read_lines(path: Path, see: See = _unseen) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, each with the words that name its place, "FILE, line N".

    Raises ValueError for invalid UTF-8 and for lines longer than 8 MiB.
    """
    with path.open("rb") as file:
        number = read = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            read += len(line)
            see(read)
            where = f"{path}, line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"{where}: a line may have {MAX_LINE_BYTES} bytes, got more")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where}: must be UTF-8, got byte 0x{line[error.start]:02x} at {error.start}"
                ) from error
            if number == 1:
                text = text.removeprefix("\ufeff")
            if text.strip():
                yield text.removesuffix("\n").removesuffix("\r"), where


def _read_jsonl(path: Path, see: See) -> Iterator[Document]:
    for line, where in read_lines(path, see):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: must be JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: must be an object with {', '.join(COLUMNS)}, got {line[:40]!r}")
        yield _document(record, where)


def _read_tsv(path: Path, see: See) -> Iterator[Document]:
    columns: tuple[str, ...] | None = None
    for line, where in read_lines(path, see):
        fields = [_unquote(field) for field in line.split("\t")]
        if columns is None:
            header = tuple(field.strip().lower() for field in fields)
            is_header = sorted(header) == sorted(COLUMNS)
            columns = header if is_header else COLUMNS
            if is_header:
                continue
        if len(fields) != len(columns):
            raise ValueError(
                f"{where}: must have {len(columns)} columns, {', '.join(columns)}, got {len(fields)}"
            )
        yield _document(dict(zip(columns, fields, strict=True)), where)


def _read_squad(path: Path, see: See) -> Iterator[Document]:
    try:
        data = path.read_bytes()
        see(len(data))
        articles = json.loads(data.decode("utf-8"))["data"]
        for article in articles:
            title = article["title"].replace("_", " ")
            for number, paragraph in enumerate(article["paragraphs"]):
                name = f"{title}#{number}"
                record = {"id": name, "title": title, "text": paragraph["context"]}
                yield _document(record, f"{path}, paragraph {name}")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: must be JSON in UTF-8: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: must be SQuAD's data, title, paragraphs, context: {error!r}") from error


def _document(record: dict[str, Any], where: str) -> Document:
    for name in ("id", "text"):
        if not isinstance(record.get(name), str | int) or not str(record[name]).strip():
            raise ValueError(f"{where}: {name} must be a string that is not empty, got {record.get(name)!r}")
    title = record.get("title")
    if title is not None and not isinstance(title, str):
        raise ValueError(f"{where}: title must be a string, got {title!r}")
    for name in COLUMNS:
        require_unicode(record.get(name), name, where)
    text = str(record["text"])
    return Document(str(record["id"]), title or "", text, _spans(record.get("spans"), text, where), where)


def require_unicode(value: Any, name: str, where: str) -> None:
    """Raise ValueError for a text with half of a character, which JSON can hold and UTF-8 cannot."""
    try:
        str(value).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{where}: {name} must be Unicode, got a lone {half} at {error.start}") from error


def _spans(given: Any, text: str, where: str) -> tuple[tuple[int, int], ...] | None:
    if given is None:
        return None
    rule = f"{where}: spans must be [begin, end] pairs of characters in [0, {len(text)}]"
    if not isinstance(given, list):
        raise ValueError(f"{rule}, got {given!r}")
    for span in given:
        is_pair = isinstance(span, list) and len(span) == 2 and all(type(place) is int for place in span)
        if not is_pair or not 0 <= span[0] < span[1] <= len(text):
            raise ValueError(f"{rule}, got {span!r}")
    return tuple((begin, end) for begin, end in given)


def _unquote(field: str) -> str:
    """A field as CSV quotes it, "..." with every quote inside doubled; any other field is left as it is."""
    inner = field[1:-1]
    is_quoted = len(field) >= 2 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if is_quoted else field
