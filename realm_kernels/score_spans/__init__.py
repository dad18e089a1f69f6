from .api import score_spans

__all__ = ["score_spans"]
