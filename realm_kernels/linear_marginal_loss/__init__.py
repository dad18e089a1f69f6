from .api import linear_marginal_loss

__all__ = ["linear_marginal_loss"]
