"""Laws of a corpus: read, split, tagged, packed, stored; and one clear line for whatever is wrong with it."""

import gzip
import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from realm_model.config import ModelConfig, TextConfig
from realm_model.corpus import BlockStore, Document, build_corpus, read_documents
from realm_model.corpus.build import pack_sentences
from realm_model.corpus.documents import MAX_LINE_BYTES, read_files
from realm_model.corpus.sentences import capitalised, salient_spans, sentences, tagger_named
from realm_model.corpus.statements import prepare_text
from realm_model.ragged import Ragged

TEXT = "Ada Lovelace was born in London. She met Charles Babbage on 5 June 1833. It rained."


def document(number, text=TEXT, **more):
    return Document(f"d{number}", "Ada", text, **more)


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def words(text, spans):
    return [text[begin:end] for begin, end in spans]


def test_a_ragged_array_pads_rows_and_the_row_behind_the_last_is_empty():
    ragged = Ragged.from_lists([[7, 8], [], [9, 10, 11]])
    assert [row.tolist() for row in (ragged[0], ragged[1], ragged[-1])] == [[7, 8], [], [9, 10, 11]]
    rows = torch.tensor([[2, 3], [0, 1]])
    assert ragged.padded(rows).tolist() == [[[9, 10, 11], [0, 0, 0]], [[7, 8, 0], [0, 0, 0]]]
    with pytest.raises(IndexError, match=r"row must be in \[0, 3\), got 3"):
        ragged[3]


def test_sentences_end_at_stops_that_no_abbreviation_explains():
    text = 'Dr. No met J. F. Smith of the U.S. Army. "Was it 3.5 km?" he asked. Yes! 1999 came.\nA title'
    assert words(text, sentences(text)) == [
        "Dr. No met J. F. Smith of the U.S. Army.",
        '"Was it 3.5 km?" he asked.',
        "Yes!",
        "1999 came.",
        "A title",
    ]


def test_named_entities_are_capitalised_runs_and_not_the_first_word_of_a_sentence():
    text = (
        "The Walt Disney Company paid. Rain fell on New York and the Isle of Man, said O'Brien's U.S. aide."
    )
    found = ["Walt Disney Company", "New York", "Isle of Man", "O'Brien", "U.S."]
    assert words(text, capitalised(text)) == found
    assert words("Он жил в городе Москва.", capitalised("Он жил в городе Москва.")) == ["Москва"]


@pytest.mark.parametrize(
    "date",
    ["October 12, 1943", "12 October 1943", "March 2007", "1957", "1990s", "8th century", "44 BC", "May 5th"],
)
def test_a_date_is_one_salient_span(date):
    text = f"It began on {date}, or so they say."
    assert words(text, salient_spans(text, capitalised)) == [date]


def test_no_date_is_found_inside_a_number():
    assert salient_spans("He ran 12000 m with 1957x and part 31415926.", capitalised) == []


def test_sentences_are_packed_greedily():
    assert pack_sentences([3, 4, 2, 5, 9, 1, 6], 7) == [[0, 1], [2, 3], [4], [5, 6]]


def test_a_store_gives_back_blocks_with_their_sentences_and_salient_spans(tmp_path):
    store = build_corpus(
        [document(0), document(1, "Only Rome is named.")], tmp_path / "c", vocabulary_size=90
    )
    again = BlockStore.open(tmp_path / "c")
    assert len(again) == 2 and again.fingerprint == store.fingerprint
    block = again[0]
    assert (block.text, block.title_text, block.document_id) == (TEXT, "Ada", "d0")
    assert block.body.dtype == np.int32
    assert block.body.tolist() == again.tokenizer.encode(TEXT, add_special_tokens=False).ids
    said = [again.tokenizer.decode(block.body[a:b].tolist()) for a, b in again.spans(0)]
    assert said == ["ada lovelace", "london", "charles babbage", "5 june 1833"]
    whole = np.concatenate([block.body[a:b] for a, b in again.sentences[0]])
    assert len(again.sentences[0]) == 3 and whole.tolist() == block.body.tolist()


def test_blocks_end_with_sentences_and_hold_no_two_documents(tmp_path):
    texts = [f"{TEXT} {TEXT}", TEXT]
    whole = build_corpus([document(i, t) for i, t in enumerate(texts)], tmp_path / "a", vocabulary_size=90)
    limit = len(whole[1].body)
    store = build_corpus(
        [document(i, t) for i, t in enumerate(texts)], tmp_path / "b", tmp_path / "a", block_wordpieces=limit
    )
    assert [store[i].document_id for i in range(len(store))] == ["d0", "d0", "d1"]
    assert all(store[i].text == TEXT for i in range(3))
    assert store.twins(torch.tensor([2])).tolist() == [[0, 1, 2]]  # equal bodies know each other


