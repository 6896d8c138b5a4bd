"""Layers over the ops: they hold parameters and state, and leave the arithmetic to fastgen.ops."""

from fastgen.nn.adain import AdaIN
from fastgen.nn.coupling import AffineCoupling, RQSplineCoupling
from fastgen.nn.dropout import Dropout, keyed_dropout
from fastgen.nn.gaussian_reparam import GaussianReparam
from fastgen.nn.instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from fastgen.nn.residual_vq import ResidualVQ
from fastgen.nn.reversible import Invertible, InvertibleChain, Unwound, VolumePreserving
from fastgen.nn.vector_quantizer import VectorQuantizer

__all__ = [
    "AdaIN",
    "AffineCoupling",
    "Dropout",
    "GaussianReparam",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "Invertible",
    "InvertibleChain",
    "RQSplineCoupling",
    "ResidualVQ",
    "Unwound",
    "VectorQuantizer",
    "VolumePreserving",
    "keyed_dropout",
]
