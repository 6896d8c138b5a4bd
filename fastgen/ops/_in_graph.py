"""Calls of autograd.Functions that Dynamo leaves whole, for torch.func transforms that it traces.

Under such a transform Dynamo replaces ``Function.apply`` by the code of ``forward``, and gradients
are then those of what ``forward`` calls: a raw operator has none. Left whole, the call meets the
transform as it does outside compiling. Importing this module imports Dynamo.
"""

from __future__ import annotations

from typing import Any

import torch

from fastgen.ops._autograd import Fused

__all__ = ["apply"]


@torch.compiler.allow_in_graph
def apply(key: str, *args: Any) -> Any:
    """``Function.apply(*args)`` of the one with this key: graphs hold no classes."""
    return Fused.functions[key].apply(*args)