def test_a_sentence_longer_than_a_block_is_cut_between_words(tmp_path):
    text = "In Paris is " + " ".join(["wonderful"] * 9)
    build_corpus([document(0, "In Paris is wonderful.")], tmp_path / "v", vocabulary_size=60)
    store = build_corpus([document(0, text)], tmp_path / "c", tmp_path / "v", block_wordpieces=5)
    assert max(len(store[i].body) for i in range(len(store))) <= 5
    assert " ".join(store[i].text for i in range(len(store))) == text


def test_given_spans_go_before_the_tagger(tmp_path):
    path = write(tmp_path / "d.jsonl", {"id": 1, "title": "", "text": TEXT, "spans": [[76, 82]]})
    store = build_corpus(read_documents(path), tmp_path / "c", vocabulary_size=90)
    assert store.tokenizer.decode(store[0].body[slice(*store.spans(0)[0])].tolist()) == "rained"
    assert len(store.spans(0)) == 1


def test_a_pipeline_of_spacy_names_the_entities(tmp_path):
    spacy = pytest.importorskip("spacy")
    pipeline = spacy.blank("en")
    patterns = (("PERSON", "Ada Lovelace"), ("CARDINAL", "three"), ("DATE", "May 1843"))
    ruler = pipeline.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": label, "pattern": pattern} for label, pattern in patterns])
    pipeline.to_disk(tmp_path / "pipeline")
    tagger = tagger_named(f"spacy:{tmp_path / 'pipeline'}")
    text = "Ada Lovelace wrote three notes in London in May 1843."
    assert words(text, salient_spans(text, tagger)) == ["Ada Lovelace", "May 1843"]
    with pytest.raises(ValueError, match="the tagger spacy:nowhere needs that pipeline: .*nowhere"):
        tagger_named("spacy:nowhere")


def test_a_tagger_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ValueError, match="spacy:en needs spaCy, which is not installed"):
        tagger_named("spacy:en")
    with pytest.raises(ValueError, match="tagger must be rules, dates or spacy:PIPELINE, got 'none'"):
        tagger_named("none")


def test_equal_documents_make_equal_stores_and_other_text_another_fingerprint(tmp_path):
    one, two, other = (
        build_corpus([document(0, text)], tmp_path / name, vocabulary_size=90)
        for name, text in (("a", TEXT), ("b", TEXT), ("c", TEXT + " Rome burned."))
    )
    assert one.fingerprint == two.fingerprint != other.fingerprint
    files = [{path.name: path.read_bytes() for path in store.directory.iterdir()} for store in (one, two)]
    assert files[0] == files[1]


def test_the_three_forms_of_files_are_read(tmp_path):
    (tmp_path / "a.tsv").write_text('id\ttext\ttitle\n1\t"A ""big"" cat."\tCats\n', encoding="utf-8")
    (tmp_path / "psgs_w100.tsv.gz").write_bytes(gzip.compress((tmp_path / "a.tsv").read_bytes()))
    (tmp_path / "b.tsv").write_text('1\tCats\t"Big," he said.\r\n', encoding="utf-8")
    squad = {"data": [{"title": "Big_cats", "paragraphs": [{"context": "One."}, {"context": "Two."}]}]}
    (tmp_path / "c.json").write_text(json.dumps(squad))
    found = [
        [(d.id, d.title, d.text) for d in read_documents(tmp_path / name)]
        for name in ("a.tsv", "psgs_w100.tsv.gz", "b.tsv", "c.json")
    ]
    assert found == [
        [("1", "Cats", 'A "big" cat.')],
        [("1", "Cats", 'A "big" cat.')],
        [("1", "Cats", '"Big," he said.')],
        [("Big cats#0", "Big cats", "One."), ("Big cats#1", "Big cats", "Two.")],
    ]


