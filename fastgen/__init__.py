"""fastgen: fused ops, layers, models and a training engine for deep generative models in
PyTorch."""

from fastgen._interrupt import one_line_for_commands

with one_line_for_commands():
    from fastgen import backends, nn, ops
    from fastgen.backends import use_backend
    from fastgen.integrations import explain, patch, unpatch

__all__ = ["backends", "explain", "nn", "ops", "patch", "unpatch", "use_backend"]

__version__ = "0.1.0"
