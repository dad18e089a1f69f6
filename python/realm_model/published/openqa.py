"""Open-QA with a published checkpoint: retrieve blocks, read them, answer; and what fine-tuning minimises.

Shapes: B questions, R retrieved blocks, K blocks that are read, L wordpieces, C spans, D projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

import realm_kernels as rk

from ..inputs import padded
from ..metrics import find_answers, holds_answer
from ..reader import Form, ReaderLoss, best_span, reader_loss
from .config import PublishedConfig
from .files import fill, read_weights
from .models import Embedder, Published, Reader, SpanScores
from .records import BLOCK_RECORDS, BlockRecords, write_records
from .tokenizer import read_tokenizer, write_tokenizer

TABLE = "table"  # the folder of a sharded table, in the place of block_emb among the weights
HasAnswer = Literal["raw", "wordpieces"]


@dataclass(frozen=True)
class ReadBlock:
    """What one block that was read was worth for the answer y (section 3.1): p(z|x) over the blocks read,
    p(y|z,x) the share of y's spans in the block's own softmax, and p(z|x,y).

    The utility of pre-training compares with the null document, in which an extractive reader finds nothing.
    This one compares with all blocks read: what is above 0 is what fine-tuning makes more relevant.
    """

    block: int  # its row
    text: str
    relevance: float  # f(x, z)
    prior: float
    likelihood: float
    posterior: float
    utility: float  # log p(y|z,x) - log p(y|x) in nats, -inf where the block does not hold y
    places: tuple[tuple[int, int], ...]  # text[start:end] is the answer as it is written there


@dataclass(frozen=True)
class Answer:
    """The answer to one question, and where it stands."""

    text: str  # wordpieces put together again, so lower case; empty where no retrieved block has a text
    evidence: str  # the block
    start: int  # evidence[start:end] is the answer as it is written there
    end: int
    block: int  # the row of the block
    relevance: float  # f(x, z) of the block
    score: float  # relevance plus the reader's score of the span: the reader logit of the released code
    read: tuple[ReadBlock, ...]  # the blocks that were read, the most relevant first


class OpenQALoss(NamedTuple):
    loss: Tensor  # scalar, the mean over questions of retriever plus reader
    terms: ReaderLoss  # [B] each
    has_answer: Tensor  # bool [B, R]


class OpenQA(Published):
    """Embed_input, an index of block embeddings, the blocks' text and the extractive reader.

    block_emb: [num_block_records, D], mapped from the file; a tensor, as published, is a buffer of the
        module, a sharded table, as convert() writes one, is not.
    records: the blocks as UTF-8 bytes, by row.
    """

    architecture = "RealmForOpenQA"
    block_emb: Tensor | rk.ShardedTable

    def __init__(
        self,
        config: PublishedConfig,
        block_emb: Tensor | rk.ShardedTable,
        records: Sequence[bytes],
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__(config)
        _check_blocks(config, block_emb, records)
        self.embedder = Embedder(config)
        self.reader = Reader(config)
        if isinstance(block_emb, Tensor):
            self.register_buffer("block_emb", block_emb)
        else:
            self.block_emb = block_emb
        self.records, self.tokenizer = records, tokenizer
        self._joiner = Tokenizer.from_str(tokenizer.to_str())
        self._joiner.enable_truncation(config.reader_seq_len)  # of the longer side first, as in the port

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> OpenQA:
        """Load a published directory, block_records.npy and the tokenizer's files included.

        Nothing is unpickled but tensors. Raises ValueError naming the file that is missing or damaged.
        """
        folder = Path(directory)
        config = PublishedConfig.read(folder)
        tokenizer = read_tokenizer(folder, config.vocab_size)
        records = BlockRecords.open(folder / BLOCK_RECORDS)
        weights, path = read_weights(folder, cls.architecture)
        # The buffer is the file's own tensor: copying 13 million rows would be for nothing.
        block_emb = weights.pop("block_emb", None)
        if block_emb is None and not (folder / TABLE).is_dir():
            raise ValueError(f"{path}: {cls.__name__} needs block_emb, which the file lacks")
        try:
            table = rk.ShardedTable.open(folder / TABLE) if block_emb is None else block_emb
            model = cls(config, table, records, tokenizer)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        for part in ("embedder", "reader"):
            taken = [key for key in weights if key.startswith(f"{part}.")]
            fill(getattr(model, part), {key[len(part) + 1 :]: weights.pop(key) for key in taken}, path)
        if weights:
            raise ValueError(f"{path}: {cls.__name__} has no {next(iter(weights))}, which the file holds")
        return model.eval()

    def save_pretrained(self, directory: str | Path, *, safe_serialization: bool = True) -> None:
        """Write config.json, weights, block_records.npy and the tokenizer's files; a sharded table as one."""
        if not isinstance(self.embedder, Embedder):
            kind = type(self.embedder).__name__
            raise ValueError(f"OpenQA.save_pretrained: embedder must be a published Embedder, got a {kind}")
        super().save_pretrained(directory, safe_serialization=safe_serialization)
        if isinstance(self.block_emb, rk.ShardedTable):
            self.block_emb.save(Path(directory) / TABLE)
        write_records(self.records, Path(directory) / BLOCK_RECORDS)
        write_tokenizer(self.tokenizer, Path(directory))

    @torch.no_grad()
    def retrieve(self, questions: Sequence[str], k: int, batch_size: int = 64) -> rk.TopK:
        """The top k blocks of each question, best first: scores and rows, [B, k]."""
        was_training = self.training
        self.eval()
        try:
            batches = [questions[at : at + batch_size] for at in range(0, len(questions), batch_size)]
            found = [self._retrieve(batch, k)[1] for batch in batches]
        finally:
            self.train(was_training)
        return rk.TopK(torch.cat([top.scores for top in found]), torch.cat([top.indices for top in found]))

    @torch.no_grad()
    def answer(self, questions: Sequence[str], batch_size: int = 8) -> list[Answer]:
        """The best span of the top reader_beam_size blocks for each question.

        Retrieval is exact. Batches change the time, and scores by rounding only. Raises ValueError for a
        question longer than the encoder's positions.
        """
        if isinstance(questions, str):
            raise ValueError("OpenQA.answer: questions must be a list of texts, got one text")
        if batch_size < 1:
            raise ValueError(f"OpenQA.answer: batch_size must be at least 1, got {batch_size}")
        was_training = self.training
        self.eval()
        try:
            batches = [questions[at : at + batch_size] for at in range(0, len(questions), batch_size)]
            return [answer for batch in batches for answer in self._answer(batch)]
        finally:
            self.train(was_training)

    def loss(
        self,
        questions: Sequence[str],
        references: Sequence[Sequence[str]],
        *,
        form: Form = "released",
        has_answer: HasAnswer = "wordpieces",
    ) -> OpenQALoss:
        """What fine-tuning minimises, with gradient to the embedder and the reader; the index is fixed.

        form: reader.reader_loss. has_answer, for the retriever's term: "raw", the released code's, a block
        that holds a reference as bytes; "wordpieces", the port's, one that holds its wordpieces in the
        join, cut to reader_seq_len. In training mode searcher_beam_size blocks are retrieved, else
        reader_beam_size.
        """
        if not questions:
            raise ValueError("OpenQA.loss: questions must not be empty")
        if len(questions) != len(references):
            raise ValueError(
                f"OpenQA.loss: references must be one list for each of {len(questions)} questions, "
                f"got {len(references)}"
            )
        if isinstance(questions, str) or any(isinstance(own, str) for own in references):
            raise ValueError("OpenQA.loss: questions must be texts and references lists of texts, got a text")
        if any(not reference.strip() for own in references for reference in own):
            raise ValueError("OpenQA.loss: references must not be empty, got one that is")
        if has_answer not in ("raw", "wordpieces"):
            raise ValueError(f'OpenQA.loss: has_answer must be "raw" or "wordpieces", got {has_answer!r}')
        config = self.config
        beam = config.reader_beam_size
        if self.training:
            beam = min(config.searcher_beam_size, len(self.records))
        ids, top = self._retrieve(questions, beam)
        # Beyond the blocks that are read, joins are made only for the port's has_answer.
        wanted = top.indices if has_answer == "wordpieces" else top.indices[:, : config.reader_beam_size]
        joins = self._join(ids, wanted)
        wordpieces = [
            [e.ids for e in self.tokenizer.encode_batch(list(own), add_special_tokens=False)]
            for own in references
        ]
        places = [
            [_places(join, answers) for join in own] for own, answers in zip(joins, wordpieces, strict=True)
        ]
        if has_answer == "raw":
            found = [
                [holds_answer(self.records[row], own) for row in rows]
                for rows, own in zip(top.indices.tolist(), references, strict=True)
            ]
        else:
            found = [[bool(place) for place in own] for own in places]
        K = min(config.reader_beam_size, top.indices.shape[1])
        read = self._read([own[:K] for own in joins])
        gold = _pad_places([own[:K] for own in places]).to(top.scores.device)  # [B, K, A, 2]
        has = torch.tensor(found, dtype=torch.bool, device=top.scores.device)
        terms = reader_loss(
            top.scores,
            has,
            read.scores.unflatten(0, (-1, K)),
            read.spans.correct(gold[..., 0], gold[..., 1]),
            read.valid.unflatten(0, (-1, K)),
            form,
        )
        return OpenQALoss((terms.retriever + terms.reader).mean(), terms, has)

    def _answer(self, questions: Sequence[str]) -> list[Answer]:
        ids, top = self._retrieve(questions, self.config.reader_beam_size)
        joins = self._join(ids, top.indices)
        read = self._read(joins)
        K = top.indices.shape[1]
        span_scores, valid = read.scores.unflatten(0, (-1, K)), read.valid.unflatten(0, (-1, K))
        best = best_span(top.scores, span_scores, valid)
        found = best.score != -torch.inf  # [B]
        spans = list(
            zip(read.spans.starts[best.span].tolist(), read.spans.ends[best.span].tolist(), strict=True)
        )
        places = []  # [B][K], of the answer's wordpieces in every block
        for own, k, (first, last), exists in zip(
            joins, best.block.tolist(), spans, found.tolist(), strict=True
        ):
            answer = own[k].ids[first : last + 1] if exists else []
            places.append([_places(join, [answer]) for join in own])
        gold = _pad_places(places).to(top.scores.device)  # [B, K, A, 2]
        correct = read.spans.correct(gold[..., 0], gold[..., 1]) & valid  # [B, K, C]
        worth = _worth(top.scores, span_scores, correct, valid)
        answers = []
        for b, (k, (first, last)) in enumerate(zip(best.block.tolist(), spans, strict=True)):
            blocks = []
            for j, row in enumerate(top.indices[b].tolist()):
                offsets = joins[b][j].offsets
                blocks.append(
                    ReadBlock(
                        block=row,
                        text=self.records[row].decode("utf-8", "replace"),
                        relevance=top.scores[b, j].item(),
                        prior=worth[0][b, j].item(),
                        likelihood=worth[1][b, j].item(),
                        posterior=worth[2][b, j].item(),
                        utility=worth[3][b, j].item(),
                        places=tuple((offsets[i][0], offsets[n][1]) for i, n in places[b][j]),
                    )
                )
            join, block, text, start, end = joins[b][k], blocks[k], "", 0, 0
            if found[b]:
                text = self.tokenizer.decode(join.ids[first : last + 1])
                start, end = join.offsets[first][0], join.offsets[last][1]
            score = best.score[b].item()
            answers.append(
                Answer(text, block.text, start, end, block.block, block.relevance, score, tuple(blocks))
            )
        return answers

    @property
    def _device(self) -> torch.device:
        """Of the encoders; the index may lie elsewhere, and a sharded table does not follow `to`."""
        return next(self.embedder.parameters()).device

    def _retrieve(self, questions: Sequence[str], beam: int) -> tuple[list[list[int]], rk.TopK]:
        """The questions' wordpieces and the top blocks of each, [B, R], best first."""
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(list(questions))]
        longest = max(map(len, ids), default=0)
        if longest > self.config.max_position_embeddings:
            raise ValueError(
                f"OpenQA: a question may have {self.config.max_position_embeddings - 2} wordpieces, "
                f"got {longest - 2}"
            )
        queries = self.embedder(padded(ids).to(self._device))  # [B, D]
        top = rk.mips_topk(queries.to(self.block_emb.device), self.block_emb, beam)
        return ids, rk.TopK(top.scores.to(self._device), top.indices)

    def _join(self, ids: list[list[int]], rows: Tensor) -> list[list[Encoding]]:
        """`[CLS] question [SEP] block [SEP]` for the blocks of each question, at most reader_seq_len long.

        The question is put together from its wordpieces again and loses its [UNK], as in the port.
        """
        joins = []
        for question, blocks in zip(ids, rows.tolist(), strict=True):
            text = self.tokenizer.decode(question)
            pairs = [(text, self.records[row].decode("utf-8", "replace")) for row in blocks]
            joins.append(self._joiner.encode_batch(pairs))
        return joins

    def _read(self, joins: list[list[Encoding]]) -> SpanScores:
        """Of all joins: [B K, C]."""
        flat = [join for own in joins for join in own]
        device = self._device
        ids, segments = padded([join.ids for join in flat]), padded([join.type_ids for join in flat])
        body = padded([_body(join) for join in flat]).bool()
        return self.reader(ids.to(device), segments.to(device), body.to(device))


