"""A model on disk: its embedder and its reader, whatever stage or checkpoint it comes from.

a published directory     RealmEmbedder, RealmReader, RealmKnowledgeAugEncoder or RealmForOpenQA
embedder/ and encoder/    two published directories: the encoder is where the reader begins
a run of pre-training     its last checkpoint, likewise
a run of fine-tuning      embedder/, reader/ and index.json: whose index it was tuned with
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from .. import checkpoints
from ..config import read_config
from ..corpus.store import BlockStore
from ..model import Realm
from ..published import Embedder, OpenQA, PublishedConfig, Reader
from ..published.config import CONFIG
from ..published.files import fill, read_weights
from ..published.models import Published
from ..published.tokenizer import TOKENIZER, VOCABULARY, read_tokenizer, vocabulary_rows, write_tokenizer
from ..run_folder import CHECKPOINTS, is_run
from .index import AnyEmbedder, Identity, fingerprint, require_vocabulary
from .twin import TwinEmbedder, published_config

P = TypeVar("P", bound=Published)

EMBEDDER, ENCODER, READER, INDEX = "embedder", "encoder", "reader", "index.json"
# Class -> the prefix of the part among its weights.
_EMBEDDERS = {"RealmEmbedder": "", TwinEmbedder.architecture: "", "RealmForOpenQA": "embedder."}
_READERS = {"RealmReader": "", "RealmForOpenQA": "reader.", "RealmKnowledgeAugEncoder": ""}
# What ends the names of weights with a row for each word.
_BY_WORD = (".word_embeddings.weight", ".predictions.decoder.weight", ".predictions.bias", ".decoder.bias")


def load_embedder(directory: Path) -> AnyEmbedder:
    """In evaluation mode. Raises ValueError where the directory has none."""
    if is_run(directory):
        realm, tokenizer = _load_run(directory)
        model = read_config(directory).model
        return TwinEmbedder.of(realm, model, tokenizer.get_vocab_size()).eval()
    folder, config = _find(directory, (EMBEDDER,), _EMBEDDERS)
    if config.architecture == TwinEmbedder.architecture:
        return TwinEmbedder.from_pretrained(folder)
    embedder = Embedder(config)
    fill(embedder, *_part(folder, config, _EMBEDDERS[config.architecture]))
    return embedder.eval()


def load_reader(directory: Path, seed: int, otherwise: PublishedConfig) -> Reader:
    """In evaluation mode. Of a knowledge-augmented encoder, with a fresh span head by the seed; where the
    directory has neither, a fresh reader by the seed and the sizes of `otherwise`.
    """
    if is_run(directory):
        realm, tokenizer = _load_run(directory)
        config = published_config(read_config(directory).model, tokenizer.get_vocab_size(), of_reader=True)
        weights = {
            f"realm.{key[5:]}" if key.startswith("bert.") else key: value
            for key, value in realm.reader.lm.state_dict().items()
        }
        return _reader(config, weights, directory, seed)
    names = {name for name in (EMBEDDER, ENCODER, READER) if (directory / name).is_dir()}
    if names == {EMBEDDER}:
        return _fresh_reader(otherwise, seed).eval()
    folder, config = _find(directory, (READER, ENCODER), _READERS)
    weights, path = _part(folder, config, _READERS[config.architecture])
    if config.architecture == "RealmKnowledgeAugEncoder":
        return _reader(config, weights, path, seed)
    reader = Reader(config)
    fill(reader, weights, path)
    return reader.eval()


def has_reader(directory: Path) -> bool:
    """Whether load_reader gives one that was trained to read answers."""
    if is_run(directory):
        return False
    if any((directory / name).is_dir() for name in (EMBEDDER, ENCODER, READER)):
        return (directory / READER).is_dir()
    return PublishedConfig.read(directory).architecture in ("RealmReader", "RealmForOpenQA")


def index_identity(directory: Path, store: BlockStore, embedder: AnyEmbedder) -> Identity:
    """What an index must be for the model to use it with a corpus.

    Fine-tuning moves the embedder and leaves the index as it was: it is known by what it was built with.
    """
    if (directory / INDEX).is_file():
        return Identity(store.fingerprint, Identity.read(directory / INDEX).model)
    return Identity(store.fingerprint, fingerprint(embedder))


def tuned_with(directory: Path) -> tuple[Path | None, Path | None]:
    """The corpus and the index of a run of fine-tuning, as its config.json names them; else None twice."""
    if not (directory / INDEX).is_file():
        return None, None
    path = directory / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Path(values["corpus"]), Path(values["index"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must name the corpus and the index of the run: {error!r}") from error


def save_tuned(model: OpenQA, identity: Identity, out: Path) -> None:
    """embedder/, reader/, index.json and the tokenizer's files; index.json last, and with it all is whole."""
    (out / INDEX).unlink(missing_ok=True)
    for part, name in ((model.embedder, EMBEDDER), (model.reader, READER)):
        part.save_pretrained(out / name)
        write_tokenizer(model.tokenizer, out / name)
    identity.write(out / f"{INDEX}.partial")
    (out / f"{INDEX}.partial").rename(out / INDEX)


