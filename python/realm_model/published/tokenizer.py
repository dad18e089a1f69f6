"""The BERT tokenizer of a published directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, normalizers, processors
from torch import Tensor

from ..inputs import PAD, SPECIAL, load_tokenizer, wordpiece

VOCABULARY, TOKENIZER, TOKENIZER_CONFIG = "vocab.txt", "tokenizer.json", "tokenizer_config.json"


def read_tokenizer(place: Path, vocab_size: int) -> Tokenizer:
    """From the vocab.txt of a directory, or its tokenizer.json where there is none, or one such file, with
    BERT's templates:

        [CLS] x [SEP]    and    [CLS] x [SEP] body [SEP], segments 0 and 1

    vocab.txt may end its lines with CRLF, as some published ones do: whoever keeps the CR knows no word.
    Raises ValueError for a vocabulary without BERT's special tokens, with a token twice, with [PAD] anywhere
    but at 0 (the place every mask here goes by, whatever config.json says), or larger than the model's.
    """
    path = place if place.is_file() else place / VOCABULARY
    if path.is_file() and path.suffix != ".json":
        words = _read_lines(path)
        ids = {word: number for number, word in enumerate(words) if word in SPECIAL}
        tokenizer = wordpiece(words)
        tokenizer.normalizer = _normalizer(path.parent / TOKENIZER_CONFIG)
    else:
        path = path if path.is_file() else place / TOKENIZER
        tokenizer = _read_json(path)
        ids = {word: number for word, number in tokenizer.get_vocab().items() if word in SPECIAL}
    lacking = [token for token in SPECIAL if token not in ids]
    if lacking:
        raise ValueError(f"{path} must hold {', '.join(SPECIAL)}, lacks {', '.join(lacking)}")
    if ids["[PAD]"] != PAD:
        raise ValueError(f"{path} must hold [PAD] at {PAD}, got {ids['[PAD]']}")
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(
            f"{path} may hold {vocab_size} tokens by config.json, got {tokenizer.get_vocab_size()}"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """vocab.txt, tokenizer.json and what of the normalizer tokenizer_config.json tells."""
    vocabulary = tokenizer.get_vocab()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    (directory / VOCABULARY).write_text("".join(f"{word}\n" for word in words), encoding="utf-8", newline="")
    tokenizer.save(str(directory / TOKENIZER))
    normalizer = tokenizer.normalizer
    values = {
        "do_lower_case": normalizer.lowercase,
        "strip_accents": normalizer.strip_accents,
        "tokenize_chinese_chars": normalizer.handle_chinese_chars,
        "tokenizer_class": "BertTokenizer",
    }
    (directory / TOKENIZER_CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def vocabulary_rows(ours: Tokenizer, theirs: Tokenizer, place: Path) -> Tensor:
    """Of each word of our vocabulary its row in that of the model in `place`: int64 [V].

    Raises ValueError for words that the model lacks.
    """
    words, known = ours.get_vocab(), theirs.get_vocab()
    lacking = [word for word in words if word not in known]
    if lacking:
        raise ValueError(
            f"{place} must know the words of the corpus, lacks {len(lacking)} of {len(words)}, such as "
            f"{min(lacking)!r}: build the corpus with this directory as its vocabulary"
        )
    return torch.tensor([known[word] for word in sorted(words, key=words.__getitem__)])


def _read_lines(path: Path) -> list[str]:
    """One token a line. LF and CRLF alone end one: other line separators may be tokens."""
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8: {error}") from error
    words = [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    seen: dict[str, int] = {}
    for number, word in enumerate(words, start=1):
        first = seen.setdefault(word, number)
        if first != number:
            raise ValueError(
                f"{path}, line {number}: a token may stand once, got {word!r} as in line {first}"
            )
    return words


def _read_json(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ValueError(f"{path.parent} must hold {VOCABULARY} or {TOKENIZER}")
    try:
        tokenizer = load_tokenizer(path)
    except Exception as error:  # tokenizers raises bare Exception, with the reason in it
        raise ValueError(f"{path} is no tokenizer: {error}") from error
    if not isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
        found = type(tokenizer.normalizer).__name__
        raise ValueError(f"{path} must be a BERT tokenizer, with a BertNormalizer, got {found}")
    return tokenizer


def _normalizer(path: Path) -> normalizers.Normalizer:
    """BERT's, as tokenizer_config.json says; without the file it is that of an uncased BERT."""
    if path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return normalizers.BertNormalizer(
                lowercase=values.get("do_lower_case", True),
                strip_accents=values.get("strip_accents"),
                handle_chinese_chars=values.get("tokenize_chinese_chars", True),
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no configuration of a BERT tokenizer: {error}") from error
    return normalizers.BertNormalizer(lowercase=True)
