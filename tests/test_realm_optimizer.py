"""Pre-training's optimizer: the rate by step, each network's own, the released one where none is given."""

import pytest
import torch
from torch import nn

from realm_model.config import StageConfig
from realm_model.optimizer import ReleasedAdamW, StageOptimizer, released_warmup


def make_model(seed=0):
    torch.manual_seed(seed)
    model = nn.Module()
    for name in ("retriever", "reader"):
        network = nn.Module()
        network.dense, network.LayerNorm = nn.Linear(3, 2), nn.LayerNorm(2)
        setattr(model, name, network)
    return model


def rates(optimizer):
    """Of the networks that are trained; decaying and still parameters have one rate."""
    by_network = [group["lr"] for group in optimizer.adamw.param_groups]
    assert by_network[::2] == by_network[1::2]
    return by_network[::2]


@pytest.mark.parametrize(
    ("steps", "warmup"), [(50, 100), (1000, 100), (1010, 101), (100_000, 10_000), (200_000, 10_000)]
)
def test_the_released_warmup_is_a_tenth_of_the_steps_within_bounds(steps, warmup):
    assert released_warmup(steps) == warmup
    assert StageOptimizer(make_model(), StageConfig(steps, 1, 1, 1e-3, 1e-3, warmup=0.0)).warmup == warmup


def test_without_a_warmup_of_its_own_a_stage_is_trained_as_released():
    """Rates and weights of every step are those of the optimizer that has a test of its own."""
    steps, lr = 2000, 1e-2
    model, other = make_model(), make_model()
    stage = StageOptimizer(model, StageConfig(steps, 1, retriever_lr=lr, warmup=0.0))
    released = ReleasedAdamW(other.retriever, lr, steps)
    untrained = [p.clone() for p in other.reader.parameters()]
    for step in (0, 1, 99, 199, 200, 201, 1000, 1999):
        for network in (model.retriever, other.retriever):
            for number, parameter in enumerate(network.parameters()):
                parameter.grad = torch.full_like(parameter, 0.1 * (step % 7 - 3) + number)
        stage.step(step)
        assert rates(stage) == [pytest.approx(released.step(step), rel=1e-9)]
        for ours, theirs in zip(model.retriever.parameters(), other.retriever.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert all(map(torch.equal, model.reader.parameters(), untrained))


def test_a_given_warmup_ends_at_the_peak_and_the_rate_falls_to_nothing():
    stage = StageOptimizer(make_model(), StageConfig(100, 1, retriever_lr=1e-3, reader_lr=2e-3, warmup=0.2))
    found = []
    for step in (0, 9, 19, 20, 60, 99):
        stage.step(step)
        found.append(rates(stage))
    expected = [1 / 20, 10 / 20, 1.0, 1.0, 40 / 80, 1 / 80]
    assert found == [pytest.approx([1e-3 * share, 2e-3 * share]) for share in expected]


def test_each_network_is_clipped_on_its_own():
    model = make_model()
    stage = StageOptimizer(model, StageConfig(10, 1, retriever_lr=1e-3, reader_lr=1e-3))
    for network, size in ((model.retriever, 100.0), (model.reader, 1e-3)):
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, size)
    stage.step(5)
    count = sum(p.numel() for p in model.reader.parameters())
    norms = [
        torch.cat([p.grad.flatten() for p in network.parameters()]).norm().item()
        for network in (model.retriever, model.reader)
    ]
    assert norms == pytest.approx([1.0, 1e-3 * count**0.5], rel=1e-5)
