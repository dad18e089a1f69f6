"""What tests/test_marginal_loss_distributed.py runs in each rank, as function(rank, size, ...).

Each rank makes the problem of all ranks from one seed and brings its own documents. Tensors go back as lists.
"""

import random

import pytest
import torch
import torch.distributed as dist
from marginal_loss_cases import CASES
from marginal_loss_oracle import Inputs
from table_distributed_cases import split_of

import realm_kernels as rk
from realm_kernels import ranks
from realm_kernels.testing import assert_within


def documents_of(inputs, rank_documents, rank):
    """The inputs of one rank: all examples and tokens, but its own documents."""
    by_document = {name: x for name, x in inputs._asdict().items() if x is not None and name != "token_mask"}
    mine = {name: x.split(rank_documents, dim=1)[rank].clone() for name, x in by_document.items()}
    return inputs._replace(**mine)


def call(inputs, mode, reduction, group, g=None, take=lambda x: True):
    """loss and, by name, the gradients of the inputs that `take` one."""
    leaves = {name: getattr(inputs, name) for name in ("scores", "log_likelihood", "log_weight")}
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items() if x is not None and take(name)}
    inputs = inputs._replace(**leaves)
    loss_of = rk.nn.MarginalLoss(
        mode=mode, reduction=reduction, group=group
    )  # rk.marginal_loss and its options
    loss = loss_of(inputs.scores, inputs.log_likelihood, **inputs.options())
    gradients = torch.autograd.grad(loss, list(leaves.values()), torch.ones_like(loss) if g is None else g)
    return loss.detach(), dict(zip(leaves, gradients, strict=True))


def adversarial(rank, size, mode):
    """(loss, its dtype, gradients by name, their dtypes) of every case; with K = 1 most ranks have none."""
    found = {}
    for seed, (name, inputs) in enumerate(CASES.items()):
        split = split_of(inputs.scores.shape[1], size, random.Random(seed))
        loss, gradients = call(documents_of(inputs, split, rank), mode, "none", dist.group.WORLD)
        dtypes = {key: str(x.dtype) for key, x in gradients.items()}
        found[name] = (
            loss.tolist(),
            str(loss.dtype),
            {key: x.double().tolist() for key, x in gradients.items()},
            dtypes,
        )
    return found


def as_on_one_rank(rank, size, seeds):
    """Any shapes, masks, reductions and upstream gradients, in float64, where rounding hides nothing."""
    for seed in seeds:
        draw = random.Random(seed)
        torch.manual_seed(seed)
        shape = (draw.choice([0, 1, 3]), draw.randint(1, 9), draw.choice([0, 1, 4]))
        tokens = None if draw.random() < 0.3 else shape[2]
        spread = draw.choice([0.0, 1e-6, 1.0, 50.0])
        inputs = Inputs(
            spread * torch.randn(shape[:2]).double(),
            spread * torch.randn(shape if tokens is not None else shape[:2]).double() - 10,
            None if tokens is None or draw.random() < 0.3 else torch.rand(shape[0], tokens) < 0.6,
            None if draw.random() < 0.3 else torch.rand(shape[:2]) < draw.choice([0.3, 0.9]),
            None if draw.random() < 0.5 else torch.randn(shape[:2]).double(),
        )
        mode, reduction = draw.choice(["sequence", "token"]), draw.choice(["none", "sum", "mean"])
        g = torch.randn(shape[:1] if reduction == "none" else ()).double()
        only = draw.choice(["scores", "log_likelihood", None])

        def take(name, only=only):
            return only in (None, name)

        expected, whole = call(inputs, mode, reduction, None, g, take)
        split = split_of(shape[1], size, draw)
        loss, gradients = call(documents_of(inputs, split, rank), mode, reduction, dist.group.WORLD, g, take)
        bound = 1e-13 * (1 + spread) * max(1, shape[2])
        assert_within(loss, expected, bound * (1 + 10 * shape[0]), f"seed {seed}: loss")
        for name, x in gradients.items():
            mine = whole[name].split(split, dim=1)[rank]
            assert_within(x, mine, bound * 10, f"seed {seed}: d_{name}")
            assert not x[mine == 0].any(), f"seed {seed}: d_{name} of what takes no part"
    return seed


