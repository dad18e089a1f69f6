"""How many rows of logits fit into the workspace: from shapes, dtypes and the fixed budget alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .problem import Problem
from .products import takes_narrow_operands

WORKSPACE_BYTES = 256 << 20
ALIGNMENT = 8  # examples: chunks of a multiple keep the pitch of the logits a multiple of 16 bytes


@dataclass(frozen=True)
class Chunks:
    """Rows are the B * K * M pairs of document and token, an example's standing together."""

    words: int  # of a row of logits
    rows: int  # in all
    rows_of_example: int  # K * M
    bytes_of_row: int  # of logits, and of their half-precision gradients where products take such
    rows_at_once: int  # at least 1, however large the vocabulary
    examples_at_once: int  # 0: one example is more than the budget, and takes two passes

    @property
    def workspace_bytes(self) -> int:
        return self.most_rows() * self.bytes_of_row

    def most_rows(self) -> int:
        """Of a chunk."""
        return min(self.rows, self.step())

    def step(self) -> int:
        return self.examples_at_once * self.rows_of_example or self.rows_at_once

    def ranges(self) -> Iterator[tuple[int, int]]:
        """[first, last) of each chunk, whole examples where one fits."""
        for first in range(0, self.rows, self.step()):
            yield first, min(first + self.step(), self.rows)


def chunks_of(
    problem: Problem, in_place: bool = False, words: int | None = None, documents: int | None = None
) -> Chunks:
    """in_place: half-precision gradients take the place of the logits.

    words, documents: the most of a rank, where not the problem's; rows are the problem's all the same.
    """
    batch, here, tokens, _ = problem.hidden.shape
    weight = problem.weight
    words = weight.shape[0] if words is None else words
    bytes_of_row = words * problem.sum_dtype.itemsize
    if takes_narrow_operands(weight) and not in_place:
        bytes_of_row += words * weight.element_size()
    rows_of_example = here * tokens
    rows_at_once = max(1, WORKSPACE_BYTES // bytes_of_row)
    examples = rows_at_once // max(1, (documents or here) * tokens)
    if examples > ALIGNMENT:
        examples -= examples % ALIGNMENT
    return Chunks(words, batch * rows_of_example, rows_of_example, bytes_of_row, rows_at_once, examples)
