"""torch.nn.InstanceNorm1d, 2d and 3d on :func:`fastgen.ops.instance_norm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.instancenorm import _InstanceNorm

import fastgen.nn
from fastgen.integrations._calls import reason_against_tracer
from fastgen.integrations._library import Library, Swap, own_method, run_own_code

__all__ = ["LIBRARY", "FusedInstanceNorm1d", "FusedInstanceNorm2d", "FusedInstanceNorm3d"]


class _Fused(_InstanceNorm):
    """What a layer needs to be, for PyTorch's tracers, the one that it takes the place of."""

    # Only so does torch.jit.script find them, which compiles what `is_scripting()` leads to.
    _own_forward = own_method(_InstanceNorm.forward, "_own_forward")
    _own_apply = own_method(_InstanceNorm._apply_instance_norm, "_own_apply")

    def own_code(self, input: Tensor) -> str | None:
        """Why this call runs PyTorch's own code, or None."""
        return reason_against_tracer(input)

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._own_forward(input)
        elif isinstance(input, Proxy):
            return _as_one_node(self, input)
        else:
            return super().forward(input)

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._own_apply(input)
        else:
            reason = reason_against_tracer()
            if reason is None:
                return super()._apply_instance_norm(input)
            run_own_code(type(self).__name__.removeprefix("Fused"), reason)
            return self._own_apply(input)


def _as_one_node(layer: nn.Module, input: Proxy) -> Proxy:
    """A call of `layer` in the graph of torch.fx, which looks into no layer of torch.nn either."""
    tracer: Any = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), {})


# Classes of their own, so that unpatching leaves alone the fastgen layers a model has by itself.
class FusedInstanceNorm1d(_Fused, fastgen.nn.InstanceNorm1d):
    """A patched torch.nn.InstanceNorm1d."""


class FusedInstanceNorm2d(_Fused, fastgen.nn.InstanceNorm2d):
    """A patched torch.nn.InstanceNorm2d."""


class FusedInstanceNorm3d(_Fused, fastgen.nn.InstanceNorm3d):
    """A patched torch.nn.InstanceNorm3d."""


def _swap(original: type[nn.Module], fused: type[nn.Module], fingerprint: str) -> Swap:
    return Swap(original, fused, fingerprint, relies_on=(_InstanceNorm,))


LIBRARY = Library(
    name="torch.nn",
    distribution="torch",
    tested=("2.10.0", "2.11.0", "2.13.0", "2.14.1"),
    swaps=(
        _swap(nn.InstanceNorm1d, FusedInstanceNorm1d, "dbbf9c8cac029036"),
        _swap(nn.InstanceNorm2d, FusedInstanceNorm2d, "69596161cac7a9dd"),
        _swap(nn.InstanceNorm3d, FusedInstanceNorm3d, "558f7f9d4959b283"),
    ),
)


def _quantize_like_the_originals() -> None:
    """Lets torch.ao.quantization.convert make of a patched layer what it makes of PyTorch's own."""
    try:
        from torch.ao.quantization import quantization_mappings
    except ImportError:  # PyTorch has announced its end
        return
    mapping = quantization_mappings.DEFAULT_STATIC_QUANT_MODULE_MAPPINGS
    for swap in LIBRARY.swaps:
        if swap.original in mapping:
            mapping.setdefault(swap.fused, mapping[swap.original])


_quantize_like_the_originals()