def documents_alike(rank, size):
    """Exactly zero, whatever the prior and wherever the documents are."""
    one = torch.randn(2, 1, 3) * 20
    for seed in range(4):
        inputs = Inputs(10 * torch.randn(2, 6), one.expand(2, 6, 3))
        split = split_of(6, size, random.Random(seed))
        for mode in ("sequence", "token"):
            _, gradients = call(documents_of(inputs, split, rank), mode, "none", dist.group.WORLD)
            assert torch.equal(gradients["scores"], torch.zeros(2, split[rank]))
    return split


def wild_on_one_rank(rank, size):
    """NaN and +inf in a document of rank 1 make that example NaN on all ranks, and no other."""
    for wild in (float("nan"), float("inf")):
        for where in ("scores", "log_likelihood"):
            for mode in ("sequence", "token"):
                inputs = Inputs(torch.randn(2, rank + 1), -torch.rand(2, rank + 1, 2))
                if rank == 1:
                    getattr(inputs, where)[1, 0] = wild
                loss, gradients = call(inputs, mode, "none", dist.group.WORLD)
                assert loss[1].isnan() and not loss[0].isnan()
                assert gradients["scores"][1].isnan().all() and not gradients["scores"][0].isnan().any()


def bytes_received(rank, size, mode):
    """Of a forward and a backward, seen at torch.distributed itself; and what explain() says of them."""
    received, gather = [], ranks._all_gather

    def counted(output, tensor, group=None):
        received.append((output.numel() - tensor.numel()) * tensor.element_size())
        return gather(output, tensor, group=group)

    inputs = Inputs(torch.randn(5, rank), -torch.rand(5, rank, 3))
    explained = rk.explain(rk.marginal_loss, *inputs[:2], mode=mode, group=dist.group.WORLD)
    ranks._all_gather = counted
    try:
        call(inputs, mode, "mean", dist.group.WORLD)
    finally:
        ranks._all_gather = gather
    return sum(received), explained.plan


def in_a_subgroup(rank, size):
    group = dist.new_group([1, 2])
    inputs = Inputs(torch.randn(2, 4), -torch.rand(2, 4, 3))
    if rank == 0:
        with pytest.raises(ValueError, match="group must hold this process, got a group of other ranks only"):
            call(inputs, "token", "mean", group)
        return None
    loss, gradients = call(documents_of(inputs, [1, 3], rank - 1), "token", "mean", group)
    expected, whole = call(inputs, "token", "mean", None)
    assert_within(loss, expected, 2.0**-23 * expected.abs().double(), "loss")  # two roundings to float32
    mine = whole["scores"].split([1, 3], dim=1)[rank - 1]
    assert_within(gradients["scores"], mine, 2.0**-23 * mine.abs().double() + 1e-15, "d_scores")
    return None


def differentiated_twice(rank, size):
    inputs = Inputs(torch.randn(2, 3, requires_grad=True), -torch.rand(2, 3))
    loss = rk.marginal_loss(inputs.scores, inputs.log_likelihood, group=dist.group.WORLD)
    (d_scores,) = torch.autograd.grad(loss, inputs.scores, create_graph=True)
    d_scores.sum().backward()


def refused(rank, size, case):
    scores, log_likelihood, arguments = torch.randn(2, 3), -torch.rand(2, 3, 4), {}
    other = rank == 1
    if case == "scores" and other:
        scores = None
    elif case == "doc_mask" and other:
        arguments["doc_mask"] = torch.ones(2, 6, dtype=torch.bool)
    elif case == "backend" and other:
        with rk.use_backend("triton"):
            return rk.marginal_loss(scores, log_likelihood, group=dist.group.WORLD)
    elif case == "mixed" and other:
        return rk.DistributedTable.from_local(torch.randn(4, 8))
    elif case == "batch" and other:
        scores, log_likelihood = scores[:1], log_likelihood[:1]
    elif case == "tokens" and other:
        log_likelihood = log_likelihood[:, :, 0]
    elif case == "mode":
        arguments["mode"] = "token" if other else "sequence"
    elif case == "reduction":
        arguments["reduction"] = "sum" if other else "mean"
    elif case == "token_mask":
        arguments["token_mask"] = torch.tensor([[True, True, True, other], [True] * 4])
    elif case == "one token_mask" and other:
        arguments["token_mask"] = torch.ones(2, 4, dtype=torch.bool)
    elif case == "no document":
        scores, log_likelihood = scores[:, :0], log_likelihood[:, :0]
    return rk.marginal_loss(scores, log_likelihood, **arguments, group=dist.group.WORLD)
