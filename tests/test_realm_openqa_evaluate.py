"""How answers are counted, BM25 beside the model, and the commands from a corpus to an answer."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from realm_openqa_cases import CAPITALS, DOCUMENTS, QUESTIONS, make_folders
from typer.testing import CliRunner

from realm_model import checkpoints
from realm_model.cli import app, common
from realm_model.config import ModelConfig, RunConfig, to_json
from realm_model.model import Realm
from realm_model.openqa.assemble import Beams, BlockTexts, assemble
from realm_model.openqa.evaluate import evaluate, evaluate_bm25, recalls
from realm_model.openqa.folder import load_embedder, save_tuned
from realm_model.openqa.index import block_inputs, build_index
from realm_model.openqa.questions import Question, read_questions


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture
def call(monkeypatch):
    monkeypatch.setattr(common.console, "width", 160)

    def invoke(*arguments, **more):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], **more)

    return invoke


def test_recall_counts_the_first_block_that_answers_by_hand(folders):
    """Blocks 0 to 4 are of France, Norway, Italy, Spain and Peru."""
    rows = np.array([[1, 0, 2], [1, 0, 2], [3, 4, 2]])
    questions = [
        Question("a", "?", ("Paris",), "France#0"),  # second
        Question("b", "?", ("Oslo", "Madrid"), "Norway#0"),  # first
        Question(
            "c", "?", (r"is the city of O\w+",), "Spain#0", is_regex=True
        ),  # nowhere, yet document first
    ]
    texts = BlockTexts(folders.store)
    recall, gold = recalls(rows, questions, texts, folders.store)
    assert recall == {1: 1 / 3, 5: 2 / 3, 20: 2 / 3, 100: 2 / 3}
    assert gold == {1: 2 / 3, 5: 1.0, 20: 1.0, 100: 1.0}
    unknown = Question("d", "?", ("Lima",))
    assert recalls(rows[:1], [unknown], texts, folders.store) == ({k: 0.0 for k in (1, 5, 20, 100)}, None)


def test_evaluation_is_that_of_the_answers_one_by_one(folders):
    parts = assemble(folders.model, folders.corpus, folders.index, Beams(reader=2))
    questions = list(read_questions(folders.questions))
    blind = evaluate(parts, questions)
    assert blind.exact_match is None and blind.f1 is None  # its reader was never trained
    answers = [parts.model.answer([question.question])[0] for question in questions]
    # Half of the questions are made right.
    known = [
        Question(q.id, q.question, (a.text,) if i % 2 else q.answers, q.document_id)
        for i, (q, a) in enumerate(zip(questions, answers, strict=True))
    ]
    parts = replace(parts, can_read=True)
    seen = []
    result = evaluate(parts, known, seen.append)
    expected = [question.exact_match(a.text) for question, a in zip(known, answers, strict=True)]
    assert result.exact_match == sum(expected) / 5 >= 2 / 5 and seen[-1] == 5
    assert result.f1 == pytest.approx(sum(q.f1(a.text) for q, a in zip(known, answers, strict=True)) / 5)
    tops = [parts.model.retrieve([question.question], 1).indices.item() for question in questions]
    first = [QUESTIONS[row]["id"] == question.id for row, question in zip(tops, questions, strict=True)]
    assert result.gold[1] == sum(first) / 5 and result.gold[5] == 1.0


def test_bm25_finds_what_shares_the_rare_word(folders):
    pytest.importorskip("bm25s")
    result = evaluate_bm25(folders.store, list(read_questions(folders.questions)))
    assert result.recall[1] == result.gold[1] == 1.0 and result.exact_match is None


@pytest.mark.parametrize("shared", [False, True], ids=["two heads", "one head"])
def test_a_run_of_pre_training_is_a_model(folders, tmp_path, shared):
    """Its last checkpoint: both heads, and the factor of the relevance in the queries."""
    sizes = ModelConfig(
        hidden=16, layers=1, projection=8, query_length=24, document_length=24, shared_head=shared
    )
    tokenizer = folders.store.tokenizer
    realm = Realm(sizes, tokenizer.get_vocab_size()).eval()
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(to_json(RunConfig(model=sizes)))
    state = checkpoints.Checkpoint({"model": realm.state_dict()}, tokenizer)
    checkpoints.save(run / "checkpoints", 1, state)
    build_index(load_embedder(run), folders.store, tmp_path / "index")
    parts = assemble(run, folders.corpus, tmp_path / "index")
    questions = [f"what is the capital of {land}" for land in CAPITALS]
    top = parts.model.retrieve(questions, len(CAPITALS))
    asked = torch.tensor([tokenizer.encode(question).ids for question in questions[:1]])
    documents = realm.retriever.documents(*block_inputs(folders.store, range(5), 24))
    expected = realm.relevance(realm.retriever.queries(asked), documents[None])
    torch.testing.assert_close(top.scores[0], expected[0, top.indices[0]].detach(), rtol=0, atol=1e-5)
    save_tuned(parts.model, parts.identity, tmp_path / "tuned")
    again = assemble(tmp_path / "tuned", folders.corpus, tmp_path / "index").model
    assert torch.equal(again.retrieve(questions, 5).scores, parts.model.retrieve(questions, 5).scores)
    assert not parts.can_read
    body = parts.model.reader.realm.embeddings.word_embeddings.weight
    assert torch.equal(body, realm.reader.lm.bert.embeddings.word_embeddings.weight)


def test_the_walk_from_an_index_to_an_answer(call, folders, tmp_path):
    def told(*arguments, **more):
        result = call(*arguments, "--threads", 1, **more)
        assert result.exit_code == 0, result.output
        return result.stdout

    index, tuned = tmp_path / "index", tmp_path / "tuned"
    three = ["--corpus", folders.corpus, "--model", folders.model, "--index", index]
    out = told("index", "--corpus", folders.corpus, "--model", folders.model, "--out", index)
    assert f"5 blocks of corpus {folders.store.fingerprint[:12]}" in out
    result = call("split", "--corpus", folders.corpus, "--questions", folders.questions, "--out", tmp_path,
                  "--articles", 3)  # fmt: skip
    assert result.exit_code == 0, result.output
    held_out = tmp_path / "held_out.jsonl"
    assert len(held_out.read_text().splitlines()) == 2
    told("evaluate", *three, "--questions", held_out, "--out", tmp_path / "before.json", "--name", "before")
    settings = tmp_path / "finetune.json"
    settings.write_text(json.dumps({"steps": 4, "batch": 2, "lr": 9.0, "length": 48}))
    told("finetune", *three, "--questions", tmp_path / "train.jsonl", "--out", tuned, "--lr", 1e-3,
         "--config", settings)  # fmt: skip
    config = json.loads((tuned / "config.json").read_text())
    assert config["steps"] == 4 and config["lr"] == 1e-3  # the file's, and the flag's before the file's
    assert {"loss.png", "found.png", "metrics.jsonl"} <= {path.name for path in tuned.iterdir()}
    three[3] = tuned
    out = told("evaluate", *three, "--questions", held_out, "--out", tmp_path / "after.json", "--bm25",
               "--beside", tmp_path / "before.json")  # fmt: skip
    assert [name in out for name in ("before", "BM25", "tuned", "@100", "exact")] == [True] * 5
    rows = json.loads((tmp_path / "after.json").read_text())
    assert [row["name"] for row in rows] == ["BM25", "tuned"] and rows[1]["exact_match"] is not None
    out = told("answer", "what is the capital of Peru", "--model", tuned)  # a run knows its own corpus
    assert "p(z|x,y)" in out and "reader logit" in out and any(land in out for land in CAPITALS)
    out = told("answer", *three, input=f"what is the capital of Peru\n{'why ' * 60}\nand of Spain\n\n")
    assert out.count("reader logit") == 2


def test_a_whole_published_open_qa_needs_no_corpus(call, tmp_path):
    published = Path(__file__).parent / "goldens" / "realm" / "openqa"
    (case, *_) = json.loads((published.parent / "openqa.json").read_text())["cases"]
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": case["question"], "answer": [case["answer"]]}))
    arguments = ["--questions", questions, "--length", 18, "--reader-beam", 2, "--out", tmp_path / "out.json"]
    result = call("evaluate", "--model", published, *arguments)
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row["exact_match"] == 1.0 and row["recall@100"] == 1.0 and row["document@1"] is None
    pattern = case["answer"][:3] + "."
    questions.write_text(json.dumps({"question": case["question"], "answer": [pattern]}))
    assert call("evaluate", "--model", published, *arguments, "--regex").exit_code == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row["exact_match"] == row["regex_found"] == 1.0 and row["f1"] is None
    questions.write_text(json.dumps({"question": case["question"], "answer": [case["answer"][1:]]}))
    assert call("evaluate", "--model", published, *arguments, "--regex").exit_code == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert (row["exact_match"], row["regex_found"]) == (0.0, 1.0)  # inside the prediction, not at its start
    result = call("answer", case["question"], "--model", published)
    assert result.exit_code == 0 and case["answer"] in result.stdout.lower()


def test_what_does_not_belong_together_is_one_line(call, folders, tmp_path):
    from realm_model.corpus import build_corpus

    build_corpus(DOCUMENTS[1:], tmp_path / "other", vocabulary=folders.corpus / "vocab.txt")

    def line(*arguments):
        result = call(*arguments)
        assert result.exit_code == 1
        (only,) = result.stderr.strip().splitlines()
        return only

    three = ["--corpus", tmp_path / "other", "--model", folders.model, "--index", folders.index]
    for command in ("finetune", "evaluate"):
        asked = ["--questions", folders.questions, "--out", tmp_path / "out"]
        assert "do not belong together" in line(command, *three, *asked)
    assert "do not belong together" in line("answer", "who", *three)
    assert "fine-tune it first" in line("answer", "who", *three[2:], "--corpus", folders.corpus)
    assert "go together" in line("answer", "who", *three[:4])
    (tmp_path / "long.jsonl").write_text(json.dumps({"id": "a", "question": "why " * 60, "answer": ["x"]}))
    for command in ("finetune", "evaluate"):
        asked = ["--questions", tmp_path / "long.jsonl", "--out", tmp_path / "out"]
        told = line(command, *three[2:], "--corpus", folders.corpus, *asked)
        assert "question a: it may have 46 wordpieces, got 180" in told
    (tmp_path / "bad.json").write_text('{"stepz": 3}')
    assert "finetune has no option 'stepz'" in line(
        "finetune", *three, *asked, "--config", tmp_path / "bad.json"
    )
    assert not (tmp_path / "out").exists()
