"""What is hidden from the model: masked tokens (the object, or at random for the ablations), cropped spans
of the Inverse Cloze Task, and, for the copy start, which object a document states.

Shapes: B statements, L wordpieces, M target tokens, the most that any statement of the batch has.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .inputs import IGNORE, MASK, PAD, SEP, Statements

MaskKind = Literal["salient", "token", "span"]


def mask_statements(
    statements: Statements, kind: MaskKind, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Masked ids [B, L], positions [B, M] of the targets and the targets [B, M]; IGNORE fills the shorter
    rows.

    kind "salient" masks the object, as the paper masks a named entity or a date (section 3.4). "token" masks
    as many tokens, each drawn uniformly; "span" masks one run of as many tokens at a uniform place. All kinds
    so mask equally much, and the ablation compares places only.
    """
    count = statements.last - statements.first  # [B]
    length = (statements.ids != PAD).sum(dim=1)  # [B], with [CLS] and [SEP]
    if kind == "salient":
        chosen = _between(statements.ids, statements.first, statements.last)
    elif kind == "span":
        places = length - 2 - count + 1
        first = 1 + (torch.rand(len(statements), generator=generator) * places).long()
        chosen = _between(statements.ids, first, first + count)
    elif kind == "token":
        draws = torch.rand(statements.ids.shape, generator=generator)
        draws = draws.masked_fill((statements.ids == PAD) | (statements.ids == SEP), 2.0)
        draws[:, 0] = 2.0  # [CLS]
        chosen = draws.argsort(dim=1).argsort(dim=1) < count[:, None]
    else:
        raise ValueError(f"masks must be salient, token or span, got {kind!r}")
    return _apply(statements.ids, chosen)


def crop_spans(bodies: Tensor, remove: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The Inverse Cloze Task: from each body [B, L] a span of a third to two thirds of it and what is left of
    it.

    Returns the spans, to be looked for, and the bodies, from which the span was taken in the share `remove`
    of the examples (0.9 in ORQA: the rest teaches that matching words count too). Both are padded, without
    special tokens.
    """
    length = (bodies != PAD).sum(dim=1)  # [B]
    draws = torch.rand(3, bodies.shape[0], generator=generator)
    size = (length * (1 + draws[0]) / 3).long().clamp(min=1)
    first = ((length - size + 1) * draws[1]).long()
    inside = _between(bodies, first, first + size)
    spans = bodies.masked_fill(~inside, PAD)
    rest = bodies.masked_fill(inside & (draws[2] < remove)[:, None], PAD)
    return spans, rest


def exchange_objects(statements: Statements, bodies: Tensor, others: Statements) -> tuple[Statements, Tensor]:
    """The objects of `others` in place of a statement's own, in the statement and in its document alike.

    What a document says is then no fact of the corpus, and only reading it tells. A pair is left as it is
    where the objects differ in length or where the body does not hold the statement's object at its place: a
    body [B, Lb] that begins with the statement has it one column before ids [B, L], which begin with [CLS].
    Returns new statements and bodies.
    """
    ids, first, last = statements.ids, statements.first, statements.last
    inside = _between(ids, first, last)  # [B, L]
    width = min(bodies.shape[1], ids.shape[1] - 1)
    stated = (bodies[:, :width] == ids[:, 1 : width + 1]) | ~inside[:, 1 : width + 1]
    chosen = stated.all(dim=1) & (last - 1 <= width) & (others.last - others.first == last - first)  # [B]
    inside &= chosen[:, None]
    columns = torch.arange(ids.shape[1]) + (others.first - first)[:, None]
    objects = others.ids.gather(1, columns.clamp(0, others.ids.shape[1] - 1))
    exchanged = bodies.clone()
    exchanged[:, :width] = torch.where(inside[:, 1 : width + 1], objects[:, 1 : width + 1], bodies[:, :width])
    return replace(statements, ids=torch.where(inside, objects, ids)), exchanged


def _between(ids: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """bool [B, L]: first <= column < last."""
    columns = torch.arange(ids.shape[1])
    return (columns >= first[:, None]) & (columns < last[:, None])


def _apply(ids: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count = chosen.sum(dim=1)  # [B]
    width = int(count.max()) if count.numel() else 0
    positions = (~chosen).to(torch.int8).argsort(dim=1, stable=True)[:, :width]  # [B, M], in reading order
    targets = ids.gather(1, positions).masked_fill(torch.arange(width) >= count[:, None], IGNORE)
    return ids.masked_fill(chosen, MASK), positions, targets
