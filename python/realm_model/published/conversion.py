"""A published directory as one of safetensors alone, the index of Open-QA as a sharded table."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

import realm_kernels as rk

from .config import CONFIG, PublishedConfig
from .files import read_weights, write_weights
from .models import Embedder, KnowledgeAugmentedEncoder, Reader, Scorer
from .openqa import TABLE, OpenQA
from .records import BLOCK_RECORDS, BlockRecords, write_records
from .tokenizer import read_tokenizer, write_tokenizer

CLASSES = {kind.architecture: kind for kind in (Embedder, Scorer, KnowledgeAugmentedEncoder, Reader)}
PIECE_ROWS = 1 << 16  # of the index at a time: 32 MiB of 128 float32 columns
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(
    directory: str | Path,
    out: str | Path,
    *,
    dtype: str = "float32",
    report: Callable[[int], None] = lambda rows: None,
) -> str:
    """Write `directory` again as the new directory `out`, for from_pretrained of the class whose name is
    returned.

    model.safetensors takes the place of pytorch_model.bin. An Open-QA index goes to out/table row by row, as
    `dtype`; neither it nor the blocks are ever held in memory. bfloat16 halves the index and rounds it.
    report sees the number of its rows written so far. `out` appears whole or not at all.

    Raises ValueError naming the file that is missing or damaged, or where `out` exists and is not empty.
    """
    directory, out = Path(directory), Path(out)
    if dtype not in DTYPES:
        raise ValueError(f"convert: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"convert: out must be a new directory, got {out}, which exists")
    config = PublishedConfig.read(directory)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        kind = _convert(directory, partial, config, DTYPES[dtype], report)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return kind


def _convert(
    directory: Path, out: Path, config: PublishedConfig, dtype: torch.dtype, report: Callable[[int], None]
) -> str:
    if config.architecture == OpenQA.architecture:
        _convert_openqa(directory, out, config, dtype, report)
        return OpenQA.__name__
    kind = CLASSES.get(config.architecture)
    if kind is None:
        known = ", ".join([*CLASSES, OpenQA.architecture])
        raise ValueError(
            f"{directory / CONFIG}: architectures must be one of {known}, got {config.architecture!r}"
        )
    kind.from_pretrained(directory).save_pretrained(out)
    return kind.__name__


def _convert_openqa(
    directory: Path, out: Path, config: PublishedConfig, dtype: torch.dtype, report: Callable[[int], None]
) -> None:
    OpenQA.from_pretrained(directory)  # so that nothing is written where a file is damaged
    weights, _ = read_weights(directory, OpenQA.architecture)
    out.mkdir(parents=True, exist_ok=True)
    block_emb = weights.pop("block_emb", None)
    if block_emb is None:
        pieces = rk.ShardedTable.open(directory / TABLE).shards
    else:
        pieces = (block_emb,)
    done = 0
    with rk.TableWriter(out / TABLE, dim=config.retriever_proj_size, dtype=dtype) as writer:
        for piece in pieces:
            for rows in piece.split(PIECE_ROWS):
                writer.append(rows)
                done += len(rows)
                report(done)
    legacy = [key for key in weights if key.endswith("embeddings.position_ids")]
    for key in legacy:
        del weights[key]
    write_weights(weights, out, safe=True)
    config.write(out, OpenQA.architecture)
    write_records(BlockRecords.open(directory / BLOCK_RECORDS), out / BLOCK_RECORDS)
    write_tokenizer(read_tokenizer(directory, config.vocab_size), out)
