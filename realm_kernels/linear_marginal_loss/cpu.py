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
from .problem import NOTHING, Found, Gradients, Needs, Problem, posterior_factor


def run(
    problem: Problem, needs: Needs, chunks: Chunks, reduction: str = "none", factor: Tensor | None = None
) -> Found:
    """With factor float64 [B, K, M], the upstream gradient times the posterior, nothing but its gradients.

    Without it they are those for an upstream gradient of 1, and chunks must hold whole examples if any are
    needed.
    """
    hidden, weight = _readable(problem.hidden.flatten(0, 2)), _readable(problem.weight)
    inputs = problem.scores, problem.log_weight, problem.doc_mask, problem.bias, problem.targets
    scores, log_weight, doc_mask, bias, targets = (contiguous(x) for x in inputs)
    threads, variant, dtype = torch.get_num_threads(), forced_variant(), dtype_name(weight.dtype)

    units = Gradients(
        hidden.new_empty(problem.hidden.shape if needs.hidden else (0,), dtype=problem.hidden_gradient_dtype),
        fresh(weight, weight.shape if needs.weight else (0,), torch.float32),
        weight.new_empty(weight.shape[0] if needs.bias else 0, dtype=torch.float32),
    )
    batch, *of_example = problem.hidden.shape[:3]
    has_factor, wants = factor is not None, any(needs)
    log_likelihood = hidden.new_empty((0 if has_factor else batch, *of_example), dtype=torch.float64)
    each = log_likelihood.shape[:1] if reduction == "none" else ()
    loss = torch.empty(each, dtype=problem.loss_dtype)
    count = torch.empty(each, dtype=torch.int64) if reduction == "none" else None
    if factor is None:
        factor = torch.empty_like(log_likelihood) if wants else log_likelihood[:0]
    assert native.cpu is not None
    chunk = max(1, min(chunks.step(), chunks.rows)), weight.shape[1], weight.shape[0]
    size, scratch_size = native.cpu.linear_marginal_loss_memory(
        chunk, weight.stride(0), dtype, threads, variant
    )
    workspace = fresh(weight, (size if wants else 0,), torch.float32)
    scratch = weight.new_empty(scratch_size, dtype=torch.float32)
    counted, _ = native.cpu.linear_marginal_loss(
        (hidden.data_ptr(), hidden.stride(0)),
        (weight.data_ptr(), weight.stride(0)),
        dtype,
        pointer(bias),
        array(scores),
        array(log_weight),
        pointer(doc_mask),
        (pointer(targets), problem.ignore_index),
        tuple(problem.hidden.shape[:3]),
        problem.mode == "token",
        chunk,
        chunks.examples_at_once > 0,
        (_address(workspace), scratch.data_ptr()),
        reduction,
        (log_likelihood.data_ptr(), array(loss), pointer(count)),
        factor.data_ptr(),
        has_factor,
        (array(units.d_hidden), _address(units.d_weight), _address(units.d_bias)),
        threads,
        variant,
    )
    return Found(loss, counted if count is None else count, log_likelihood, units)


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


def forward(problem: Problem, needs: Needs, reduction: str) -> Found:
    chunks = chunks_in_cache(problem)
    if chunks.examples_at_once > 0 and problem.min_posterior == 0.0:
        return run(problem, needs, chunks, reduction)
    found = run(problem, NOTHING, chunks, reduction)
    if not any(needs):
        return found
    ones = problem.scores.new_ones(problem.scores.shape[0], dtype=problem.loss_dtype)
    return found._replace(units=backward(problem, found.log_likelihood, ones, needs))


def backward(problem: Problem, log_likelihood: Tensor, d_loss: Tensor, needs: Needs) -> Gradients:
    factor = posterior_factor(problem, log_likelihood, d_loss).contiguous()
    return run(problem, needs, chunks_in_cache(problem), factor=factor).units


def halves_logits(weight: Tensor) -> bool:
    """Whether what is kept of logits takes 16 bits: bfloat16, of which the processor multiplies pairs."""
    assert native.cpu is not None
    instructions = forced_variant() or native.cpu.instruction_sets()[-1]
    return weight.dtype == torch.bfloat16 and instructions == "avx512_bf16"


BACKEND = Backend(name="cpu", refuses=refuses, forward=forward, backward=backward)
