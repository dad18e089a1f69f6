"""Retrieval is learned without labels: from likelihoods alone, and on subjects not asked about in training.

One test is a whole small run. In the other the reader is perfect from its first step: a document that states
the fact makes its object likely. So where the first fails and the second does not, the reader is to blame.
"""

import copy
import dataclasses

import pytest
import torch

import realm_kernels as rk
from realm_model.config import preset
from realm_model.evaluate import build_table
from realm_model.masking import mask_statements
from realm_model.objectives import fresh_scores, retrieve
from realm_model.pretrain import Trainer, make_setting
from realm_model.swap import corpus_swap

# A minute or two of one processor; a busy machine needs more of the clock.
pytestmark = pytest.mark.timeout(1200)

CANDIDATES, BATCH, STEPS, REFRESH = 16, 32, 100, 25
LIKELY, UNLIKELY = -0.1, -4.0  # log p(y|z,x) where z states the fact, and where it does not


def recall_at_5(trainer):
    """Over all documents, for the queries of subjects that training never asks about."""
    corpus, model = trainer.setting.corpus, trainer.model
    with torch.no_grad():
        ids, _, _ = mask_statements(corpus.held_out, "salient", torch.Generator())
        top = rk.mips_topk(model.retriever.queries(ids), build_table(model, corpus.documents), 5).indices
    return (top == corpus.held_out.fact[:, None]).any(1).double().mean().item()


@pytest.fixture(scope="module")
def warm_start():
    """A retriever after the Inverse Cloze Task: it knows subjects, not which of their facts is asked for."""
    config = preset("tiny")
    world = dataclasses.replace(config.world, subjects=80, facts_per_subject=8, relations=8)
    trainer = Trainer(make_setting(dataclasses.replace(config, world=world, threads=1)))
    while trainer.step < config.ict.steps:
        trainer.advance()
    return trainer, copy.deepcopy(trainer.model.state_dict())


@pytest.mark.parametrize("mode", ["sequence", "token"])
def test_the_retriever_learns_from_likelihoods_alone(warm_start, mode):
    trainer, state = warm_start
    corpus, model = trainer.setting.corpus, trainer.model
    model.load_state_dict(state)
    start = recall_at_5(trainer)

    adamw = torch.optim.AdamW(model.retriever.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        if step % REFRESH == 0:
            with torch.no_grad():
                table = build_table(model, corpus.documents)
        statements = corpus.train[torch.randint(len(corpus.train), (BATCH,), generator=generator)]
        ids, _, targets = mask_statements(statements, "salient", generator)
        queries = model.retriever.queries(ids)
        rows, found = retrieve(queries, table, corpus.documents, CANDIDATES, None)
        states_it = (rows == statements.fact[:, None])[:, :, None].expand(-1, -1, targets.shape[1])
        log_likelihood = torch.where(states_it, LIKELY, UNLIKELY)
        scores = fresh_scores(model, corpus.documents, queries, rows)
        loss = rk.marginal_loss(scores, log_likelihood, doc_mask=found, mode=mode)
        adamw.zero_grad()
        loss.backward()
        adamw.step()
    assert start < 0.5
    assert recall_at_5(trainer) > 0.9


def test_a_whole_run_learns_to_retrieve_and_to_answer():
    trainer = Trainer(make_setting(dataclasses.replace(preset("tiny"), threads=1)))
    stages = {}
    while not trainer.done:
        while trainer.step < trainer.stage.config.steps:
            trainer.advance()
        stages[trainer.name] = trainer.evaluate()
        trainer.end_stage()
    assert stages["ict"].recall[1] < 0.2 and stages["ict"].accuracy < 0.1
    assert stages["reader"].recall == stages["ict"].recall  # the copy start leaves the retriever alone
    assert stages["realm"].recall[1] > 0.6 and stages["realm"].accuracy > 0.6
    assert stages["realm"].utility > 2.0
    # Appendix C: the facts of the corpus change, and the answers with them, without a step of training.
    for swap in corpus_swap(trainer.setting, trainer.model, seed=1).values():
        assert swap.follows.accuracy > 0.6 * swap.before.accuracy > 5 * swap.stays.accuracy
