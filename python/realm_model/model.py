"""REALM's two networks: the embedder (the retriever) and the knowledge-augmented encoder (the reader).

Shapes: B queries, N documents, L wordpieces, K candidates, M target tokens, D projection, H hidden, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, BertModel
from transformers.models.bert.modeling_bert import BertLayer

from .config import ModelConfig
from .inputs import PAD, Documents, join, trim

ENCODE_ROWS = 1024  # documents at a time, where all are embedded
CHUNK_ROWS = 64  # sequences at a time on the CPU, where their activations so stay in the cache
LAYER_NORM_EPS = 1e-12  # BERT's, and of the embedder's head in the released model


def bert_config(config: ModelConfig, vocab_size: int, of_reader: bool = False) -> BertConfig:
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden,
        num_hidden_layers=(of_reader and config.reader_layers) or config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.intermediate or 4 * config.hidden,
        hidden_act=config.activation,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        initializer_range=config.initializer_range,
        max_position_embeddings=config.query_length + config.document_length,
        layer_norm_eps=LAYER_NORM_EPS,
        pad_token_id=PAD,
    )


class Embedder(nn.Module):
    """Embed_input and Embed_doc (section 3.1): one transformer, and a head for each side or one for both.

    Embed(x) = LayerNorm(W BERT_CLS(x)), the LayerNorm as in the released code.
    """

    def __init__(self, config: BertConfig, projection: int, shared_head: bool = False) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)
        self.query_head = _head(config.hidden_size, projection)
        self.document_head = self.query_head if shared_head else _head(config.hidden_size, projection)

    def queries(self, ids: Tensor) -> Tensor:
        """`[CLS] x [SEP]`, int64 [B, L] -> [B, D]."""
        ids = trim(ids)
        return self.query_head(self._cls(ids, torch.zeros_like(ids)))

    def documents(self, ids: Tensor, segments: Tensor) -> Tensor:
        """`[CLS] title [SEP] body [SEP]`, int64 [B, L] -> [B, D]."""
        return self.document_head(self._cls(ids, segments))

    def _cls(self, ids: Tensor, segments: Tensor) -> Tensor:
        first = ids.new_zeros(ids.shape[0], 1)
        return encode(self.bert, ids, segments, first).squeeze(1)


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
        return self.lm.cls.predictions.transform(encode(self.lm.bert, ids, segments, positions))

    @property
    def weight(self) -> Tensor:
        """[V, H], tied to the word embeddings."""
        return self.lm.cls.predictions.decoder.weight

    @property
    def bias(self) -> Tensor:
        """[V]."""
        return self.lm.cls.predictions.decoder.bias


class Realm(nn.Module):
    """Retriever and reader, which share nothing but the vocabulary. They take wordpieces from the CPU."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.score_scale = config.score_scale
        self.retriever = Embedder(bert_config(config, vocab_size), config.projection, config.shared_head)
        self.reader = KnowledgeAugmentedEncoder(bert_config(config, vocab_size, of_reader=True))
        for network in (self.retriever.bert, self.reader.lm.bert):
            embeddings = network.embeddings
            for table in (embeddings.position_embeddings, embeddings.token_type_embeddings):
                nn.init.normal_(table.weight, std=config.position_initializer_range)

    @property
    def device(self) -> torch.device:
        return self.reader.weight.device

    def relevance(self, queries: Tensor, documents: Tensor) -> Tensor:
        """f(x, z) of each query [B, D] and its own candidates [B, K, D]: [B, K]."""
        # Scores are differences of large sums: autocast would round them to three digits.
        with torch.autocast(queries.device.type, enabled=False):
            return self.score_scale * torch.einsum("bd,bkd->bk", queries.float(), documents.float())

    def relevance_of_all(self, queries: Tensor, documents: Tensor) -> Tensor:
        """f(x, z) of queries [B, D] and documents [N, D]: [B, N]."""
        with torch.autocast(queries.device.type, enabled=False):
            return self.score_scale * queries.float() @ documents.float().T

    def read(self, queries: Tensor, positions: Tensor, bodies: Tensor) -> Tensor:
        """The decoder's inputs for each query [B, Lq] joined with each of its bodies [B, K, Lb]: [B, K, M,
        H].
        """
        B, K, _ = bodies.shape
        hidden = self.reader(
            queries.repeat_interleave(K, 0), bodies.flatten(0, 1), positions.repeat_interleave(K, 0)
        )
        # linear_marginal_loss wants one dtype for hidden states and weight, and under autocast casts both.
        return hidden.unflatten(0, (B, K)).to(self.reader.weight.dtype)


def encode(bert: BertModel, ids: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
    """The last hidden states at positions [B, M] of padded inputs [B, L]: [B, M, H].

    The inputs are on the CPU, where the corpus is; what comes back is where the weights are.
    In chunks of like lengths: little padding is computed, and a chunk's activations stay in the cache. Of the
    last layer only what stands at the positions is computed: with one layer, most of the work falls away.
    """
    device = bert.embeddings.word_embeddings.weight.device
    order = (ids != PAD).sum(1).argsort(stable=True)
    parts = []
    for rows in order.split(CHUNK_ROWS if device.type == "cpu" else ENCODE_ROWS):
        chunk = trim(ids[rows])
        types, places = (t.to(device) for t in (segments[rows, : chunk.shape[1]], positions[rows]))
        chunk = chunk.to(device)
        mask = (chunk != PAD)[:, None, None, :]  # [rows, 1, 1, L]
        hidden = bert.embeddings(input_ids=chunk, token_type_ids=types)
        *lower, last = bert.encoder.layer
        for layer in lower:
            hidden = _layer(layer, hidden, hidden, mask)  # [rows, L, H]
        asking = hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.shape[-1]))
        parts.append(_layer(last, asking, hidden, mask))
    return torch.cat(parts)[order.argsort().to(device)]


def _layer(layer: BertLayer, asking: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
    """One layer at some places, [B, M, H], which attend to all places [B, L, H]: [B, M, H]."""
    attention = layer.attention.self

    def heads(linear: nn.Module, states: Tensor) -> Tensor:  # [B, heads, places, H / heads]
        return linear(states).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)

    context = functional.scaled_dot_product_attention(
        heads(attention.query, asking),
        heads(attention.key, hidden),
        heads(attention.value, hidden),
        attn_mask=mask,
        dropout_p=attention.dropout.p if layer.training else 0.0,
    )
    attended = layer.attention.output(context.transpose(1, 2).flatten(2), asking)
    return layer.output(layer.intermediate(attended), attended)


@torch.no_grad()
def embed_documents(embedder: Embedder, documents: Documents, rows: Tensor) -> Tensor:
    """Embeddings of documents by row: [len(rows), D]."""
    return embedder.documents(*documents.inputs(rows))


def embed_all(embedder: Embedder, documents: Documents, rows: Tensor | None = None) -> Iterator[Tensor]:
    """Embeddings of documents by row, of all where None, in chunks [n, D] in the order of the rows."""
    rows = torch.arange(documents.num_documents) if rows is None else rows
    for chunk in rows.split(ENCODE_ROWS):
        yield embed_documents(embedder, documents, chunk)


def _head(hidden: int, projection: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, projection), nn.LayerNorm(projection, eps=LAYER_NORM_EPS))