def words_in(directory: Path, store: BlockStore, config: PublishedConfig) -> Tensor | None:
    """Of each word of a corpus its row in the vocabulary of a model, int64 [V]: a store has the special
    tokens first, BERT has them elsewhere. None where the two are the same, or the folder does not tell.

    Raises ValueError where the model lacks words, or where its embedder and its reader have different ones.
    """
    require_vocabulary(config.vocab_size, store)
    own = [_load_run(directory)[1]] if is_run(directory) else []
    for folder in (directory, *(directory / name for name in (EMBEDDER, ENCODER, READER))):
        if (folder / VOCABULARY).is_file() or (folder / TOKENIZER).is_file():
            own.append(read_tokenizer(folder, config.vocab_size))
    if any(tokenizer.get_vocab() != own[0].get_vocab() for tokenizer in own):
        raise ValueError(f"the embedder and the reader of {directory} have different vocabularies")
    if not own or own[0].get_vocab() == store.tokenizer.get_vocab():
        return None
    return vocabulary_rows(store.tokenizer, own[0], directory)


def with_words(model: P, rows: Tensor | None) -> P:
    """A model with `rows` of its vocabulary, in their order, as the whole of it; None leaves it as it is."""
    if rows is None:
        return model
    other = type(model)(replace(model.config, vocab_size=len(rows)))
    weights = {k: w[rows] if k.endswith(_BY_WORD) else w for k, w in model.state_dict().items()}
    other.load_state_dict(weights)
    return other.train(model.training)


def _load_run(directory: Path) -> tuple[Realm, Tokenizer]:
    """The model of a run's last checkpoint and its vocabulary; its corpus is not opened."""
    config, checkpoint = read_config(directory), checkpoints.load(directory / CHECKPOINTS)
    if checkpoint is None:
        raise ValueError(f"{directory} has no checkpoint yet")
    realm = Realm(config.model, checkpoint.tokenizer.get_vocab_size())
    checkpoint.fill(realm)
    return realm, checkpoint.tokenizer


def _reader(config: PublishedConfig, weights: dict[str, Tensor], path: Path, seed: int) -> Reader:
    """With the weights of an encoder, which has no span head and, of a run, no pooler."""
    reader = _fresh_reader(config, seed)
    own = {k: v for k, v in reader.state_dict().items() if k.startswith(("qa_outputs.", "realm.pooler."))}
    fill(reader, own | weights, path)
    return reader.eval()


def _fresh_reader(config: PublishedConfig, seed: int) -> Reader:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = Reader(config)
        for layer in (reader.qa_outputs.dense_intermediate, reader.qa_outputs.dense_output):
            nn.init.trunc_normal_(layer.weight, std=config.initializer_range)
            nn.init.zeros_(layer.bias)
    return reader


def _find(directory: Path, names: tuple[str, ...], kinds: dict[str, str]) -> tuple[Path, PublishedConfig]:
    """The published directory that holds the part: `directory` itself or a folder in it."""
    folders = [directory / name for name in names if (directory / name).is_dir()]
    folder = folders[0] if folders else directory
    config = PublishedConfig.read(folder)
    if config.architecture not in kinds:
        raise ValueError(
            f"{folder / CONFIG}: architectures must be one of {', '.join(kinds)} here, got "
            f"{config.architecture!r}"
        )
    return folder, config


def _part(folder: Path, config: PublishedConfig, prefix: str) -> tuple[dict[str, Tensor], Path]:
    weights, path = read_weights(folder, config.architecture)
    return {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}, path
