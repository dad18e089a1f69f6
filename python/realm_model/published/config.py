"""config.json of a published directory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import BertConfig
from transformers.activations import ACT2FN

from ..inputs import PAD

CONFIG = "config.json"
MODEL_TYPE = "realm"


@dataclass(frozen=True)
class PublishedConfig:
    """The sizes of a published model; the defaults are those of the port, and so the released models' own.

    `other` holds the keys that no model here reads, to be written again as they came. Among them are
    pad_token_id, bos_token_id and eos_token_id, which are shipped as 1, 0 and 2 and wrong for BERT: the
    tokenizer knows them.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    retriever_proj_size: int = 128
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_candidates: int = 8
    intermediate_size: int = 3072
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12  # of the encoder and of the embedder's projection
    span_hidden_size: int = 256
    max_span_width: int = 10
    reader_layer_norm_eps: float = 1e-3
    reader_beam_size: int = 5  # blocks that are read
    reader_seq_len: int = 320
    num_block_records: int = 13353718
    searcher_beam_size: int = 5000  # blocks of the retriever's loss
    other: dict[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def read(cls, directory: Path) -> PublishedConfig:
        """config.json of a directory. Raises ValueError where it is none or says what cannot be."""
        path = directory / CONFIG
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"{directory} is no checkpoint: cannot read {CONFIG}: {error.strerror}"
            ) from error
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(values, dict) or values.get("model_type") != MODEL_TYPE:
            found = values.get("model_type") if isinstance(values, dict) else type(values).__name__
            raise ValueError(f'{path} must have "model_type": "{MODEL_TYPE}", got {found!r}')
        own = {f.name: values.pop(f.name) for f in fields(cls) if f.name in values and f.name != "other"}
        config = cls(**own, other=values)
        config.check(path)
        return config

    def write(self, directory: Path, architecture: str) -> None:
        values = asdict(self)
        other = values.pop("other")
        values = {**other, **values, "model_type": MODEL_TYPE, "architectures": [architecture]}
        (directory / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @property
    def architecture(self) -> str:
        """The class the files are of, as config.json names it; "" where it names none."""
        names = self.other.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""

    def check(self, path: Path) -> None:
        """Raise ValueError naming `path` and the key of the first value that cannot be."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{path}: {entry.name} must be a positive integer, got {value!r}")
            if entry.type == "float" and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{path}: {entry.name} must be a number, got {value!r}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"{path}: hidden_act must be an activation of transformers, got {self.hidden_act!r}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"{path}: hidden_size must be a multiple of num_attention_heads={self.num_attention_heads}, "
                f"got {self.hidden_size}"
            )

    def bert(self) -> BertConfig:
        """The encoder's part."""
        return BertConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            # The same formula as one fused op.
            hidden_act="gelu_pytorch_tanh" if self.hidden_act == "gelu_new" else self.hidden_act,
            hidden_dropout_prob=self.hidden_dropout_prob,
            attention_probs_dropout_prob=self.attention_probs_dropout_prob,
            max_position_embeddings=self.max_position_embeddings,
            type_vocab_size=self.type_vocab_size,
            initializer_range=self.initializer_range,
            layer_norm_eps=self.layer_norm_eps,
            pad_token_id=PAD,
        )
