"""Complete generative models, one system a file."""

from fastgen.models.code_prior import CodePrior
from fastgen.models.realnvp import ImageRealNVP, RealNVP
from fastgen.models.vqvae import VQVAE

__all__ = ["VQVAE", "CodePrior", "ImageRealNVP", "RealNVP"]
