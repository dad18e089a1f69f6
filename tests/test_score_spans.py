"""The laws of score_spans, for every backend, against the span head written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import realm_kernels as rk
from realm_kernels import native
from realm_kernels.score_spans.reference import count
from realm_kernels.testing import assert_within

BACKENDS = ["reference"]
if native.cpu is not None:
    BACKENDS += [f"cpu:{name}" for name in native.cpu.instruction_sets()]
if not native.triton_missing():
    BACKENDS.append("triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::DeprecationWarning:triton")
NAMES = ("start", "end", "weight", "bias", "norm_weight", "norm_bias")
# N, T, S, max_width: one wordpiece, spans of all, and joins of several tiles.
SHAPES = {"N2-T9-S32-W4": (2, 9, 32, 4), "N3-T1-S16-W1": (3, 1, 16, 1), "N1-T12-S256-W12": (1, 12, 256, 12)}
SHAPES |= {"N2-T37-S256-W10": (2, 37, 256, 10)}
# What the CPU's vectors do not divide, for the others: one column, odd rows, parts that are not full.
ODD_SHAPES = {"N2-T5-S1-W2": (2, 5, 1, 2), "N1-T7-S123-W3": (1, 7, 123, 3), "N2-T3-S200-W3": (2, 3, 200, 3)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
odd_shapes = pytest.mark.parametrize("shape", ODD_SHAPES.values(), ids=list(ODD_SHAPES))


@pytest.fixture(params=BACKENDS)
def backend(request):
    with rk.use_backend(request.param):
        yield request.param


def there(x):
    """On the GPU where Triton is to serve one."""
    is_gpu = torch.cuda.is_available() and rk.backends.forced_backend() == "triton"
    return x.cuda() if is_gpu and isinstance(x, torch.Tensor) else x


def make(rows, length, width, dtype=torch.float32):
    tensors = dict(zip(NAMES[:2], torch.randn(2, rows, length, width).to(dtype).unbind(), strict=True))
    tensors |= dict(weight=torch.randn(width), bias=torch.randn(1), norm_weight=1 + 0.1 * torch.randn(width))
    return tensors | dict(norm_bias=torch.randn(width))


def plain(start, end, weight, bias, norm_weight, norm_bias, max_width, eps=1e-3):
    """All representations [N, C, S] in memory, as the released code has them."""
    length, width = start.shape[1:]
    widths = range(1, max_width + 1)
    starts = torch.cat([torch.arange(length - w + 1) for w in widths])
    ends = torch.cat([torch.arange(w - 1, length) for w in widths])
    x = (start[:, starts] + end[:, ends]).relu()
    return F.layer_norm(x, (width,), norm_weight, norm_bias, eps) @ weight + bias


def ours(start, end, weight, bias, norm_weight, norm_bias, max_width, eps=1e-3):
    options = dict(norm_weight=there(norm_weight), norm_bias=there(norm_bias), max_width=max_width, eps=eps)
    return rk.score_spans(*map(there, (start, end, weight, bias)), **options).cpu()


def run(function, tensors, max_width, d_scores):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    scores = function(**leaves, max_width=max_width)
    return scores.detach(), *torch.autograd.grad(scores, list(leaves.values()), d_scores.to(scores.dtype))


def assert_no_less_accurate_than_torch(tensors, max_width, d_scores):
    """Scores and all six gradients: at most plain float32 torch's error and 16 roundings of the largest."""
    exact = run(plain, {name: x.double() for name, x in tensors.items()}, max_width, d_scores)
    theirs, got = (run(function, tensors, max_width, d_scores) for function in (plain, ours))
    for name, x, y, truth in zip(("scores", *NAMES), got, theirs, exact, strict=True):
        worst = (y.double() - truth).abs().max()
        assert_within(x, truth, worst + 16 * 2.0**-24 * truth.abs().max(), name)


@shapes
def test_no_less_accurate_than_plain_torch(backend, shape):
    rows, length, width, max_width = shape
    d_scores = torch.randn(rows, count(length, max_width))
    assert_no_less_accurate_than_torch(make(rows, length, width), max_width, d_scores)


@odd_shapes
@pytest.mark.parametrize("name", [name for name in BACKENDS if not name.startswith("cpu")])
def test_any_width_is_served(name, shape):
    rows, length, width, max_width = shape
    d_scores = torch.randn(rows, count(length, max_width))
    with rk.use_backend(name):
        assert_no_less_accurate_than_torch(make(rows, length, width), max_width, d_scores)


