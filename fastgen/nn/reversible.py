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
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor
from torch.autograd import Function, forward_ad

from fastgen.nn._replay import Scene, check_sources, uncached
from fastgen.ops import _check

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

    A subclass defines `forward` and `inverse`. One whose inverse is inexact, or does not undo the
    forward in training mode, also defines `remember`, `replay` and `unwind`.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, ...) -> y (B, ...) and log|det dy/dx| (B,), in nats."""
        raise NotImplementedError

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y (B, ...) -> x (B, ...) and log|det dx/dy| (B,), in nats."""
        raise NotImplementedError

    def remember(self, x: Tensor) -> tuple[Tensor, Tensor, Memory]:
        """`forward`, and what `unwind` and `replay` need to know of it beside y and x."""
        return *self(x), ()

    def replay(self, x: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """What `remember` gave for x, y and log_det, with its graph."""
        if memory:
            raise NotImplementedError(
                f"{type(self).__name__}: expected a replay beside its remember, "
                "which gradients of second order need"
            )
        return self(x)

    def unwind(
        self, y: Tensor, memory: Memory, cotangents: Cotangents, parameters: Sequence[Tensor]
    ) -> Unwound:
        """Rebuild x from y, and pull the cotangents of y and log_det back."""
        # the inverse, too, may draw, and move buffers
        with torch.no_grad(), Scene("inverse", self, y.device).again({}):
            x, _ = self.inverse(y)
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            outputs = self.replay(x, memory)
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
            plain backward up to rounding; see below.
        anchor_every: layers between kept states in that mode.

    State dict: that of the layers, under "layers.0." and so on.

    In reversible mode a layer is run again in backward as it ran: with the parameters and modes of
    then, the buffers that it found (spectral normalisation and batch normalisation move theirs in
    forward), under the same autocast, and drawing the same random numbers from torch's default
    generators (dropout). Hooks of the modules inside it run each time. What it computes may depend
    on nothing else. Two cases keep all activations, as a plain chain does: gradients of higher
    order (`create_graph=True` runs the chain again for them, from x), and torch.func transforms and
    forward-mode differentiation.

    Raises:
        TypeError: `anchor_every` is not an int.
        ValueError: it is below 1; another chain in a reversible one.
        RuntimeError: in reversible mode, hooks on a layer itself; in backward, parameters changed
            in place since forward, a layer that draws what it did not draw in forward, or one that
            depends on a tensor with a gradient that is neither its parameter nor its buffer.
        TypeError: in reversible mode, a module of torch.jit.
    """

    def __init__(
        self, layers: Iterable[Invertible], *, reversible: bool = False, anchor_every: int = 16
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.reversible = reversible
        _check.positive_int(anchor_every, "anchor_every")
        self.anchor_every = anchor_every
        if reversible:
            for name, module in self.layers.named_modules(prefix="layers"):
                if isinstance(module, InvertibleChain):
                    raise ValueError(
                        f"layers: expected no chain in a chain, for reversible=True; "
                        f"{name} is {type(module).__name__}"
                    )

    def __iter__(self) -> Iterator[Invertible]:
        return iter(self.layers)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.reversible and torch.is_grad_enabled() and not _transformed():
            parameters = list(self.parameters())
            learned = [t for t in (*parameters, *self.buffers()) if t.requires_grad]
            if learned or x.requires_grad:
                self._check_hooks()
                frozen = [p for p in parameters if not p.requires_grad]
                return _apply_reversible(self, frozen, x, learned)
        return _run(x, self)

    def _check_hooks(self) -> None:
        for name, layer in self.layers.named_children():
            kinds = ("forward_pre", "forward", "backward_pre", "backward")
            for kind in kinds:
                if getattr(layer, f"_{kind}_hooks"):
                    raise RuntimeError(
                        f"layers.{name}: expected no hooks on the layers of a reversible chain, "
                        f"which would not run in backward, got a {kind} hook; "
                        "modules inside a layer may have them"
                    )

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return _run(y, (layer.inverse for layer in reversed(list(self))))

    def extra_repr(self) -> str:
        return f"reversible={self.reversible}, anchor_every={self.anchor_every}"


def pull_back(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    create_graph: bool = False,
) -> Sequence[Tensor | None]:
    """Gradients of the inputs; None for one that no output depends on, or that has none.

    Raises:
        RuntimeError: outputs depend on other leaves too.
    """
    check_sources(outputs, inputs)
    flowing = [pair for pair in zip(outputs, cotangents, strict=True) if pair[0].requires_grad]
    wanted = [i for i, tensor in enumerate(inputs) if tensor.requires_grad]
    found: list[Tensor | None] = [None] * len(inputs)
    if flowing and wanted:
        results, grads = zip(*flowing, strict=True)
        of = [inputs[i] for i in wanted]
        pulled = torch.autograd.grad(
            results, of, grads, allow_unused=True, create_graph=create_graph
        )
        for i, grad in zip(wanted, pulled, strict=True):
            found[i] = grad
    return found


def zero_log_det(x: Tensor) -> Tensor:
    """(B,) zeros, float32 (float64 for float64 x)."""
    return x.new_zeros(x.shape[:1], dtype=torch.promote_types(x.dtype, torch.float32))


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation look on, which know no custom backward."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _batched(tensor: Tensor) -> bool:
    # `is_grads_batched` makes the latter
    return is_batchedtensor(tensor) or is_legacy_batchedtensor(tensor)


def _run(x: Tensor, steps: Iterable[Callable[[Tensor], Any]]) -> tuple[Tensor, Tensor]:
    total = zero_log_det(x)
    for step in steps:
        x, log_det = step(x)
        total = total + log_det
    return x, total


# torch.compiler.disable would import Dynamo, and Triton with it, as soon as fastgen is imported.
@torch._disable_dynamo
def _apply_reversible(
    chain: InvertibleChain, frozen: Sequence[Tensor], x: Tensor, learned: Sequence[Tensor]
) -> Any:
    return _Reversible.apply(chain, frozen, x, *learned)


class _Reversible(Function):
    """The whole chain as one node of the graph; saves its ends, anchors and memories."""

    @staticmethod
    def forward(
        ctx: Any, chain: InvertibleChain, frozen: Sequence[Tensor], x: Tensor, *learned: Tensor
    ) -> Any:
        device = x.device.type
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
            # later layers would take the cast of a weight from here, which has no graph
            "cache_enabled": False,
        }
        ctx.learned, ctx.frozen = learned, frozen
        ctx.scenes, ctx.kept = [], []
        y, total, kept = x, zero_log_det(x), []
        with torch.autocast(**ctx.autocast), uncached():
            for i, layer in enumerate(chain):
                anchor = [y] if i and i % chain.anchor_every == 0 else []
                scene = Scene(f"layers.{i}", layer, x.device)
                y, log_det, memory = layer.remember(y)
                scene.close()
                total = total + log_det
                kept += [*anchor, *memory]
                ctx.scenes.append(scene)
                ctx.kept.append((len(anchor), len(memory)))
        # the parameters too, so that one changed before backward is an error
        ctx.save_for_backward(x, y, *kept, *learned, *frozen)
        return y, total

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        x, y, *saved = ctx.saved_tensors
        kept = []
        for counts in ctx.kept:
            anchor, memory = (tuple(saved.pop(0) for _ in range(count)) for count in counts)
            kept.append((anchor, memory))
        with torch.autocast(**ctx.autocast), uncached():
            if torch.is_grad_enabled() or any(map(_batched, cotangents)):
                grads = _pull_back_at_once(ctx, x, [memory for _, memory in kept], cotangents)
            else:
                grads = _pull_back_by_layers(ctx, y, kept, cotangents)
        return None, None, grads[0] if ctx.needs_input_grad[2] else None, *grads[1:]


def _pull_back_by_layers(
    ctx: Any, y: Tensor, kept: list[tuple[Memory, Memory]], cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of x and what is learned, with one layer's activations in memory at a time."""
    sums = _Sums(ctx.learned)
    # Of the parameters themselves, hooks would run here and again where the sums arrive.
    stand_ins = {id(t): t.detach() for t in (*ctx.frozen, *ctx.learned)}
    for learned in ctx.learned:
        stand_ins[id(learned)].requires_grad_()
    grad_y, grad_log_det = cotangents
    while kept:
        anchor, memory = kept.pop()
        scene = ctx.scenes[len(kept)]
        own = [t for t in scene.tensors if t in sums]
        wanted = [stand_ins[id(t)] for t in own]
        with scene.again(stand_ins):
            y, grad_y, grads = scene.layer.unwind(y, memory, (grad_y, grad_log_det), wanted)
        sums.add(own, grads)
        y = anchor[0] if anchor else y
    return [grad_y, *sums.results()]


def _pull_back_at_once(
    ctx: Any, x: Tensor, memories: list[Memory], cotangents: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """The same as functions of x, of what is learned and of the cotangents, to be differentiated
    again, or for batched cotangents, which would not fit into the memory of the sums: the chain
    with its graph, all layers in memory."""
    with_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        stand_ins = {id(t): t.view_as(t) for t in ctx.learned}
        inputs = [x.view_as(x) if x.requires_grad else x, *(stand_ins[id(t)] for t in ctx.learned)]
        stand_ins |= {id(t): t.detach() for t in ctx.frozen}
        y, total = inputs[0], zero_log_det(x)
        for scene, memory in zip(ctx.scenes, memories, strict=True):
            with scene.again(stand_ins):
                outputs = scene.layer.replay(y, memory)
                check_sources(outputs, (y, *stand_ins.values()))
            y, log_det = outputs
            total = total + log_det
    return pull_back((y, total), cotangents, inputs, create_graph=with_graph)


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
