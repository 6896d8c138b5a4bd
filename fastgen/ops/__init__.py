"""The fused ops. Each has one file: formula, schema, reference, gradients, backends, public
function."""

from fastgen import backends
from fastgen.ops.affine_coupling import affine_coupling

__all__ = ["affine_coupling"]

backends.check_choice()
