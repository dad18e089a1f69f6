"""What tests/test_linear_marginal_loss_distributed.py runs in each rank, as function(rank, size, ...).

Each rank makes the problem of all ranks from one seed and brings its own words or documents of it.
"""

import random
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from linear_marginal_loss_cases import DIFFERENTIABLE, Case, eager, gradients, make_case
from table_distributed_cases import split_of

import realm_kernels as rk
from realm_kernels import ranks
from realm_kernels.linear_marginal_loss import chunked, chunks, distributed
from realm_kernels.testing import assert_within

BY_WORDS, BY_DOCUMENTS = ("weight", "bias"), ("scores", "hidden", "doc_mask", "log_weight")


def axis_of(split):
    """The tensors that are split, along which axis, and the argument that says so."""
    if split == "vocabulary":
        return BY_WORDS, 0, {"vocabulary_group": dist.group.WORLD}
    return BY_DOCUMENTS, 1, {"group": dist.group.WORLD}


def share_of(case, split, sizes, rank):
    names, axis, _ = axis_of(split)
    present = {name: getattr(case, name) for name in names if getattr(case, name) is not None}
    return replace(case, **{name: x.split(sizes, axis)[rank].clone() for name, x in present.items()})


def size_of(case, split):
    return case.weight.shape[0] if split == "vocabulary" else case.scores.shape[1]


def both(case, split, sizes, rank, call=Case.loss, upstream=None):
    """({name: value} of this rank, the same of one process, cut to what this rank has)."""
    present = tuple(name for name in DIFFERENTIABLE if getattr(case, name) is not None)
    names, axis, group = axis_of(split)
    whole = gradients(call, case, present, upstream)
    mine = gradients(lambda c: call(c, **group), share_of(case, split, sizes, rank), present, upstream)
    expected = {k: x.split(sizes, axis)[rank] if k in names else x for k, x in whole.items()}
    if split == "documents":  # the gradients of parameters that ranks share add up over ranks
        for name in {"weight", "bias"} & mine.keys():
            dist.all_reduce(mine[name])
    return mine, expected


def assert_same(case, split, sizes, rank, bound, what, **options):
    """Within `bound` of the largest number of each tensor; bits alike on ranks."""
    mine, expected = both(case, split, sizes, rank, **options)
    for name, value in expected.items():
        assert mine[name].dtype == value.dtype
        largest = value[value.isfinite()].abs().amax() if value.isfinite().any() else 0.0
        assert_within(mine[name], value.double(), bound * (1 + largest), f"{what}: {name}")
    alike = ("loss", "scores", "hidden") if split == "vocabulary" else ("loss",)
    for name in alike:
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, mine[name].double().flatten().tolist())
        assert all(each == told[0] for each in told), f"{what}: {name}"


def as_on_one_rank(rank, size, split, seeds):
    """Any shapes, masks, options and chunks, in float64, where rounding hides nothing."""
    for seed in seeds:
        draw = random.Random(seed)
        torch.manual_seed(seed)
        vocabulary = draw.choice([1, 2, 5, 37])
        case = make_case(
            draw.choice([0, 1, 3]),
            draw.choice([1, 2, 5]),
            draw.choice([0, 1, 4]),
            width=draw.choice([1, 7]),
            vocabulary=vocabulary,
            spread=draw.choice([1e-3, 1.0, 5.0]),
            masks=draw.random() < 0.7,
        ).to(torch.float64)
        if draw.random() < 0.4:
            case = replace(case, bias=None)
        if draw.random() < 0.4:
            case = replace(case, log_weight=None)
        mode, reduction = draw.choice(["sequence", "token"]), draw.choice(["none", "sum", "mean"])
        threshold = draw.choice([0.0, 0.0, 0.2])
        upstream = torch.randn(len(case.scores) if reduction == "none" else ()).double()
        rows, counts = draw.choice([1, 6, 1000]), draw.random() < 0.5

        def call(c, mode=mode, reduction=reduction, threshold=threshold, **group):
            return c.loss(mode, reduction, min_posterior=threshold, **group)

        budget, chunks.WORKSPACE_BYTES = chunks.WORKSPACE_BYTES, rows * (vocabulary + 1) * 8
        counting, chunked.may_count_rows = chunked.may_count_rows, lambda device, counts=counts: counts
        try:
            sizes = split_of(size_of(case, split), size, draw)
            assert_same(case, split, sizes, rank, 1e-12, f"seed {seed}", call=call, upstream=upstream)
        finally:
            chunks.WORKSPACE_BYTES, chunked.may_count_rows = budget, counting


