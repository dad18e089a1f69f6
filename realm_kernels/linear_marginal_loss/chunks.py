"""How many rows of logits fit into the workspace: from shapes, dtypes and the fixed budget alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .problem import Problem
from .products import takes_narrow_operands

WORKSPACE_BYTES = 256 << 20
# On a CPU a chunk's exponentials should come back from a cache that others use too. But each chunk reads and
# writes the sum of d_weight, so it has LEAST_ROWS even where they do not. Above CACHE_ROWS the gradients of a
# block outgrow a second-level cache.
CACHE_BYTES, CACHE_ROWS = 8 << 20, 640
LEAST_BYTES, LEAST_ROWS = 32 << 20, 256
ALIGNMENT = 8  # examples: chunks of a multiple keep the pitch of the logits a multiple of 16 bytes


@dataclass(frozen=True)
class Chunks:
    """Rows are the B * K * M pairs of document and token, an example's standing together."""

    rows: int  # in all
    rows_of_example: int  # K * M
    bytes_of_row: int  # of logits, and of their half-precision gradients where products take such
    rows_at_once: int  # at least 1, however large the vocabulary
    examples_at_once: int  # 0: one example is more than the budget, and takes two passes

    @property
    def workspace_bytes(self) -> int:
        return min(self.rows, self.step()) * self.bytes_of_row

    def step(self) -> int:
        return self.examples_at_once * self.rows_of_example or self.rows_at_once

    def ranges(self) -> Iterator[tuple[int, int]]:
        """[first, last) of each chunk, whole examples where one fits."""
        for first in range(0, self.rows, self.step()):
            yield first, min(first + self.step(), self.rows)

    def ranges_of(self, counts: list[int]) -> Iterator[tuple[int, int]]:
        """The same where only counts[b] rows of example b are taken: as many examples as fit then."""
        if self.examples_at_once == 0:
            yield from self.ranges()
            return
        first = taken = 0
        for example, count in enumerate(counts):
            if taken + count > self.step():
                yield first, example * self.rows_of_example
                first, taken = example * self.rows_of_example, 0
            taken += count
        if first < self.rows:
            yield first, self.rows


def chunks_of(
    problem: Problem, in_place: bool = False, words: int | None = None, documents: int | None = None
) -> Chunks:
    """in_place: half-precision gradients take the place of the logits.

    words, documents: the most of any rank, where the problem is spread over several.
    """
    weight = problem.weight
    words = weight.shape[0] if words is None else words
    bytes_of_row = words * problem.sum_dtype.itemsize
    if takes_narrow_operands(weight) and not in_place:
        bytes_of_row += words * weight.element_size()
    rows_at_once = max(1, WORKSPACE_BYTES // bytes_of_row)
    batch, rows_of_example = _rows_of(problem)
    most = rows_of_example if documents is None else documents * problem.hidden.shape[2]
    examples = rows_at_once // max(1, most)
    if examples > ALIGNMENT:
        examples -= examples % ALIGNMENT
    return Chunks(batch * rows_of_example, rows_of_example, bytes_of_row, rows_at_once, examples)


def chunks_in_cache(problem: Problem) -> Chunks:
    """Of the CPU's kernels: what a last-level cache holds, but one example at least if the workspace does."""
    bytes_of_row = problem.weight.shape[0] * 4
    in_cache = min(CACHE_ROWS, CACHE_BYTES // bytes_of_row)
    least = min(LEAST_ROWS, LEAST_BYTES // bytes_of_row)
    rows_at_once = max(1, min(max(in_cache, least), WORKSPACE_BYTES // bytes_of_row))
    batch, rows_of_example = _rows_of(problem)
    examples = rows_at_once // max(1, rows_of_example)
    if examples == 0 and rows_of_example * bytes_of_row <= WORKSPACE_BYTES:
        examples = 1
    return Chunks(batch * rows_of_example, rows_of_example, bytes_of_row, rows_at_once, examples)


def _rows_of(problem: Problem) -> tuple[int, int]:
    batch, documents, tokens, _ = problem.hidden.shape
    return batch, documents * tokens
