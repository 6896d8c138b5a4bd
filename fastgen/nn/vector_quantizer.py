"""The vector quantizer of VQ-VAEs (van den Oord et al. 2017), learned by EMA or by gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastgen import ops
from fastgen.nn._codebook import Codebook
from fastgen.nn._kmeans import finite_rows
from fastgen.nn._layout import check_input, check_mask, to_first, to_last
from fastgen.ops import _check

__all__ = ["VectorQuantizer"]


class VectorQuantizer(Codebook):
    """Replaces each vector by its nearest code, straight-through (van den Oord et al. 2017).

    With e the code nearest to x, the output is x + sg(e - x), and

        loss = codebook_weight * mean ||sg(x) - e||^2 + commitment_weight * mean ||x - sg(e)||^2

    (eq. 3), with means over elements. ``codebook="gradient"`` trains the codes by the first term.
    ``codebook="ema"`` drops it and moves them in forward (appendix A.1): with n_i the number of
    vectors of the batch that code i got and s_i their sum,

        N_i <- decay N_i + (1 - decay) n_i,  m_i <- decay m_i + (1 - decay) s_i,  e_i = m_i / N'_i,

    where N'_i = (N_i + epsilon) / (n + K epsilon) * n, n = sum(N), is N_i with Laplace smoothing.
    N_i and m_i start as if each code had been the mean of one vector. The forward of a step uses
    the codes from before its update.

    A code that gets no vectors keeps m_i / N_i, while N_i decays: e_i is that times N_i / (N_i +
    epsilon), so the code stays where it is until N_i comes down to epsilon, after log(epsilon) /
    log(decay) steps (1146 by default; one with ``decay=0``), and then shrinks to zero
    (`revive_after` replaces it before). With the cosine metric it keeps its direction.

    ``metric="cosine"`` (Yu et al. 2022, section 3.2): vectors and codes are compared at unit
    length. The output, the loss and the EMA statistics are then of the normalised vectors, and so
    are gradients.

    ``kmeans_init``: the first training batch in which there is a vector puts the codes at its
    k-means, from random distinct vectors (a batch with fewer than K vectors repeats some). The
    module knows on the Python side that this is done: no later step waits for the device, and
    torch.compile compiles once more for the second step. (A compiled first step does not wait
    either, and is the last to try: where it finds no vector the codes stay as they were drawn.)

    ``revive_after``: after this many training steps in a row in which a code's N_i was under
    ``revive_threshold * mean(N)``, the code is replaced by a random vector of the batch, and its
    statistics with it: N_i restarts at that threshold. As mean(N) is the EMA of vectors / K, the
    threshold scales with both. For gradient codebooks the optimizer's moments of a replaced code
    are left alone. Nothing is read back to the host.

    With torch.distributed, `sync` sums the statistics of a step over the ranks of the default group
    in one all_reduce: all ranks hold the codebook that one process would get from the joint batch,
    the vectors of rank 0 first, then those of rank 1, and so on. Every rank must then take part in
    each training step. Random choices follow torch.manual_seed, with several ranks that of rank 0,
    which tells the others, in revival by a second, small all_reduce. A codebook that some ranks
    alone have started, such as by loading a checkpoint, is taken over by the others in their first
    step. The loss is that of the rank's own vectors.

    Vectors that are not finite (their sum is not) make the loss NaN or infinite, but nothing else:
    like padding they count in no statistics and are drawn by no code. A code whose vectors' sum
    overflows gets none in that step. A step without vectors leaves codes and averages as they are.

    Each forward in training is one step of the buffers: do not rerun it (torch.utils.checkpoint).

    Args:
        num_codes: K.
        dim: D, size of a vector.
        codebook: "ema" or "gradient".
        decay: of the EMA, in [0, 1]; also of N_i for gradient codebooks.
        epsilon: of the Laplace smoothing; EMA with the Euclidean metric only.
        commitment_weight: beta of eq. 3.
        codebook_weight: of the codebook term; gradient codebooks only.
        metric: "euclidean" or "cosine".
        kmeans_init: start from k-means of the first training batch.
        kmeans_iters: rounds of Lloyd's algorithm.
        revive_after: training steps, or None to leave unused codes alone.
        revive_threshold: fraction of the mean count under which a code is unused, in [0, 1].
        channel_first: x is (B, D, ...) instead of (..., D).
        sync: sum statistics over ranks.
        device, dtype: of the codes. Buffers are float32 at least, and stay so under ``.half()`` and
            ``.bfloat16()``.

    State dict, version 1 (the same keys for every option except `codebook`):
        codebook: (K, D), the codes; a parameter for gradient codebooks, else a buffer.
        ema_counts: (K,), N_i, unsmoothed.
        ema_sums: (K, D), m_i; only for ``codebook="ema"``.
        usage_counts: (K,) int64, vectors that each code got in training since :meth:`reset_usage`.
        idle_steps: (K,) int64, training steps in a row that each code was unused; counted for
            `revive_after` only.
        initialized: () bool, False until k-means has run; loaded as True without `kmeans_init`.

    Outside training no buffer changes.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> ops.VQResult:
        """Quantizes the vectors of `x`; in training also updates the buffers.

        Args:
            x: (..., D), or (B, D, ...) for `channel_first`; float32, float64, float16 or bfloat16.
                The distances are those of the wider dtype of x and codebook.
            mask: bool, shape of `x` without D: False where a vector is padding. It then gets the
                index -1 and a zero output, and counts neither in the loss nor in the statistics.

        Returns:
            quantized: shape and dtype of x. indices: int64, shape of x without D.
            loss: scalar, at least float32.

        Raises:
            TypeError: x is not a floating tensor, mask not a bool one.
            ValueError: a shape does not fit.
        """
        rows, keep = self._rows(x, mask)
        valid = finite_rows(rows.detach(), keep) if self.training else None
        if valid is not None:
            self.start(rows.detach(), valid)
        quantized, indices, loss = self.quantize(rows, keep)
        if valid is not None:
            self.step(rows, indices, valid)
        if keep is not None:
            quantized = torch.where(keep[:, None], quantized, 0)
            indices = torch.where(keep, indices, -1)
        shape = to_last(x, self.channel_first).shape
        quantized = to_first(quantized.to(x.dtype).reshape(shape), self.channel_first)
        return ops.VQResult(quantized, indices.view(shape[:-1]), loss)

    def encode(self, x: Tensor) -> Tensor:
        """Index of the code nearest to each vector of `x`, as in forward: int64, x without D."""
        rows, _ = self._rows(x, None)
        return self.nearest(rows).view(to_last(x, self.channel_first).shape[:-1])

    def decode(self, indices: Tensor) -> Tensor:
        """The codes of `indices` (...) int64, zeros where negative.

        Returns:
            (..., D), or (B, D, ...) for `channel_first`.

        Raises:
            TypeError: indices are not int64.
            IndexError: on the CPU, where an index is K or more.
        """
        _check.has_dtype(indices, "indices", torch.int64)
        return to_first(self.lookup(indices), self.channel_first)

    def init_from(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Puts the codes at the k-means of `x` now, as `kmeans_init` does in the first step.

        Where `x` has no vectors that count, nothing changes.
        """
        rows, keep = self._rows(x, mask)
        self.start_from(rows.detach(), finite_rows(rows.detach(), keep))

    def _rows(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        check_input(x, self.dim, self.channel_first)
        last = to_last(x, self.channel_first)
        check_mask(mask, last.shape[:-1])
        rows = last.reshape(-1, self.dim)
        if self.metric == "cosine":
            wide = torch.promote_types(rows.dtype, self.codebook.dtype)
            rows = normalize(rows.to(wide), dim=1)
        return rows, None if mask is None else mask.reshape(-1)
