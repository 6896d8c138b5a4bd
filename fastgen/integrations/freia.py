"""Affine couplings of FrEIA on :func:`fastgen.ops.affine_coupling`.

FrEIA's soft clamp is clamp * f(raw), with f an approximate (2 / pi) atan, tanh, or 2 sigmoid - 1,
which is tanh of half its argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import CodeType
from typing import Any

import torch
from FrEIA.modules import (
    AffineCouplingOneSided,
    AllInOneBlock,
    ConditionalAffineTransform,
    GLOWCouplingBlock,
    RNVPCouplingBlock,
)
from FrEIA.modules.coupling_layers import _BaseCouplingBlock
from torch import Tensor, nn

from fastgen.integrations import _library
from fastgen.integrations._coupling import (
    Given,
    affine,
    reason_against,
    reason_against_cpu,
    slower_on_cpu,
)
from fastgen.integrations._library import Library, Swap

__all__ = [
    "LIBRARY",
    "FusedAffineCouplingOneSided",
    "FusedAllInOneBlock",
    "FusedConditionalAffineTransform",
    "FusedGLOWCouplingBlock",
    "FusedRNVPCouplingBlock",
]

Result = tuple[tuple[Tensor], Tensor]

#: The functions that the base class makes for the names "ATAN" and "SIGMOID".
_CLAMPS = {
    name: code
    for code in _BaseCouplingBlock.__init__.__code__.co_consts
    if isinstance(code, CodeType)
    for name in ("atan", "sigmoid")
    if name in code.co_names
}
#: The library's 2 / pi.
_ATAN_FACTOR = 0.636


def _clamp_of(function: Callable) -> str | None:
    """Which of the library's clamps this is: "tanh", "atan", "sigmoid", or None for another."""
    if function is torch.tanh:
        return "tanh"
    code = getattr(function, "__code__", None)
    return next((name for name, known in _CLAMPS.items() if known is code), None)


def _against_clamp(clamp: Any) -> str | None:
    if not isinstance(clamp, (int, float)) or not 0 < clamp < math.inf:
        return f"a clamp of {clamp!r}, which is not a positive number"
    return None


def _against_block(block: _BaseCouplingBlock) -> str | None:
    if _clamp_of(block.f_clamp) is None:
        return "a clamp_activation of its own"
    return _against_clamp(block.clamp)


