"""Complete generative models, one system a file."""

from fastgen.models.classifier import Classifier
from fastgen.models.code_prior import CodePrior
from fastgen.models.realnvp import Flow, ImageRealNVP, RealNVP
from fastgen.models.stylegan import StyleGANDiscriminator, StyleGANGenerator
from fastgen.models.vae import VAE, Bound
from fastgen.models.vqvae import VQVAE, VQVAEOutput

__all__ = [
    "VAE",
    "VQVAE",
    "Bound",
    "Classifier",
    "CodePrior",
    "Flow",
    "ImageRealNVP",
    "RealNVP",
    "StyleGANDiscriminator",
    "StyleGANGenerator",
    "VQVAEOutput",
]
