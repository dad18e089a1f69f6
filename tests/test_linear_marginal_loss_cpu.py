"""The C++ backend of linear_marginal_loss: every instruction set, threads, edges of tiles, chunks, memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_marginal_loss_cases import Case, Meter, eager, gradients, make_case

import realm_kernels as rk
from realm_kernels import native
from realm_kernels.linear_marginal_loss import chunks, cpu
from realm_kernels.linear_marginal_loss.problem import Needs, Problem
from realm_kernels.testing import assert_within

pytestmark = pytest.mark.skipif(native.cpu is None, reason=native.cpu_missing)
INSTRUCTION_SETS = native.cpu.instruction_sets() if native.cpu is not None else ()

instruction_sets = pytest.mark.parametrize("isa", INSTRUCTION_SETS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
NOTHING, ALL = Needs(False, False, False), Needs(True, True, True)


def problem_of(case: Case) -> Problem:
    return Problem(*vars(case).values(), -100, "sequence")


def assert_no_worse_than_torch(case: Case, isa: str) -> None:
    """Largest error against float64 <= torch's in the same dtype + 3 ulp of it (unit gradient, upstream, and
    the gradients of logits in bfloat16, which torch rounds too) and what float32 logits move a posterior by.
    """
    oracle = gradients(eager, case.to(torch.float64))
    torch_error = gradients(eager, case)
    with rk.use_backend(f"cpu:{isa}"):
        ours = gradients(Case.loss, case)
    logits = torch.nn.functional.linear(case.hidden.double(), case.weight.double())
    moved = case.targets.shape[1] * 2.0**-24 * logits.abs().max()
    for name, expected in oracle.items():
        if name == "loss":
            rounding = 2.0**-23 * expected.abs()
        elif name in ("scores", "log_weight"):
            rounding = moved
        else:
            rounding = (3 * torch.finfo(case.weight.dtype).eps + moved) * expected.abs().max()
        error = (torch_error[name].double() - expected).abs().max()
        assert_within(ours[name].double(), expected, error + rounding, name)


@instruction_sets
@dtypes
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 2), (2, 3, 5, 7, 191), (3, 2, 8, 32, 192), (1, 3, 11, 33, 193), (4, 4, 4, 40, 397)],
    ids=lambda shape: "B{}-K{}-M{}-H{}-V{}".format(*shape),
)
def test_every_instruction_set_is_no_worse_than_torch(isa, dtype, shape):
    """Shapes around a lane, a panel, a tile and a block of the vocabulary."""
    batch, documents, tokens, width, vocabulary = shape
    case = make_case(batch, documents, tokens, width, vocabulary, dtype, masks=False)
    assert_no_worse_than_torch(case, isa)


@instruction_sets
@dtypes
def test_rows_with_a_pitch_of_their_own_are_read_where_they_lie(isa, dtype):
    """Columns cut out of wider matrices, at an odd offset: every other row is misaligned."""
    case = make_case(3, width=24, vocabulary=200, dtype=dtype)
    weight = torch.full((200, 29), torch.nan).to(dtype)
    weight[:, 3:27] = case.weight
    hidden = torch.full((*case.hidden.shape[:3], 27), torch.nan).to(dtype)
    hidden[..., 1:25] = case.hidden
    cut = replace(case, weight=weight[:, 3:27], hidden=hidden[..., 1:25])
    with rk.use_backend(f"cpu:{isa}"):
        want, got = (gradients(Case.loss, c) for c in (case, cut))
        direct = cut.loss()
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    assert torch.equal(direct, want["loss"])


@instruction_sets
def test_words_that_cannot_be_have_no_part(isa):
    """A bias of minus infinity over whole blocks of the vocabulary, and most of the target's."""
    case = make_case(3, vocabulary=600, masks=False)
    targets = case.targets % 3
    bias = torch.full((600,), -torch.inf)
    bias[:3] = torch.randn(3)
    bias[599] = 0.5
    case = replace(case, targets=targets, bias=bias)
    with rk.use_backend(f"cpu:{isa}"):
        ours = gradients(Case.loss, case, ("hidden", "weight"))
    oracle = gradients(eager, case.to(torch.float64), ("hidden", "weight"))
    for name, expected in oracle.items():
        assert_within(ours[name].double(), expected, 2.0**-19 * expected.abs().max(), name)
    assert (ours["weight"][3:599] == 0).all()


@instruction_sets
def test_infinite_and_missing_logits_make_what_they_make_in_torch(isa):
    case = make_case(3, vocabulary=300, masks=False)
    for value in (torch.inf, torch.nan):
        weight = case.weight.clone()
        weight[250, 0] = value
        spoiled = replace(case, weight=weight)
        with rk.use_backend(f"cpu:{isa}"):
            ours = spoiled.loss("token", "none")
        assert torch.equal(ours.isfinite(), eager(spoiled, "token", "none").isfinite())


@instruction_sets
def test_logits_far_apart_keep_their_gradients(isa):
    """Blocks whose largest logits differ by hundreds: each is relative to its own, and comes back to one."""
    case = make_case(2, 2, 3, vocabulary=1000, spread=60.0, masks=False)
    assert_no_worse_than_torch(case, isa)
    assert_no_worse_than_torch(replace(case, bias=torch.linspace(-300.0, 300.0, 1000)), isa)


