from .api import TopK, mips_topk
from .cpu import SearchCounters, search_counters
from .triton_plan import ScanConfig
from .triton_tuning import use_scan_config

__all__ = ["ScanConfig", "SearchCounters", "TopK", "mips_topk", "search_counters", "use_scan_config"]
