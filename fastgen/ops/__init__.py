"""The fused ops. Each has one file: formula, schema, reference, gradients, backends, public function."""

from fastgen import backends
from fastgen.ops.affine_coupling import affine_coupling
from fastgen.ops.normal import normal
from fastgen.ops.reparam_kl import reparam_kl

__all__ = ["affine_coupling", "normal", "reparam_kl"]

backends.check_choice()