def hidden_order(case, mode, moved):
    """How far d_hidden, a sum over V words, may be off in whatever order the words are added.

    d_hidden_h = sum_v d_v W_vh, with sum_v |d_v| <= 2 g and g the share of a token or an example in the mean.
    A float32 sum of V products in any order is off by at most V u / (1 - V u) sum_v |d_v W_vh| (Higham,
    Accuracy and Stability of Numerical Algorithms, section 3.1), and what moves a logit moves each d_v by as
    much of its size. Cancellation leaves the result smaller than its terms: hence not relative to it.
    """
    live = case.targets != -100
    if case.doc_mask is not None:
        live &= case.doc_mask.any(1, keepdim=True)
    counted = int(live.sum() if mode == "token" else live.any(1).sum())
    words = case.weight.shape[0] * 2.0**-24
    return 2 / max(1, counted) * case.weight.abs().max().double() * (words / (1 - words) + moved)


def planted(rank, size, name, share):
    """The same with d_hidden of one rank's words off by `share` of itself: what the comparison says of it."""
    found = distributed.VocabularyPass.gradients

    def gradients_off(self):
        if rank == 1:
            self.d_hidden *= 1 + share
        return found(self)

    distributed.VocabularyPass.gradients = gradients_off
    try:
        adversarial(rank, size, "vocabulary", name, torch.float32, None)
    except AssertionError as error:
        return str(error)
    finally:
        distributed.VocabularyPass.gradients = found
    return ""


def adversarial(rank, size, split, name, dtype, backend):
    """float32 and half precision against float64: no worse than plain torch on one rank."""
    case = ADVERSARIAL[name]().to(dtype)
    sizes = split_of(size_of(case, split), size, random.Random(name))
    names, axis, group = axis_of(split)
    for mode in ("sequence", "token"):
        oracle = gradients(lambda c, m=mode: eager(c, m), case.to(torch.float64))
        torch_error = gradients(lambda c, m=mode: eager(c, m), case)
        with rk.use_backend(backend):
            mine = gradients(lambda c, m=mode: c.loss(m, **group), share_of(case, split, sizes, rank))
        logits = case.hidden.double() @ case.weight.double().T
        moved = case.targets.shape[1] * 2.0**-24 * logits[logits.isfinite()].abs().max()
        for key, whole in oracle.items():
            error = (torch_error[key].double() - whole).abs().nan_to_num().max()
            if key == "loss":
                rounding = 2.0**-22 * whole.abs()
            elif key in ("scores", "log_weight"):
                rounding = moved + 2.0**-24
            else:
                rounding = (2 * torch.finfo(getattr(case, key).dtype).eps + moved) * whole.abs().max()
            if key == "hidden":
                rounding += hidden_order(case, mode, moved)
            if split == "documents" and key in ("weight", "bias"):
                total = mine[key].double()
                dist.all_reduce(total)
                mine[key] = total
            mine_of = whole.split(sizes, axis)[rank] if key in names else whole
            assert_within(mine[key], mine_of, error + rounding, f"{name} {mode}: {key}")


def common_offset():
    case = make_case()
    return replace(case, bias=case.bias + 2.0**24)


