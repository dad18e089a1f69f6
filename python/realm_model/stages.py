"""The three stages of pre-training, in order: the Inverse Cloze Task, the reader's copy start, REALM.

A stage draws its batches and says what to minimise. Nothing a stage makes at its start outlives what a
checkpoint holds: made again from the same model, it is the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import realm_kernels as rk

from .config import RunConfig, StageConfig
from .evaluate import build_table
from .inputs import IGNORE, Corpus, Statements, StatementSource, trivial
from .masking import crop_spans, exchange_objects, mask_statements, take_sentences, take_spans
from .model import Realm, embed_all
from .objectives import ict_loss, reading_loss, realm_loss
from .ranks import ALONE, Ranks

ICT_REMOVE = 0.9  # the share of spans taken out of their context (ORQA), in a world
SHORTEST_SPAN = 4  # wordpieces of a query of the ICT on text
# The copy start's contexts: a statement's own document, one retrieved for it, or none.
OWN_CONTEXT, RETRIEVED_CONTEXT = 0.7, 0.2
RETRIEVED = 8


class Stage(Protocol):
    """One stage of training."""

    config: StageConfig

    def begin_step(self, step: int) -> None:
        """The step boundary, before the work of `step`."""

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Draw a batch; the loss and what else is worth a line in the metrics."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed stage needs beside the model."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class _Stateless:
    def begin_step(self, step: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class IctStage(_Stateless):
    """Warm start of the retriever: a span of each document's body looks for the rest of it (section 3.3)."""

    def __init__(self, config: RunConfig, model: Realm, corpus: Corpus, ranks: Ranks = ALONE) -> None:
        self.config, self.model, self.corpus, self.ranks = config.ict, model, corpus, ranks
        self.text, self.room = config.text, config.model.query_length - 2
        if config.text is not None and config.text.ict_wordpieces:
            self.room = min(self.room, config.text.ict_wordpieces)

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        documents, contexts = self.corpus.documents, self.corpus.contexts
        rows = contexts[torch.randperm(len(contexts), generator=generator)[: self.config.batch]]
        bodies = documents.read(rows)
        drawn = [
            self._take(rows, bodies, generator) for _ in range(self.text.ict_queries if self.text else 1)
        ]
        spans = torch.stack([span for span, _ in drawn], dim=1)  # [B, Q, L]
        rest = torch.stack([rest for _, rest in drawn]).amin(dim=0)  # [PAD], 0, where any of them took it
        return ict_loss(self.model, documents, rows, spans, rest, self.ranks), {}

    def _take(self, rows: Tensor, bodies: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A query from each body and what is left of it, [B, L] both."""
        if self.text is None:
            return crop_spans(bodies, ICT_REMOVE, generator)
        remove = self.text.ict_remove
        if self.text.ict == "span":
            return take_spans(bodies, min(SHORTEST_SPAN, self.room), self.room, remove, generator)
        assert self.corpus.documents.sentences is not None
        ends = self.corpus.documents.sentences.padded(rows, fill=-1)
        return take_sentences(bodies, ends, self.room, remove, generator)


class ReaderStage(_Stateless):
    """Copy start of the reader: it learns to fill a mask from a document that says it, and to do without.

    Statements of the corpus, masked, beside their own document, one that the warm retriever finds for them,
    or the null document. No query is seen and the retriever stays as it is. Without this start the first
    steps of REALM reward documents for nothing and damage the retriever.

    Beside its own document a statement and the document exchange the object for another one: the reader
    could learn the facts by heart otherwise, and then it does not learn to copy.
    """

    def __init__(self, config: RunConfig, model: Realm, corpus: Corpus, ranks: Ranks = ALONE) -> None:
        self.config, self.model, self.corpus, self.ranks = config.reader, model, corpus, ranks
        self.masks = ("salient", config.marginal.masks)  # alternating, so that an ablation starts fairly
        self.step = 0
        self.table = build_table(model, corpus.documents)

    def begin_step(self, step: int) -> None:
        self.step = step

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        own, documents = self.corpus.own, self.corpus.documents
        statements = _draw(own, self.config.batch, generator)
        draw = torch.rand(len(statements), generator=generator)
        column = torch.randint(RETRIEVED, (len(statements),), generator=generator)
        rows = statements.fact.masked_fill(draw >= OWN_CONTEXT + RETRIEVED_CONTEXT, documents.null)
        is_retrieved = (draw >= OWN_CONTEXT) & (draw < OWN_CONTEXT + RETRIEVED_CONTEXT)
        rows[is_retrieved] = self._retrieve(statements[is_retrieved], column[is_retrieved])
        others = _draw(own, len(statements), generator)
        statements, bodies = exchange_objects(statements, documents.read(rows), others)
        masked = mask_statements(statements, self.masks[self.step % 2], generator)
        part = self.ranks.part(len(statements))
        ids, positions, targets = (tensor[part] for tensor in masked)
        return reading_loss(self.model, ids, positions, targets, bodies[part]), {}

    @torch.no_grad()
    def _retrieve(self, statements: Statements, column: Tensor) -> Tensor:
        """The document at place `column` [B] of the top ones for each statement, its object masked: [B]."""
        if len(statements) == 0:
            return column
        self.model.eval()
        unused = torch.Generator()  # salient masks draw nothing
        ids, _, _ = mask_statements(statements, "salient", unused)
        k = min(RETRIEVED, self.table.num_rows)
        found = rk.mips_topk(self.model.retriever.queries(ids), self.table, k).indices.cpu()
        self.model.train()
        return found.gather(1, column.clamp(max=k - 1)[:, None]).squeeze(1)


class RealmStage:
    """REALM's pre-training: retrieve from the stale index, score afresh, maximise log p(y|x), refresh the
    index.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Realm,
        corpus: Corpus,
        index: Path | None = None,
        ranks: Ranks = ALONE,
        builders: rk.table.RanksEncoder | None = None,
    ) -> None:
        """index: the folder of this rank's part of the index. builders: embed it in the place of a thread."""
        self.config, self.marginal, self.model, self.corpus = config.realm, config.marginal, model, corpus
        self.ranks, self.builders = ranks, builders
        # Each rank holds, refreshes and searches its part of the index.
        self.rows = torch.arange(corpus.documents.num_documents)[ranks.part(corpus.documents.num_documents)]
        empty = torch.zeros(len(self.rows), config.model.projection, device=model.device)
        local = rk.ShardedTable.from_tensors([empty])
        self.table = local if ranks.size == 1 else rk.DistributedTable.from_local(local, ranks.group)
        lag = config.marginal.refresh_lag if config.marginal.refresh == "fixed_lag" else None
        self.refresher = rk.TableRefresher(
            self.table,
            # Called, not given: builders serve on when this stage is closed.
            self._encoder() if builders is None else builders.__call__,
            mode=config.marginal.refresh,
            every=config.marginal.refresh_every,
            lag=lag,
            path=index,
        )

    def begin_step(self, step: int) -> None:
        if step == 0:
            self.refresher.build(0, self.model.retriever.state_dict)
        self.refresher.step(step, self.model.retriever.state_dict)
        if self.builders is not None and self.builders.lost is not None:
            raise rk.LostRankError(self.builders.lost)

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        from_corpus = round(self.marginal.corpus_share * self.config.batch)
        queries = _draw(self.corpus.train, self.config.batch - from_corpus, generator)
        sentences = _draw(self.corpus.own, from_corpus, generator)
        statements = queries.cat(sentences)
        exclude = trivial(self.corpus.documents, statements)
        masked = mask_statements(statements, self.marginal.masks, generator)
        part = self.ranks.part(len(statements))
        mine = tuple(tensor[part] for tensor in masked)
        loss, posterior = realm_loss(
            self.model, self.corpus.documents, self.table, mine, exclude[part], self.marginal
        )
        if self.marginal.mode == "token":
            # A mean over tokens, of which the ranks have unequal numbers.
            loss = loss * (mine[2] != IGNORE).sum() * self.ranks.size / (masked[2] != IGNORE).sum()
        metrics = self.refresher.metrics
        return loss, {
            "null_prior": posterior.prior[:, 0].mean().item(),
            "age": metrics.age,
            "refreshes": metrics.refreshes,
            "failed_refreshes": metrics.failures,
        }

    def state_dict(self) -> dict[str, Any]:
        return self.refresher.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.refresher.load_state_dict(state)

    def close(self) -> None:
        self.refresher.close()

    def _encoder(self) -> Callable[[dict[str, Tensor]], Iterator[Tensor]]:
        """What the refresher's thread runs: a twin of the embedder, which it alone touches."""
        twin, documents = copy.deepcopy(self.model.retriever).eval(), self.corpus.documents
        mine = self.rows

        def encode(snapshot: dict[str, Tensor]) -> Iterator[Tensor]:
            twin.load_state_dict(snapshot)
            yield from embed_all(twin, documents, mine)

        return encode


def _draw(source: StatementSource, count: int, generator: torch.Generator) -> Statements:
    return source[torch.randint(max(1, len(source)), (count,), generator=generator)]
