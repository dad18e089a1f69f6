"""The embedder of a pre-training run, in the place of a published one."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import model
from ..config import ModelConfig
from ..published import PublishedConfig
from ..published.models import Published

_OTHER = ("score_scale", "document_length", "shared_head")  # what a published configuration does not know


class TwinEmbedder(Published):
    """model.Embedder: its heads, one for each side or one for both, read [CLS] itself, without BERT's pooler.

    The factor of the relevance goes into the queries: f(x, z) is then a plain inner product, as the index and
    the released reader want it.
    """

    architecture = "TwinEmbedder"

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__(config)
        lacking = [name for name in _OTHER if name not in config.other]
        if lacking:
            raise ValueError(f"{self.architecture}: the configuration must have {lacking[0]}, which lacks")
        self.net = model.Embedder(config.bert(), config.retriever_proj_size, config.other["shared_head"])
        self.score_scale: float = config.other["score_scale"]
        self.document_length: int = config.other["document_length"]

    def forward(self, ids: Tensor) -> Tensor:
        """Queries `[CLS] x [SEP]`, int64 [B, L] -> [B, D]."""
        return self.score_scale * self.net.queries(ids)

    def documents(self, ids: Tensor, segments: Tensor) -> Tensor:
        """`[CLS] title [SEP] body [SEP]`, int64 [N, L] -> [N, D]."""
        return self.net.documents(ids, segments)

    @staticmethod
    def of(trained: model.Realm, config: ModelConfig, vocab_size: int) -> TwinEmbedder:
        """With the weights of a run."""
        twin = TwinEmbedder(published_config(config, vocab_size))
        with torch.no_grad():
            for name, target in twin.net.state_dict().items():
                target.copy_(trained.retriever.state_dict()[name])
        return twin


def published_config(config: ModelConfig, vocab_size: int, of_reader: bool = False) -> PublishedConfig:
    """The sizes of a run's networks, by the published names."""
    bert = model.bert_config(config, vocab_size, of_reader)
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "max_position_embeddings",
        "initializer_range",
        "layer_norm_eps",
    )
    return PublishedConfig(
        **{name: getattr(bert, name) for name in names},
        retriever_proj_size=config.projection,
        # A third of the width, as the released 256 is of 768, in sixteens: rk.score_spans is fast there.
        span_hidden_size=max(32, config.hidden // 48 * 16),
        other={name: getattr(config, name) for name in _OTHER},
    )
