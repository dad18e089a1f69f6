"""The torch op behind mips_topk: schema, fake kernel, autograd, choice of the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..table import device_stream
from ..table.sharded import gather
from . import checks, cpu, cuda, reference, triton

BACKENDS = (cpu.BACKEND, cuda.BACKEND, triton.BACKEND, reference.BACKEND)

# return_rows: the caller will ask for d_queries, so the gathered rows [B, k, D] come along as a third result.
# codes: empty, or Int8Codes.tensors() of the shards; a backend may scan the rows all the same.
torch.library.define(
    "realm_kernels::mips_topk",
    "(Tensor queries, Tensor[] shards, int k, Tensor? exclude, Tensor? row_mask, bool return_rows,"
    " Tensor[] codes)"
    " -> (Tensor scores, Tensor indices, Tensor rows)",
)
torch.library.define(
    "realm_kernels::mips_topk_bwd",
    "(Tensor d_scores, Tensor queries, Tensor indices, Tensor rows, int num_rows, ScalarType table_dtype,"
    " bool needs_queries, bool needs_table) -> (Tensor d_queries, Tensor d_table)",
)


def backend_for(
    queries: Tensor, shards: list[Tensor], k: int, exclude: Tensor | None, row_mask: Tensor | None
) -> backends.Backend:
    return backends.choose(checks.OP, BACKENDS, queries, shards, k, exclude, row_mask)


@torch.library.impl("realm_kernels::mips_topk", "CompositeExplicitAutograd")
def mips_topk_fwd(
    queries: Tensor,
    shards: list[Tensor],
    k: int,
    exclude: Tensor | None,
    row_mask: Tensor | None,
    return_rows: bool,
    codes: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_values(sum(shard.shape[0] for shard in shards), exclude)
    backend = backend_for(queries, shards, k, exclude, row_mask)
    scores, indices = backend.forward(queries, shards, k, exclude, row_mask, codes)
    if return_rows:
        rows = _gather_rows(shards, indices)  # [B, k, D]
    else:
        rows = queries.new_empty(0, dtype=shards[0].dtype)
    return scores, indices, rows


def _gather_rows(shards: list[Tensor], indices: Tensor) -> Tensor:
    """Rows by global id on the device of the ids, zeros for -1."""
    if shards[0].device == indices.device:
        return reference.gather_rows(shards, indices)
    if device_stream.is_pinned(shards):
        from .triton_gather import gather_pinned  # imports triton

        return gather_pinned(shards, indices)
    device_stream.refuse_capture()
    return gather(shards, indices.cpu()).to(indices.device)


@torch.library.register_fake("realm_kernels::mips_topk")
def _(
    queries: Tensor,
    shards: list[Tensor],
    k: int,
    exclude: Tensor | None,
    row_mask: Tensor | None,
    return_rows: bool,
    codes: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    batch, dim = queries.shape
    scores = queries.new_empty(batch, k, dtype=torch.float32)
    indices = queries.new_empty(batch, k, dtype=torch.int64)
    rows = queries.new_empty((batch, k, dim) if return_rows else (0,), dtype=shards[0].dtype)
    return scores, indices, rows


@torch.library.impl("realm_kernels::mips_topk_bwd", "CompositeExplicitAutograd")
def mips_topk_bwd(
    d_scores: Tensor,
    queries: Tensor,
    indices: Tensor,
    rows: Tensor,
    num_rows: int,
    table_dtype: torch.dtype,
    needs_queries: bool,
    needs_table: bool,
) -> tuple[Tensor, Tensor]:
    """d_queries[b] = sum_j g[b, j] table[i_bj] and d_table[i] = sum g[b, j] q_b, both summed in float32."""
    found = indices >= 0
    g = torch.where(found, d_scores, 0.0).float()  # [B, k]
    d_queries, d_table = queries.new_empty(0), queries.new_empty(0, dtype=table_dtype)
    if needs_queries:
        # Not a matrix product: autocast would cast it, and it reads each gathered row once either way.
        d_queries = (g[:, :, None] * rows.float()).sum(1).to(queries.dtype)
    if needs_table:
        # By selection: a query that found nothing may be NaN, and must not reach the row that -1 stands for.
        outer = torch.where(found[:, :, None], g[:, :, None] * queries.float()[:, None, :], 0.0)  # [B, k, D]
        total = outer.new_zeros(num_rows, queries.shape[1])
        # Both forms add in a fixed order: index_add_ does on the CPU, index_put_ sorts its indices on CUDA.
        if total.device.type == "cpu":
            total.index_add_(0, indices.clamp(min=0).flatten(), outer.flatten(0, 1))
        else:
            total.index_put_((indices.clamp(min=0).flatten(),), outer.flatten(0, 1), accumulate=True)
        d_table = total.to(table_dtype)
    return d_queries, d_table


@torch.library.register_fake("realm_kernels::mips_topk_bwd")
def _(
    d_scores: Tensor,
    queries: Tensor,
    indices: Tensor,
    rows: Tensor,
    num_rows: int,
    table_dtype: torch.dtype,
    needs_queries: bool,
    needs_table: bool,
) -> tuple[Tensor, Tensor]:
    d_queries = queries.new_empty(queries.shape if needs_queries else (0,))
    d_table = queries.new_empty((num_rows, queries.shape[1]) if needs_table else (0,), dtype=table_dtype)
    return d_queries, d_table


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, shards, *_, codes = inputs
    _, indices, rows = output
    ctx.mark_non_differentiable(indices, rows)
    ctx.save_for_backward(queries, indices, rows)
    ctx.shard_rows = [shard.shape[0] for shard in shards]
    ctx.table_dtype = shards[0].dtype
    ctx.num_codes = len(codes)


def _backward(ctx: Any, d_scores: Tensor, _d_indices: Tensor, _d_rows: Tensor) -> tuple[Any, ...]:
    queries, indices, rows = ctx.saved_tensors
    needs_queries = ctx.needs_input_grad[0]
    needs_table = ctx.needs_input_grad[1][0]
    d_queries, d_table = torch.ops.realm_kernels.mips_topk_bwd(
        d_scores, queries, indices, rows, sum(ctx.shard_rows), ctx.table_dtype, needs_queries, needs_table
    )
    d_shards = [d_table if needs_table else None] + [None] * (len(ctx.shard_rows) - 1)
    return d_queries if needs_queries else None, d_shards, None, None, None, None, [None] * ctx.num_codes


torch.library.register_autograd("realm_kernels::mips_topk", _backward, setup_context=_setup_context)


def _once(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    raise RuntimeError(
        f"{checks.OP}: the gradient is itself not differentiable (second derivatives are not offered)"
    )


torch.library.register_autograd("realm_kernels::mips_topk_bwd", _once)
