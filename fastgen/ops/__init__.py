"""The fused ops, each in one file: formula, schema, reference, gradients, backends, function.

Gradients are reverse-mode. Forward mode (torch.func.jvp and jacfwd, torch.autograd.forward_ad) of a
differentiable op raises NotImplementedError; backend="reference" has it.
"""

from fastgen import backends
from fastgen.ops.adain import adain
from fastgen.ops.affine_coupling import affine_coupling
from fastgen.ops.instance_norm import instance_norm
from fastgen.ops.normal import normal
from fastgen.ops.reparam_kl import reparam_kl
from fastgen.ops.rq_spline import rq_spline
from fastgen.ops.vq_codebook_stats import vq_codebook_stats
from fastgen.ops.vq_nearest import vq_nearest
from fastgen.ops.vq_quantize import VQResult, vq_quantize

__all__ = [
    "VQResult",
    "adain",
    "affine_coupling",
    "instance_norm",
    "normal",
    "reparam_kl",
    "rq_spline",
    "vq_codebook_stats",
    "vq_nearest",
    "vq_quantize",
]

backends.check_choice()
