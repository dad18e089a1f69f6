"""What each stage minimises: the Inverse Cloze Task, reading a given document, and REALM's marginal
likelihood.

Shapes: B examples, K candidates, L wordpieces, M target tokens, D projection.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import realm_kernels as rk

from .config import RealmConfig
from .inputs import Documents, query_inputs
from .model import Realm
from .ranks import ALONE, Ranks


def ict_loss(
    model: Realm, documents: Documents, rows: Tensor, spans: Tensor, rest: Tensor, ranks: Ranks = ALONE
) -> Tensor:
    """Inverse Cloze Task: a span finds its own context among those of the batch (ORQA, section 4).

    rows int64 [B], the documents; spans [B, Q, L], Q of each, and rest [B, L] as masking.crop_spans made
    them. The batch is that of all ranks; the loss is of this rank's spans, among the contexts of all.
    """
    part = ranks.part(len(rows))
    queries = model.retriever.queries(query_inputs(spans[part].flatten(0, 1)))  # [B Q / W, D]
    contexts = model.retriever.documents(*documents.inputs(rows[part], rest[part]))  # [B / W, D]
    scores = model.relevance_of_all(queries, ranks.gather(contexts))  # [B Q / W, B]
    own = torch.arange(len(rows), device=scores.device)[part]
    return F.cross_entropy(scores, own.repeat_interleave(spans.shape[1]))


def reading_loss(model: Realm, ids: Tensor, positions: Tensor, targets: Tensor, bodies: Tensor) -> Tensor:
    """-log p(y|z,x) with one given document for each statement: the marginal with nothing to choose.

    ids [B, L] masked, positions and targets [B, M], bodies [B, Lb].
    """
    hidden = model.read(ids, positions, bodies[:, None])  # [B, 1, M, H]
    scores = hidden.new_zeros(ids.shape[0], 1)
    targets = targets.to(hidden.device)
    return rk.linear_marginal_loss(scores, hidden, model.reader.weight, targets, bias=model.reader.bias)


def retrieve(
    queries: Tensor,
    table: rk.ShardedTable | rk.DistributedTable,
    documents: Documents,
    k: int,
    exclude: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The candidates of each query [B, D]: the null document at index 0, then the top k - 1 of the stale
    table.

    exclude: int64 [B, E] or None, trivial candidates: the documents the sentences were taken from; -1 pads.
    Returns rows int64 [B, k] of `documents` and which of them are documents, bool [B, k], on the CPU.
    """
    exclude = None if exclude is None else exclude.to(queries.device)
    indices = rk.mips_topk(queries.detach(), table, k - 1, exclude=exclude).indices.cpu()
    null = indices.new_full((queries.shape[0], 1), documents.null)
    found = torch.cat([torch.ones_like(null, dtype=torch.bool), indices >= 0], dim=1)
    return torch.cat([null, indices.masked_fill(indices < 0, documents.null)], dim=1), found


def fresh_scores(model: Realm, documents: Documents, queries: Tensor, rows: Tensor) -> Tensor:
    """f(x, z) by the encoders as they are now, with gradient: queries [B, D], rows [B, K] -> [B, K].

    Retrieval used a stale table; p(z|x) and its gradient may not (section 3.3). Each document is embedded
    once.
    """
    distinct, where = rows.unique(return_inverse=True)
    embeddings = model.retriever.documents(*documents.inputs(distinct))
    # As an embedding lookup: its gradient is summed in a fixed order, that of embeddings[where] is not.
    return model.relevance(queries, F.embedding(where.to(queries.device), embeddings))


def realm_loss(
    model: Realm,
    documents: Documents,
    table: rk.ShardedTable | rk.DistributedTable,
    masked: tuple[Tensor, Tensor, Tensor],
    exclude: Tensor,
    config: RealmConfig,
) -> tuple[Tensor, rk.Posterior]:
    """-log p(y|x) = -log sum_z p(z|x) p(y|z,x) over the candidates (equation 1), and what retrieval was
    worth.

    masked: ids [B, L], positions [B, M] and targets [B, M]; exclude int64 [B, E].
    """
    ids, positions, targets = masked
    queries = model.retriever.queries(ids)  # [B, D]
    rows, found = retrieve(queries, table, documents, config.candidates, exclude)
    scores = fresh_scores(model, documents, queries, rows)  # [B, K]
    hidden = model.read(ids, positions, documents.read(rows))  # [B, K, M, H]
    return rk.linear_marginal_loss(
        scores,
        hidden,
        model.reader.weight,
        targets.to(hidden.device),
        bias=model.reader.bias,
        doc_mask=found.to(hidden.device),
        mode=config.mode,
        return_posterior=True,
    )