def _worth(
    scores: Tensor, span_scores: Tensor, correct: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prior, likelihood, posterior and utility of the blocks, [B, K], for the correct spans as the answer."""
    log_likelihood = span_scores.masked_fill(~correct, -torch.inf).logsumexp(-1)
    log_likelihood -= span_scores.masked_fill(~valid, -torch.inf).logsumexp(-1)
    log_likelihood = log_likelihood.masked_fill(~correct.any(-1), -torch.inf)
    worth = rk.posterior(scores, log_likelihood)
    utility = (log_likelihood - worth.log_marginal[:, None]).masked_fill(~correct.any(-1), -torch.inf)
    return worth.prior, log_likelihood.exp(), worth.posterior, utility


def _body(join: Encoding) -> list[int]:
    """1 at the wordpieces of the block."""
    return [
        segment & (1 - special)
        for segment, special in zip(join.type_ids, join.special_tokens_mask, strict=True)
    ]


def _places(join: Encoding, answers: list[list[int]]) -> list[tuple[int, int]]:
    """First and last position of every answer in a join's block."""
    body = _body(join)
    if 1 not in body:
        return []
    first = body.index(1)
    found = find_answers(join.ids[first : first + sum(body)], answers)
    return [(first + start, first + end) for start, end in found]


def _pad_places(places: list[list[list[tuple[int, int]]]]) -> Tensor:
    """int64 [B, K, A, 2], A the most of any block and at least 1; -1 pads."""
    most = max([1, *(len(place) for own in places for place in own)])
    return torch.tensor(
        [[place + [(-1, -1)] * (most - len(place)) for place in own] for own in places], dtype=torch.int64
    )


def _check_blocks(
    config: PublishedConfig, block_emb: Tensor | rk.ShardedTable, records: Sequence[bytes]
) -> None:
    rows, size = config.num_block_records, config.retriever_proj_size
    is_tensor = isinstance(block_emb, Tensor)
    shape = list(block_emb.shape) if is_tensor else [block_emb.num_rows, block_emb.dim]
    if shape != [rows, size]:
        raise ValueError(
            f"block_emb must be [num_block_records={rows}, retriever_proj_size={size}], got {shape}"
        )
    if len(records) != rows:
        raise ValueError(f"{BLOCK_RECORDS} must hold num_block_records={rows} blocks, got {len(records)}")
    if config.reader_beam_size > rows:
        raise ValueError(
            f"reader_beam_size must be at most num_block_records={rows}, got {config.reader_beam_size}"
        )
    if config.reader_seq_len > config.max_position_embeddings:
        raise ValueError(
            f"reader_seq_len must be at most max_position_embeddings={config.max_position_embeddings}, "
            f"got {config.reader_seq_len}"
        )
