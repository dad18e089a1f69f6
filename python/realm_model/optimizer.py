"""The optimizer of the released code: AdamW, linear warm-up and decay, a clipped gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CLIP = 1.0  # of the gradient's norm; over all parameters in fine-tuning, for each network in pre-training
WEIGHT_DECAY, EPS = 0.01, 1e-6


class ReleasedAdamW:
    """AdamW of a module over `steps` steps, as language/realm trains.

    Biases and LayerNorms do not decay. The rate rises over released_warmup(steps) steps and falls to 0 at the
    last: lr * (1 - step / steps). In BERT's own optimizer Adam's means are not
    corrected for their start at 0; torch's are.
    """

    def __init__(self, module: nn.Module, lr: float, steps: int) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        still = [p for name, p in named if _is_exempt(name)]
        decaying = [p for name, p in named if not _is_exempt(name)]
        groups = [{"params": decaying, "weight_decay": WEIGHT_DECAY}, {"params": still, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=lr, eps=EPS)
        self.lr, self.steps, self.parameters = lr, steps, decaying + still
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


def released_warmup(steps: int) -> int:
    """Steps of the linear rise."""
    return min(10_000, max(100, steps // 10))


def _is_exempt(name: str) -> bool:
    """As BERT names them: LayerNorm, layer_norm(alization) and bias."""
    return "LayerNorm" in name or "layer_norm" in name or name.endswith("bias")
