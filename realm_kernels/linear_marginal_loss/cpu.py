"""The C++ backend of linear_marginal_loss: chunks whose products and passes are one (csrc/cpu/)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..backends import Backend, forced_variant
from ..validation import dtype_name
from . import chunked
from .chunks import chunks_in_cache
from .memory import fresh
from .problem import Gradients, Needs, Problem


class NativePass(chunked.Pass):
    def __init__(self, problem: Problem, needs: Needs) -> None:
        super().__init__(problem, needs, chunks_in_cache(problem))
        weight = problem.weight
        self.weight = weight if weight.stride(1) == 1 else weight.contiguous()
        if self.hidden.stride(1) != 1:
            self.hidden = self.hidden.contiguous()
        self.dtype = dtype_name(weight.dtype)
        self.threads, self.variant = torch.get_num_threads(), forced_variant()

        rows = min(self.chunks.step(), self.chunks.rows)
        assert native.cpu is not None
        workspace, scratch = native.cpu.linear_marginal_loss_memory(
            self._shape(max(1, rows)), self.weight.stride(0), self.dtype, self.threads, self.variant
        )
        self.workspace = fresh(weight, (workspace if any(needs) else 0,), torch.float32)
        self.scratch = weight.new_empty(scratch, dtype=torch.float32)
        self.log_sum = weight.new_empty(rows, dtype=torch.float64)
        self.d_rows = weight.new_empty((rows if needs.hidden else 0, weight.shape[1]), dtype=torch.float32)

    def score(self, rows: chunked.Rows) -> Tensor:
        self.log_p = self.log_sum.new_empty(len(rows.targets))
        if len(rows.targets) > 0:
            assert native.cpu is not None
            bias = 0 if self.bias is None else self.bias.data_ptr()
            native.cpu.linear_marginal_loss_fwd(
                *self._operands(rows.hidden), bias, *self._chunk(rows), self.threads, self.variant
            )
        return self.log_p

    def add_gradients(self, rows: chunked.Rows, factor: Tensor) -> None:
        count = len(rows.targets)
        if count == 0:
            return
        factor = factor.contiguous()
        assert native.cpu is not None
        native.cpu.linear_marginal_loss_bwd(
            *self._operands(rows.hidden),
            *self._chunk(rows),
            factor.data_ptr(),
            _address(self.d_rows),
            _address(self.d_weight),
            _address(self.d_bias),
            not self.d_weight_begun,
            self.threads,
            self.variant,
        )
        self.d_weight_begun = True
        if self.needs.hidden:
            self.keep_d_hidden(rows, self.d_rows[:count])

    def _shape(self, rows: int) -> tuple[int, int, int]:
        return rows, self.weight.shape[1], self.weight.shape[0]

    def _operands(self, hidden: Tensor) -> tuple[Any, ...]:
        return (
            (hidden.data_ptr(), hidden.stride(0)),
            (self.weight.data_ptr(), self.weight.stride(0)),
            self.dtype,
        )

    def _chunk(self, rows: chunked.Rows) -> tuple[Any, ...]:
        """What stays the same from the forward of a chunk to its backward."""
        return (
            rows.targets.data_ptr(),
            self._shape(len(rows.targets)),
            (_address(self.workspace), self.scratch.data_ptr()),
            self.log_p.data_ptr(),
            self.log_sum.data_ptr(),
        )


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


def forward(problem: Problem, needs: Needs) -> tuple[Tensor, Gradients]:
    return chunked.forward_by(NativePass(problem, needs))


def backward(problem: Problem, log_likelihood: Tensor, d_loss: Tensor, needs: Needs) -> Gradients:
    return chunked.backward_by(NativePass(problem, needs), log_likelihood, d_loss)


BACKEND = Backend(name="cpu", refuses=refuses, forward=forward, backward=backward)
