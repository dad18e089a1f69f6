"""The published networks. Attributes have the layout's names, so that a state_dict is a published file.

Shapes: B queries or questions, N inputs, K candidates, L wordpieces, M masked tokens, C spans, D projection,
H hidden size, V vocabulary. Inputs are padded with [PAD], id 0, which is never attended to; segments None
means zeros.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import BertModel
from transformers.models.bert.modeling_bert import BertOnlyMLMHead

import realm_kernels as rk

from ..inputs import IGNORE, PAD
from ..model import CHUNK_ROWS, encode
from ..reader import SpanHead, Spans, all_spans
from .config import PublishedConfig
from .files import fill, read_weights, write_weights

P = TypeVar("P", bound="Published")


class Published(nn.Module):
    """What the classes share: a directory with config.json and weights."""

    architecture: str

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(cls: type[P], directory: str | Path) -> P:
        """Load a published directory, in evaluation mode.

        Raises ValueError naming the file that is missing, damaged, of another class, or more than tensors.
        """
        config = PublishedConfig.read(Path(directory))
        weights, path = read_weights(Path(directory), cls.architecture)
        model = cls._for(config, weights)
        fill(model, weights, path)
        return model.eval()

    def save_pretrained(self, directory: str | Path, *, safe_serialization: bool = True) -> None:
        """Write config.json and model.safetensors, or pytorch_model.bin."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_weights(self.state_dict(), directory, safe=safe_serialization)
        self.config.write(directory, self.architecture)

    @classmethod
    def _for(cls: type[P], config: PublishedConfig, weights: dict[str, Tensor]) -> P:
        """A model that takes `weights`."""
        return cls(config)


class Embedder(Published):
    """Embed(x) = LayerNorm(W pooler(BERT(x))), D = 128: the released form of Embed_input and Embed_doc.

    The pooler, dense and tanh over [CLS], is BERT's; the paper's equation leaves it out.
    """

    architecture = "RealmEmbedder"

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__(config)
        self.realm = BertModel(config.bert())
        self.cls = _mlm_head(config)  # its MLM head is in the files and unused
        self.cls.dense = nn.Linear(config.hidden_size, config.retriever_proj_size)
        self.cls.LayerNorm = nn.LayerNorm(config.retriever_proj_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor, segments: Tensor | None = None) -> Tensor:
        """int64 [N, L] -> [N, D]. Rows are computed in chunks of like lengths."""
        segments = torch.zeros_like(ids) if segments is None else segments
        hidden = encode(self.realm, ids, segments, ids.new_zeros(ids.shape[0], 1))  # [N, 1, H], of [CLS]
        return self.cls.LayerNorm(self.cls.dense(self.realm.pooler(hidden)))

    def documents(self, ids: Tensor, segments: Tensor) -> Tensor:
        """The same network serves both sides."""
        return self(ids, segments)

    @property
    def document_length(self) -> int:
        """The most wordpieces of a document's input; the released index was made with 288."""
        return self.config.max_position_embeddings


class Scorer(Published):
    """f(x, z) = Embed_input(x) . Embed_doc(z). One embedder serves both sides unless another is given."""

    architecture = "RealmScorer"

    def __init__(self, config: PublishedConfig, query_embedder: Embedder | None = None) -> None:
        super().__init__(config)
        self.embedder = Embedder(config)
        self.query_embedder = self.embedder if query_embedder is None else query_embedder

    def forward(
        self,
        ids: Tensor,
        candidates: Tensor,
        segments: Tensor | None = None,
        candidate_segments: Tensor | None = None,
    ) -> Tensor:
        """Queries int64 [B, L] and the candidates of each, int64 [B, K, L] -> relevance [B, K]."""
        queries = self.query_embedder(ids, segments)  # [B, D]
        flat = None if candidate_segments is None else candidate_segments.flatten(0, 1)
        documents = self.embedder(candidates.flatten(0, 1), flat)  # [B K, D]
        return torch.einsum("bd,bkd->bk", queries, documents.unflatten(0, candidates.shape[:2]))

    @classmethod
    def _for(cls, config: PublishedConfig, weights: dict[str, Tensor]) -> Scorer:
        """With a query embedder of its own where the file's differs: the port stores the shared one twice."""
        own = [key for key in weights if key.startswith("query_embedder.")]
        shared = all(torch.equal(weights[key], weights.get(key[6:], weights[key])) for key in own)
        return cls(config, None if shared else Embedder(config))