class _Fused(_BaseCouplingBlock):
    """What the couplings with a choice of soft clamps share."""

    def own_code(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> str | None:
        return self._reason_against(x[0])

    def _reason_against(self, x: Tensor) -> str | None:
        if (reason := reason_against(x)) is not None:
            return reason
        if x.dim() != self.ndims + 1:
            return f"an input of {x.dim()} dimensions for a block of {self.ndims} and the batch"
        return None

    def _transform(
        self, x: Tensor, parameters: Tensor | tuple[Tensor, Tensor], rev: bool, channels: int = 0
    ) -> tuple[Tensor, Tensor] | None:
        """The coupling of x and its log-determinant; None where the library has to do it.

        `parameters` are raw scales and shifts, or both in one output of a subnet, of which the
        first `channels` are the raw scales.
        """
        reason = self._reason_against(x)
        if reason is None:
            if isinstance(parameters, Tensor):
                parameters = _halves(parameters, channels)
            reason = reason_against(x, *parameters)
        if reason is not None:
            _library.run_own_code(type(self).__name__.removeprefix("Fused"), reason)
            return None
        raw_scale, shift = parameters
        scale, factor = "tanh", float(self.clamp)
        clamp = _clamp_of(self.f_clamp)
        if clamp == "atan":
            scale, factor = "atan", factor * _ATAN_FACTOR * math.pi / 2
        elif clamp == "sigmoid":
            raw_scale = raw_scale / 2
        return affine(x, raw_scale, shift, scale=scale, inverse=rev, scale_factor=factor)


def _halves(output: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The raw scales, the first `channels` of a subnet's output, and the rest, its shifts."""
    channels = min(channels, output.shape[1])
    raw_scale, shift = output.split((channels, output.shape[1] - channels), 1)
    return raw_scale, shift


def _with_conditions(x: Tensor, c: Sequence[Tensor]) -> Tensor:
    return torch.cat([x, *c], 1) if c else x


class FusedGLOWCouplingBlock(_Fused, GLOWCouplingBlock):
    """A patched FrEIA GLOWCouplingBlock."""

    def _coupling1(self, x1: Tensor, u2: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        a = self.subnet2(u2)
        done = self._transform(x1, a, rev, self.split_len1)
        return done or GLOWCouplingBlock._coupling1(Given(self, subnet2=a), x1, u2, rev)

    def _coupling2(self, x2: Tensor, u1: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        a = self.subnet1(u1)
        done = self._transform(x2, a, rev, self.split_len2)
        return done or GLOWCouplingBlock._coupling2(Given(self, subnet1=a), x2, u1, rev)


class FusedRNVPCouplingBlock(_Fused, RNVPCouplingBlock):
    """A patched FrEIA RNVPCouplingBlock."""

    def _coupling1(self, x1: Tensor, u2: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        s, t = self.subnet_s2(u2), self.subnet_t2(u2)
        given = Given(self, subnet_s2=s, subnet_t2=t)
        done = self._transform(x1, (s, t), rev)
        return done or RNVPCouplingBlock._coupling1(given, x1, u2, rev)

    def _coupling2(self, x2: Tensor, u1: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        s, t = self.subnet_s1(u1), self.subnet_t1(u1)
        given = Given(self, subnet_s1=s, subnet_t1=t)
        done = self._transform(x2, (s, t), rev)
        return done or RNVPCouplingBlock._coupling2(given, x2, u1, rev)


class FusedAffineCouplingOneSided(_Fused, AffineCouplingOneSided):
    """A patched FrEIA AffineCouplingOneSided."""

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> Result:
        x1, x2 = x[0].split((self.split_len1, self.split_len2), 1)
        a = self.subnet(_with_conditions(x1, c if self.conditional else ()))
        done = self._transform(x2, a, rev, self.split_len2)
        if done is None:
            return AffineCouplingOneSided.forward(Given(self, subnet=a), x, c, rev, jac)
        y2, log_jacobian = done
        return (torch.cat((x1, y2), 1),), log_jacobian


class FusedConditionalAffineTransform(_Fused, ConditionalAffineTransform):
    """A patched FrEIA ConditionalAffineTransform."""

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> Result:
        a = self.subnet(_with_conditions(c[0], c[1:]))
        done = self._transform(x[0], a, rev, self.channels)
        if done is None:
            return ConditionalAffineTransform.forward(Given(self, subnet=a), x, c, rev, jac)
        y, log_jacobian = done
        return (y,), log_jacobian


class FusedAllInOneBlock(AllInOneBlock):
    """A patched FrEIA AllInOneBlock: its coupling; permutations and global affine are FrEIA's."""

    def own_code(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> str | None:
        return self._reason_against(x[0][:, self.splits[0] :])

    def _reason_against(self, x: Tensor) -> str | None:
        if (reason := reason_against(x)) is not None:
            return reason
        if x.dim() != self.input_rank + 2:
            return f"an input of {x.dim()} dimensions for a block of {self.input_rank + 2}"
        return reason_against_cpu("AllInOneBlock", x)

    def _affine(self, x: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        reason = self._reason_against(x) or reason_against(x, *_halves(a, x.shape[1]))
        if reason is not None:
            _library.run_own_code("AllInOneBlock", reason)
            return super()._affine(x, a, rev)
        raw_scale, shift = _halves(a * 0.1, x.shape[1])
        y, log_det = affine(
            x, raw_scale, shift, scale="tanh", inverse=rev, scale_factor=float(self.clamp)
        )
        # FrEIA adds to it in place, as nobody may to one of several results under torch.func.
        return y, log_det.clone() if torch._C._are_functorch_transforms_active() else log_det


def _against_all_in_one(block: AllInOneBlock) -> str | None:
    if block.GIN:
        return "gin_block=True: its scales are centred, which the fused coupling does not do"
    return _against_clamp(block.clamp)


def _swap(original: type[nn.Module], fused: type[nn.Module], fingerprint: str) -> Swap:
    return Swap(original, fused, fingerprint, (_BaseCouplingBlock,), _against_block)


LIBRARY = Library(
    name="FrEIA",
    distribution="FrEIA",
    tested=("0.2",),
    swaps=(
        _swap(GLOWCouplingBlock, FusedGLOWCouplingBlock, "1b552f58f7ab5477"),
        _swap(RNVPCouplingBlock, FusedRNVPCouplingBlock, "c5ef9a1dfe2be2a6"),
        _swap(AffineCouplingOneSided, FusedAffineCouplingOneSided, "565003ddcda64afa"),
        _swap(ConditionalAffineTransform, FusedConditionalAffineTransform, "a3c397f15c3bf868"),
        Swap(
            AllInOneBlock,
            FusedAllInOneBlock,
            "21c464b75c66a347",
            (),
            _against_all_in_one,
            partial(slower_on_cpu, "AllInOneBlock"),
        ),
    ),
)
