from .api import TopK, mips_topk

__all__ = ["TopK", "mips_topk"]