class KnowledgeAugmentedEncoder(Published):
    """p(y|z,x): BERT over the join and the MLM head, its decoder tied to the word embeddings."""

    architecture = "RealmKnowledgeAugEncoder"

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__(config)
        self.realm = BertModel(config.bert())
        self.cls = _mlm_head(config)
        self.cls.predictions.decoder.weight = self.realm.embeddings.word_embeddings.weight

    def forward(self, ids: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
        """What the decoder reads at positions int64 [B, M] of each join int64 [B, K, L]: [B, K, M, H].

        Logits are this times `weight` plus `bias`, and never made here.
        """
        B, K, _ = ids.shape
        places = positions.repeat_interleave(K, dim=0)
        hidden = encode(self.realm, ids.flatten(0, 1), segments.flatten(0, 1), places)  # [B K, M, H]
        return self.cls.predictions.transform(hidden).unflatten(0, (B, K))

    @property
    def weight(self) -> Tensor:
        """[V, H]."""
        return self.cls.predictions.decoder.weight

    @property
    def bias(self) -> Tensor:
        """[V]."""
        return self.cls.predictions.bias

    def loss(
        self,
        ids: Tensor,
        segments: Tensor,
        relevance: Tensor,
        labels: Tensor,
        mlm_mask: Tensor | None = None,
    ) -> Tensor:
        """The released marginal: -sum_j m_j log sum_z p(z|x) p(y_j|z,x) / sum_j m_j, over all examples.

        ids and segments [B, K, L]; relevance [B, K]; labels int64 [B, L], -100 where nothing is asked;
        mlm_mask [B, L], m, ones where None. As in the port a place with m = 1 and no label adds nothing and
        is counted; with m = 0 everywhere the loss is 0.
        """
        counted = torch.ones_like(labels, dtype=torch.bool) if mlm_mask is None else mlm_mask.bool()
        asked = counted & (labels != IGNORE)
        most = max(1, int(asked.sum(dim=1).max()))
        positions = (~asked).to(torch.int8).argsort(dim=1, stable=True)[:, :most]  # [B, M]
        targets = labels.masked_fill(~asked, IGNORE).gather(1, positions)
        total = rk.linear_marginal_loss(
            relevance,
            self(ids, segments, positions),
            self.weight,
            targets,
            bias=self.bias,
            mode="token",
            reduction="sum",
        )
        return total / counted.sum().clamp(min=1)


class SpanScores(NamedTuple):
    """Every span of every join."""

    scores: Tensor  # [N, C]; what it holds where not valid has no meaning
    valid: Tensor  # bool [N, C], the span lies in the block
    spans: Spans


class Reader(Published):
    """The extractive reader: BERT over the join, a score for each span of the block (reader.SpanHead)."""

    architecture = "RealmReader"

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__(config)
        self.realm = BertModel(config.bert())
        self.cls = _mlm_head(config)  # in the files and unused
        self.qa_outputs = SpanHead(config.hidden_size, config.span_hidden_size, config.reader_layer_norm_eps)

    def forward(self, ids: Tensor, segments: Tensor, body: Tensor) -> SpanScores:
        """Joins int64 [N, L], segments, and bool [N, L], True at the wordpieces of the block, [SEP] not."""
        spans = all_spans(ids.shape[1], self.config.max_span_width, ids.device)
        scores = []
        for rows in torch.arange(ids.shape[0], device=ids.device).split(CHUNK_ROWS):
            hidden = self.realm(
                input_ids=ids[rows],
                attention_mask=(ids[rows] != PAD).long(),
                token_type_ids=segments[rows],
            ).last_hidden_state  # [rows, L, H]
            scores.append(self.qa_outputs(hidden, spans))
        return SpanScores(torch.cat(scores), spans.inside(body), spans)


def _mlm_head(config: PublishedConfig) -> nn.Module:
    """BERT's, whose bias stands in the files under two names."""
    head = BertOnlyMLMHead(config.bert())
    head.predictions.decoder.bias = head.predictions.bias
    return head