def confident():
    case = make_case(3, 2, 4, width=8, vocabulary=8, masks=False)
    rows = torch.eye(8)[case.targets][:, None].expand(3, 2, 4, 8) * torch.tensor([10.0, 20.0]).view(
        1, 2, 1, 1
    )
    return replace(case, hidden=rows.contiguous(), weight=torch.eye(8), bias=torch.zeros(8))


def masked_words():
    """A vocabulary padded with words of bias -inf, all of some rank's among them."""
    case = make_case(vocabulary=40)
    words = torch.arange(40) < 38
    return replace(case, bias=case.bias.masked_fill(~words, -torch.inf), targets=case.targets.clamp(max=37))


ADVERSARIAL = {
    "plain": make_case,
    "H=123": lambda: make_case(width=123, vocabulary=300),
    "V=1": lambda: make_case(vocabulary=1),
    "V=30522": lambda: make_case(2, 3, 3, width=16, vocabulary=30522),
    "common offset": common_offset,
    "confident": confident,
    "masked words": masked_words,
    "K=1": lambda: make_case(documents=1, masks=False),
}


def masks_hide(rank, size, split):
    """NaN in masked documents and ignored tokens is never looked at, on whichever rank."""
    case = make_case(4, 5)
    hide = ~case.doc_mask[:, :, None, None] | (case.targets == -100)[:, None, :, None]
    spoiled = replace(case, hidden=case.hidden.masked_fill(hide, torch.nan))
    sizes = split_of(size_of(case, split), size, random.Random(0))
    clean, dirty = (both(c, split, sizes, rank)[0] for c in (case, spoiled))
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name


def backward_twice(rank, size, split):
    case = share_of(
        make_case(4, 5), split, split_of(37 if split == "vocabulary" else 5, size, random.Random(1)), rank
    )
    case = case.requiring(*DIFFERENTIABLE)
    leaves = [getattr(case, name) for name in DIFFERENTIABLE]
    for reduction in ("none", "mean"):
        loss = case.loss(reduction=reduction, **axis_of(split)[2])
        first = torch.autograd.grad(loss.sum(), leaves, retain_graph=True)
        again = torch.autograd.grad(2 * loss.sum(), leaves, retain_graph=True)
        other = torch.autograd.grad(case.loss(reduction=reduction, **axis_of(split)[2]).sum(), leaves)
        for x, y, z in zip(first, again, other, strict=True):
            assert torch.equal(2 * x, y) and torch.equal(x, z)
    with pytest.raises(RuntimeError, match="linear_marginal_loss: second derivatives are not offered"):
        (grad,) = torch.autograd.grad(case.loss(**axis_of(split)[2]), case.scores, create_graph=True)
        grad.sum().backward()


def posterior(rank, size):
    case = make_case(4, 5).to(torch.float64)
    mine = share_of(case, "vocabulary", split_of(37, size, random.Random(2)), rank)
    _, found = mine.loss(return_posterior=True, vocabulary_group=dist.group.WORLD)
    _, whole = case.loss(return_posterior=True)
    for name in ("log_marginal", "prior", "posterior"):
        assert_within(getattr(found, name), getattr(whole, name), 1e-12, name)