GOOD = b'{"id": "1", "title": "", "text": "Rome, 1957."}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + b'{"id": "2", "text": " "}\n', "line 2: text must be a string that is not empty"),
        ("a.jsonl", GOOD + b'{"id": "2", "text": "' + b"x" * MAX_LINE_BYTES, "line 2: a line may have"),
        ("a.jsonl", GOOD + b'{"id": "2", "text": "\xff"}\n', "line 2: must be UTF-8, got byte 0xff at 21"),
        ("a.jsonl", GOOD + b"\n" + GOOD, "line 3: id must be its own, got '1' again"),
        ("a.jsonl", GOOD + b"{", "line 2: must be JSON"),
        (
            "a.jsonl",
            GOOD + b'{"id": "2", "text": "Rome \\ud83d."}\n',
            r"line 2: text must be Unicode, got a lone \\ud83d at 5",
        ),
        (
            "a.jsonl",
            b'{"id": "1", "text": "ab", "spans": [[1, 3]]}',
            r"line 1: spans .* \[0, 2\], got \[1, 3\]",
        ),
        (
            "a.jsonl",
            b'{"id": "1", "text": "nothing here."}',
            "line 1: the corpus that begins here must hold a salient span to be masked, got none",
        ),
        ("a.jsonl", b"", "there must be at least one document, got none"),
        ("a.tsv", b"1\tRome\n", "line 1: must have 3 columns, id, title, text, got 2"),
        ("a.json", b'{"data": [{"title": "x"}]}', "must be SQuAD's data, title, paragraphs, context"),
        ("a.jsonl.gz", gzip.compress(GOOD)[:-9], "cannot read .*a.jsonl.gz: Compressed file ended"),
        ("a.jsonl.gz", GOOD, "cannot read .*a.jsonl.gz: Not a gzipped file"),
        ("a.txt", GOOD, r"must end in .jsonl, .tsv, .json"),
    ],
    ids=[
        "empty",
        "long",
        "utf8",
        "twice",
        "json",
        "half",
        "spans",
        "salient",
        "none",
        "tsv",
        "squad",
        "gzip",
        "no gzip",
        "suffix",
    ],
)
def test_a_bad_corpus_is_one_line_and_writes_nothing(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        build_corpus(read_documents(tmp_path / name), tmp_path / "out", vocabulary_size=200)
    assert "\n" not in str(caught.value) and name in str(caught.value) or "build_corpus" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_corpus_is_never_written_over(tmp_path):
    build_corpus([document(0)], tmp_path / "c", vocabulary_size=90)
    with pytest.raises(ValueError, match="exists: a corpus is written to a new directory"):
        build_corpus([document(1)], tmp_path / "c", vocabulary_size=90)
    assert BlockStore.open(tmp_path / "c")[0].document_id == "d0"


def test_a_vocabulary_too_small_for_the_letters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocabulary_size must be at least"):
        build_corpus([document(0)], tmp_path / "c", vocabulary_size=20)


def test_reading_tells_how_far_it_came(tmp_path):
    one = write(tmp_path / "a.jsonl", *({"id": str(i), "text": TEXT} for i in range(3)))
    two = tmp_path / "b.json"
    two.write_text(json.dumps({"data": [{"title": "Ada", "paragraphs": [{"context": TEXT}]}]}))
    seen = []
    assert len(list(read_files([one, two], seen.append))) == 4
    sizes = [path.stat().st_size for path in (one, two)]
    assert seen == [sizes[0] // 3, sizes[0] // 3 * 2, sizes[0], sum(sizes)]


def test_an_open_store_costs_a_few_numbers_a_block(tmp_path):
    """Its columns are mapped: opened, drawn from and split, it holds no list of its blocks."""
    texts = (f"{TEXT} She wrote note {number} in 1843." for number in range(3000))
    build_corpus((document(n, text) for n, text in enumerate(texts)), tmp_path / "c", vocabulary_size=90)
    model = ModelConfig(query_length=64, document_length=291)
    tracemalloc.start()
    try:
        store = BlockStore.open(tmp_path / "c")
        own = prepare_text(store, TextConfig(str(tmp_path / "c")), model, 0).own
        assert len(own[torch.arange(0, len(own), len(own) // 8)]) >= 8
        held = tracemalloc.get_traced_memory()[0]
        columns = sum(path.stat().st_size for path in (tmp_path / "c").glob("*.values"))
    finally:
        tracemalloc.stop()
    assert len(store) == 3000 and columns > 1_000_000
    # Blocks to train on, where their spans begin and end, contexts: four numbers a block, and small things.
    assert held < 4 * 8 * len(store) + 50_000


def test_a_damaged_store_is_named(tmp_path):
    with pytest.raises(ValueError, match="is no corpus: cannot read corpus.json"):
        BlockStore.open(tmp_path)
    build_corpus([document(0)], tmp_path / "c", vocabulary_size=90)
    (tmp_path / "c" / "bodies.values").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"bodies.values must hold \d+ bytes, got 4"):
        BlockStore.open(tmp_path / "c")


def test_a_corpus_is_the_same_bytes_in_every_process(tmp_path):
    # Python's sets and dicts of strings are ordered by a seed that each process draws.
    names = ["Ada", "Boole", "Curie", "Darwin", "Euler", "Fermat"]
    write(
        tmp_path / "documents.jsonl",
        *(
            {
                "id": str(i),
                "title": name,
                "text": f"In {1700 + i} {name} met {names[i % 5]} by the {name}sea.",
            }
            for i, name in enumerate(names * 20)
        ),
    )
    script = """
import sys
from realm_model.corpus import build_corpus, read_documents

build_corpus(read_documents(sys.argv[1]), sys.argv[2], vocabulary_size=150)
"""
    contents = []
    for seed in ("1", "2"):
        arguments = [sys.executable, "-c", script, tmp_path / "documents.jsonl", tmp_path / seed]
        subprocess.run(arguments, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
        contents.append({path.name: path.read_bytes() for path in (tmp_path / seed).iterdir()})
    assert contents[0] == contents[1] and len(contents[0]) > 5
