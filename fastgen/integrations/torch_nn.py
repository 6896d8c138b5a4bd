"""torch.nn.InstanceNorm1d, 2d and 3d on :func:`fastgen.ops.instance_norm`."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

import fastgen.nn
from fastgen.integrations._library import Library, Swap

__all__ = ["LIBRARY", "FusedInstanceNorm1d", "FusedInstanceNorm2d", "FusedInstanceNorm3d"]


# Classes of their own, so that unpatching leaves alone the fastgen layers a model has by itself.
class FusedInstanceNorm1d(fastgen.nn.InstanceNorm1d):
    """A patched torch.nn.InstanceNorm1d."""


class FusedInstanceNorm2d(fastgen.nn.InstanceNorm2d):
    """A patched torch.nn.InstanceNorm2d."""


class FusedInstanceNorm3d(fastgen.nn.InstanceNorm3d):
    """A patched torch.nn.InstanceNorm3d."""


def _swap(original: type[nn.Module], fused: type[nn.Module], fingerprint: str) -> Swap:
    return Swap(original, fused, fingerprint, relies_on=(_InstanceNorm,))


LIBRARY = Library(
    name="torch.nn",
    distribution="torch",
    tested=("2.10.0", "2.11.0", "2.13.0"),
    swaps=(
        _swap(nn.InstanceNorm1d, FusedInstanceNorm1d, "dbbf9c8cac029036"),
        _swap(nn.InstanceNorm2d, FusedInstanceNorm2d, "69596161cac7a9dd"),
        _swap(nn.InstanceNorm3d, FusedInstanceNorm3d, "558f7f9d4959b283"),
    ),
)
