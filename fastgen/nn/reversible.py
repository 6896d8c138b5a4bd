"""Invertible layers in a row, trained in memory that does not grow with their number.

Gomez et al. 2017, "The Reversible Residual Network": backward rebuilds what forward did not keep,
from the outputs up, so that one layer's activations are in memory at a time. A coupling layer runs
its conditioner once for that (its kept half is there exactly), so a training step runs it forward
twice and backward once.

What is rebuilt is exact but for rounding, which adds up over layers; every `anchor_every` layers
the state itself is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["Invertible", "InvertibleChain", "Unwound", "VolumePreserving"]

Memory = tuple[Tensor, ...]
Cotangents = tuple[Tensor, Tensor]


class Unwound(NamedTuple):
    """A layer's input x, its gradient, and those of the parameters asked for (None: no effect)."""

    x: Tensor
    grad_x: Tensor
    grads: Sequence[Tensor | None]


class Invertible(nn.Module):
    """An invertible map of each sample of a batch.

    A subclass defines `forward` and `inverse`. One whose forward changes its state, or whose
    inverse is inexact, also defines `remember` and `unwind`.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, ...) -> y (B, ...) and log|det dy/dx| (B,), in nats."""
        raise NotImplementedError

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y (B, ...) -> x (B, ...) and log|det dx/dy| (B,), in nats."""
        raise NotImplementedError

    def remember(self, x: Tensor) -> tuple[Tensor, Tensor, Memory]:
        """`forward`, and what `unwind` needs to know of it beside y."""
        return *self(x), ()

    def unwind(
        self, y: Tensor, memory: Memory, cotangents: Cotangents, parameters: Sequence[Tensor]
    ) -> Unwound:
        """Rebuild x from y, and pull the cotangents of y and log_det back; changes no state."""
        with torch.no_grad():
            x, _ = self.inverse(y)
        x.requires_grad_()
        with torch.enable_grad():
            outputs = self(x)
        grad_x, *grads = pull_back(outputs, cotangents, (x, *parameters))
        return Unwound(x.detach(), torch.zeros_like(x) if grad_x is None else grad_x, grads)


class VolumePreserving(Invertible):
    """A rearrangement of a sample's elements: linear, with a Jacobian of determinant 1."""

    def rearrange(self, x: Tensor) -> Tensor:
        """x (B, ...) -> y, the same elements in other places."""
        raise NotImplementedError

    def restore(self, y: Tensor) -> Tensor:
        """The inverse of `rearrange`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.rearrange(x), zero_log_det(x)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.restore(y), zero_log_det(y)

    def unwind(
        self, y: Tensor, memory: Memory, cotangents: Cotangents, parameters: Sequence[Tensor]
    ) -> Unwound:
        return Unwound(self.restore(y), self.restore(cotangents[0]), [None] * len(parameters))


class InvertibleChain(Invertible):
    """Invertible layers one after the other.

    Args:
        layers: in the order of `forward`.
        reversible: rebuild activations in backward instead of keeping them. The result is that of
            plain backward up to rounding, with gradients of first order only (PyTorch's error for
            once differentiable functions otherwise), and not under torch.func.
        anchor_every: layers between kept states in that mode.

    State dict: that of the layers, under "layers.0." and so on.

    Raises:
        ValueError: `anchor_every` below 1; a reversible chain with dropout or batch normalisation
            of torch.nn inside, which would not do the same again in backward, or another chain.
    """

    def __init__(
        self, layers: Iterable[Invertible], *, reversible: bool = False, anchor_every: int = 16
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.reversible = reversible
        self.anchor_every = anchor_every
        if anchor_every < 1:
            raise ValueError(f"anchor_every: expected at least 1, got {anchor_every}")
        if reversible:
            for name, module in self.layers.named_modules(prefix="layers"):
                if isinstance(module, (_DropoutNd, _BatchNorm, InvertibleChain)):
                    raise ValueError(
                        f"layers: expected layers that do the same when run again, for "
                        f"reversible=True; {name} is {type(module).__name__}"
                    )

    def __iter__(self) -> Iterator[Invertible]:
        return iter(self.layers)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.reversible and torch.is_grad_enabled():
            parameters = [p for p in self.parameters() if p.requires_grad]
            if parameters or x.requires_grad:
                return _apply_reversible(self, x, *parameters)
        return _run(x, self)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return _run(y, (layer.inverse for layer in reversed(list(self))))

    def extra_repr(self) -> str:
        return f"reversible={self.reversible}, anchor_every={self.anchor_every}"


def pull_back(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Gradients of the inputs; None for one that no output depends on."""
    flowing = [pair for pair in zip(outputs, cotangents, strict=True) if pair[0].requires_grad]
    if not flowing:
        return [None] * len(inputs)
    results, grads = zip(*flowing, strict=True)
    return torch.autograd.grad(results, inputs, grads, allow_unused=True)


