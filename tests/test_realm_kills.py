"""Corpora and indexes killed in the middle: nothing half is seen, and the same call again gives the same."""

import os
import re
from itertools import count

import pytest

pytest.importorskip("transformers")

from realm_openqa_cases import make_folders
from table_crash_cases import before_call, die, in_child

from realm_model.corpus import BlockStore, Document, build_corpus
from realm_model.corpus import build as build_module
from realm_model.openqa import index as index_module
from realm_model.openqa.folder import load_embedder
from realm_model.openqa.index import build_index, open_index

TEXTS = ["Rome, 1957. It rained.", "Only Oslo is named.", "Ada Lovelace was born in London.", "In Lima."]


def contents(folder):
    """Of every file. A table's shards have a name of their own at every build, which its manifest repeats."""
    token = re.compile(r"(?<=shard-\d{6}-)\w+")
    files = {token.sub("", path.name): path.read_bytes() for path in folder.iterdir()}
    return {name: found for name, found in files.items() if name not in (".lock", "manifest.json")}


@pytest.fixture
def corpus_of_batches(monkeypatch):
    """Builds a corpus of four documents, two at a time, into a folder."""
    monkeypatch.setattr(build_module, "BATCH", 2)
    documents = [Document(str(number), "a town", text) for number, text in enumerate(TEXTS)]
    return lambda out, progress=None: build_corpus(documents, out, vocabulary_size=90, progress=progress)


@pytest.mark.parametrize(("what", "documents"), [("vocabulary", 2), ("blocks", 2), ("blocks", 4)])
def test_a_corpus_killed_between_batches_is_built_as_if_nothing_had_been(
    corpus_of_batches, tmp_path, what, documents
):
    corpus_of_batches(tmp_path / "whole")
    out = tmp_path / "killed"

    def progress(now, read, blocks):
        if (now, read) == (what, documents):
            die(now)

    assert os.WIFSIGNALED(in_child(lambda: corpus_of_batches(out, progress)))
    assert not out.exists()
    corpus_of_batches(out)
    assert contents(out) == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "killed"}


def test_a_corpus_killed_before_any_call_is_whole_or_not_there(corpus_of_batches, tmp_path):
    corpus_of_batches(tmp_path / "whole")
    expected, seen = contents(tmp_path / "whole"), set()
    for number in count():
        out = tmp_path / f"c{number}"

        def work(out=out, number=number):
            with before_call(number, die):
                corpus_of_batches(out)

        killed = os.WIFSIGNALED(in_child(work))
        seen.add(out.exists())
        if not out.exists():
            corpus_of_batches(out)
        assert contents(out) == expected and len(BlockStore.open(out)) == len(TEXTS)
        if not killed:
            break
    assert number > 10 and seen == {True, False}


def test_an_index_killed_before_any_call_is_whole_or_not_there(tmp_path, monkeypatch):
    folders = make_folders(tmp_path)
    monkeypatch.setattr(index_module, "ENCODE_ROWS", 2)
    embedder = load_embedder(folders.model)
    identity = build_index(embedder, folders.store, tmp_path / "whole")
    expected, seen = contents(tmp_path / "whole"), set()
    for number in count():
        out = tmp_path / f"i{number}"

        def work(out=out, number=number):
            with before_call(number, die):
                build_index(embedder, folders.store, out)

        killed = os.WIFSIGNALED(in_child(work))
        committed = (out / "manifest.json").exists()
        seen.add(committed)
        if not committed:
            build_index(embedder, folders.store, out)
        table, found = open_index(out)
        assert found == identity and table.num_rows == len(folders.store) and contents(out) == expected
        if not killed:
            break
    assert number > 10 and seen == {True, False}
