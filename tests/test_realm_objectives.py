"""Laws of the REALM step: null document, exclusion, fresh scores, both marginals."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

import realm_kernels as rk
from realm_model.config import ModelConfig, RealmConfig, preset
from realm_model.evaluate import build_table
from realm_model.inputs import IGNORE, MASK, prepare, world_tokenizer
from realm_model.masking import mask_statements
from realm_model.model import Realm, embed_documents
from realm_model.objectives import fresh_scores, realm_loss, retrieve
from realm_model.world import draw_world, generate_source

MODEL = ModelConfig(vocab_size=400, hidden=16, layers=1, heads=2, projection=8)
WORLD = replace(preset("tiny").world, subjects=10, facts_per_subject=3, relations=3)


@pytest.fixture(scope="module")
def corpus():
    world = draw_world(generate_source(), WORLD, 0)
    return prepare(world, world_tokenizer(world, MODEL.vocab_size), MODEL)


@pytest.fixture
def model():
    return Realm(MODEL, MODEL.vocab_size)


def masked(corpus, count=6):
    return mask_statements(corpus.own[torch.arange(count)], "salient", torch.Generator())


def test_the_null_document_is_candidate_0_and_never_retrieved(model, corpus):
    table = build_table(model, corpus.documents)
    queries = model.retriever.queries(masked(corpus)[0])
    rows, found = retrieve(queries, table, corpus.documents, table.num_rows + 1, None)
    assert (rows[:, 0] == corpus.documents.null).all() and found.all()
    assert (rows[:, 1:] < corpus.documents.num_documents).all()


def test_an_excluded_document_is_never_a_candidate(model, corpus):
    table = build_table(model, corpus.documents)
    queries = model.retriever.queries(masked(corpus)[0])
    best = retrieve(queries, table, corpus.documents, 2, None)[0][:, 1:]
    rows, found = retrieve(queries, table, corpus.documents, table.num_rows + 1, best)
    assert not (rows == best).any()
    # One row fewer may be returned: the last place holds no document, and says so.
    assert found.sum(1).tolist() == [table.num_rows] * len(queries)


def test_scores_are_of_the_encoders_as_they_are_however_stale_the_table(model, corpus):
    queries = model.retriever.queries(masked(corpus)[0])
    rows = torch.tensor([[corpus.documents.null, 0, 7]]).expand(len(queries), -1)
    embeddings = embed_documents(model.retriever, corpus.documents, rows[0])
    scores = fresh_scores(model, corpus.documents, queries, rows)
    torch.testing.assert_close(scores, MODEL.score_scale * queries @ embeddings.T)


def test_embeddings_do_not_depend_on_the_batch(model, corpus):
    rows = torch.arange(corpus.documents.num_documents)
    together = embed_documents(model.retriever, corpus.documents, rows)
    apart = torch.cat([embed_documents(model.retriever, corpus.documents, row[None]) for row in rows])
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("mode", ["sequence", "token"])
def test_the_loss_is_the_marginal_over_the_candidates(model, corpus, mode):
    table, config = build_table(model, corpus.documents), RealmConfig(mode=mode)
    ids, positions, targets = masked(corpus)
    exclude = corpus.own.fact[:6, None]
    loss, posterior = realm_loss(model, corpus.documents, table, (ids, positions, targets), exclude, config)
    queries = model.retriever.queries(ids)
    rows, found = retrieve(queries, table, corpus.documents, config.candidates, exclude)
    log_prior = fresh_scores(model, corpus.documents, queries, rows).log_softmax(1)
    hidden = model.read(ids, positions, corpus.documents.read(rows))
    log_p = (hidden @ model.reader.weight.T + model.reader.bias).log_softmax(-1)
    log_likelihood = log_p.gather(3, targets[:, None, :, None].expand(-1, config.candidates, -1, 1)).squeeze(
        3
    )
    # One masked token each: both modes agree.
    expected = -torch.logsumexp(log_prior + log_likelihood.squeeze(2), dim=1).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(posterior.prior.float(), log_prior.exp())


@pytest.mark.parametrize("mode", ["sequence", "token"])
def test_the_modes_differ_in_where_the_documents_are_summed_out(model, corpus, mode):
    """Of several masked tokens: the paper's product under the sum, the released code's sum for each token."""
    table, config = build_table(model, corpus.documents), RealmConfig(mode=mode, candidates=3)
    ids = corpus.own[torch.arange(4)].ids.clone()
    positions = torch.tensor([[1, 2, 3]]).repeat(4, 1)
    targets = ids.gather(1, positions)
    targets[0, 1:], targets[1, 2:] = IGNORE, IGNORE  # one token, two tokens, three
    ids = ids.scatter(1, positions, torch.where(targets == IGNORE, ids.gather(1, positions), MASK))
    exclude = torch.full((4, 1), -1)
    with torch.no_grad():  # an untrained retriever and reader would hardly tell documents apart
        for parameter in model.parameters():
            parameter.mul_(3)
        loss, _ = realm_loss(model, corpus.documents, table, (ids, positions, targets), exclude, config)
        queries = model.retriever.queries(ids)
        rows, _ = retrieve(queries, table, corpus.documents, config.candidates, exclude)
        log_prior = fresh_scores(model, corpus.documents, queries, rows).double().log_softmax(1)  # [B, K]
        hidden = model.read(ids, positions, corpus.documents.read(rows))
        log_p = (hidden @ model.reader.weight.T + model.reader.bias).double().log_softmax(-1)
    total, by_token, tokens = 0.0, 0.0, 0
    for b in range(4):
        kept = [j for j in range(3) if targets[b, j] != IGNORE]
        own = torch.stack([log_p[b, :, j, targets[b, j]] for j in kept], dim=1)  # [K, tokens]
        total += torch.logsumexp(log_prior[b] + own.sum(1), dim=0).item()
        by_token += torch.logsumexp(log_prior[b, :, None] + own, dim=0).sum().item()
        tokens += len(kept)
    expected = {"sequence": -total / 4, "token": -by_token / tokens}
    assert abs(expected["sequence"] - expected["token"]) > 1  # so either could fail for the other
    assert loss.item() == pytest.approx(expected[mode], rel=1e-4)


def test_retriever_and_reader_both_learn_from_the_marginal(model, corpus):
    table = build_table(model, corpus.documents)
    exclude = torch.full((6, 1), -1)
    loss, _ = realm_loss(model, corpus.documents, table, masked(corpus), exclude, RealmConfig())
    loss.backward()
    for network in (model.retriever.query_head, model.retriever.document_head, model.reader):
        assert all(
            p.grad is not None and p.grad.isfinite().all() for p in network.parameters() if p.grad is not None
        )
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_a_table_of_shards_retrieves_what_one_tensor_does(model, corpus):
    table = build_table(model, corpus.documents)
    shards = rk.ShardedTable.from_tensors(list(table.shards[0].split(7)))
    queries = model.retriever.queries(masked(corpus)[0])
    whole = retrieve(queries, table, corpus.documents, 8, None)
    assert torch.equal(whole[0], retrieve(queries, shards, corpus.documents, 8, None)[0])
