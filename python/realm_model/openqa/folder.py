"""A model on disk: its embedder and its reader, whatever stage or checkpoint it comes from.

a published directory     RealmEmbedder, RealmReader, RealmKnowledgeAugEncoder, RealmForOpenQA
embedder/ and encoder/    what pre-training leaves: the encoder is where the reader begins
embedder/ and reader/     what fine-tuning leaves, with index.json: whose index it was tuned with
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..corpus.store import BlockStore
from ..published import Embedder, OpenQA, PublishedConfig, Reader
from ..published.config import CONFIG
from ..published.files import fill, read_weights
from ..published.tokenizer import TOKENIZER, VOCABULARY, read_tokenizer, write_tokenizer
from .index import Identity, fingerprint, require_vocabulary

EMBEDDER, ENCODER, READER, INDEX = "embedder", "encoder", "reader", "index.json"
# Class -> the prefix of the part among its weights.
_EMBEDDERS = {"RealmEmbedder": "", "RealmForOpenQA": "embedder."}
_READERS = {"RealmReader": "", "RealmForOpenQA": "reader.", "RealmKnowledgeAugEncoder": ""}


def load_embedder(directory: Path) -> Embedder:
    """In evaluation mode. Raises ValueError where the directory has none."""
    folder, config = _find(directory, (EMBEDDER,), _EMBEDDERS)
    embedder = Embedder(config)
    fill(embedder, *_part(folder, config, _EMBEDDERS[config.architecture]))
    return embedder.eval()


def load_reader(directory: Path, seed: int, otherwise: PublishedConfig) -> Reader:
    """In evaluation mode. Of a knowledge-augmented encoder, with a fresh span head by the seed; where the
    directory has neither, a fresh reader by the seed and the sizes of `otherwise`.
    """
    names = {name for name in (EMBEDDER, ENCODER, READER) if (directory / name).is_dir()}
    if names == {EMBEDDER}:
        return _fresh_reader(otherwise, seed).eval()
    folder, config = _find(directory, (READER, ENCODER), _READERS)
    weights, path = _part(folder, config, _READERS[config.architecture])
    reader = _fresh_reader(config, seed)
    if config.architecture == "RealmKnowledgeAugEncoder":
        head = {name: tensor for name, tensor in reader.state_dict().items() if name.startswith("qa_")}
        weights = weights | head
    fill(reader, weights, path)
    return reader.eval()


def has_reader(directory: Path) -> bool:
    """Whether load_reader gives one that was trained to read answers."""
    if any((directory / name).is_dir() for name in (EMBEDDER, ENCODER, READER)):
        return (directory / READER).is_dir()
    return PublishedConfig.read(directory).architecture in ("RealmReader", "RealmForOpenQA")


def index_identity(directory: Path, store: BlockStore, embedder: Embedder) -> Identity:
    """What an index must be for the model to use it with a corpus.

    Fine-tuning moves the embedder and leaves the index as it was: it is known by what it was built with.
    """
    if (directory / INDEX).is_file():
        return Identity(store.fingerprint, Identity.read(directory / INDEX).model)
    return Identity(store.fingerprint, fingerprint(embedder))


def save_tuned(model: OpenQA, identity: Identity, out: Path) -> None:
    """embedder/, reader/, index.json and the tokenizer's files; index.json last, and with it all is whole."""
    (out / INDEX).unlink(missing_ok=True)
    for part, name in ((model.embedder, EMBEDDER), (model.reader, READER)):
        part.save_pretrained(out / name)
        write_tokenizer(model.tokenizer, out / name)
    identity.write(out / f"{INDEX}.partial")
    (out / f"{INDEX}.partial").rename(out / INDEX)


def require_same_vocabulary(directory: Path, store: BlockStore, config: PublishedConfig) -> None:
    """Raise ValueError where the model was made with another vocabulary than the corpus, as far as its folder
    tells.
    """
    require_vocabulary(config.vocab_size, store)
    for folder in (directory, directory / EMBEDDER):
        if (folder / VOCABULARY).is_file() or (folder / TOKENIZER).is_file():
            own = read_tokenizer(folder, config.vocab_size).get_vocab()
            if own != store.tokenizer.get_vocab():
                raise ValueError(
                    f"the corpus {store.directory} and the model {directory} have different vocabularies: "
                    f"build the corpus with the model's"
                )


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