def dtensor(rank, size):
    """A weight and bias as tensor parallelism leaves them; their gradients are placed alike."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    case = make_case(4, 5).to(torch.float64)
    whole = gradients(Case.loss, case)
    mesh = init_device_mesh("cpu", (size,))
    spread = {
        name: distribute_tensor(getattr(case, name), mesh, [Shard(0)]).requires_grad_() for name in BY_WORDS
    }
    case = replace(case.requiring("scores", "hidden", "log_weight"), **spread)
    loss = case.loss()
    found = torch.autograd.grad(loss, [getattr(case, name) for name in DIFFERENTIABLE])
    assert_within(loss, whole["loss"], 1e-12, "loss")
    for name, value in zip(DIFFERENTIABLE, found, strict=True):
        if name in BY_WORDS:
            assert isinstance(value, DTensor) and value.placements == (Shard(0),)
            value = value.full_tensor()
        assert_within(value, whole[name], 1e-12, name)
    with pytest.raises(TypeError, match="bias must be a DTensor, as weight is, got float64"):
        replace(case, bias=case.bias.to_local()).loss()
    for wrong in (
        {"weight": distribute_tensor(case.weight.full_tensor().detach(), mesh, [Replicate()])},
        {"bias": distribute_tensor(case.bias.full_tensor().detach(), mesh, [Replicate()])},
    ):
        with pytest.raises(
            ValueError, match=r"must be a DTensor placed Shard\(0\) on weight's mesh of one axis"
        ):
            replace(case, **wrong).loss()
    with pytest.raises(TypeError, match="hidden must be a plain Tensor, alike on all ranks, got a DTensor"):
        replace(case, hidden=distribute_tensor(case.hidden.detach(), mesh, [Replicate()])).loss()
    with pytest.raises(ValueError, match="vocabulary_group must be None where weight is a DTensor"):
        case.loss(vocabulary_group=dist.group.WORLD)


def bytes_received(rank, size, split):
    """(what arrives in the forward, in the backward), counted in bytes."""
    moved = []
    gather, reduce_ = ranks._all_gather, dist.all_reduce

    def counted(output, tensor, group):
        moved.append((output.numel() - tensor.numel()) * tensor.element_size())
        return gather(output, tensor, group=group)

    def summed(tensor, group):
        moved.append(tensor.numel() * tensor.element_size())
        return reduce_(tensor, group=group)

    case = make_case(4, 8, 5, masks=False).requiring(*DIFFERENTIABLE)
    mine = share_of(case, split, split_of(size_of(case, split), size, random.Random(3)), rank)
    ranks._all_gather, dist.all_reduce = counted, summed
    try:
        loss = mine.loss(**axis_of(split)[2])
        forward = sum(moved)
        moved.clear()
        loss.backward()
        return forward, sum(moved)
    finally:
        ranks._all_gather, dist.all_reduce = gather, reduce_


def explained(rank, size, split):
    case = make_case(4, 8, 5)
    mine = share_of(case, split, split_of(size_of(case, split), size, random.Random(5)), rank)
    inputs = (mine.scores, mine.hidden, mine.weight, mine.targets)
    told = rk.explain(rk.linear_marginal_loss, *inputs, **mine.options(), **axis_of(split)[2])
    return told.backend, told.plan, told.flops == 2 * 16 * mine.hidden[..., 0].numel() * len(mine.weight)


def refused(rank, size, split, name):
    case, other, options = make_case(2, 4, masks=False), rank == 1, dict(axis_of(split)[2])
    case = share_of(case, split, split_of(size_of(case, split), size, random.Random(4)), rank)
    if name == "hidden" and other:
        case = replace(case, hidden=None)
    elif name == "weight" and other:
        case = replace(case, weight=case.weight[:, :3])
    elif name == "batch" and other:
        case = Case(*(None if x is None else x[:1] if x.shape[0] == 2 else x for x in vars(case).values()))
    elif name == "mode":
        options["mode"] = "token" if other else "sequence"
    elif name == "requires_grad" and other:
        case = case.requiring("hidden")
    elif name == "targets" and other:
        case = replace(case, targets=(case.targets + 1) % 37)
    elif name == "range":
        case = replace(case, targets=case.targets + 37)
    elif name == "backend" and other:
        with rk.use_backend("reference"):
            return case.loss(**options)
    elif name == "both":
        options |= {"group": dist.group.WORLD, "vocabulary_group": dist.group.WORLD}
    elif name == "nothing":
        cut = {"weight": case.weight[:0], "bias": case.bias[:0]}
        if split == "documents":
            cut = {x: getattr(case, x)[:, :0] for x in ("scores", "hidden", "log_weight")}
        case = replace(case, **cut)
    return case.loss(**options)