def test_a_mean_far_above_the_deviation_costs_no_more_digits_than_in_torch(backend):
    """Of a mean square less a squared mean nothing would be left. Sums of starts and ends are exact here."""
    tensors = make(2, 9, 256)
    tensors |= {name: 1000 + (256 * tensors[name]).round() / 256 for name in ("start", "end")}
    assert_no_less_accurate_than_torch(tensors, 4, torch.randn(2, count(9, 4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_halves_are_widened_exactly(backend, dtype):
    tensors, d_scores = make(2, 6, 32, dtype), torch.randn(2, 15)
    wide = run(ours, tensors | {n: tensors[n].float() for n in ("start", "end")}, 3, d_scores)
    got = run(ours, tensors, 3, d_scores)
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    assert torch.equal(got[0], wide[0])
    assert all(torch.equal(x, y.to(x.dtype)) for x, y in zip(got[1:], wide[1:], strict=True))


def test_strided_and_expanded_halves_equal_contiguous_ones(backend):
    tensors, d_scores = make(3, 5, 32), torch.randn(3, 12)
    want = run(ours, tensors, 3, d_scores)
    start, end = torch.cat([tensors["start"], tensors["end"]], 2).chunk(2, 2)
    turned = tensors["end"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for halves in ((start, end), (start, turned)):
        got = run(ours, tensors | dict(zip(NAMES[:2], halves, strict=True)), 3, d_scores)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    one = tensors["start"][:1].expand(3, -1, -1)
    scores = ours(**tensors | dict(start=one), max_width=3)
    assert torch.equal(scores, ours(**tensors | dict(start=one.contiguous()), max_width=3))


def test_leading_axes_are_kept_and_none_may_be_empty(backend):
    tensors = make(6, 5, 16)
    halves = {name: tensors[name].view(2, 3, 5, 16) for name in NAMES[:2]}
    assert torch.equal(ours(**tensors | halves, max_width=2), ours(**tensors, max_width=2).view(2, 3, 9))
    assert ours(**tensors | {name: tensors[name][0] for name in NAMES[:2]}, max_width=2).shape == (9,)
    empty = ours(**make(0, 5, 16), max_width=2)
    assert empty.shape == (0, 9)


def test_a_span_without_upstream_pulls_nothing(backend):
    tensors, d_scores = make(2, 5, 16), torch.zeros(2, 12)
    assert all(not x.any() for x in run(ours, tensors, 3, d_scores)[1:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_spans_without_upstream_hold_is_not_looked_at(backend, value):
    """A wordpiece that no scored span begins or ends with, as padding is: the others keep their bits."""
    tensors, d_scores = make(2, 5, 16), torch.randn(2, 9)
    d_scores[:, [3, 4, 7, 8]] = 0.0  # starts 0 1 2 3 4, then 0 1 2 3: all that wordpieces 3 and 4 begin
    d_scores[:, [6]] = 0.0  # and 2 to 3, which 3 ends
    want = run(ours, tensors, 2, d_scores)
    for half in ("start", "end"):
        tensors[half] = tensors[half].clone()
        tensors[half][:, 3:] = value
    got = run(ours, tensors, 2, d_scores)
    assert all(torch.equal(x, y) for x, y in zip(got[1:], want[1:], strict=True))


def test_where_a_representation_is_zero_the_constant_is_left(backend):
    """LayerNorm of equal numbers is its bias; ReLU lets no gradient through at 0."""
    tensors = make(2, 4, 16) | dict(start=torch.zeros(2, 4, 16), end=torch.zeros(2, 4, 16))
    scores, d_start, d_end, *_ = run(ours, tensors, 2, torch.ones(2, 7))
    assert (scores == (tensors["norm_bias"] * tensors["weight"]).sum() + tensors["bias"]).all()
    assert not d_start.any() and not d_end.any()


def test_nan_reaches_the_spans_it_is_part_of_alone(backend):
    tensors = make(1, 4, 16)
    tensors["start"][0, 1, 3] = torch.nan
    scores = ours(**tensors, max_width=2)[0]  # starts 0 1 2 3, then 0 1 2
    assert scores.isnan().tolist() == [False, True, False, False, False, True, False]


def test_two_calls_give_equal_bits(backend):
    tensors, d_scores = make(3, 9, 32), torch.randn(3, 24)
    first, second = (run(ours, tensors, 3, d_scores) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.skipif(native.cpu is None, reason="the CPU module was not built")
def test_the_number_of_threads_does_not_change_a_bit():
    tensors, d_scores = make(7, 9, 32), torch.randn(7, 24)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(run(ours, tensors, 3, d_scores))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


def test_gradients_match_finite_differences_and_there_are_no_second_ones():
    leaves = [x.double().requires_grad_() for x in make(2, 4, 3).values()]
    assert torch.autograd.gradcheck(lambda *x: ours(*x, max_width=3), leaves)
    (gradient,) = torch.autograd.grad(ours(*leaves, max_width=3).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="score_spans: second derivatives are not offered"):
        gradient.sum().backward()


@pytest.mark.parametrize("wanted", NAMES)
def test_any_one_input_may_want_a_gradient(backend, wanted):
    tensors, d_scores = make(2, 5, 16), torch.randn(2, 12)
    every = dict(zip(NAMES, run(ours, tensors, 3, d_scores)[1:], strict=True))
    leaf = tensors[wanted].requires_grad_()
    assert torch.equal(torch.autograd.grad(ours(**tensors, max_width=3), leaf, d_scores)[0], every[wanted])


@pytest.mark.parametrize(
    "needs", [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)]
)
def test_no_gradient_is_made_that_is_not_needed(backend, needs):
    """It comes back empty, and the others with the bits they have beside it."""
    tensors, d_scores = make(2, 9, 32), torch.randn(2, count(9, 4))
    inputs = [
        there(x) for x in (tensors["start"], tensors["end"], tensors["weight"] - tensors["weight"].mean())
    ]
    ops = torch.ops.realm_kernels
    forward = ops.score_spans(*inputs, 4, 1e-3)
    every, found = (
        ops.score_spans_bwd(there(d_scores), *forward, *inputs, 4, 1e-3, *wanted)
        for wanted in ((True, True, True), needs)
    )
    for gradient, got, needed in zip(every, found, needs, strict=True):
        assert torch.equal(got, gradient if needed else gradient.new_empty(0))


def test_the_op_is_well_registered():
    start, end = (torch.randn(2, 4, 16, requires_grad=True) for _ in range(2))
    arguments = (start, end, torch.randn(16, requires_grad=True), 3, 1e-3)
    # autograd of bits that mean and deviation carry is not differentiable any further
    torch.library.opcheck(torch.ops.realm_kernels.score_spans.default, arguments)


def test_compiles_whole_and_autocast_changes_nothing():
    tensors = make(2, 6, 32)
    want = ours(**tensors, max_width=3)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**tensors, max_width=3), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(**tensors, max_width=3), want)


def test_bad_input_is_named():
    tensors = make(2, 5, 16)
    for changes, error, message in (
        ({"start": [1.0]}, TypeError, r"score_spans: start must be a Tensor \[..., T, S\]"),
        ({"start": torch.zeros(16)}, ValueError, r"start must be \[..., T, S\] with T >= 1"),
        ({"end": tensors["end"][:, :4]}, ValueError, r"end must be \[..., T, S\] = \[2, 5, 16\]"),
        ({"end": tensors["end"].double()}, ValueError, "end must be of dtype float32"),
        ({"weight": torch.zeros(15)}, ValueError, r"weight must be \[S\] = \[16\]"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must be \[\] or \[1\]"),
        ({"norm_weight": torch.zeros(16).long()}, ValueError, "norm_weight must be of dtype"),
        ({"max_width": 6}, ValueError, r"max_width must be in \[1, T=5\], got 6"),
        ({"max_width": 2.0}, TypeError, "max_width must be an int"),
        ({"eps": 0.0}, ValueError, "eps must be above 0, got 0.0"),
    ):
        with pytest.raises(error, match=message):
            ours(**tensors | dict(max_width=2) | changes)


def test_explain_counts_the_spans(backend):
    tensors = {name: there(x) for name, x in make(2, 5, 16).items()}
    told = rk.explain(rk.score_spans, **tensors, max_width=3)
    assert told.backend == backend.partition(":")[0]
    assert told.bytes == 2 * (2 * 5 * 16 * 4 + 12 * 12) and told.flops == 2 * 12 * 16 * 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_step_in_triton_computes_with_what_its_inputs_hold_at_replay(dtype):
    tensors = {name: x.cuda() for name, x in make(3, 40, 256, dtype).items()}
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    d_scores = torch.randn(3, count(40, 10), device="cuda")

    def step():
        options = {name: leaves[name] for name in NAMES[4:]}
        scores = rk.score_spans(*(leaves[name] for name in NAMES[:4]), max_width=10, **options)
        return scores, *torch.autograd.grad(scores, list(leaves.values()), d_scores)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in leaves.values():
            x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, step(), strict=True))
