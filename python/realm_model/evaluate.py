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
from .ranks import ALONE, Ranks

RECALL_AT = (1, 5, 20)
AT_ONCE = 100  # statements


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


def build_table(
    model: Realm, documents: Documents, asking: Statements | None = None, ranks: Ranks = ALONE
) -> rk.ShardedTable | rk.DistributedTable:
    """The index by the encoder as it is now; documents lack the statements `asking` that stand in them.

    Of several ranks each embeds and holds its part of the documents.
    """
    training = model.training
    model.eval()
    mine = torch.arange(documents.num_documents)[ranks.part(documents.num_documents)]
    rows = torch.cat(list(embed_all(model.retriever, documents, mine)))
    asking = asking if asking is None else asking[(asking.origin >= 0) & torch.isin(asking.fact, mine)]
    if asking is not None and len(asking):
        rest = without(documents.read(asking.fact), asking)
        with torch.no_grad():
            embedded = model.retriever.documents(*documents.inputs(asking.fact, rest))
            rows[asking.fact - mine[0]] = embedded
    model.train(training)
    local = rk.ShardedTable.from_tensors([rows])
    return local if ranks.size == 1 else rk.DistributedTable.from_local(local, ranks.group)


@torch.no_grad()
def read(
    model: Realm,
    corpus: Corpus,
    table: rk.ShardedTable | rk.DistributedTable,
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
def evaluate(
    model: Realm, corpus: Corpus, config: RealmConfig, statements: Statements, ranks: Ranks = ALONE
) -> Evaluation:
    """Objects of the statements masked, over all documents of the corpus, with a fresh index.

    A statement that stands in a document looks for that document without it (recall), and is read beside
    other documents (the rest). Several ranks call this together: each takes its share of the statements, and
    all return the same, which is what one returns up to the rounding of sums.
    """
    model.eval()
    table = build_table(model, corpus.documents, statements, ranks)
    sums = _Sums()
    if len(statements):
        mine = torch.arange(len(statements))[ranks.part(len(statements))]
        # All search together, in as many rounds each; a rank without a statement asks another's, uncounted.
        rounds = -(-len(statements) // (AT_ONCE * ranks.size))
        for rows in (mine if len(mine) else torch.zeros(1, dtype=torch.int64)).tensor_split(rounds):
            found = _ask(model, corpus, config, table, statements[rows])
            if len(mine):
                sums.add(found)
    if ranks.size > 1:
        ranks.sum_(sums.values)
    model.train()
    return sums.means(len(statements), corpus.objects_per_fact is not None)


class _Sums:
    """Sums over statements, float64: hits at each k, utility, gain, right wordpieces, wordpieces, log p."""

    def __init__(self) -> None:
        self.values = torch.zeros(len(RECALL_AT) + 5, dtype=torch.float64)

    def add(self, sums: list[Tensor]) -> None:
        self.values += torch.stack([value.detach().cpu().double() for value in sums])

    def means(self, count: int, is_gain_known: bool) -> Evaluation:
        count = max(count, 1)
        *hits, utility, gain, right, wordpieces, log_marginal = self.values.tolist()
        return Evaluation(
            recall={k: hit / count for k, hit in zip(RECALL_AT, hits, strict=True)},
            utility=utility / count,
            gain=gain / count if is_gain_known else None,
            accuracy=right / max(wordpieces, 1),
            log_marginal=log_marginal / count,
        )


def _ask(
    model: Realm,
    corpus: Corpus,
    config: RealmConfig,
    table: rk.ShardedTable | rk.DistributedTable,
    batch: Statements,
) -> list[Tensor]:
    """What _Sums adds up, of a batch of statements."""
    masked = mask_statements(batch, "salient", torch.Generator())  # salient masks draw nothing
    exclude = trivial(corpus.documents, batch)
    copies = exclude.masked_fill(exclude == batch.fact[:, None], -1)
    queries = model.retriever.queries(masked[0])
    k = min(max(RECALL_AT), corpus.documents.num_documents)
    top = rk.mips_topk(queries, table, k, exclude=copies.to(queries.device)).indices.cpu()
    hits = [(top[:, :k] == batch.fact[:, None]).any(1).sum() for k in RECALL_AT]
    reading = read(model, corpus, table, masked, config, exclude=exclude)
    utility = reading.posterior.utility
    assert utility is not None  # read() names the null document
    gain = torch.zeros(())
    if corpus.objects_per_fact is not None:
        log_top = (reading.log_likelihood[:, 1] * reading.token_mask).sum(1).cpu()
        gain = (log_top + corpus.objects_per_fact[batch.fact].log()).sum()
    right = (reading.predictions.cpu() == masked[2]).sum()
    log_marginal = reading.posterior.log_marginal.sum()
    return [*hits, utility[:, 1].sum(), gain, right, reading.token_mask.sum(), log_marginal]
