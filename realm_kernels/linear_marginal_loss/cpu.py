"""The C++ backend of linear_marginal_loss: chunks whose products and passes are one (csrc/cpu/)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..backends import Backend, forced_variant
from ..marginal_loss.cpu import array, contiguous, pointer
from ..validation import dtype_name
from .chunks import Chunks, chunks_in_cache
from .memory import fresh
from .problem import Found, Gradients, Needs, Problem, posterior_factor

NOTHING = Needs(False, False, False)


def run(problem: Problem, needs: Needs, chunks: Chunks, factor: Tensor | None = None) -> Found:
    """With factor float64 [B, K, M], the upstream gradient times the posterior, nothing but its gradients.

    Without it they are those for an upstream gradient of 1, and chunks must hold whole examples if any are
    needed.
    """
    hidden, weight = _readable(problem.hidden.flatten(0, 2)), _readable(problem.weight)
    live = problem.live().contiguous()
    if factor is not None and problem.min_posterior > 0.0:
        live &= factor != 0
    by_example = chunks.rows_of_example
    counts = live.view(-1, by_example).sum(1).tolist() if by_example > 0 else []
    ranges = list(chunks.ranges_of(counts))
    documents = [contiguous(x) for x in (problem.scores, problem.log_weight, problem.doc_mask)]
    scores, log_weight, doc_mask = documents
    targets, scored = problem.targets.contiguous(), problem.scored().contiguous()
    bias = problem.centred_bias()
    threads, variant, dtype = torch.get_num_threads(), forced_variant(), dtype_name(weight.dtype)

    units = Gradients(
        hidden.new_zeros(problem.hidden.shape if needs.hidden else (0,), dtype=problem.hidden_gradient_dtype),
        fresh(weight, weight.shape if needs.weight else (0,), torch.float32),
        weight.new_zeros(weight.shape[0] if needs.bias else 0, dtype=torch.float32),
    )
    batch, *of_example = problem.hidden.shape[:3]
    has_factor, wants = factor is not None, any(needs)
    log_likelihood = hidden.new_zeros((0 if has_factor else batch, *of_example), dtype=torch.float64)
    loss = log_likelihood.new_empty(log_likelihood.shape[0])
    count = torch.empty(log_likelihood.shape[0], dtype=torch.int64)
    if factor is None:
        factor = log_likelihood.new_empty(log_likelihood.shape if wants else (0,))
    assert native.cpu is not None
    chunk = max(1, min(chunks.step(), chunks.rows)), weight.shape[1], weight.shape[0]
    size, scratch_size = native.cpu.linear_marginal_loss_memory(
        chunk, weight.stride(0), dtype, threads, variant
    )
    workspace = fresh(weight, (size if wants else 0,), torch.float32)
    scratch = weight.new_empty(scratch_size, dtype=torch.float32)
    native.cpu.linear_marginal_loss(
        (hidden.data_ptr(), hidden.stride(0)),
        (weight.data_ptr(), weight.stride(0)),
        dtype,
        pointer(bias),
        array(scores),
        array(log_weight),
        pointer(doc_mask),
        scored.data_ptr(),
        targets.data_ptr(),
        live.data_ptr(),
        tuple(problem.hidden.shape[:3]),
        problem.mode == "token",
        ranges,
        chunk,
        (_address(workspace), scratch.data_ptr()),
        (log_likelihood.data_ptr(), loss.data_ptr(), count.data_ptr()),
        factor.data_ptr(),
        has_factor,
        (array(units.d_hidden), _address(units.d_weight), _address(units.d_bias)),
        threads,
        variant,
    )
    return Found(loss, count, log_likelihood, units)


def _readable(rows: Tensor) -> Tensor:
    """Rows [R, H] that are contiguous, each by itself."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _address(tensor: Tensor) -> int:
    """Null for what is not needed, and empty."""
    return tensor.data_ptr() if tensor.numel() > 0 else 0


def refuses(problem: Problem) -> str | None:
    if problem.hidden.device.type != "cpu":
        return f"the arguments are on {problem.hidden.device}"
    if native.cpu is None:
        return native.cpu_missing
    if problem.hidden.dtype == torch.float64:
        return "it has no float64"
    return None


def forward(problem: Problem, needs: Needs) -> Found:
    chunks = chunks_in_cache(problem)
    if chunks.examples_at_once > 0 and problem.min_posterior == 0.0:
        return run(problem, needs, chunks)
    found = run(problem, NOTHING, chunks)
    if not any(needs):
        return found
    return found._replace(units=backward(problem, found.log_likelihood, torch.ones_like(found.loss), needs))


def backward(problem: Problem, log_likelihood: Tensor, d_loss: Tensor, needs: Needs) -> Gradients:
    factor = posterior_factor(problem, log_likelihood, d_loss).contiguous()
    return run(problem, needs, chunks_in_cache(problem), factor).units


def halves_logits(weight: Tensor) -> bool:
    """Whether what is kept of logits takes 16 bits: bfloat16, of which the processor multiplies pairs."""
    assert native.cpu is not None
    instructions = forced_variant() or native.cpu.instruction_sets()[-1]
    return weight.dtype == torch.bfloat16 and instructions == "avx512_bf16"


BACKEND = Backend(name="cpu", refuses=refuses, forward=forward, backward=backward)
