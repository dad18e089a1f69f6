"""What tests/test_realm_ranks.py runs in each rank of a job, as function(rank, size, ...)."""

import os
import signal
import time

import torch

from realm_model import builders as builders_module
from realm_model import evaluate as evaluate_module
from realm_model.machine import Machine
from realm_model.pretrain import Trainer, make_model, make_setting, pretrain
from realm_model.ranks import Ranks


def train(rank, size, config, out, builders, timeout, trouble=(None, None, None)):
    """A run of pre-training: how many records this rank saw and how often it embedded as a builder; or the
    error of a lost rank.

    trouble: (rank, "killed" or "hangs", at): it befalls a trainer at that step of REALM, a builder at that
    embedding of documents, counted from 0.
    """
    who, how, at = trouble
    seen, embedded = [], []
    embed_all, advance = builders_module.embed_all, Trainer.advance

    def befall():
        if how == "hangs":
            time.sleep(2.5 * timeout)
        os.kill(os.getpid(), signal.SIGKILL)

    def embed(*arguments):
        if rank == who and len(embedded) == at:
            befall()
        embedded.append(arguments)
        return embed_all(*arguments)

    def advance_or_not(trainer):
        if rank == who and (trainer.name, trainer.step) == ("realm", at):
            befall()
        return advance(trainer)

    builders_module.embed_all, Trainer.advance = embed, advance_or_not
    try:
        pretrain(config, out, seen.append, machine=Machine(refresh_ranks=builders, timeout=timeout))
    except RuntimeError as error:
        return type(error).__name__, str(error)
    finally:
        builders_module.embed_all, Trainer.advance = embed_all, advance
    return len(seen), len(embedded)


def refused(rank, size, config, out, builders):
    """What each rank is told of a run that cannot begin."""
    try:
        pretrain(config, out, lambda record: None, machine=Machine(refresh_ranks=builders))
    except (ValueError, OSError) as error:
        return str(error)


def evaluated(rank, size, config, count):
    """What this rank makes of the first `count` held-out statements, three at a time, and which it read."""
    setting = make_setting(config)
    asked = []
    ask, at_once = evaluate_module._ask, evaluate_module.AT_ONCE

    def ask_and_tell(model, corpus, marginal, table, batch):
        asked.append(batch.fact.tolist())
        return ask(model, corpus, marginal, table, batch)

    evaluate_module._ask, evaluate_module.AT_ONCE = ask_and_tell, 3
    try:
        statements = setting.corpus.held_out[torch.arange(count)]
        model, ranks = make_model(setting), Ranks.current()
        result = evaluate_module.evaluate(model, setting.corpus, config.marginal, statements, ranks)
    finally:
        evaluate_module._ask, evaluate_module.AT_ONCE = ask, at_once
    return result.as_dict(), asked
