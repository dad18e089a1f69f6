"""Begin as another model: the sizes and weights of a BERT-like checkpoint, or of another run.

A checkpoint holds config.json, model.safetensors or pytorch_model.bin, and the tokenizer's files, as BERT's
own and the published REALMs do; both networks begin as it. What it lacks (the heads of the embedder; often
BERT's MLM head) begins at random.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from . import checkpoints
from .config import RunConfig, read_config
from .model import LAYER_NORM_EPS, Realm
from .published.files import read_weights
from .published.tokenizer import read_tokenizer, vocabulary_rows
from .run_folder import CHECKPOINTS, is_run

WORDS, POSITIONS = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
MLM_HEAD = "cls.predictions."


def start_from(config: RunConfig, directory: Path) -> RunConfig:
    """The configuration with the sizes of a checkpoint, or of a run, whose ICT then stands for this one's.

    Raises ValueError where the directory is neither or cannot serve.
    """
    if is_run(directory):
        run = read_config(directory)
        return replace(config, start=str(directory), model=run.model, ict=replace(config.ict, steps=0))
    values = _read_config(directory)
    model = config.model
    activation = values.get("hidden_act", "gelu")
    sizes: dict[str, Any] = {
        "hidden": values["hidden_size"],
        "layers": values["num_hidden_layers"],
        "reader_layers": 0,
        "heads": values["num_attention_heads"],
        "intermediate": values["intermediate_size"],
        "activation": "gelu_pytorch_tanh" if activation == "gelu_new" else activation,
        "dropout": values.get("hidden_dropout_prob", 0.1),
        "initializer_range": values.get("initializer_range", 0.02),
    }
    most, wanted = values["max_position_embeddings"], model.query_length + model.document_length
    if wanted > most:
        raise ValueError(
            f"{directory} has {most} positions, for the wordpieces of a query and a document together, got "
            f"{model.query_length} + {model.document_length}"
        )
    return replace(config, start=str(directory), model=replace(model, **sizes))


@torch.no_grad()
def load_start(model: Realm, directory: Path, tokenizer: Tokenizer) -> None:
    """Fill both networks. Rows of the vocabulary go by the word, so its order need not be the checkpoint's.

    Raises ValueError for a checkpoint that lacks words or weights, or has another shape, and for a run with
    another vocabulary.
    """
    if is_run(directory):
        _load_run(model, directory, tokenizer)
        return
    values = _read_config(directory)
    weights, path = read_weights(directory, "")
    weights = {key.replace("gamma", "weight").replace("beta", "bias"): w for key, w in weights.items()}
    prefix = next((key.removesuffix(WORDS) for key in weights if key.endswith(WORDS)), None)
    if prefix is None:
        raise ValueError(f"{path} must hold a BERT, lacks {WORDS}")
    rows = vocabulary_rows(tokenizer, read_tokenizer(directory, values["vocab_size"]), directory)
    for network in (model.retriever.bert, model.reader.lm.bert):
        for key, target in network.state_dict().items():
            source = weights.get(prefix + key)
            if source is not None:
                source = source[rows] if key == WORDS else source
                source = source[: len(target)] if key == POSITIONS else source
            _copy(target, source, path, prefix + key)
    start = next((key.split(MLM_HEAD)[0] for key in weights if MLM_HEAD in key), None)
    if start is None:
        return
    bias = weights.get(f"{start}{MLM_HEAD}bias", weights.get(f"{start}{MLM_HEAD}decoder.bias"))
    head = model.reader.lm.cls.predictions
    _copy(head.decoder.bias, None if bias is None else bias[rows], path, f"{start}{MLM_HEAD}bias")
    for key, target in head.transform.state_dict().items():
        name = f"{start}{MLM_HEAD}transform.{key}"
        _copy(target, weights.get(name), path, name)


def _load_run(model: Realm, directory: Path, tokenizer: Tokenizer) -> None:
    checkpoint = checkpoints.load(directory / CHECKPOINTS)
    if checkpoint is None:
        raise ValueError(f"{directory} has no checkpoint yet")
    if checkpoint.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{directory} and the corpus have different vocabularies: build the corpus with its own"
        )
    checkpoint.fill(model)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{directory} is no checkpoint: cannot read config.json: {error.strerror}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for key in (*keys, "max_position_embeddings", "vocab_size"):
        if not isinstance(values, dict) or not isinstance(values.get(key), int):
            raise ValueError(f"{path} must be the configuration of a BERT, lacks {key}")
    if values.get("layer_norm_eps", LAYER_NORM_EPS) != LAYER_NORM_EPS:
        raise ValueError(
            f"{path}: layer_norm_eps must be BERT's {LAYER_NORM_EPS}, got {values['layer_norm_eps']}"
        )
    return values


def _copy(target: Tensor, source: Tensor | None, path: Path, key: str) -> None:
    if source is None or source.shape != target.shape:
        found = "nothing" if source is None else list(source.shape)
        raise ValueError(f"{path}: {key} must be {list(target.shape)}, got {found}")
    target.copy_(source)
