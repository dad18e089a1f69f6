"""A run killed at any step goes on from its last checkpoint, and with the fixed-lag refresher bit for bit."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from realm_model import checkpoints
from realm_model.checkpoints import Checkpoint
from realm_model.config import (
    ModelConfig,
    RealmConfig,
    RunConfig,
    StageConfig,
    WorldConfig,
    from_json,
    to_json,
)
from realm_model.inputs import wordpiece
from realm_model.pretrain import load_run, pretrain

CONFIG = RunConfig(
    threads=1,
    world=WorldConfig(subjects=10, facts_per_subject=3, relations=3, min_objects=5),
    # Dropout draws from torch's own generator, so that is covered too.
    model=ModelConfig(vocab_size=400, hidden=16, layers=1, projection=8, dropout=0.1),
    ict=StageConfig(steps=5, batch=8, retriever_lr=1e-2),
    reader=StageConfig(steps=5, batch=8, reader_lr=1e-2),
    realm=StageConfig(steps=12, batch=4, retriever_lr=1e-2, reader_lr=1e-2),
    marginal=RealmConfig(refresh_every=4, refresh_lag=2, corpus_share=0.25),
    evaluate_every=100,
    checkpoint_every=3,
)
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]


class Killed(BaseException):
    """Stands for a kill: nothing in the trainer may catch it."""


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"], line["loss"]) for line in lines if "loss" in line]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ignore(record):
    pass


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    pretrain(CONFIG, out, ignore)
    return out


def kill_at(stage, step):
    def report(record):
        if record["stage"] == stage and record["step"] == step and "loss" in record:
            raise Killed

    return report


# Checkpoints come when 3, 6 and 9 steps of a stage are done, and at its end; snapshots are taken before steps
# 4 and 8 and swapped in before steps 6 and 10. So the kills in REALM resume before any refresh, with a first
# one pending, and with the second pending and the first in use.
@pytest.mark.parametrize(
    ("stage", "step"),
    [("ict", 0), ("reader", 4), ("realm", 4), ("realm", 7), ("realm", 11)],
)
def test_a_killed_run_has_the_losses_of_an_undisturbed_one_bit_for_bit(undisturbed, tmp_path, stage, step):
    with pytest.raises(Killed):
        pretrain(CONFIG, tmp_path, kill_at(stage, step))
    pretrain(CONFIG, tmp_path, ignore)
    assert losses(tmp_path) == losses(undisturbed)
    ours, theirs = load_run(tmp_path)[1].state_dict(), load_run(undisturbed)[1].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_process_that_dies_at_once_loses_nothing_committed(undisturbed, tmp_path):
    (tmp_path / "config.json").write_text(to_json(CONFIG))
    script = f"""
import os
from pathlib import Path
from realm_model.config import read_config
from realm_model.pretrain import pretrain
out = Path({str(tmp_path)!r})
die = lambda record: record["stage"] == "realm" and record["step"] == 8 and os._exit(9)
pretrain(read_config(out), out, die)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    pretrain(CONFIG, tmp_path, ignore)
    assert losses(tmp_path) == losses(undisturbed)


def test_a_finished_run_stays_as_it_is(undisturbed):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    pretrain(CONFIG, undisturbed, ignore)
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_a_folder_of_another_run_is_refused(undisturbed):
    with pytest.raises(ValueError, match="holds a run with another configuration"):
        pretrain(replace(CONFIG, seed=1), undisturbed, ignore)


def test_nothing_in_a_run_folder_is_a_pickle(undisturbed):
    contents = [path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()]
    assert len(contents) > 5
    # Pickles since protocol 2 begin with 0x80, torch.save's archives with PK.
    assert not any(content.startswith((b"\x80", b"PK")) for content in contents)


def test_a_checkpoint_gives_back_what_was_saved(tmp_path):
    state = {"step": 3, "adam": {0: {"step": torch.tensor(2.0)}, 1: {}}, "list": [1.5, None, torch.arange(3)]}
    checkpoints.save(tmp_path, 7, Checkpoint(state, wordpiece(VOCABULARY)))
    loaded = checkpoints.load(tmp_path)
    assert loaded.state["step"] == 3 and loaded.state["list"][:2] == [1.5, None]
    assert loaded.state["adam"].keys() == {0, 1}
    assert torch.equal(loaded.state["adam"][0]["step"], torch.tensor(2.0))
    assert torch.equal(loaded.state["list"][2], torch.arange(3))
    assert loaded.tokenizer.get_vocab() == wordpiece(VOCABULARY).get_vocab()


