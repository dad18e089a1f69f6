"""The optimizer of the released code: AdamW, linear warm-up and decay, a clipped gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .config import StageConfig

if TYPE_CHECKING:
    from .model import Realm

CLIP = 1.0  # of the gradient's norm; over all parameters in fine-tuning, for each network in pre-training
WEIGHT_DECAY, EPS = 0.01, 1e-6


class ReleasedAdamW:
    """AdamW of a module over `steps` steps, as language/realm trains: decay as parameter_groups has it.

    The rate rises over released_warmup(steps) steps and falls to 0 at the
    last: lr * (1 - step / steps). In BERT's own optimizer Adam's means are not
    corrected for their start at 0; torch's are.
    """

    def __init__(self, module: nn.Module, lr: float, steps: int) -> None:
        groups = parameter_groups(module)
        self.adamw = torch.optim.AdamW(groups, lr=lr, eps=EPS)
        self.lr, self.steps = lr, steps
        self.parameters = [p for group in groups for p in group["params"]]
        self.warmup = released_warmup(steps)

    def zero_grad(self) -> None:
        self.adamw.zero_grad()

    def step(self, step: int) -> float:
        """Step number `step`, from 0, on the gradients as they are; returns its rate."""
        rate = self.lr * min((step + 1) / self.warmup, 1 - step / self.steps)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.adamw.step()
        return rate

    def state_dict(self) -> dict[str, Any]:
        return self.adamw.state_dict()["state"]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(self.adamw.state_dict() | {"state": state})


class StageOptimizer:
    """AdamW for the networks a stage trains: each with its rate and its clip, linear warm-up and decay.

    Where the configuration gives no warm-up the rate is the released one; else it falls from its peak at the
    end of the warm-up.
    """

    def __init__(self, model: Realm, config: StageConfig) -> None:
        self.config = config
        given = max(1, round(config.warmup * config.steps))
        self.warmup = given if config.warmup else released_warmup(config.steps)
        self.falls_over = max(1, config.steps - given) if config.warmup else config.steps  # steps
        trained = [
            (net, lr)
            for net, lr in ((model.retriever, config.retriever_lr), (model.reader, config.reader_lr))
            if lr > 0
        ]
        self.networks = [list(net.parameters()) for net, _ in trained]
        groups = [group | {"lr": lr, "peak": lr} for net, lr in trained for group in parameter_groups(net)]
        self.adamw = torch.optim.AdamW(groups, eps=EPS)

    def zero_grad(self) -> None:
        self.adamw.zero_grad()

    def step(self, step: int) -> None:
        """Step number `step`, from 0, on the gradients as they are."""
        up = (step + 1) / self.warmup
        down = (self.config.steps - step) / self.falls_over
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * min(up, down)
        for parameters in self.networks:
            nn.utils.clip_grad_norm_(parameters, CLIP)
        self.adamw.step()


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """What a module trains, for AdamW: all decays but biases and LayerNorms, as in the released code."""
    norms = {p for part in module.modules() if isinstance(part, nn.LayerNorm) for p in part.parameters()}
    decaying, still = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (still if parameter in norms or name.endswith("bias") else decaying).append(parameter)
    return [{"params": decaying, "weight_decay": WEIGHT_DECAY}, {"params": still, "weight_decay": 0.0}]


def released_warmup(steps: int) -> int:
    """Steps of the linear rise."""
    return min(10_000, max(100, steps // 10))
