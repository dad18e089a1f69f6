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
    return _take(bodies, first, first + size, draws[2] < remove)


def take_sentences(
    bodies: Tensor, ends: Tensor, room: int, remove: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The Inverse Cloze Task as ORQA has it: from each body [B, L] one sentence, and the rest as crop_spans.

    ends: int64 [B, S], where each body's sentences end, which follow one another; -1 pads.
    room: wordpieces of a sentence that are taken at most.
    """
    draws = torch.rand(2, bodies.shape[0], generator=generator)
    chosen = ((ends >= 0).sum(dim=1) * draws[0]).long()[:, None]  # [B, 1]
    first = torch.where(chosen > 0, ends.gather(1, (chosen - 1).clamp(min=0)), 0)
    last = torch.minimum(ends.gather(1, chosen), first + room)
    return _take(bodies, first[:, 0], last[:, 0], draws[1] < remove)


def take_spans(
    bodies: Tensor, shortest: int, longest: int, remove: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The Inverse Cloze Task with queries as short as questions: from each body [B, L] a run of wordpieces,
    its length and place uniform, and the rest as crop_spans.
    """
    length = (bodies != PAD).sum(dim=1)  # [B]
    draws = torch.rand(3, bodies.shape[0], generator=generator)
    size = (shortest + (longest - shortest + 1) * draws[0]).long().minimum(length)
    first = ((length - size + 1) * draws[1]).long()
    return _take(bodies, first, first + size, draws[2] < remove)


def without(bodies: Tensor, statements: Statements) -> Tensor:
    """The bodies [B, L] of the statements' documents, without the statements that stand in them."""
    length = (statements.ids != PAD).sum(dim=1) - 2
    end = torch.where(statements.origin < 0, -1, statements.origin + length)
    return bodies.masked_fill(_between(bodies, statements.origin, end), PAD)


def exchange_objects(statements: Statements, bodies: Tensor, others: Statements) -> tuple[Statements, Tensor]:
    """The objects of `others` in place of a statement's own, in the statement and in its document alike.

    What a document says is then no fact of the corpus, and only reading it tells. A pair is left as it is
    where the objects differ in length or where the body [B, Lb] does not hold the statement's object at its
    place, as that of another document does not. Returns new statements and bodies.
    """
    first, last, origin = statements.first, statements.last, statements.origin
    place = origin + first - 1  # of the object in the body
    in_ids = _between(statements.ids, first, last)  # [B, L]
    in_body = _between(bodies, place, place + last - first)  # [B, Lb]
    objects = _shifted(statements.ids, bodies.shape[1], first - place)
    stated = ((objects == bodies) | ~in_body).all(dim=1) & (in_body.sum(dim=1) == last - first)
    chosen = stated & (origin >= 0) & (others.last - others.first == last - first)  # [B]
    exchanged = torch.where(
        in_body & chosen[:, None], _shifted(others.ids, bodies.shape[1], others.first - place), bodies
    )
    renamed = torch.where(
        in_ids & chosen[:, None],
        _shifted(others.ids, statements.ids.shape[1], others.first - first),
        statements.ids,
    )
    return replace(statements, ids=renamed), exchanged


def _shifted(ids: Tensor, width: int, shift: Tensor) -> Tensor:
    """ids [B, L] read from column `shift` [B] on: int64 [B, width]; what lies outside has no meaning."""
    columns = torch.arange(width) + shift[:, None]
    return ids.gather(1, columns.clamp(0, ids.shape[1] - 1))


def _take(bodies: Tensor, first: Tensor, last: Tensor, remove: Tensor) -> tuple[Tensor, Tensor]:
    """The wordpieces [first, last) of each body [B, L], and the bodies, without them where `remove` [B]."""
    inside = _between(bodies, first, last)
    spans = bodies.masked_fill(~inside, PAD)
    rest = bodies.masked_fill(inside & remove[:, None], PAD)
    return spans, rest


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
