"""realm-model: one clear line for what a user can mend, and a whole run from pretrain to answer."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from typer.testing import CliRunner

from realm_model import pretrain
from realm_model.cli import app, common, world
from realm_model.config import ModelConfig, RealmConfig, RunConfig, StageConfig, WorldConfig

SMALL = RunConfig(
    world=WorldConfig(subjects=10, facts_per_subject=3, relations=3),
    model=ModelConfig(vocab_size=400, hidden=16, layers=1, projection=8),
    ict=StageConfig(steps=3, batch=8, retriever_lr=1e-2),
    reader=StageConfig(steps=3, batch=8, reader_lr=1e-2),
    realm=StageConfig(steps=4, batch=4, retriever_lr=1e-2, reader_lr=1e-2),
    marginal=RealmConfig(refresh_every=2, refresh_lag=1),
)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(common.console, "width", 200)


@pytest.fixture
def call(monkeypatch):
    monkeypatch.setattr(
        world, "preset", lambda name, data: replace(SMALL, world=replace(SMALL.world, data=data))
    )
    runner = CliRunner()

    def invoke(*arguments):
        return runner.invoke(app, [str(argument) for argument in arguments])

    return invoke


def one_line(result):
    assert result.exit_code == 1
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    "command", ["world pretrain", "world evaluate", "world swap", "world answer", "convert"]
)
def test_every_command_shows_an_example(call, command):
    result = call(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"realm-model {command}" in re.sub(r"\s+", " ", result.stdout)


def test_a_run_from_pretrain_to_answer(call, tmp_path):
    run = tmp_path / "run"
    result = call("world", "pretrain", "--out", run, "--threads", 1)
    assert result.exit_code == 0, result.output
    files = {path.name for path in run.iterdir()}
    assert {"config.json", "metrics.jsonl", "loss.png", "recall.png", "utility.png"} <= files

    result = call("world", "evaluate", "--run", run)
    assert result.exit_code == 0, result.output
    assert "recall@5" in result.stdout
    assert 0 <= json.loads((run / "evaluation.json").read_text())["recall@5"] <= 1

    question = re.search(r'realm-model world answer "(.*)" --run', result.stdout).group(1)
    result = call("world", "answer", question, "--run", run)
    assert result.exit_code == 0, result.output
    assert "(null document)" in result.stdout and "utility" in result.stdout

    result = call("world", "swap", "--run", run)
    assert result.exit_code == 0, result.output
    assert "after: the new object" in result.stdout
    assert 0 <= json.loads((run / "swap.json").read_text())["held-out subjects"]["stays"]["accuracy"] <= 1

    assert "must hold [MASK]" in one_line(call("world", "answer", "no mask here", "--run", run))
    assert "another configuration" in one_line(call("world", "pretrain", "--out", run, "--seed", 5))


def test_a_missing_data_folder_is_one_line_and_leaves_nothing_behind(call, tmp_path):
    line = one_line(call("world", "pretrain", "--out", tmp_path / "run", "--data", tmp_path / "nowhere"))
    assert "cannot read" in line and "facts.jsonl" in line
    assert not (tmp_path / "run").exists()


def test_an_unwritable_run_folder_is_one_line(call, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "cannot write the run folder" in one_line(
        call("world", "pretrain", "--out", tmp_path / "file" / "run")
    )


def test_a_folder_without_a_run_is_one_line(call, tmp_path):
    assert "is no run folder" in one_line(call("world", "evaluate", "--run", tmp_path))


def test_fresh_drops_a_run_folder_and_nothing_else(call, tmp_path):
    (tmp_path / "thesis.txt").write_text("dear to somebody")
    assert "is not a run folder" in one_line(call("world", "pretrain", "--out", tmp_path, "--fresh"))
    assert (tmp_path / "thesis.txt").exists()


def test_a_published_checkpoint_is_converted(call, tmp_path):
    published = Path(__file__).parent / "goldens" / "realm" / "openqa"
    result = call("convert", published, "--out", tmp_path / "out", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "realm_model.published.OpenQA" in result.stdout
    assert {"model.safetensors", "table"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert "cannot read config.json" in one_line(call("convert", tmp_path, "--out", tmp_path / "other"))


def test_a_refresh_that_fails_is_told_and_training_goes_on(call, tmp_path, monkeypatch):
    from realm_model import stages

    embed, calls = stages.embed_all, []

    def fails_once_started(*arguments):
        calls.append(1)
        if len(calls) > 1:  # the first index is built; every refresh after it fails
            raise RuntimeError("killed")
        return embed(*arguments)

    monkeypatch.setattr(stages, "embed_all", fails_once_started)
    run = tmp_path / "run"
    result = call("world", "pretrain", "--out", run, "--threads", 1)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    realm = [line for line in lines if line["stage"] == "realm" and "loss" in line]
    assert len(realm) == SMALL.realm.steps
    assert realm[-1]["failed_refreshes"] > 0 and realm[-1]["age"] == SMALL.realm.steps - 1


@pytest.mark.parametrize(
    ("arm", "refreshes", "is_frozen"),
    [
        ((), 2, False),
        (("--masks", "span"), 2, False),
        (("--refresh-every", 1000), 1, False),
        (("--frozen-retriever",), 2, True),
    ],
)
def test_the_arms_of_an_ablation(call, tmp_path, monkeypatch, arm, refreshes, is_frozen):
    weights = []
    end_stage = pretrain.Trainer.end_stage

    def noting(trainer):
        weights.append([p.detach().clone() for p in trainer.model.retriever.parameters()])
        end_stage(trainer)

    monkeypatch.setattr(pretrain.Trainer, "end_stage", noting)
    run = tmp_path / "run"
    result = call("world", "pretrain", "--out", run, "--threads", 1, *arm)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["refreshes"] for line in lines if "refreshes" in line][-1] == refreshes
    copy_start = [line["stage"] for line in lines if "loss" in line].count("reader")
    assert copy_start == SMALL.reader.steps * (2 if "--masks" in arm else 1)
    _, before, after = weights  # of the ICT, the copy start and REALM
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) == is_frozen
