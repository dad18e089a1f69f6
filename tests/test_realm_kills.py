"""Every stage killed in the middle, by SIGKILL: nothing half is seen, and the same call gives the same."""

import json
import os
import random
import re
from dataclasses import replace
from itertools import count

import pytest

pytest.importorskip("transformers")

from realm_openqa_cases import make_folders
from table_crash_cases import before_call, die, in_child
from typer.testing import CliRunner

from realm_model.cli import app
from realm_model.config import ModelConfig, RealmConfig, RunConfig, StageConfig, TextConfig, WorldConfig
from realm_model.corpus import BlockStore, Document, build_corpus
from realm_model.corpus import build as build_module
from realm_model.openqa import index as index_module
from realm_model.openqa.finetune import FinetuneConfig, finetune
from realm_model.openqa.folder import load_embedder
from realm_model.openqa.index import build_index, open_index
from realm_model.pretrain import pretrain
from realm_model.start import start_from

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


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """By name what trains into a folder, as (out, report), and its number of records."""
    root = tmp_path_factory.mktemp("stages")
    folders = make_folders(root)
    world = RunConfig(
        threads=1,
        world=WorldConfig(subjects=10, facts_per_subject=3, relations=3, min_objects=5),
        model=ModelConfig(
            vocab_size=400,
            hidden=16,
            layers=1,
            projection=8,
            query_length=20,
            document_length=304,
            dropout=0.1,
        ),
        ict=StageConfig(steps=5, batch=4, retriever_lr=1e-2),
        reader=StageConfig(steps=4, batch=4, reader_lr=1e-2),
        realm=StageConfig(steps=9, batch=4, retriever_lr=1e-2, reader_lr=1e-2),
        marginal=RealmConfig(candidates=4, refresh_every=3, refresh_lag=2, corpus_share=0.25),
        evaluate_every=4,
        checkpoint_every=2,
    )
    marginal = replace(world.marginal, corpus_share=1.0)
    text = replace(world, text=TextConfig(str(folders.corpus), held_out=0.2), marginal=marginal)
    assert in_child(lambda: pretrain(text, root / "ict", lambda record: None, "ict")) == 0
    tuning = FinetuneConfig(
        model=str(folders.model), corpus=str(folders.corpus), index=str(folders.index),
        questions=str(folders.questions), steps=9, batch=2, lr=1e-3, reader_beam=3, length=48, threads=1,
        checkpoint_every=2,
    )  # fmt: skip
    return {
        "world": lambda out, report: pretrain(world, out, report),
        "ict": lambda out, report: pretrain(text, out, report, "ict"),
        "pretrain": lambda out, report: pretrain(start_from(text, root / "ict"), out, report),
        "finetune": lambda out, report: finetune(tuning, out, report),
    }


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"], line["loss"]) for line in lines if "loss" in line]


def last_checkpoint(out):
    (folder,) = (out / "checkpoints").iterdir()
    return folder.name, (folder / "state.safetensors").read_bytes()


@pytest.mark.parametrize("stage", ["world", "ict", "pretrain", "finetune"])
def test_a_run_killed_again_and_again_at_random_steps_ends_in_the_same_bytes(stages, tmp_path, stage):
    """Three kills, wherever the last one left it; losses, weights and optimizer are those of one run."""
    work, rng = stages[stage], random.Random(stage)
    assert in_child(lambda: work(tmp_path / "whole", lambda record: None)) == 0
    killed = tmp_path / "killed"
    for _ in range(3):
        countdown = rng.randrange(1, 6)

        def report(record, seen=[], last=countdown):  # noqa: B006
            seen.append(record)
            if len(seen) == last:
                die(stage)

        status = in_child(lambda report=report: work(killed, report))
        assert os.WIFSIGNALED(status) or status == 0
    assert in_child(lambda: work(killed, lambda record: None)) == 0
    assert losses(killed) == losses(tmp_path / "whole") and len(losses(killed)) > 4
    assert last_checkpoint(killed) == last_checkpoint(tmp_path / "whole")


@pytest.mark.parametrize("stage", ["ict", "finetune"])
def test_a_fresh_run_killed_while_it_drops_the_old_one_can_begin(stages, tmp_path, stage):
    work, out = stages[stage], tmp_path / "run"
    assert in_child(lambda: work(out, lambda record: None)) == 0
    expected = losses(out)
    from realm_model import run_folder

    for name in ("rmtree", "replace"):
        module = run_folder.shutil if name == "rmtree" else run_folder.os

        def begin(module=module, name=name):
            original = getattr(module, name)

            def dying(path, *arguments, **options):
                if name == "rmtree" and options:
                    return original(path, *arguments, **options)
                if name == "rmtree":
                    os.unlink(path / "config.json")
                return die(name)

            setattr(module, name, dying)
            run_folder.begin(out, fresh=True)

        assert os.WIFSIGNALED(in_child(begin))
        run_folder.require_own(out, fresh=False)  # whole, or not there
        assert in_child(lambda: work(out, lambda record: None)) == 0
        assert losses(out) == expected


def test_an_evaluation_killed_before_it_is_written_leaves_the_old_one(tmp_path):
    folders = make_folders(tmp_path)
    out = tmp_path / "scores.json"
    out.write_text("of the last time")

    def evaluate():
        arguments = ["--corpus", folders.corpus, "--model", folders.model, "--index", folders.index]
        arguments += ["--questions", folders.questions, "--out", out, "--threads", 1]
        result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
        assert result.exit_code == 0, result.output

    def killed():
        os.replace = lambda *paths: die("replace")
        evaluate()

    assert os.WIFSIGNALED(in_child(killed))
    assert out.read_text() == "of the last time"
    assert in_child(evaluate) == 0
    (row,) = json.loads(out.read_text())
    assert row["questions"] == 5
