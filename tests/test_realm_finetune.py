"""Fine-tuning: what it minimises, in parts and in one, killed and resumed, and what it leaves."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from realm_openqa_cases import DROPOUT, QUESTIONS, make_folders

from realm_model.metrics import exact_match
from realm_model.openqa.assemble import Beams, assemble
from realm_model.openqa.finetune import FinetuneConfig, Finetuner, finetune
from realm_model.openqa.folder import load_embedder
from realm_model.openqa.index import build_index, fingerprint
from realm_model.openqa.questions import read_questions
from realm_model.optimizer import ReleasedAdamW


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("finetune"))


@pytest.fixture(scope="module")
def config(folders):
    return FinetuneConfig(
        model=str(folders.model),
        corpus=str(folders.corpus),
        index=str(folders.index),
        questions=str(folders.questions),
        steps=9,
        batch=2,
        lr=1e-3,
        reader_beam=3,
        length=48,
        threads=1,
        checkpoint_every=2,
    )


def losses(config, out):
    finetune(config, out, lambda record: None)
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def still_tuner(folders, config):
    """Without dropout. As many blocks are read as there are: a near tie decides nothing."""
    tuner = tuner_of(folders, replace(config, reader_beam=5))
    for module in tuner.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return tuner


def tuner_of(folders, config):
    beams = Beams(config.searcher_beam, config.reader_beam, config.length)
    parts = assemble(folders.model, folders.corpus, folders.index, beams, config.seed)
    return Finetuner(config, parts, list(read_questions(folders.questions)))


@pytest.mark.parametrize("kill_at", [0, 3, 6])
def test_a_run_killed_at_any_step_goes_on_to_the_same_losses(config, tmp_path, kill_at):
    """With dropout, in the middle of an epoch, between two checkpoints."""

    def kill(record):
        if record["step"] == kill_at:
            raise Killed

    with pytest.raises(Killed):
        finetune(config, tmp_path / "killed", kill)
    assert losses(config, tmp_path / "killed") == losses(config, tmp_path / "whole")
    assert len(losses(config, tmp_path / "whole")) == config.steps  # and a finished run stays as it is
    ours, theirs = (load_embedder(tmp_path / name) for name in ("killed", "whole"))
    assert fingerprint(ours) == fingerprint(theirs) != fingerprint(load_embedder(Path(config.model)))


def test_an_older_checkpoint_does_not_go_on(config, tmp_path):
    def kill(record):
        if record["step"] == 6:
            raise Killed

    with pytest.raises(Killed):
        finetune(config, tmp_path, kill)
    state = tmp_path / "checkpoints" / "000006" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text())["state"]))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"000006 must have format 3 .*, got 1: train into another folder"):
        finetune(config, tmp_path, kill)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_accumulated_batches_are_one_large_batch(folders, config):
    """The same gradient, and so the same step."""
    tuners = [
        still_tuner(folders, replace(config, batch=batch, accumulate=accumulate))
        for batch, accumulate in ((4, 1), (2, 2), (1, 4))
    ]
    records = [[tuner.advance() for _ in range(3)] for tuner in tuners]
    for other in records[1:]:
        for one, same in zip(records[0], other, strict=True):
            assert same["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert same["retrieved"] == pytest.approx(one["retrieved"])


@pytest.mark.parametrize(("form", "has_answer"), [("released", "raw"), ("paper", "wordpieces")])
def test_fine_tuning_learns_the_questions_in_every_form(folders, config, form, has_answer):
    config = replace(config, form=form, has_answer=has_answer, steps=200, batch=5, lr=1e-2)
    tuner = still_tuner(folders, config)
    table = [shard.clone() for shard in tuner.model.block_emb.shards]
    first = tuner.advance()["loss"]
    for _ in range(150):
        last = tuner.advance()["loss"]
    assert last < 0.5 * first
    answers = tuner.model.answer([question["question"] for question in QUESTIONS])
    right = [exact_match(a.text, q["answers"]) for a, q in zip(answers, QUESTIONS, strict=True)]
    assert sum(right) >= 4
    assert all(map(torch.equal, tuner.model.block_emb.shards, table))  # the index is fixed


def test_bfloat16_follows_float32(folders, config):
    """Autocast rounds to 8 bits, the losses stay in float32: they agree to a unit in the last of the 8."""
    runs = []
    for precision in ("float32", "bfloat16"):
        tuner = still_tuner(folders, replace(config, precision=precision, batch=5))
        runs.append([tuner.advance()["loss"] for _ in range(5)])
        assert tuner.model.reader.qa_outputs.dense_output.weight.dtype == torch.float32
    assert runs[0] != runs[1]
    assert runs[1] == pytest.approx(runs[0], rel=2**-8)


def test_what_is_left_is_a_model_of_the_old_index(folders, config, tmp_path):
    finetune(config, tmp_path / "run", lambda record: None)
    parts = assemble(tmp_path / "run", folders.corpus, folders.index, Beams(reader=3, length=48))
    assert parts.can_read
    tuner = tuner_of(folders, config)
    for _ in range(config.steps):
        tuner.advance()
    asked = [question["question"] for question in QUESTIONS]
    assert parts.model.answer(asked) == tuner.model.answer(asked)
    # An index made by the moved embedder is another one.
    build_index(load_embedder(tmp_path / "run"), folders.store, tmp_path / "index")
    with pytest.raises(ValueError, match="do not belong together"):
        assemble(tmp_path / "run", folders.corpus, tmp_path / "index")
    with pytest.raises(ValueError, match=r"another configuration \(lr\)"):
        finetune(replace(config, lr=2e-3), tmp_path / "run", lambda record: None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"searcher_beam": 2}, "searcher_beam must be at least reader_beam=3, got 2"),
        ({"lr": 0.0}, "lr must be more than 0, got 0.0"),
        ({"questions": "nowhere.jsonl"}, "cannot read nowhere.jsonl"),
        ({"index": "nowhere"}, "nowhere"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(config, tmp_path, values, message):
    with pytest.raises((ValueError, OSError), match=message):
        finetune(replace(config, **values), tmp_path / "run", lambda record: None)
    assert not (tmp_path / "run").exists()


def test_the_optimizer_is_the_released_one():
    """By hand: the rate's rise and fall, the clip, and what does not decay."""
    module = torch.nn.Module()
    module.dense, module.LayerNorm = torch.nn.Linear(2, 1), torch.nn.LayerNorm(1)
    weight, scale = module.dense.weight, module.LayerNorm.weight
    optimizer = ReleasedAdamW(module, lr=0.1, steps=200)
    assert optimizer.warmup == 100
    torch.nn.init.constant_(weight, 2.0)
    weight.grad, module.dense.bias.grad = torch.tensor([[30.0, 40.0]]), torch.zeros(1)
    scale.grad, module.LayerNorm.bias.grad = torch.zeros(1), torch.zeros(1)
    assert optimizer.step(0) == pytest.approx(0.1 / 100)
    # The first step of Adam is the gradient's sign, on the weight as it has decayed.
    expected = torch.full((1, 2), 2.0) * (1 - 0.001 * 0.01) - 0.001
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=2e-6)
    assert scale.item() == 1.0
    assert optimizer.adamw.state[weight]["exp_avg"].norm() == pytest.approx(0.1, rel=1e-4)  # clipped to 1
    assert optimizer.step(99) == pytest.approx(0.1 * (1 - 99 / 200))
    assert optimizer.step(150) == pytest.approx(0.1 * 0.25)


