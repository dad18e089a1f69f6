"""Every GPU backend of every op on small and awkward shapes, once: what compute-sanitizer watches.

To add a call: a line in CALLS. Backends are those of the op's BACKENDS.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch

import realm_kernels as rk
from realm_kernels.backends import Backend
from realm_kernels.linear_marginal_loss import op as linear_op
from realm_kernels.marginal_loss import op as marginal_op
from realm_kernels.mips_topk import op as mips_op
from realm_kernels.score_spans import op as score_op
from realm_kernels.span_marginal_loss import op as span_op

from .served import GPU, on_gpu


def search(
    batch: int,
    num_rows: int,
    dim: int,
    k: int,
    dtype: torch.dtype,
    same: bool = False,
    where: str = "device",
) -> None:
    """same: every row alike, so that every query is repaired. where: "device", "codes", "pinned codes"."""
    # From the CPU: the libraries' kernels stay out of the tools' sight.
    queries = torch.randn(batch, dim).to(dtype).to(GPU).requires_grad_()
    rows = torch.randn(num_rows, dim).to(dtype)
    rows = rows[:1].repeat(num_rows, 1) if same else rows
    table = rk.ShardedTable.from_tensors([rows])
    table = table.pin_memory() if where.startswith("pinned") else table.to(GPU)
    table = table.quantize("int8", device=GPU) if where.endswith("codes") else table
    exclude = torch.randint(-1, num_rows, (batch, 3)).to(GPU)
    row_mask = (torch.rand(num_rows) < 0.9).to(GPU)
    rk.mips_topk(queries, table, k, exclude=exclude, row_mask=row_mask).scores.sum().backward()


def marginal(batch: int, documents: int, tokens: int, mode: str, dtype: torch.dtype) -> None:
    scores = torch.randn(batch, documents).to(GPU).requires_grad_()
    log_likelihood = (-10 * torch.rand(batch, documents, tokens)).to(dtype).to(GPU).requires_grad_()
    token_mask = (torch.rand(batch, tokens) < 0.7).to(GPU)
    doc_mask = (torch.rand(batch, documents) < 0.8).to(GPU)
    rk.marginal_loss(scores, log_likelihood, token_mask=token_mask, doc_mask=doc_mask, mode=mode).backward()


def linear(batch: int, documents: int, tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> None:
    scores = torch.randn(batch, documents).to(GPU).requires_grad_()
    hidden = torch.randn(batch, documents, tokens, width).to(dtype).to(GPU).requires_grad_()
    weight = (torch.randn(vocabulary, width) / width**0.5).to(dtype).to(GPU).requires_grad_()
    targets = torch.randint(vocabulary, (batch, tokens))
    targets[:, -1] = -100
    rk.linear_marginal_loss(scores, hidden, weight, targets.to(GPU)).backward()


def spans(batch: int, documents: int, number: int, normalization: str, dtype: torch.dtype) -> None:
    scores = torch.randn(batch, documents).to(GPU).requires_grad_()
    span_scores = torch.randn(batch, documents, number).to(dtype).to(GPU).requires_grad_()
    correct, valid = ((torch.rand(batch, documents, number) < part).to(GPU) for part in (0.3, 0.9))
    options = dict(valid=valid, normalization=normalization)
    rk.span_marginal_loss(scores, span_scores, correct, **options).backward()


def score(rows: int, length: int, width: int, max_width: int, dtype: torch.dtype) -> None:
    start, end = (torch.randn(rows, length, width).to(dtype).to(GPU).requires_grad_() for _ in range(2))
    weight, norm = (torch.randn(width).to(GPU).requires_grad_() for _ in range(2))
    options = dict(norm_weight=norm, norm_bias=norm, max_width=max_width)
    rk.score_spans(start, end, weight, **options).square().sum().backward()


Calls = Sequence[Callable[[], None]]
CALLS: dict[str, tuple[Sequence[Backend], Calls]] = {
    "mips_topk": (
        mips_op.BACKENDS,
        (
            lambda: search(3, 1000, 128, 8, torch.bfloat16),
            lambda: search(130, 5003, 128, 100, torch.bfloat16),
            lambda: search(5, 777, 100, 7, torch.bfloat16),
            lambda: search(17, 1500, 768, 8, torch.bfloat16),
            lambda: search(2, 300, 64, 3, torch.float32),
            lambda: search(4, 2000, 128, 8, torch.bfloat16, same=True),
            lambda: search(3, 9000, 64, 3000, torch.bfloat16),
            lambda: search(2, 100_000, 64, 1100, torch.bfloat16),  # in two passes
            lambda: search(70, 3001, 100, 8, torch.float32, where="codes"),
            lambda: search(4, 1000, 128, 8, torch.bfloat16, same=True, where="codes"),
            lambda: search(3, 2000, 768, 20, torch.bfloat16, where="pinned codes"),
        ),
    ),
    "marginal_loss": (
        marginal_op.BACKENDS,
        (
            lambda: marginal(3, 8, 20, "sequence", torch.float32),
            lambda: marginal(3, 8, 20, "token", torch.bfloat16),
            lambda: marginal(2, 1000, 3, "token", torch.float32),
            lambda: marginal(1, 1, 1, "sequence", torch.float16),
        ),
    ),
    "linear_marginal_loss": (
        linear_op.BACKENDS,
        (
            lambda: linear(2, 3, 5, 64, 300, torch.bfloat16),
            lambda: linear(1, 8, 20, 123, 1001, torch.float32),
        ),
    ),
    "span_marginal_loss": (
        span_op.BACKENDS,
        (
            lambda: spans(3, 5, 33, "document", torch.float32),
            lambda: spans(2, 3, 1500, "global", torch.bfloat16),
            lambda: spans(1, 2000, 1, "global", torch.float32),
        ),
    ),
    "score_spans": (
        score_op.BACKENDS,
        (
            lambda: score(2, 37, 256, 10, torch.float32),
            lambda: score(3, 5, 123, 3, torch.bfloat16),
            lambda: score(1, 1, 1, 1, torch.float16),
        ),
    ),
}


def main(share: str = "0/1") -> None:
    """share: "i/n", each n-th call from the i-th on."""
    which, of = map(int, share.split("/"))
    jobs = [
        (op, backend.name, number, call)
        for op, (backends, calls) in CALLS.items()
        for backend in backends
        if on_gpu(backend)
        for number, call in enumerate(calls)
    ]
    for op, name, number, call in jobs[which::of]:
        torch.manual_seed(number)
        try:
            with rk.use_backend(name):
                call()
        except ValueError as error:
            if f"use_backend({name!r}) cannot serve" not in str(error):
                raise
            print(f"{op} {name} {number}: not served: {error}", flush=True)
            continue
        torch.cuda.synchronize()
        print(f"{op} {name} {number}: done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
