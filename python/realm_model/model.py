"""REALM's two networks: the embedder (the retriever) and the knowledge-augmented encoder (the reader).

Shapes: B queries, N documents, L wordpieces, K candidates, M target tokens, D projection, H hidden, V
vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from .config import ModelConfig
from .inputs import PAD, Documents, join, trim

LAYER_NORM_EPS = 1e-12  # BERT's, and of the embedder's head in the released model


def bert_config(config: ModelConfig, vocab_size: int) -> BertConfig:
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=4 * config.hidden,
        hidden_act="gelu_pytorch_tanh",  # BERT's gelu_new as one fused op
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        initializer_range=config.initializer_range,
        max_position_embeddings=config.query_length + config.document_length,
        layer_norm_eps=LAYER_NORM_EPS,
        pad_token_id=PAD,
    )


class Embedder(nn.Module):
    """Embed_input and Embed_doc (section 3.1): one transformer, a head of its own for each side.

    Embed(x) = LayerNorm(W BERT_CLS(x)), the LayerNorm as in the released code.
    """

    def __init__(self, config: BertConfig, projection: int) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)
        self.query_head = _head(config.hidden_size, projection)
        self.document_head = _head(config.hidden_size, projection)

    def queries(self, ids: Tensor) -> Tensor:
        """`[CLS] x [SEP]`, int64 [B, L] -> [B, D]."""
        ids = trim(ids)
        return self.query_head(self._cls(ids, torch.zeros_like(ids)))

    def documents(self, ids: Tensor, segments: Tensor) -> Tensor:
        """`[CLS] title [SEP] body [SEP]`, int64 [B, L] -> [B, D]."""
        return self.document_head(self._cls(ids, segments))

    def _cls(self, ids: Tensor, segments: Tensor) -> Tensor:
        return encode(self.bert, ids, segments)[:, 0]


class KnowledgeAugmentedEncoder(nn.Module):
    """p(y|z,x): BERT over the join of query and document body, with the masked-language-model head (section
    3.1).
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.lm = BertForMaskedLM(config)

    def forward(self, queries: Tensor, bodies: Tensor, positions: Tensor) -> Tensor:
        """What the decoder reads at the masked positions.

        queries int64 [B, Lq] with their special tokens, bodies int64 [B, Lb], positions int64 [B, M] in the
        query.
        Returns [B, M, H]; logits are this times `weight` plus `bias`, never made here.
        """
        ids, segments = join(queries, bodies)
        hidden = encode(self.lm.bert, ids, segments)  # [B, L, H]
        masked = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        return self.lm.cls.predictions.transform(masked)

    @property
    def weight(self) -> Tensor:
        """[V, H], tied to the word embeddings."""
        return self.lm.cls.predictions.decoder.weight

    @property
    def bias(self) -> Tensor:
        """[V]."""
        return self.lm.cls.predictions.decoder.bias


class Realm(nn.Module):
    """Retriever and reader, which share nothing but the vocabulary."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        bert = bert_config(config, vocab_size)
        self.score_scale = config.score_scale
        self.retriever = Embedder(bert, config.projection)
        self.reader = KnowledgeAugmentedEncoder(bert)

    def relevance(self, queries: Tensor, documents: Tensor) -> Tensor:
        """f(x, z) of each query [B, D] and its own candidates [B, K, D]: [B, K]."""
        return self.score_scale * torch.einsum("bd,bkd->bk", queries, documents)

    def read(self, queries: Tensor, positions: Tensor, bodies: Tensor) -> Tensor:
        """The decoder's inputs for each query [B, Lq] joined with each of its bodies [B, K, Lb]: [B, K, M,
        H].
        """
        B, K, _ = bodies.shape
        hidden = self.reader(
            queries.repeat_interleave(K, 0), bodies.flatten(0, 1), positions.repeat_interleave(K, 0)
        )
        return hidden.unflatten(0, (B, K))


def encode(bert: BertModel, ids: Tensor, segments: Tensor) -> Tensor:
    """The last hidden states [B, L, H] of padded inputs."""
    attention = (ids != PAD).long()
    return bert(input_ids=ids, attention_mask=attention, token_type_ids=segments).last_hidden_state


@torch.no_grad()
def embed_documents(embedder: Embedder, documents: Documents, rows: Tensor, batch: int = 256) -> Tensor:
    """Embeddings of documents by row: [len(rows), D]. In batches of like lengths, so that little padding is
    read.
    """
    lengths = (documents.bodies[rows] != PAD).sum(1) + (documents.titles[rows] != PAD).sum(1)
    order = lengths.argsort(stable=True)
    parts = [embedder.documents(*documents.inputs(part)) for part in rows[order].split(batch)]
    table = torch.cat(parts)
    out = torch.empty_like(table)
    out[order] = table
    return out


def _head(hidden: int, projection: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, projection), nn.LayerNorm(projection, eps=LAYER_NORM_EPS))