def test_two_ranks_have_the_losses_of_one(folders, config, tmp_path):
    """Each takes half of every batch; what differs is the rounding of sums, and dropout: there is none."""
    model = shutil.copytree(folders.model, tmp_path / "model")
    for path in model.glob("*/config.json"):
        path.write_text(path.read_text().replace(f'dropout_prob": {DROPOUT}', 'dropout_prob": 0.0'))
    config = replace(config, model=str(model))
    script = tmp_path / "ranks.py"
    script.write_text(f"""
import sys
from dataclasses import replace
from pathlib import Path
from realm_model.openqa.finetune import FinetuneConfig, finetune
from realm_model.ranks import Ranks
size = Ranks.join().size
finetune({replace(config, reader_beam=5)!r}, Path({str(tmp_path)!r}) / f"on{{size}}", lambda record: None)
""")
    for size in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        subprocess.run([*launch, script], check=True, capture_output=True, timeout=200)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("on1", "on2")
    )
    assert len(one) == config.steps and [line["step"] for line in one] == [line["step"] for line in two]
    for name in ("loss", "retrieved", "read"):
        torch.testing.assert_close(
            [line[name] for line in one], [line[name] for line in two], rtol=1e-4, atol=0
        )
    assert load_embedder(tmp_path / "on2").config == load_embedder(tmp_path / "on1").config
