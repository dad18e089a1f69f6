"""The losses on a GPU, forward and backward, beside their peers. Shapes are those of the CPU's benchmarks.

Another backend of ours is found in the op's BACKENDS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import realm_kernels as rk
from realm_kernels.backends import Backend
from realm_kernels.linear_marginal_loss import op as linear_op
from realm_kernels.linear_marginal_loss import plan as linear_plan
from realm_kernels.marginal_loss import op as marginal_op
from realm_kernels.marginal_loss import plan as marginal_plan
from realm_kernels.span_marginal_loss import plan as span_plan

from .. import bench_linear_marginal_loss as linear
from .. import bench_marginal_loss as marginal
from .. import bench_span_marginal_loss as span
from .. import marginal_loss_peers, roofline
from . import peers, served
from .rows import OURS, Call, Row
from .served import forced_backends, served_by

LINEAR_BATCHES = (64, 16, 512)
LINEAR_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Of plain torch's loss in float64: what float32 sums of a few thousand terms may lose. Peers round more.
TOLERANCE, PEER_TOLERANCE = 2.0**-18, 2.0**-6

Loss = Callable[..., Tensor]


def step_of(loss_of: Loss, inputs: Sequence[Tensor], trained: Sequence[Tensor]) -> Callable[[], object]:
    """Forward and backward: (loss, gradients)."""

    def step() -> object:
        loss = loss_of(*inputs)
        return loss.detach(), torch.autograd.grad(loss, trained)

    return step


def close_to(expected: Callable[[], float], tolerance: float) -> Callable[[Any], None]:
    def check(results: Any) -> None:
        got, right = float(results[0]), expected()
        if not abs(got - right) <= tolerance * abs(right):
            raise AssertionError(f"loss {got!r}, plain torch in higher precision {right!r}")

    return check


def job(
    group: str,
    make: Callable[[], tuple[list[Tensor], list[Tensor]]],
    ours: Loss,
    others: dict[str, Loss],
    backends: Sequence[Backend],
    limit: Callable[[], float],
    reference: Loss,
) -> list[Row]:
    """The rows of one group: ours by each backend, then the peers. make() gives inputs and those trained."""

    def prepare(loss_of: Loss, backend: str | None, tolerance: float) -> Call:
        inputs, trained = make()
        step = served_by(backend, step_of(loss_of, inputs, trained))

        def right() -> float:
            with torch.no_grad():
                return float(reference(*inputs))

        return Call(step, limit, close_to(right, tolerance), is_replayed=loss_of is ours)

    found = []
    for backend in [None, *forced_backends(backends)]:
        name = OURS if backend is None else f"ours {backend}"
        found.append(Row(group, name, lambda b=backend: prepare(ours, b, TOLERANCE)))
    for name, loss_of in others.items():
        found.append(Row(group, name, lambda f=loss_of: prepare(f, None, PEER_TOLERANCE)))
    return found


def linear_rows(batch: int, dtype_name: str, padding: str) -> list[Row]:
    dtype, scored = LINEAR_DTYPES[dtype_name], linear.SCORED[padding]

    def make() -> tuple[list[Tensor], list[Tensor]]:
        inputs = [x.detach().to(served.GPU) for x in linear.inputs(batch, scored, dtype)]
        return inputs, [x.requires_grad_() for x in inputs[:3]]

    def reference(scores: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        """An example at a time, in float32: what the logits of all would take is too much."""
        losses = [
            marginal_loss_peers.eager(s[None], h[None].float(), weight.float(), bias.float(), t[None])
            for s, h, t in zip(scores, hidden, targets, strict=True)
        ]
        return torch.stack(losses).double().mean()

    # Padding tokens are no part of the job: a limit counts the rows that are scored.
    rows = batch * linear.DOCUMENTS * scored

    def limit() -> float:
        moved, flops = linear_plan.cost(rows, linear.WIDTH, linear.VOCABULARY, dtype.itemsize, products=3)
        return roofline.limit_seconds(moved, flops, dtype, served.GPU)

    name = (
        f"linear_marginal_loss {dtype_name} B={batch} K={linear.DOCUMENTS} M={scored} of {linear.TOKENS}"
        f" H={linear.WIDTH} V={linear.VOCABULARY}"
    )
    others = {name: peer.make for name, peer in peers.installed(peers.LOSSES).items()}
    return job(name, make, linear.ours, others, linear_op.BACKENDS, limit, reference)


def marginal_rows(shape: str, mode: str) -> list[Row]:
    batch, documents, tokens = marginal.SHAPES[shape]

    def make() -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator(served.GPU).manual_seed(0)
        scores = torch.randn(batch, documents, generator=generator, device=served.GPU)
        log_likelihood = -10 * torch.rand(batch, documents, tokens, generator=generator, device=served.GPU)
        trained = [scores.requires_grad_(), log_likelihood.requires_grad_()]
        return trained, trained

    def ours(scores: Tensor, log_likelihood: Tensor) -> Tensor:
        return rk.marginal_loss(scores, log_likelihood, mode=mode)

    def eager(scores: Tensor, log_likelihood: Tensor) -> Tensor:
        return marginal_loss_peers.marginal_loss(scores, log_likelihood, mode)

    def limit() -> float:
        moved, flops = marginal_plan.cost(batch, documents, tokens, mode, 4, 4)
        # The backward reads the same and writes a gradient of each input.
        return roofline.limit_seconds(
            2 * moved + batch * documents * (tokens + 1) * 4, 2 * flops, torch.float32, served.GPU
        )

    others = {"torch eager": eager, "torch.compile": peers.compiled(eager)}
    group = f"marginal_loss {mode} {shape}"
    return job(group, make, ours, others, marginal_op.BACKENDS, limit, _in_double(eager))


def span_rows(shape: str, normalization: str) -> list[Row]:
    batch, documents, spans = span.SHAPES[shape]

    def make() -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator(served.GPU).manual_seed(0)
        scores = torch.randn(batch, documents, generator=generator, device=served.GPU).requires_grad_()
        span_scores = torch.randn(
            batch, documents, spans, generator=generator, device=served.GPU
        ).requires_grad_()
        correct = torch.rand(batch, documents, spans, generator=generator, device=served.GPU) < 0.01
        correct[:, 0, 0] = True
        return [scores, span_scores, correct], [scores, span_scores]

    def ours(scores: Tensor, span_scores: Tensor, correct: Tensor) -> Tensor:
        return rk.span_marginal_loss(scores, span_scores, correct, normalization=normalization)

    def eager(scores: Tensor, span_scores: Tensor, correct: Tensor) -> Tensor:
        return marginal_loss_peers.span_marginal_loss(scores, span_scores, correct, normalization)

    def limit() -> float:
        moved, flops = span_plan.cost(batch, documents, spans, 4, 4)
        return roofline.limit_seconds(
            2 * moved + batch * documents * (spans + 1) * 4, 2 * flops, torch.float32, served.GPU
        )

    others = {"torch eager": eager, "torch.compile": peers.compiled(eager)}
    return job(
        f"span_marginal_loss {normalization} {shape}", make, ours, others, (), limit, _in_double(eager)
    )


def _in_double(loss_of: Loss) -> Loss:
    return lambda *inputs: loss_of(*(x.double() if x.is_floating_point() else x for x in inputs))


def rows(op: str, quick: bool) -> list[Row]:
    if op == "linear_marginal_loss":
        if quick:
            return linear_rows(1, "bfloat16", "padded")
        found = [row for batch in LINEAR_BATCHES for row in linear_rows(batch, "bfloat16", "full")]
        return found + linear_rows(64, "bfloat16", "padded") + linear_rows(16, "float32", "full")
    make, shapes, modes = {
        "marginal_loss": (marginal_rows, marginal.SHAPES, ("sequence", "token")),
        "span_marginal_loss": (span_rows, span.SHAPES, ("document", "global")),
    }[op]
    jobs = [(shape, mode) for shape in shapes for mode in modes]
    return [row for shape, mode in jobs[: 1 if quick else None] for row in make(shape, mode)]


def absent(op: str) -> list[str]:
    return peers.missing(peers.LOSSES) if op == "linear_marginal_loss" else []
