"""The index of a corpus: one embedding a block, and whose they are.

A directory is a sharded table and one file more, identity-VERSION.json: the fingerprints of the corpus and
of the embedder. It is written before the table's own commit and named by the version that the commit makes
visible, so that a table is never seen with the identity of another one, whenever a process dies.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import realm_kernels as rk

from ..corpus.store import BlockStore
from ..inputs import padded
from ..published import Embedder
from .twin import TwinEmbedder

AnyEmbedder = Embedder | TwinEmbedder

ENCODE_ROWS = 512  # blocks at a time; the embedder sorts them by length
SHOWN = 12  # digits of a fingerprint in an error


@dataclass(frozen=True)
class Identity:
    """Fingerprints of the corpus whose blocks, and of the embedder by which, an index was made."""

    corpus: str
    model: str

    @staticmethod
    def read(path: Path) -> Identity:
        """Raises ValueError where the file is none."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return Identity(str(values["corpus"]), str(values["model"]))
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} must hold the fingerprints corpus and model: {error!r}") from error

    def write(self, path: Path) -> None:
        """Durably: what comes after it in time finds it."""
        with path.open("w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self), indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def require(self, index: Path, other: Identity, corpus: Path, model: Path) -> None:
        """Raise ValueError where the index is not of this corpus or not by this model."""
        pairs = (("corpus", self.corpus, other.corpus, corpus), ("model", self.model, other.model, model))
        for what, own, wanted, place in pairs:
            if own != wanted:
                raise ValueError(
                    f"the index {index} and the {what} {place} do not belong together: the index was made "
                    f"with the {what} {own[:SHOWN]}, this one is {wanted[:SHOWN]}: make the index again"
                )


def fingerprint(embedder: AnyEmbedder) -> str:
    """SHA-256 of all that an embedding depends on; the MLM head, which is unused, is left out."""
    digest = hashlib.sha256()
    config = embedder.config
    shape = (config.num_attention_heads, config.hidden_act, config.layer_norm_eps, embedder.document_length)
    digest.update(json.dumps(shape).encode())
    for name, tensor in sorted(embedder.state_dict().items()):
        if not name.startswith("cls.predictions."):
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def build_index(
    embedder: AnyEmbedder,
    store: BlockStore,
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
    report: Callable[[int], None] = lambda rows: None,
) -> Identity:
    """Encode every block, `[CLS] title [SEP] body [SEP]`, into a table, committed whole or not at all.

    report sees the number of blocks encoded so far. Blocks longer than the embedder's document_length
    lose their end.
    An index that is there already is replaced. Raises ValueError where the vocabulary is larger than the
    embedder's or `out` holds something else, OSError where the disk is full.
    """
    require_vocabulary(embedder.config.vocab_size, store)
    _require_own(out)
    identity = Identity(store.fingerprint, fingerprint(embedder))
    was_training = embedder.training
    embedder.eval()
    device = next(embedder.parameters()).device
    try:
        with rk.TableWriter(out, dim=embedder.config.retriever_proj_size, dtype=dtype) as writer:
            for first in range(0, len(store), ENCODE_ROWS):
                rows = range(first, min(first + ENCODE_ROWS, len(store)))
                ids, segments = block_inputs(store, rows, embedder.document_length)
                writer.append(embedder.documents(ids.to(device), segments.to(device)))
                report(rows.stop)
            identity.write(_identity_path(out, writer.version))
    finally:
        embedder.train(was_training)
    for path in out.glob("identity-*.json"):
        if path != _identity_path(out, writer.version):
            path.unlink()
    return identity


def open_index(path: Path, *, device: str | torch.device = "cpu") -> tuple[rk.ShardedTable, Identity]:
    """The table and whose it is. Raises ValueError or OSError where one of them is missing or damaged."""
    table = rk.ShardedTable.open(path, device=device)
    return table, Identity.read(_identity_path(path, table.version))


def block_inputs(store: BlockStore, rows: range, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and segments of `[CLS] title [SEP] body [SEP]`, at most `length` long: int64 [len(rows), L]."""
    cls, sep = (store.tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    ids, segments = [], []
    for row in rows:
        block = store[row]
        title = [cls, *block.title.tolist(), sep][: length - 2]
        body = [*block.body.tolist()[: length - len(title) - 1], sep]
        ids.append(title + body)
        segments.append([0] * len(title) + [1] * len(body))
    return padded(ids), padded(segments)


def require_vocabulary(size: int, store: BlockStore) -> None:
    found = store.tokenizer.get_vocab_size()
    if found > size:
        raise ValueError(
            f"the corpus {store.directory} has a vocabulary of {found} wordpieces, the model only {size}"
        )


def _require_own(out: Path) -> None:
    """Raise ValueError where `out` is a folder of something else than an index."""
    if not out.is_dir():
        return
    ours = ("shard-", "identity-", "manifest.json", ".")
    other = next((path.name for path in sorted(out.iterdir()) if not path.name.startswith(ours)), None)
    if other is not None:
        raise ValueError(f"{out} is not an index: it holds {other}, so it is left alone: choose a new folder")


def _identity_path(index: Path, version: int) -> Path:
    return index / f"identity-{version:06d}.json"