def zero_log_det(x: Tensor) -> Tensor:
    """(B,) zeros, float32 (float64 for float64 x)."""
    return x.new_zeros(x.shape[:1], dtype=torch.promote_types(x.dtype, torch.float32))


def _run(x: Tensor, steps: Iterable[Callable[[Tensor], Any]]) -> tuple[Tensor, Tensor]:
    total = zero_log_det(x)
    for step in steps:
        x, log_det = step(x)
        total = total + log_det
    return x, total


# torch.compiler.disable would import Dynamo, and Triton with it, as soon as fastgen is imported.
@torch._disable_dynamo
def _apply_reversible(chain: InvertibleChain, x: Tensor, *parameters: Tensor) -> Any:
    return _Reversible.apply(chain, x, *parameters)


class _Reversible(Function):
    """The whole chain as one node of the graph; saves the last output, anchors and memories."""

    @staticmethod
    def forward(ctx: Any, chain: InvertibleChain, x: Tensor, *parameters: Tensor) -> Any:
        device = x.device.type
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
            # later layers would take the cast of a weight from here, which has no graph
            "cache_enabled": False,
        }
        ctx.chain, ctx.parameters = chain, parameters
        y, total, kept, counts = x, zero_log_det(x), [], []
        with torch.autocast(**ctx.autocast):
            for i, layer in enumerate(chain):
                if i and i % chain.anchor_every == 0:
                    kept.append(y)
                y, log_det, memory = layer.remember(y)
                total = total + log_det
                kept.extend(memory)
                counts.append(len(memory))
        ctx.counts = counts
        # the parameters too, so that one changed before backward is an error
        ctx.save_for_backward(y, *kept, *parameters)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_log_det: Tensor) -> Any:
        y, *kept = ctx.saved_tensors
        del kept[len(kept) - len(ctx.parameters) :]
        sums = _Sums(ctx.parameters)
        layers = list(ctx.chain)
        with torch.autocast(**ctx.autocast):
            for i in reversed(range(len(layers))):
                first = len(kept) - ctx.counts[i]
                memory = tuple(kept[first:])
                del kept[first:]
                own = [p for p in layers[i].parameters() if p in sums]
                y, grad_y, grads = layers[i].unwind(y, memory, (grad_y, grad_log_det), own)
                sums.add(own, grads)
                if i and i % ctx.chain.anchor_every == 0:
                    y = kept.pop()
        grad_x = grad_y if ctx.needs_input_grad[1] else None
        return None, grad_x, *sums.results()


class _Sums:
    """Gradients by parameter; layers may share parameters.

    They are copied into memory that is taken before any layer is unwound. Left where they are made,
    between a layer's activations, they would split the memory that the next layer needs again.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.memory = {id(p): torch.empty_like(p) for p in parameters}
        self.filled: set[int] = set()

    def __contains__(self, parameter: Tensor) -> bool:
        return id(parameter) in self.memory

    def add(self, parameters: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        for parameter, grad in zip(parameters, grads, strict=True):
            key = id(parameter)
            if grad is not None and key in self.filled:
                self.memory[key].add_(grad)
            elif grad is not None:
                self.memory[key].copy_(grad)
                self.filled.add(key)

    def results(self) -> list[Tensor | None]:
        return [self.memory[id(p)] if id(p) in self.filled else None for p in self.parameters]
