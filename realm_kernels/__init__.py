"""Exact, fused, differentiable top-k retrieval and marginal losses for retrieval-augmented models."""

from . import nn
from .backends import explain, use_backend
from .linear_marginal_loss import linear_marginal_loss
from .marginal_loss import Posterior, marginal_loss, posterior
from .mips_topk import ScanConfig, SearchCounters, TopK, mips_topk, search_counters, use_scan_config
from .native import build_info
from .ranks import LostRankError
from .score_spans import score_spans
from .span_marginal_loss import span_marginal_loss
from .table import DistributedTable, ShardedTable, StreamedTable, TableEditor, TableRefresher, TableWriter

__version__ = "0.1.0"

__all__ = [
    "DistributedTable",
    "LostRankError",
    "Posterior",
    "ScanConfig",
    "SearchCounters",
    "ShardedTable",
    "StreamedTable",
    "TableEditor",
    "TableRefresher",
    "TableWriter",
    "TopK",
    "build_info",
    "explain",
    "linear_marginal_loss",
    "marginal_loss",
    "mips_topk",
    "nn",
    "posterior",
    "score_spans",
    "search_counters",
    "span_marginal_loss",
    "use_backend",
    "use_scan_config",
]
