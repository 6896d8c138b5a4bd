"""torch.nn.InstanceNorm1d, 2d and 3d on the fused op."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import batch_norm
from torch.nn.modules.instancenorm import _InstanceNorm

from fastgen.ops._autograd import without_autocast
from fastgen.ops.instance_norm import instance_norm_with_stats

__all__ = ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"]


class _Fused(_InstanceNorm):
    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        if self.track_running_stats and not self.training:
            return batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        if input.shape[2:].numel() == 1:
            raise ValueError(
                f"input: expected more than 1 spatial element, got shape {tuple(input.shape)}"
            )
        # As in torch.nn, half activations stay half beside float32 parameters under autocast.
        with without_autocast(input.device):
            y, mean, var = instance_norm_with_stats(input, self.weight, self.bias, eps=self.eps)
        if self.track_running_stats and input.numel() > 0:
            self._update_running_stats(mean, var, input.shape[2:].numel())
        return y

    def _update_running_stats(self, mean: Tensor, var: Tensor, size: int) -> None:
        assert self.running_mean is not None and self.running_var is not None
        momentum = 0.0 if self.momentum is None else self.momentum
        unbiased = var * (size / (size - 1))
        for running, batch in ((self.running_mean, mean), (self.running_var, unbiased)):
            # lerp_ has no vmap.
            running.mul_(1 - momentum).add_(batch.mean(0).to(running.dtype), alpha=momentum)


class InstanceNorm1d(_Fused, torch.nn.InstanceNorm1d):
    """Instance normalisation of (B, C, L) or (C, L) inputs (Ulyanov et al. 2016).

    A drop-in for torch.nn.InstanceNorm1d: same arguments, same state_dict (`weight` and `bias` (C,)
    with ``affine=True``; `running_mean`, `running_var` (C,) and `num_batches_tracked` () with
    ``track_running_stats=True``), same running statistics, same behaviour in eval mode.
    Normalisation with the input's own statistics is :func:`fastgen.ops.instance_norm`; with running
    statistics it is a fixed affine map of each channel, which torch does.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics; None for 0, as in torch.nn.
        affine: whether to learn a weight and a bias for each channel.
        track_running_stats: whether to keep running statistics, and to use them in eval mode.

    Raises:
        ValueError: a wrong number of dimensions, channels other than C with ``affine=True``, or a
            single spatial element where the input's own statistics are needed.
    """


class InstanceNorm2d(_Fused, torch.nn.InstanceNorm2d):
    """Instance normalisation of (B, C, H, W) or (C, H, W) inputs; see :class:`InstanceNorm1d`.

    channels_last inputs are normalised as they lie and give channels_last outputs.
    """


class InstanceNorm3d(_Fused, torch.nn.InstanceNorm3d):
    """Instance normalisation of (B, C, D, H, W) or (C, D, H, W) inputs; see
    :class:`InstanceNorm1d`.

    channels_last_3d inputs are normalised as they lie and give channels_last_3d outputs.
    """
