"""How well a REALM retrieves and answers: recall@k, retrieval utility, masked-token accuracy.

Shapes: B queries, N documents, K candidates, M target tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import realm_kernels as rk

from .config import RealmConfig
from .inputs import IGNORE, Corpus, Documents, Statements, trivial
from .masking import mask_statements, without
from .model import Realm, embed_all
from .objectives import fresh_scores, retrieve

RECALL_AT = (1, 5, 20)


@dataclass(frozen=True)
class Evaluation:
    """Means over queries. Logarithms are natural."""

    recall: dict[int, float]  # at k: the document that states the fact is among the top k of all documents
    utility: float  # RU of the top document: log p(y|top, x) - log p(y|null, x) (section 4.5)
    # log p(y|top, x) - log(1 / objects of the relation). RU alone flatters: with no document the reader may
    # come to say less than the prior does. None where the number of objects is not known.
    gain: float | None
    accuracy: float  # of the masked tokens, by the marginal over the candidates
    log_marginal: float  # log p(y|x)

    def as_dict(self) -> dict[str, float]:
        values = {f"recall@{k}": value for k, value in self.recall.items()}
        gain = {} if self.gain is None else {"gain": self.gain}
        return values | {
            "utility": self.utility,
            **gain,
            "accuracy": self.accuracy,
            "log_marginal": self.log_marginal,
        }


@dataclass(frozen=True)
class Reading:
    """What the model made of masked statements, by candidate; where the model is, but for the rows."""

    rows: Tensor  # int64 [B, K] on the CPU, the null document first
    log_likelihood: Tensor  # [B, K, M]
    token_mask: Tensor  # bool [B, M]
    posterior: rk.Posterior
    predictions: Tensor  # int64 [B, M], by the marginal


def build_table(model: Realm, documents: Documents, asking: Statements | None = None) -> rk.ShardedTable:
    """The index by the encoder as it is now; documents lack the statements `asking` that stand in them."""
    training = model.training
    model.eval()
    rows = torch.cat(list(embed_all(model.retriever, documents)))
    asking = asking if asking is None else asking[asking.origin >= 0]
    if asking is not None and len(asking):
        rest = without(documents.read(asking.fact), asking)
        with torch.no_grad():
            rows[asking.fact] = model.retriever.documents(*documents.inputs(asking.fact, rest))
    model.train(training)
    return rk.ShardedTable.from_tensors([rows])


@torch.no_grad()
def read(
    model: Realm,
    corpus: Corpus,
    table: rk.ShardedTable,
    masked: tuple[Tensor, Tensor, Tensor | None],
    config: RealmConfig,
    mode: str | None = None,
    exclude: Tensor | None = None,
) -> Reading:
    """Retrieve for and read masked ids [B, L] with positions and targets [B, M].

    Without targets the likelihoods are those of the model's own prediction.
    """
    ids, positions, targets = masked
    queries = model.retriever.queries(ids)
    rows, found = retrieve(queries, table, corpus.documents, config.candidates, exclude)
    scores = fresh_scores(model, corpus.documents, queries, rows)
    hidden = model.read(ids, positions, corpus.documents.read(rows))
    found = found.to(hidden.device)
    log_p = (hidden @ model.reader.weight.T + model.reader.bias).log_softmax(-1)  # [B, K, M, V]
    prior = scores.masked_fill(~found, -torch.inf).softmax(-1)  # [B, K]
    predictions = torch.einsum("bk,bkmv->bmv", prior, log_p.exp()).argmax(-1)
    targets = predictions if targets is None else targets.to(hidden.device)
    token_mask = targets != IGNORE
    wanted = targets.masked_fill(~token_mask, 0)[:, None, :, None].expand(-1, rows.shape[1], -1, 1)
    log_likelihood = log_p.gather(3, wanted).squeeze(3)
    posterior = rk.posterior(
        scores, log_likelihood, token_mask=token_mask, doc_mask=found, mode=mode or config.mode, null_index=0
    )
    return Reading(rows, log_likelihood, token_mask, posterior, predictions)


@torch.no_grad()
def evaluate(model: Realm, corpus: Corpus, config: RealmConfig, statements: Statements) -> Evaluation:
    """Objects of the statements masked, over all documents of the corpus, with a fresh index.

    A statement that stands in a document looks for that document without it (recall), and is read beside
    other documents (the rest).
    """
    model.eval()
    table = build_table(model, corpus.documents, statements)
    unused = torch.Generator()  # salient masks draw nothing
    totals = dict.fromkeys(["utility", "gain", "right", "tokens", "log_marginal"], 0.0)
    hits = dict.fromkeys(RECALL_AT, 0.0)
    # A tensor of nothing is split into one part of nothing, which no encoder takes.
    for rows in torch.arange(len(statements)).split(100) if len(statements) else ():
        batch = statements[rows]
        masked = mask_statements(batch, "salient", unused)
        exclude = trivial(corpus.documents, batch)
        copies = exclude.masked_fill(exclude == batch.fact[:, None], -1)
        queries = model.retriever.queries(masked[0])
        k = min(max(RECALL_AT), table.num_rows)
        top = rk.mips_topk(queries, table, k, exclude=copies.to(queries.device)).indices.cpu()
        for k in RECALL_AT:
            hits[k] += (top[:, :k] == batch.fact[:, None]).any(1).sum().item()
        reading = read(model, corpus, table, masked, config, exclude=exclude)
        log_top = (reading.log_likelihood[:, 1] * reading.token_mask).sum(1).cpu()
        totals["utility"] += reading.posterior.utility[:, 1].sum().item()
        if corpus.objects_per_fact is not None:
            totals["gain"] += (log_top + corpus.objects_per_fact[batch.fact].log()).sum().item()
        totals["right"] += (reading.predictions.cpu() == masked[2]).sum().item()
        totals["tokens"] += reading.token_mask.sum().item()
        totals["log_marginal"] += reading.posterior.log_marginal.sum().item()
    model.train()
    n = max(len(statements), 1)
    return Evaluation(
        recall={k: hits[k] / n for k in RECALL_AT},
        utility=totals["utility"] / n,
        gain=None if corpus.objects_per_fact is None else totals["gain"] / n,
        accuracy=totals["right"] / max(totals["tokens"], 1),
        log_marginal=totals["log_marginal"] / n,
    )
