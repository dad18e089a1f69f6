"""The BERT tokenizer of a published directory."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, processors

from ..inputs import PAD, SPECIAL, load_tokenizer, wordpiece

VOCABULARY, TOKENIZER, TOKENIZER_CONFIG = "vocab.txt", "tokenizer.json", "tokenizer_config.json"


def read_tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    """From vocab.txt, or tokenizer.json where there is none, with BERT's templates:

        [CLS] x [SEP]    and    [CLS] x [SEP] body [SEP], segments 0 and 1

    vocab.txt may end its lines with CRLF, as some published ones do: whoever keeps the CR knows no word.
    Raises ValueError for a vocabulary without BERT's special tokens, with [PAD] anywhere but at 0 (the place
    every mask here goes by, whatever config.json says), or larger than the model's.
    """
    path = directory / VOCABULARY
    if path.is_file():
        words = _read_lines(path)
        ids = {word: number for number, word in enumerate(words) if word in SPECIAL}
        tokenizer = wordpiece(words)
        tokenizer.normalizer = _normalizer(directory / TOKENIZER_CONFIG)
    else:
        path = directory / TOKENIZER
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


def _read_lines(path: Path) -> list[str]:
    """One token a line. LF and CRLF alone end one: other line separators may be tokens."""
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8: {error}") from error
    return [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


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
