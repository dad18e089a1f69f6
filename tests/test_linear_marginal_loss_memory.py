"""What linear_marginal_loss holds and what it multiplies: the laws of its chunks, counted, not timed."""

from __future__ import annotations

import pytest
import torch
from linear_marginal_loss_cases import Case, Meter, make_case

import realm_kernels as rk
from realm_kernels import native
from realm_kernels.linear_marginal_loss import chunked, chunks
from realm_kernels.linear_marginal_loss.problem import Needs, Problem

ROW = 500 * 4  # bytes of a row of logits, at V = 500
EXAMPLE = 12  # rows, at K = 3 and M = 4
NOTHING, HIDDEN, ALL = Needs(False, False, False), Needs(True, False, False), Needs(True, True, True)


def case_of(batch: int, **options) -> Case:
    return make_case(batch, 3, 4, width=8, vocabulary=500, **options)


def problem_of(case: Case) -> Problem:
    return Problem(*vars(case).values(), -100, "sequence")


def measure(function, *arguments) -> Meter:
    with Meter() as meter:
        function(*arguments)
    return meter


@pytest.mark.parametrize("needs", [NOTHING, ALL], ids=["loss", "gradients"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [3 * EXAMPLE * ROW, 5 * ROW], ids=["one-pass", "two-passes"])
def test_the_peak_of_memory_does_not_grow_with_the_batch(needs, dtype, budget, monkeypatch):
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", budget)
    peaks = {}
    for batch in (8, 64):
        problem = problem_of(case_of(batch, dtype=dtype))
        peaks[batch] = measure(chunked.forward, problem, needs, "none").peak_bytes
        # Of the size of the inputs, whatever V: d_hidden and some numbers for each row.
        peaks[batch] -= problem.hidden.nbytes * needs.hidden + 16 * 8 * problem.hidden[..., 0].numel()
    assert peaks[64] <= peaks[8]
    # The workspace; sums of d_weight, with d_bias; one slice of a widened weight; what is [V] or [R].
    weight = 500 * 8 * 4
    assert peaks[64] <= budget + 3 * weight + 16 * 8 * 500


def test_the_peak_of_memory_holds_in_a_backward_that_recomputes(monkeypatch):
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", 3 * EXAMPLE * ROW)
    peaks = {}
    for batch in (8, 64):
        problem = problem_of(case_of(batch))
        log_likelihood = chunked.forward(problem, NOTHING, "none").log_likelihood
        upstream = torch.rand(batch, dtype=torch.float64)
        peaks[batch] = measure(chunked.backward, problem, log_likelihood, upstream, ALL).peak_bytes
        peaks[batch] -= problem.hidden.nbytes + 16 * 8 * problem.hidden[..., 0].numel()
    assert peaks[64] <= peaks[8] <= 3 * EXAMPLE * ROW + 3 * 500 * 8 * 4 + 16 * 8 * 500


@pytest.mark.parametrize("rows", [5, 12, 36, 1000], ids="rows{}".format)
@pytest.mark.parametrize(
    "needs, products", [(NOTHING, 1), (HIDDEN, 2), (Needs(False, True, False), 2), (ALL, 3)], ids=str
)
def test_each_gradient_costs_one_product_and_two_passes_one_more(needs, products, rows, monkeypatch):
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", rows * ROW)
    problem = problem_of(case_of(7, masks=False))
    recomputed = rows < EXAMPLE and any(needs)
    unit = 2 * 7 * EXAMPLE * 8 * 500
    assert measure(chunked.forward, problem, needs, "none").flops == (products + recomputed) * unit


def test_rows_without_a_part_cost_nothing_on_the_cpu():
    problem = problem_of(case_of(20))
    live = int(problem.live().sum())
    assert 0 < live < 20 * EXAMPLE
    assert measure(chunked.forward, problem, ALL, "none").flops == 3 * 2 * live * 8 * 500


@pytest.mark.parametrize(
    "batch, rows, examples_at_once, step",
    [(7, 11, 0, 11), (7, 12, 1, 12), (7, 35, 2, 24), (100, 12 * 19, 16, 12 * 16), (7, 0, 0, 1)],
    ids=["less-than-an-example", "one", "two", "a-multiple-of-eight", "not-even-a-row"],
)
def test_chunks_are_whole_examples_where_one_fits(batch, rows, examples_at_once, step, monkeypatch):
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", rows * ROW + ROW // 2)
    found = chunks.chunks_of(problem_of(case_of(batch)))
    assert (found.examples_at_once, found.step()) == (examples_at_once, step)
    ranges = list(found.ranges())
    assert [first for first, _ in ranges] == list(range(0, batch * EXAMPLE, step))
    assert [last for _, last in ranges][:-1] == [first for first, _ in ranges][1:]
    assert ranges[-1][1] == batch * EXAMPLE


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_explain_tells_the_plan_and_computes_nothing(backend, monkeypatch):
    if backend == "cpu" and native.cpu is None:
        pytest.skip(native.cpu_missing)
    with rk.use_backend(backend):
        _explain(backend, monkeypatch)


def _explain(backend: str, monkeypatch) -> None:
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", 36 * ROW)
    case = case_of(7).requiring("hidden", "weight")
    with Meter() as meter:
        told = rk.explain(
            rk.linear_marginal_loss, case.scores, case.hidden, case.weight, case.targets, **case.options()
        )
    assert meter.flops == 0
    assert (told.op, told.backend) == ("linear_marginal_loss", backend)
    assert told.plan == "chunks of 3 examples, 36 rows, one pass, 0 MiB of workspace, 3 products"
    assert told.flops == 3 * 2 * 7 * EXAMPLE * 8 * 500
    none = rk.explain(
        rk.linear_marginal_loss, case.scores, case.hidden, case.weight, case.targets, reduction="none"
    )
    assert none.flops == 4 * 2 * 7 * EXAMPLE * 8 * 500
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", 5 * ROW)
    tight = rk.explain(rk.linear_marginal_loss, case.scores, case.hidden, case.weight, case.targets)
    assert "chunks of 5 rows, 12 in an example, two passes" in tight.plan and "4 products" in tight.plan


@pytest.mark.parametrize("name,mebibytes", [("cpu:avx512", 29), ("cpu:avx512_bf16", 15)])
def test_explain_counts_the_bytes_that_a_logit_takes(name, mebibytes):
    """Two where pairs of bfloat16 are multiplied, and four elsewhere."""
    if native.cpu is None or name.removeprefix("cpu:") not in native.cpu.instruction_sets():
        pytest.skip(f"no {name} here")
    case = make_case(1, 8, 32, vocabulary=30000, dtype=torch.bfloat16, masks=False)
    with rk.use_backend(name):
        told = rk.explain(rk.linear_marginal_loss, case.scores, case.hidden, case.weight, case.targets)
    assert f"{mebibytes} MiB of workspace" in told.plan


def test_a_backward_makes_the_gradients_and_nothing_of_their_size():
    """Autograd would make zeros for every output of the op that has no gradient, the units among them."""
    case = make_case(2, 2, 2, width=64, vocabulary=20000, masks=False).requiring("hidden", "weight")
    loss = case.loss()
    with Meter() as meter:
        loss.backward()
    assert case.weight.grad is not None
    assert meter.peak_bytes <= case.weight.grad.nbytes + case.weight.grad.nbytes // 4
