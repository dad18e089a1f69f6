"""The corpus swap of Appendix C: other facts in the documents, the index made again, no training."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .evaluate import Evaluation, evaluate
from .inputs import Corpus, prepare
from .model import Realm
from .pretrain import Setting, world_of
from .world import swap_objects

TRAINED_QUERIES = 400  # of those trained on, as many as there are held-out ones or so


@dataclass(frozen=True)
class Swap:
    """Evaluations of the same queries; their accuracy tells which corpus the predictions follow."""

    before: Evaluation  # the corpus of the training, its objects wanted
    follows: Evaluation  # the swapped corpus, its objects wanted
    stays: Evaluation  # the swapped corpus, the objects of the training wanted


def corpus_swap(setting: Setting, model: Realm, seed: int) -> dict[str, Swap]:
    """Of the held-out queries and of a draw of those that were trained on, which memory could answer.

    Raises ValueError for a run on text, which has no facts to be swapped.
    """
    if setting.config.text is not None:
        raise ValueError("a corpus swap needs a world of facts, this run is on text")
    world = swap_objects(world_of(setting.config), seed)
    old, new = setting.corpus, prepare(world, setting.tokenizer, setting.config.model)
    drawn = torch.randperm(len(old.train), generator=torch.Generator().manual_seed(seed))[:TRAINED_QUERIES]
    everyone = torch.arange(len(old.held_out))
    return {
        "held-out subjects": _swap(setting, model, old, new, "held_out", everyone),
        "trained subjects": _swap(setting, model, old, new, "train", drawn),
    }


def _swap(setting: Setting, model: Realm, old: Corpus, new: Corpus, part: str, rows: torch.Tensor) -> Swap:
    config = setting.config.marginal
    before, after = getattr(old, part)[rows], getattr(new, part)[rows]
    return Swap(
        before=evaluate(model, old, config, before),
        follows=evaluate(model, new, config, after),
        stays=evaluate(model, new, config, before),
    )
