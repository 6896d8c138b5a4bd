"""Complete generative models, one system a file."""

from fastgen.models.classifier import Classifier
from fastgen.models.code_prior import CodePrior
from fastgen.models.realnvp import ImageRealNVP, RealNVP
from fastgen.models.stylegan import StyleGANDiscriminator, StyleGANGenerator
from fastgen.models.vae import VAE
from fastgen.models.vqvae import VQVAE

__all__ = [
    "VAE",
    "VQVAE",
    "Classifier",
    "CodePrior",
    "ImageRealNVP",
    "RealNVP",
    "StyleGANDiscriminator",
    "StyleGANGenerator",
]
