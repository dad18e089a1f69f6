"""The optimizer of the released code: AdamW, linear warm-up and decay, a clipped gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

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
