"""Fine-tuning for Open-QA: Embed_input and the reader are trained, the index is fixed (section 3.3).

What a step depends on is in the Finetuner's state_dict and nowhere else, so the losses of a run that was
killed and resumed equal those of an undisturbed one bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .. import checkpoints
from ..machine import CPU
from ..optimizer import ReleasedAdamW
from ..published.openqa import HasAnswer
from ..ranks import Ranks
from ..reader import Form
from ..run_folder import CHECKPOINTS, CONFIG, METRICS, MetricsLog, Record, begin, require_own, write_whole
from .assemble import Beams, Parts, assemble
from .folder import save_tuned
from .questions import Question, read_questions


@dataclass(frozen=True)
class FinetuneConfig:
    """A fine-tuning run, written to config.json of its folder. Batch, rate and beams are as released but for
    the batch, which was 1.
    """

    model: str
    corpus: str
    index: str
    questions: str
    steps: int = 1000
    batch: int = 8  # questions at a time
    accumulate: int = 1  # batches to a step
    lr: float = 1e-5
    form: Form = "released"
    has_answer: HasAnswer = "raw"
    searcher_beam: int = 5000
    reader_beam: int = 5
    length: int = 320  # of a join, in wordpieces
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    threads: int = 2
    checkpoint_every: int = 100

    def check(self) -> None:
        """Raise ValueError naming the first option that cannot be."""
        for name in ("steps", "batch", "accumulate", "searcher_beam", "reader_beam", "length", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"finetune: {name} must be at least 1, got {getattr(self, name)}")
        if self.checkpoint_every < 1:
            raise ValueError(f"finetune: checkpoint_every must be at least 1, got {self.checkpoint_every}")
        if self.searcher_beam < self.reader_beam:
            raise ValueError(
                f"finetune: searcher_beam must be at least reader_beam={self.reader_beam}, got "
                f"{self.searcher_beam}"
            )
        if not self.lr > 0:
            raise ValueError(f"finetune: lr must be more than 0, got {self.lr}")


class Finetuner:
    """A run in memory."""

    def __init__(self, config: FinetuneConfig, parts: Parts, questions: list[Question]) -> None:
        torch.set_num_threads(config.threads)
        self.config, self.parts, self.questions, self.ranks = config, parts, questions, Ranks.current()
        if config.batch % self.ranks.size:
            raise ValueError(
                f"finetune: batch must be a multiple of the number of ranks, {self.ranks.size}, got "
                f"{config.batch}"
            )
        self.model = parts.model.train()
        self.optimizer = ReleasedAdamW(self.model, config.lr, config.steps)
        self.step = 0

    def advance(self) -> Record:
        """One step: the mean loss of batch x accumulate questions, and how often an answer was found. Each
        rank takes its part of every batch.
        """
        config, total, found, readable = self.config, 0.0, 0.0, 0.0
        # What dropout draws depends on the step and the rank, not on what was drawn before.
        torch.manual_seed(((config.seed * 10**8 + self.step) * self.ranks.size + self.ranks.rank) % 2**63)
        self.optimizer.zero_grad()
        for part in range(config.accumulate):
            batch = self._batch(self.step * config.accumulate + part)[self.ranks.part(config.batch)]
            with torch.autocast(self._device_type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                out = self.model.loss(
                    [question.question for question in batch],
                    [question.answers for question in batch],
                    form=config.form,
                    has_answer=config.has_answer,
                )
            (out.loss / config.accumulate).backward()
            total += out.loss.item() / config.accumulate
            found += out.has_answer.any(1).float().mean().item() / config.accumulate
            beam = self.model.config.reader_beam_size
            readable += out.has_answer[:, :beam].any(1).float().mean().item() / config.accumulate
        self.ranks.average_gradients(self.optimizer.parameters)
        rate = self.optimizer.step(self.step)
        record = {"stage": "finetune", "step": self.step, "loss": self.ranks.mean(total), "lr": rate}
        self.step += 1
        return record | {"retrieved": self.ranks.mean(found), "read": self.ranks.mean(readable)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "embedder": self.model.embedder.state_dict(),
            "reader": self.model.reader.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.model.embedder.load_state_dict(state["embedder"])
        self.model.reader.load_state_dict(state["reader"])
        self.optimizer.load_state_dict(state["optimizer"])

    @property
    def _device_type(self) -> str:
        return next(self.model.parameters()).device.type

    def _batch(self, number: int) -> list[Question]:
        """Batch `number` of the run: the questions are gone through in a new order every epoch."""
        size, total = self.config.batch, len(self.questions)
        places = range(number * size, (number + 1) * size)
        orders = {epoch: self._order(epoch) for epoch in {place // total for place in places}}
        return [self.questions[orders[place // total][place % total]] for place in places]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.questions), generator=generator).tolist()


def finetune(
    config: FinetuneConfig,
    out: Path,
    report: Callable[[Record], object],
    fresh: bool = False,
    device: torch.device = CPU,
) -> None:
    """Fine-tune into the run folder `out`, from its last checkpoint where it has one.

    fresh: drop the run that it holds, once this one can begin.

    Writes config.json, metrics.jsonl, checkpoints/ and, at the end, the model: embedder/, reader/ and
    index.json. In a process group all ranks call it: they train together, and rank 0 alone writes and
    reports. Raises ValueError for bad options, folders that do not belong together, a run folder that is
    another run's, and damaged files, before anything is written; LostRankError where another rank is lost.
    """
    ranks = Ranks.current()
    tuner, checkpoint = ranks.together(lambda: _open(config, out, fresh, device))
    log = None
    try:
        log = ranks.together(
            lambda: _claim(config, tuner.parts, out, checkpoint, fresh) if ranks.rank == 0 else None
        )
        if checkpoint is not None:
            tuner.load_state_dict(checkpoint.state)
        while tuner.step < config.steps:
            record = tuner.advance()
            if log is None:
                continue
            log.write(record)
            report(record)
            if tuner.step % config.checkpoint_every == 0 or tuner.step == config.steps:
                state = tuner.state_dict() | {"metrics_bytes": log.size()}
                saved = checkpoints.Checkpoint(state, tuner.model.tokenizer)
                checkpoints.save(out / CHECKPOINTS, tuner.step, saved)
    finally:
        if log is not None:
            log.close()
    if ranks.rank == 0:
        assert tuner.parts.identity is not None
        save_tuned(tuner.model, tuner.parts.identity, out)


def _open(
    config: FinetuneConfig, out: Path, fresh: bool, device: torch.device
) -> tuple[Finetuner, checkpoints.Checkpoint | None]:
    config.check()
    require_own(out, fresh)
    questions = list(read_questions(config.questions))
    beams = Beams(config.searcher_beam, config.reader_beam, config.length)
    model, corpus, index = (Path(path) for path in (config.model, config.corpus, config.index))
    parts = assemble(model, corpus, index, beams, config.seed, device)
    parts.check(questions)
    if not fresh and (out / CONFIG).exists():
        _require_same(_values(config, parts), out / CONFIG)
    return Finetuner(config, parts, questions), None if fresh else checkpoints.resume(out / CHECKPOINTS)


def _values(config: FinetuneConfig, parts: Parts) -> dict[str, Any]:
    """What config.json holds: the configuration, and of which index it is."""
    assert parts.identity is not None
    return asdict(config) | {"fingerprints": asdict(parts.identity)}


def _claim(
    config: FinetuneConfig, parts: Parts, out: Path, checkpoint: checkpoints.Checkpoint | None, fresh: bool
) -> MetricsLog:
    """Make the folder and write config.json. The metrics, as they were at the checkpoint."""
    begin(out, fresh)
    write_whole(out / CONFIG, json.dumps(_values(config, parts), indent=2) + "\n")
    log = MetricsLog(out / METRICS)
    log.cut(0 if checkpoint is None else checkpoint.state["metrics_bytes"])
    return log


def _require_same(values: dict[str, Any], path: Path) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not the configuration of a run: {error}") from error
    different = [name for name in values if not isinstance(found, dict) or found.get(name) != values[name]]
    if different:
        raise ValueError(
            f"{path.parent} holds a run with another configuration ({', '.join(different)}): choose another "
            f"folder, or start afresh (--fresh)"
        )
