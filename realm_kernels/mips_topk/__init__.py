from .api import TopK, mips_topk
from .cpu import SearchCounters, search_counters

__all__ = ["SearchCounters", "TopK", "mips_topk", "search_counters"]