@dtypes
def test_threads_share_the_vocabulary_and_change_nothing_but_the_sum_of_d_hidden(dtype):
    case = make_case(5, vocabulary=1500, dtype=dtype)
    before, found = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            found[threads] = gradients(Case.loss, case)
    finally:
        torch.set_num_threads(before)
    for threads in (2, 3, 16):
        for name, value in found[1].items():
            if name == "hidden":
                eps = 2 * torch.finfo(dtype).eps
                assert_within(
                    found[threads][name].double(), value.double(), eps * value.double().abs().max(), name
                )
            else:
                assert torch.equal(found[threads][name], value), (threads, name)


def test_float64_is_left_to_torch():
    case = make_case().to(torch.float64)
    with rk.use_backend("cpu"), pytest.raises(ValueError, match="cannot serve this call: it has no float64"):
        case.loss()
    case.loss()


@pytest.mark.parametrize("needs", [NOTHING, ALL], ids=["loss", "gradients"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_peak_of_memory_does_not_grow_with_the_batch(needs, dtype):
    """Of all that a call holds: its kernels' memory is torch's too."""
    peaks = {}
    for batch in (64, 512):
        case = make_case(batch, 3, 4, width=8, vocabulary=20000, dtype=dtype, masks=False)
        problem = problem_of(case)
        with Meter() as meter:
            cpu.forward(problem, needs, "mean")
        peaks[batch] = meter.peak_bytes - problem.hidden.nbytes * needs.hidden
        peaks[batch] -= 16 * 8 * problem.hidden[..., 0].numel()  # some numbers of each row
    assert peaks[512] <= peaks[64]
    weight = 20000 * 8 * 4
    # Logits, d_weight with d_bias and a bias, and what the blocks and threads keep of so few columns.
    assert peaks[64] <= chunks.LEAST_BYTES + 2 * weight + (8 << 20)


def test_chunks_are_cut_by_the_rows_that_have_a_part(monkeypatch):
    """Examples of 12 rows in a budget of 40: three whole ones, and as many padded ones as fit."""
    monkeypatch.setattr(chunks, "CACHE_BYTES", 40 * 500 * 4)
    monkeypatch.setattr(chunks, "LEAST_ROWS", 0)
    case = make_case(7, 3, 4, width=8, vocabulary=500, masks=False)
    found = chunks.chunks_in_cache(problem_of(case))
    assert (found.examples_at_once, found.rows_at_once, found.step()) == (3, 40, 36)
    assert list(found.ranges_of([12] * 7)) == [(0, 36), (36, 72), (72, 84)]
    assert list(found.ranges_of([6] * 7)) == [(0, 72), (72, 84)]
    assert list(found.ranges_of([0] * 7)) == [(0, 84)]
    assert list(found.ranges_of([12, 12, 12, 1, 0, 12, 0])) == [(0, 36), (36, 84)]


@pytest.mark.parametrize("cache, workspace", [(5, 1000), (5, 5)], ids=["one-pass", "two-passes"])
def test_an_example_too_large_for_the_cache_takes_one_pass_while_the_workspace_holds_it(
    cache, workspace, monkeypatch
):
    case = make_case(4, 3, 4, width=8, vocabulary=500)
    whole = gradients(Case.loss, case)
    monkeypatch.setattr(chunks, "CACHE_BYTES", cache * 500 * 4)
    monkeypatch.setattr(chunks, "LEAST_ROWS", 0)
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", workspace * 500 * 4)
    told = rk.explain(rk.linear_marginal_loss, case.scores, *(case.hidden, case.weight, case.targets)).plan
    assert told.startswith(
        "chunks of 1 examples, 12 rows, one pass" if workspace == 1000 else "chunks of 5 rows, 12 in an"
    )
    for name, value in gradients(Case.loss, case).items():
        assert_within(value.double(), whole[name].double(), 2.0**-20 * whole[name].abs().max(), name)


def test_the_kernels_cut_them_so(monkeypatch):
    """The sum of d_weight tells it: chunk is added to chunk in float32."""
    case = make_case(7, 3, 4, width=8, vocabulary=500, masks=False)
    case.targets[3, 1:] = case.targets[4] = case.targets[6] = -100  # 12, 12, 12, 3, 0, 12, 0 rows

    def d_weight(first, last):
        part = {
            name: x if name in ("weight", "bias") else x[first:last]
            for name, x in vars(case).items()
            if x is not None
        }
        return gradients(lambda c: c.loss(reduction="sum"), Case(**{"doc_mask": None, **part}))["weight"]

    with rk.use_backend("cpu"):
        whole, by_chunks = d_weight(0, 7), d_weight(0, 3) + d_weight(3, 7)
        monkeypatch.setattr(chunks, "CACHE_BYTES", 40 * 500 * 4)
        monkeypatch.setattr(chunks, "LEAST_ROWS", 0)
        assert torch.equal(d_weight(0, 7), by_chunks)
    assert not torch.equal(whole, by_chunks)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_common_offset_that_costs_the_bias_no_digit_changes_no_bit(backend):
    case = make_case()
    case = replace(case, bias=2.0 * torch.randint(-8, 8, case.bias.shape))
    with rk.use_backend(backend):
        expected = gradients(Case.loss, case)
        found = gradients(Case.loss, replace(case, bias=case.bias + 2.0**24))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
