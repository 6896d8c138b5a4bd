"""fastgen: fused ops, layers, models and a training engine for deep generative models in
PyTorch."""

from fastgen import backends, nn, ops
from fastgen.backends import explain, use_backend

__all__ = ["backends", "explain", "nn", "ops", "use_backend"]

__version__ = "0.1.0"
