"""The whole walk, command by command: from a file of paragraphs to a question and its reasons."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("transformers")

from realm_openqa_cases import CAPITALS, QUESTIONS
from typer.testing import CliRunner

from realm_model.cli import app, common, text
from realm_model.config import StageConfig, preset


def small(name, corpus):
    """The preset of `make squad`, a few steps of it."""
    config = preset(name, corpus)
    return replace(
        config,
        model=replace(config.model, hidden=16, layers=1, projection=8, query_length=24, document_length=48),
        ict=StageConfig(steps=3, batch=4, retriever_lr=1e-2),
        reader=StageConfig(steps=2, batch=4, reader_lr=1e-2),
        realm=StageConfig(steps=3, batch=2, retriever_lr=1e-2, reader_lr=1e-2),
        marginal=replace(config.marginal, candidates=3, refresh_every=2, refresh_lag=1),
    )


def test_from_paragraphs_to_an_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(common.console, "width", 160)
    monkeypatch.setattr(text, "preset_named", small)

    def realm_model(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    paragraphs, questions = tmp_path / "paragraphs.jsonl", tmp_path / "questions.jsonl"
    bodies = (
        "{0} is a land. The capital of {0} is the city of {1}. People of {1} say that in 1900 it was small.",
        "Many rivers run through {0}. The longest of them was bridged in 1850 near {1}.",
    )
    documents = [
        {"id": f"{land}#{number}", "title": land, "text": body.format(land, town)}
        for land, town in CAPITALS.items()
        for number, body in enumerate(bodies)
    ]
    for path, records in ((paragraphs, documents), (questions, QUESTIONS)):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    corpus, ict, realm, tuned = (tmp_path / name for name in ("corpus", "ict", "realm", "tuned"))
    realm_model("corpus", paragraphs, "--out", corpus, "--block", 40, "--vocabulary-size", 200)
    realm_model("split", "--corpus", corpus, "--questions", questions, "--articles", 3, "--out", tmp_path)
    asked = ["--corpus", corpus, "--questions", tmp_path / "held_out.jsonl", "--threads", 1]
    realm_model("ict", "--corpus", corpus, "--out", ict, "--threads", 1)
    realm_model("pretrain", "--corpus", corpus, "--from", ict, "--out", realm, "--threads", 1)
    for model in (ict, realm):
        index = tmp_path / f"{model.name}-index"
        realm_model("index", "--corpus", corpus, "--model", model, "--out", index, "--threads", 1)
        realm_model(
            "evaluate", *asked, "--model", model, "--index", index, "--out", tmp_path / f"{model.name}.json"
        )
    index = tmp_path / "realm-index"
    realm_model(
        "finetune", "--corpus", corpus, "--model", realm, "--index", index, "--questions",
        tmp_path / "train.jsonl", "--out", tuned, "--steps", 3, "--batch", 2, "--length", 64, "--threads", 1,
    )  # fmt: skip
    out = realm_model(
        "evaluate", *asked, "--model", tuned, "--index", index, "--out", tmp_path / "tuned.json",
        "--beside", tmp_path / "ict.json", "--beside", tmp_path / "realm.json",
    )  # fmt: skip
    assert [name in out for name in ("ict", "realm", "tuned", "exact")] == [True] * 4
    (row,) = json.loads((tmp_path / "tuned.json").read_text())
    assert row["recall@20"] == 1.0 and row["exact_match"] is not None  # the 10 blocks are all
    out = realm_model("answer", "what is the capital of Norway", "--model", tuned, "--threads", 1)
    assert "p(z|x,y)" in out and any(land in out for land in CAPITALS)
