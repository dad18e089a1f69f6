"""Exact, fused, differentiable top-k retrieval and marginal losses for retrieval-augmented language models."""

from .backends import explain, use_backend
from .mips_topk import TopK, mips_topk
from .native import build_info

__version__ = "0.1.0"

__all__ = ["TopK", "build_info", "explain", "mips_topk", "use_backend"]
