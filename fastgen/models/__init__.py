"""Complete generative models, one system a file."""

from fastgen.models.code_prior import CodePrior
from fastgen.models.vqvae import VQVAE

__all__ = ["VQVAE", "CodePrior"]
