"""Pre-training from the first step to the last, killed and resumed at any of them.

The stages follow one another (stages.py). What a step depends on is in the Trainer's state_dict and nowhere
else, so with the fixed-lag refresher the losses of a resumed run equal those of an undisturbed one bit for
bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from . import checkpoints
from .builders import Job, Links
from .config import RunConfig, read_config, to_json
from .evaluate import Evaluation, evaluate
from .inputs import Corpus, prepare, world_tokenizer
from .lexical import log_idf, start_matching
from .machine import CPU, Machine
from .model import Realm
from .optimizer import StageOptimizer
from .ranks import Ranks
from .reading import start_reading
from .run_folder import CHECKPOINTS, CONFIG, METRICS, MetricsLog, Record, begin, require_own, write_whole
from .stages import IctStage, ReaderStage, RealmStage, Stage
from .start import load_start
from .world import World, draw_world, generate_source, load_source

STAGES = ("ict", "reader", "realm")
LOCAL = Machine()


@dataclass(frozen=True)
class Setting:
    """What a run trains and is tested on."""

    config: RunConfig
    tokenizer: Tokenizer
    corpus: Corpus


def make_setting(config: RunConfig, tokenizer: Tokenizer | None = None) -> Setting:
    """Open the corpus of a configuration, or draw its world. ValueError where data are missing or too few."""
    if config.text is not None:
        from .corpus.statements import open_text

        store, corpus = open_text(config.text, config.model, config.seed)
        return Setting(config, store.tokenizer, corpus)
    world = world_of(config)
    tokenizer = tokenizer or world_tokenizer(world, config.model.vocab_size)
    return Setting(config, tokenizer, prepare(world, tokenizer, config.model))


def world_of(config: RunConfig) -> World:
    """The world that a run draws. ValueError where its data are missing or too few."""
    source = generate_source() if config.world.data is None else load_source(Path(config.world.data))
    return draw_world(source, config.world, config.seed)


def make_model(setting: Setting) -> Realm:
    torch.manual_seed(setting.config.seed)
    return Realm(setting.config.model, setting.tokenizer.get_vocab_size())


class Trainer:
    """A run in memory, on one of the ranks that train it."""

    def __init__(
        self,
        setting: Setting,
        index: Path | None = None,
        fresh: bool = True,
        links: Links | None = None,
        device: torch.device = CPU,
    ) -> None:
        """index: where this rank keeps its part of the index. fresh: begin as the configuration says; a
        state_dict to be loaded needs no such start. links: to the other ranks; None: all of them train.
        """
        torch.set_num_threads(setting.config.threads)
        self.links = Links(Ranks.current()) if links is None else links
        self.setting, self.index, self.ranks = setting, index, self.links.trainers
        _check_batches(setting.config, self.ranks)
        self.model = make_model(setting)
        if fresh and setting.config.start is not None:
            load_start(self.model, Path(setting.config.start), setting.tokenizer)
        elif fresh and setting.config.model.lexical:
            idf = log_idf(setting.corpus.documents, setting.tokenizer)
            start_matching(self.model.retriever, idf)
            start_reading(self.model.reader, idf)
        self.model.to(device)
        self.generator = torch.Generator().manual_seed(setting.config.seed)  # draws all batches
        self.enter(0)

    def enter(self, number: int) -> None:
        """Begin stage `number`, or the next one that has steps; past the last one there is nothing to do."""
        steps = stage_steps(self.setting.config)
        while number < len(STAGES) and steps[number] == 0:
            number += 1
        self.number, self.step = number, 0
        self.stage: Stage | None = None
        self.optimizer: StageOptimizer | None = None
        if not self.done:
            self.stage = self._make_stage()
            self.optimizer = StageOptimizer(self.model, self.stage.config)

    @property
    def done(self) -> bool:
        return self.number == len(STAGES)

    @property
    def name(self) -> str:
        return STAGES[self.number]

    def advance(self) -> Record:
        """One step of training."""
        assert self.stage is not None and self.optimizer is not None
        config = self.setting.config
        self.links.beat()
        # What the networks draw (dropout) depends on the step and the rank, not on what was drawn before.
        place = (config.seed * len(STAGES) + self.number) * 10**8 + self.step
        torch.manual_seed((place * self.ranks.size + self.ranks.rank) % 2**63)
        self.stage.begin_step(self.step)
        self.optimizer.zero_grad()
        total, batches = 0.0, self.stage.config.accumulate
        for _ in range(batches):
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=config.bfloat16):
                loss, metrics = self.stage.loss(self.generator)
            (loss / batches).backward()
            total += loss.item() / batches
        for parameters in self.optimizer.networks:
            self.ranks.average_gradients(parameters)
        self.optimizer.step(self.step)
        record = {"stage": self.name, "step": self.step, "loss": self.ranks.mean(total), **metrics}
        self.step += 1
        return record

    def end_stage(self) -> None:
        self.close()
        self.enter(self.number + 1)

    def evaluate(self) -> Evaluation:
        corpus, config = self.setting.corpus, self.setting.config
        return evaluate(self.model, corpus, config.marginal, corpus.held_out, self.ranks)

    def close(self) -> None:
        if self.stage is not None:
            self.stage.close()

    def state_dict(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": {} if self.optimizer is None else self.optimizer.adamw.state_dict()["state"],
            "generator": self.generator.get_state(),
            "stage": {} if self.stage is None else self.stage.state_dict(),
            "corpus": self.setting.corpus.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self.model.load_state_dict(state["model"])
        self.enter(state["number"])
        self.step = state["step"]
        if self.stage is not None and self.optimizer is not None:
            adamw = self.optimizer.adamw
            adamw.load_state_dict(adamw.state_dict() | {"state": state["optimizer"]})
            if self.step > 0:
                self.stage.load_state_dict(state["stage"])
        self.generator.set_state(state["generator"])

    def _make_stage(self) -> Stage:
        config, corpus = self.setting.config, self.setting.corpus
        if self.name == "ict":
            return IctStage(config, self.model, corpus, self.ranks)
        if self.name == "reader":
            return ReaderStage(config, self.model, corpus, self.ranks)
        return RealmStage(config, self.model, corpus, self.index, self.ranks, self.links.encoder)


def pretrain(
    config: RunConfig,
    out: Path,
    report: Callable[[Record], object],
    last: str = STAGES[-1],
    fresh: bool = False,
    machine: Machine = LOCAL,
) -> None:
    """Train into the run folder `out` to the end of stage `last`, from its last checkpoint where it has one.
    fresh: drop the run that it holds, once this one can begin.

    Writes config.json, metrics.jsonl (a line for each step and each evaluation) and checkpoints/. `report`
    sees each line. In a process group all ranks call it: they train and evaluate together, but for those that
    embed the documents (builders.py), and rank 0 alone writes and reports.

    Raises ValueError for data that are missing, batches that the ranks cannot share, a folder that is another
    run's or a damaged checkpoint, OSError where the folder cannot be written, and LostRankError.
    """
    job = Job.of(machine.refresh_ranks)
    everyone = job.ranks
    setting, checkpoint = everyone.together(lambda: _open(config, out, fresh))
    links = job.connect(setting.corpus.documents.num_documents, machine.timeout)
    if job.builds:
        everyone.together(lambda: None)  # while the others make a trainer
        everyone.together(lambda: None)  # and rank 0 its folder
        links.serve(make_model(setting).retriever.to(machine.device), setting.corpus.documents)
        return
    index = out / ("index" if links.trainers.size == 1 else f"index-{everyone.rank}")
    trainer = everyone.together(lambda: Trainer(setting, index, checkpoint is None, links, machine.device))
    log = None
    try:
        log = everyone.together(
            lambda: _claim(config, out, checkpoint, fresh) if everyone.rank == 0 else None
        )
        if checkpoint is not None:
            trainer.load_state_dict(checkpoint.state)
        _run(trainer, out, log, report, STAGES.index(last))
        trainer.close()
        links.end()
    finally:
        links.drop()
        trainer.close()
        if log is not None:
            log.close()


def _open(config: RunConfig, out: Path, fresh: bool) -> tuple[Setting, checkpoints.Checkpoint | None]:
    _check_numbers(config)
    require_own(out, fresh)
    if not fresh and (out / CONFIG).exists() and read_config(out) != config:
        raise ValueError(
            f"{out} holds a run with another configuration: choose another folder, or start afresh (--fresh)"
        )
    checkpoint = None if fresh else checkpoints.resume(out / CHECKPOINTS)
    setting = make_setting(config, checkpoint.tokenizer if checkpoint else None)
    if checkpoint is not None:
        _check_corpus(setting, checkpoint, out)
    return setting, checkpoint


def _run(
    trainer: Trainer, out: Path, log: MetricsLog | None, report: Callable[[Record], object], last: int
) -> None:
    """log: where this rank writes; None where another one does."""
    config = trainer.setting.config

    def write(record: Record) -> None:
        if log is not None:
            log.write(record)
            report(record)

    def evaluate() -> None:
        write(_evaluation_record(trainer, started))

    def commit() -> None:
        if log is None:
            return
        state = trainer.state_dict() | {"metrics_bytes": log.size()}
        number = sum(stage_steps(config)[: trainer.number]) + trainer.number + trainer.step
        checkpoint = checkpoints.Checkpoint(state, trainer.setting.tokenizer)
        checkpoints.save(out / CHECKPOINTS, number, checkpoint)

    started = time.monotonic()
    while not trainer.done and trainer.number <= last:
        stage, steps = trainer.name, stage_steps(config)[trainer.number]
        while trainer.step < steps:
            write(trainer.advance())
            if stage == "realm" and trainer.step % config.evaluate_every == 0 and trainer.step < steps:
                evaluate()
            if trainer.step % config.checkpoint_every == 0 and trainer.step < steps:
                commit()
        evaluate()
        trainer.end_stage()
        commit()


def _evaluation_record(trainer: Trainer, started: float) -> Record:
    values = trainer.evaluate().as_dict()
    seconds = time.monotonic() - started
    return {"evaluation": values, "stage": trainer.name, "step": trainer.step, "seconds": round(seconds, 1)}


def load_run(run: Path, device: torch.device = CPU) -> tuple[Setting, Realm]:
    """The world and the model of the last checkpoint of a run folder. ValueError where there is none."""
    config = read_config(run)
    checkpoint = checkpoints.load(run / CHECKPOINTS)
    if checkpoint is None:
        raise ValueError(f"{run} has no checkpoint yet")
    torch.set_num_threads(config.threads)
    setting = make_setting(config, checkpoint.tokenizer)
    _check_corpus(setting, checkpoint, run)
    model = make_model(setting)
    checkpoint.fill(model)
    return setting, model.eval().to(device)


def _check_numbers(config: RunConfig) -> None:
    stages = zip(STAGES, (config.ict, config.reader, config.realm), strict=True)
    values = [("threads", config.threads, 1)]
    for name, stage in stages:
        values.append((f"{name}: steps", stage.steps, 0))
        values += [(f"{name}: {what}", getattr(stage, what), 1) for what in ("batch", "accumulate")]
    for name, value, least in values:
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_batches(config: RunConfig, ranks: Ranks) -> None:
    for name, stage in zip(STAGES, (config.ict, config.reader, config.realm), strict=True):
        if stage.steps > 0 and stage.batch % ranks.size:
            raise ValueError(
                f"{name}: batch must be a multiple of the number of ranks, {ranks.size}, got {stage.batch}"
            )


def _claim(
    config: RunConfig, out: Path, checkpoint: checkpoints.Checkpoint | None, fresh: bool
) -> MetricsLog:
    """Make the folder and write config.json. The metrics, as they were at the checkpoint."""
    begin(out, fresh)
    write_whole(out / CONFIG, to_json(config) + "\n")
    log = MetricsLog(out / METRICS)
    log.cut(0 if checkpoint is None else checkpoint.state["metrics_bytes"])
    return log


def _check_corpus(setting: Setting, checkpoint: checkpoints.Checkpoint, run: Path) -> None:
    """The corpus of a checkpoint, told by its fingerprint."""
    then, now = checkpoint.state["corpus"], setting.corpus.fingerprint
    if then != now:
        where = "a world" if setting.config.text is None else setting.config.text.directory
        raise ValueError(
            f"{run} was trained on the corpus of fingerprint {then[:12]!r}, got {now[:12]!r} from {where}"
        )


def stage_steps(config: RunConfig) -> tuple[int, int, int]:
    return config.ict.steps, config.reader.steps, config.realm.steps
