from .api import span_marginal_loss

__all__ = ["span_marginal_loss"]
