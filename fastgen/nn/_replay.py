"""Running a layer again as it ran: tensors, modes and random numbers of its forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["Elsewhere", "Scene", "check_sources", "uncached"]


class Elsewhere(RuntimeError):
    """Gradients would flow to tensors that nobody asks about."""


class Scene:
    """What a layer's forward depends on beside its input; made before it, closed after it.

    `again` puts the layer's own tensors back, which may be others by then (functional_call), its
    buffers as they were before the forward, which normalisations move, its modes, and the random
    numbers that it drew, if it drew any.

    Args:
        name: of the layer, for errors.
        layer: whose forward comes next.
        device: of its input.

    Raises:
        TypeError: a module of torch.jit inside, whose tensors cannot be replaced.
    """

    def __init__(self, name: str, layer: nn.Module, device: torch.device) -> None:
        self.name, self.layer = f"{name} ({type(layer).__name__})", layer
        self.modules = []
        tensors: dict[int, Tensor] = {}
        self.before: dict[int, Tensor] = {}
        for module in layer.modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise TypeError(f"{self.name}: expected modules of Python, got one of torch.jit")
            parameters, buffers = dict(module._parameters), dict(module._buffers)
            self.modules.append((module, module.training, parameters, buffers))
            tensors |= {id(t): t for t in parameters.values() if t is not None}
            if buffers:
                tensors |= {id(t): t for t in buffers.values() if t is not None}
                self.before |= _copies(module)
        #: parameters and buffers, each once
        self.tensors = list(tensors.values())
        self.moving: set[int] = set()
        self.versions = [tensor._version for tensor in self.tensors]
        self.generators = _generators(device)
        self.drawn: list[Tensor] | None = [g.get_state() for g in self.generators]

    def close(self) -> None:
        """After the forward."""
        pairs = zip(self.tensors, self.versions, strict=True)
        changed = {id(tensor) for tensor, version in pairs if tensor._version != version}
        self.moving = changed & self.before.keys()
        if changed - self.moving:
            # It took parameters from its first batch, which it must not do again.
            for module, *_ in self.modules:
                self.before |= _copies(module)
        if not self._drew(self.drawn):
            self.drawn = None

    def _drew(self, before: Sequence[Tensor] | None) -> bool:
        assert before is not None
        pairs = zip(self.generators, before, strict=True)
        return not all(torch.equal(g.get_state(), state) for g, state in pairs)

    @contextmanager
    def again(self, replaced: Mapping[int, Tensor]) -> Iterator[None]:
        """Back in that state, with other tensors in place of those whose id is in `replaced`.

        Raises:
            RuntimeError: random numbers were drawn, which the forward did not draw; or what ran
                raised `Elsewhere`.
        """
        tensors = {i: t.clone() if i in self.moving else t for i, t in self.before.items()}
        tensors.update(replaced)
        found = [(m, m.training, m._parameters, m._buffers) for m, *_ in self.modules]
        states = [g.get_state() for g in self.generators]
        try:
            for module, training, parameters, buffers in self.modules:
                _put(module, training, _instead(parameters, tensors), _instead(buffers, tensors))
            for generator, state in zip(self.generators, self.drawn or (), strict=False):
                generator.set_state(state)
            yield
            if self.drawn is None and self._drew(states):
                raise RuntimeError(
                    f"{self.name}: expected to do the same again in backward, "
                    "but it drew random numbers, which its forward did not"
                )
        except Elsewhere as error:
            raise RuntimeError(f"{self.name}: {error}") from None
        finally:
            for module, training, parameters, buffers in found:
                _put(module, training, parameters, buffers)
            for generator, state in zip(self.generators, states, strict=True):
                generator.set_state(state)


def _copies(module: nn.Module) -> dict[int, Tensor]:
    """Copies of a module's own buffers, by their id."""
    buffers = (buffer for buffer in module._buffers.values() if buffer is not None)
    return {id(buffer): buffer.detach().clone() for buffer in buffers}


def _instead(group: dict, tensors: Mapping[int, Tensor]) -> dict:
    return {name: tensors.get(id(tensor), tensor) for name, tensor in group.items()}


def _put(module: nn.Module, training: bool, parameters: dict, buffers: dict) -> None:
    # nn.Module.__setattr__ would look at every entry
    vars(module).update(training=training, _parameters=parameters, _buffers=buffers)


def _generators(device: torch.device) -> list[torch.Generator]:
    """Those that a layer draws from. A CUDA graph being captured does not tell its state."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return [torch.default_generator]
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]


@contextmanager
def uncached() -> Iterator[None]:
    """Without the cache of torch.nn.utils.parametrize, whose weights would have no graph, or that
    of another run."""
    enabled = parametrize._cache_enabled
    parametrize._cache_enabled = 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled


def check_sources(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Raises where outputs get gradients from leaves other than `inputs` and what these come from.

    Raises:
        Elsewhere: such as from a tensor that a layer has neither as a parameter nor as a buffer.
    """
    known = {id(tensor) for tensor in inputs}
    seen = {tensor.grad_fn for tensor in inputs}
    nodes = [output.grad_fn for output in outputs]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and id(leaf) not in known:
            raise Elsewhere(
                "expected to depend on x, parameters and buffers of its own alone, but another "
                f"tensor, of shape {tuple(leaf.shape)}, would get a gradient"
            )
        nodes += [following for following, _ in node.next_functions]