def test_a_checkpoint_cut_short_while_it_is_written_is_not_seen(tmp_path, monkeypatch):
    tokenizer = wordpiece(VOCABULARY)
    checkpoints.save(tmp_path, 1, Checkpoint({"step": 1}, tokenizer))

    def fail(path):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints, "_flush", fail)
    with pytest.raises(OSError, match="no space left"):
        checkpoints.save(tmp_path, 2, Checkpoint({"step": 2}, tokenizer))
    assert checkpoints.load(tmp_path).state["step"] == 1


def test_a_damaged_checkpoint_is_named(tmp_path):
    checkpoints.save(tmp_path, 1, Checkpoint({"w": torch.ones(3)}, wordpiece(VOCABULARY)))
    (tmp_path / "000001" / "state.safetensors").write_bytes(b"\0" * 4)
    with pytest.raises(ValueError, match="checkpoint .*000001 is damaged"):
        checkpoints.load(tmp_path)


def as_format(number, folder):
    """The state of a checkpoint under another format; 1, the first, was not written down."""
    path = folder / checkpoints.STATE
    written = json.loads(path.read_text())
    written = written["state"] if number == 1 else written | {"format": number}
    path.write_text(json.dumps(written))


@pytest.mark.parametrize("step", [None, 7], ids=["finished", "killed"])
def test_an_older_checkpoint_opens_and_does_not_go_on(undisturbed, tmp_path, step):
    run = tmp_path / "run"
    if step is None:
        shutil.copytree(undisturbed, run)
    else:
        with pytest.raises(Killed):
            pretrain(CONFIG, run, kill_at("realm", step))
    expected = load_run(run)[1].state_dict()
    (last,) = (run / "checkpoints").iterdir()
    as_format(1, last)
    before = contents(run)
    wanted, found = checkpoints.FORMAT, 1
    with pytest.raises(
        ValueError, match=f"{last.name} must have format {wanted} .*, got {found}: train into"
    ):
        pretrain(CONFIG, run, ignore)
    assert contents(run) == before
    ours = load_run(run)[1].state_dict()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("number", [0, checkpoints.FORMAT + 1, "2", None])
def test_a_checkpoint_of_an_unknown_format_is_not_read(tmp_path, number):
    checkpoints.save(tmp_path, 1, Checkpoint({"step": 1}, wordpiece(VOCABULARY)))
    as_format(number, tmp_path / "000001")
    for read in (checkpoints.load, checkpoints.resume):
        with pytest.raises(ValueError, match=f"000001 must have a format from 1 to .*, got {number!r}: use"):
            read(tmp_path)


def test_a_configuration_survives_its_file():
    assert from_json(to_json(CONFIG)) == CONFIG


def test_an_asynchronous_run_is_resumed_and_refreshed(tmp_path):
    """Its losses are nobody's promise; that it goes on, step by step and with new tables, is."""
    config = replace(
        CONFIG,
        realm=replace(CONFIG.realm, steps=60),
        marginal=replace(CONFIG.marginal, refresh="async", refresh_every=2),
    )
    with pytest.raises(Killed):
        pretrain(config, tmp_path, kill_at("realm", 7))
    last = []
    pretrain(config, tmp_path, last.append)
    assert [step for stage, step, _ in losses(tmp_path) if stage == "realm"] == list(range(60))
    steps = [record for record in last if record["stage"] == "realm" and "loss" in record]
    assert steps[0]["step"] == 6 and steps[-1]["failed_refreshes"] == 0
    assert steps[-1]["refreshes"] > steps[0]["refreshes"]


@pytest.mark.parametrize(("mode", "masks"), [("token", "salient"), ("sequence", "token"), ("token", "span")])
def test_every_mode_and_every_mask_trains(tmp_path, mode, masks):
    config = replace(CONFIG, marginal=replace(CONFIG.marginal, mode=mode, masks=masks))
    pretrain(config, tmp_path, ignore)
    assert all(math.isfinite(loss) for _, _, loss in losses(tmp_path)) and len(losses(tmp_path)) == 22
