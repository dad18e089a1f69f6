from .api import Posterior, marginal_loss, posterior

__all__ = ["Posterior", "marginal_loss", "posterior"]
