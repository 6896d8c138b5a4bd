"""The table of op cases that the generated test suite walks, and the assertions it uses.

Shipped with the package, so that whoever adds a backend can hold it to the same contract:

    >>> from fastgen import testing
    >>> for case in testing.CASES:
    ...     testing.assert_matches_reference(case, "mine", torch.float32, case.shapes[0])

Adding an op: add its rows to `CASES` at the end of this file. `tests/test_ops.py` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgen import backends, ops
from fastgen.ops._autograd import sum_per_sample

__all__ = [
    "CASES",
    "Maker",
    "OpCase",
    "Sample",
    "assert_accurate",
    "assert_matches_reference",
    "backends_here",
    "gradients",
    "outputs",
    "relayouts",
    "run",
]

#: Relative spacing of one unit in the last place, at most.
ULP = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


@dataclass(frozen=True)
class Sample:
    """The arguments of one call of a public op."""

    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor]) -> Sample:
        """The sample with `function` applied to every tensor."""

        def apply(value: Any) -> Any:
            return function(value) if isinstance(value, Tensor) else value

        return Sample(
            tuple(apply(a) for a in self.args), {k: apply(v) for k, v in self.kwargs.items()}
        )

    def double(self) -> Sample:
        """The same values in float64."""
        return self.map(lambda t: t.double() if t.is_floating_point() else t)


class Maker:
    """Makes the tensors of a sample in one dtype on one device, from a seed."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0):
        self.dtype = dtype
        self.device = torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        """Normal values; drawn in float64, so that every dtype gets the same ones rounded."""
        value = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return (value * scale + mean).to(self.device, self.dtype)

    def randint(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high), int64."""
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def key(self) -> Tensor:
        """A key of counter-based noise, [seed, offset]."""
        return torch.tensor([1234567, 89], device=self.device)


@dataclass(frozen=True)
class OpCase:
    """One row of the table: an op, one way to call it, and what to test on it.

    Attributes:
        op: its name in `fastgen.ops`.
        name: what is special to this row; with `op` it is the test's id.
        make: builds the arguments for a shape, whose meaning is the row's own.
        shapes: shapes for parity: typical, odd, size 1 and zero-size ones.
        grad_shape: a small shape for gradcheck.
        big_shape: enough work for several threads.
        dims: for each entry of a shape, the (least, most) value that random shapes draw from.
        grad: positions of the differentiable arguments.
        numeric_gradient: False where the gradient is not the derivative, as in a straight-through
            estimator; gradgradcheck still applies.
        vmap: the argument positions to batch under vmap; empty where a batch has no meaning.
        ulps: floor of the accuracy rule, in units in the last place.
        magnitudes: for a float64 sample, what those units are of in each output where that is not
            the output itself: for a sum whose terms cancel, the sum of their absolute values.
    """

    op: str
    name: str
    make: Callable[[Maker, tuple[int, ...]], Sample]
    shapes: tuple[tuple[int, ...], ...]
    grad_shape: tuple[int, ...]
    big_shape: tuple[int, ...]
    dims: tuple[tuple[int, int], ...]
    grad: tuple[int, ...] = ()
    numeric_gradient: bool = True
    vmap: tuple[int, ...] = ()
    ulps: float = 4.0
    magnitudes: Callable[[Sample], tuple[Tensor | None, ...]] | None = None

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}" if self.name else self.op

    def sample(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> Sample:
        """Arguments for a shape."""
        return self.make(Maker(dtype, device, seed), shape)


def backends_here(op: str, device: str = "cpu") -> list[str]:
    """Names of the op's backends that can run on `device` in this process."""
    return [
        name
        for name, implementation in backends.ops()[op].implementations.items()
        if implementation.unavailable is None and implementation.device in (None, device)
    ]


def outputs(result: Any) -> tuple[Tensor, ...]:
    """The tensors of an op's result, as a flat tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def run(case: OpCase, sample: Sample, backend: str | None = None) -> tuple[Tensor, ...]:
    """Calls the public op on a sample."""
    return outputs(getattr(ops, case.op)(*sample.args, **sample.kwargs, backend=backend))


def _cotangents(results: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.device, r.dtype)
        for r in results
    ]


def gradients(
    case: OpCase, sample: Sample, backend: str | None = None, seed: int = 1
) -> tuple[Tensor, ...]:
    """Gradients of the op's differentiable arguments for random cotangents of its outputs."""
    inputs = [
        a.detach().requires_grad_() if i in case.grad else a for i, a in enumerate(sample.args)
    ]
    results = [r for r in run(case, Sample(tuple(inputs), sample.kwargs), backend) if r.grad_fn]
    wanted = [inputs[i] for i in case.grad]
    return torch.autograd.grad(results, wanted, _cotangents(results, seed))


def assert_accurate(
    actual: Tensor,
    plain: Tensor,
    exact: Tensor,
    *,
    factor: float = 2.0,
    ulps: float = 4.0,
    magnitude: Tensor | None = None,
    what: str = "output",
) -> None:
    """Asserts that `actual` is about as near to the exact values as plain PyTorch is.

    The rule, element by element: |actual - exact| <= factor * max|plain - exact| + ulps *
    ulp(magnitude), where NaN and infinities must stand where plain PyTorch has them. float64
    results are held to 256 units in the last place of the largest value. Integer results must be
    equal.

    Args:
        actual: the result under test.
        plain: plain PyTorch's result in the same dtype.
        exact: the float64 reference on the same inputs.
        factor: how many times plain PyTorch's largest error is allowed.
        ulps: the floor, in units in the last place of the output's dtype.
        magnitude: what those units are of, the exact values by default.
        what: names the result in the message.
    """
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    assert actual.dtype == plain.dtype, f"{what}: dtype {actual.dtype}, expected {plain.dtype}"
    if not actual.is_floating_point():
        assert torch.equal(actual, exact), f"{what}: integer results differ"
        return
    assert torch.equal(actual.isnan(), plain.isnan()), f"{what}: NaN in other places"
    finite = plain.isfinite()
    assert torch.equal(actual[~finite].nan_to_num(0), plain[~finite].nan_to_num(0)), (
        f"{what}: infinities in other places"
    )
    if not finite.any():
        return
    magnitude = (exact if magnitude is None else magnitude)[finite].double().abs()
    exact = exact[finite].double()
    error = (actual[finite].double() - exact).abs()
    worst_plain = (plain[finite].double() - exact).abs().max()
    tiny = torch.finfo(actual.dtype).tiny
    if actual.dtype == torch.float64:
        # Plain PyTorch is the exact value here; what is left is the order of additions.
        allowed = 256 * ULP[torch.float64] * (exact.abs() + exact.abs().max()) + tiny
    else:
        allowed = factor * worst_plain + ulps * (ULP[actual.dtype] * magnitude + tiny)
    over = (error / allowed).max()
    assert over <= 1, (
        f"{what}: error {error.max():.3e} is {over:.2f} times the allowed one; "
        f"plain PyTorch errs by {worst_plain:.3e}"
    )


def assert_matches_reference(
    case: OpCase,
    backend: str | None,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *,
    device: str | torch.device = "cpu",
    sample: Sample | None = None,
    with_gradients: bool = True,
) -> None:
    """Asserts outputs and gradients of a backend against the reference, and that inputs stay as
    they were.

    Args:
        case: the row.
        backend: the backend under test; None for the default.
        dtype: dtype of the sample.
        shape: shape of the sample, in the row's own meaning.
        device: where to run.
        sample: arguments to use instead of the row's own for that shape.
        with_gradients: whether to compare gradients too.
    """
    sample = sample or case.sample(shape, dtype, device)
    before = [t.clone() for t in sample.args if isinstance(t, Tensor)]
    label = f"{case.id} {backend} {dtype} {shape}"
    actual = run(case, sample, backend)
    plain, exact = run(case, sample, "reference"), run(case, sample.double(), "reference")
    magnitudes = case.magnitudes(sample.double()) if case.magnitudes else (None,) * len(exact)
    for i, (a, p, e, magnitude) in enumerate(zip(actual, plain, exact, magnitudes, strict=True)):
        what = f"{label}: output {i}"
        assert_accurate(a, p, e, ulps=case.ulps, magnitude=magnitude, what=what)
    if case.grad and with_gradients:
        computed = gradients(case, sample, backend)
        plain = gradients(case, sample, "reference")
        exact = gradients(case, sample.double(), "reference")
        for i, results in zip(case.grad, zip(computed, plain, exact, strict=True), strict=True):
            assert_accurate(*results, ulps=case.ulps, what=f"{label}: gradient of argument {i}")
    after = [t for t in sample.args if isinstance(t, Tensor)]
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        same = torch.equal(old.nan_to_num(0), new.nan_to_num(0)) and new._version == 0
        assert same, f"{label}: input {i} was modified"


def relayouts(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values laid out otherwise in memory: (name, tensor) pairs."""
    storage = torch.empty(t.numel() + 3, dtype=t.dtype, device=t.device)
    offset = storage[3:].view(t.shape)
    yield "offset", offset.copy_(t)
    if t.dim() >= 1:
        doubled = torch.empty(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype, device=t.device)
        yield "strided", doubled[..., ::2].copy_(t)
        rows = torch.empty(t.shape[0], *(n + 1 for n in t.shape[1:]), dtype=t.dtype).to(t.device)
        yield "sliced", rows[(slice(None), *(slice(n) for n in t.shape[1:]))].copy_(t)
    if t.dim() >= 2:
        yield "transposed", t.transpose(0, -1).contiguous().transpose(0, -1)
    if t.dim() == 4:
        yield "channels_last", t.contiguous(memory_format=torch.channels_last)
    if t.dim() == 5:
        yield "channels_last_3d", t.contiguous(memory_format=torch.channels_last_3d)


def _affine_coupling(scale: str, min_scale: float, inverse: bool) -> OpCase:
    def make(maker: Maker, shape: tuple[int, ...]) -> Sample:
        options = {"scale": scale, "inverse": inverse, "min_scale": min_scale}
        if scale in ("tanh", "atan"):
            options["scale_factor"] = 1.5
        return Sample(tuple(maker.randn(*shape) for _ in range(3)), options)

    def magnitudes(sample: Sample) -> tuple[Tensor | None, ...]:
        each = Sample(tuple(t.reshape(-1, 1) for t in sample.args), sample.kwargs)
        _, terms = ops.affine_coupling(*each.args, **each.kwargs, backend="reference")
        return None, sum_per_sample(terms.abs().view(sample.args[0].shape))

    return OpCase(
        op="affine_coupling",
        name="-".join([scale, *["floor"] * (min_scale > 0), "inverse" if inverse else "forward"]),
        make=make,
        shapes=((4, 6), (3, 2, 5, 7), (1, 1), (5,), (2, 9001), (0, 4), (3, 0)),
        grad_shape=(2, 3),
        big_shape=(257, 129),
        dims=((0, 5), (0, 40)),
        grad=(0, 1, 2),
        vmap=(0, 1, 2),
        magnitudes=magnitudes,
    )


def _plane_norm(
    op: str, name: str, shape_of: Callable[[tuple[int, ...]], tuple[int, ...]] | None
) -> OpCase:
    """A row of `instance_norm` or `adain`; `shape_of` maps the shape of x to the parameters'."""

    def make(maker: Maker, shape: tuple[int, ...]) -> Sample:
        x = maker.randn(*shape, scale=2.0, mean=1.0)
        if name == "channels_last" and len(shape) == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        if shape_of is None:
            return Sample((x,), {"eps": 1e-3})
        scale = maker.randn(*shape_of(shape), mean=1.0)
        return Sample((x, scale, maker.randn(*shape_of(shape))), {"eps": 1e-3})

    tensors = (0,) if shape_of is None else (0, 1, 2)
    return OpCase(
        op=op,
        name=name,
        make=make,
        shapes=(
            (2, 3, 4, 6),
            (2, 19, 33),
            (1, 2, 3, 4, 5),
            (3, 2, 1),
            (1, 1, 5, 1),
            (1, 2, 21001),
            (0, 3, 4),
            (2, 0, 4),
            (2, 3, 0),
        ),
        grad_shape=(2, 3, 2, 3),
        big_shape=(5, 7, 65, 129),
        dims=((0, 3), (0, 20), (0, 9), (0, 9)),
        grad=tensors,
        vmap=tensors,
        ulps=1.0,
    )


def _normal(dims: int) -> OpCase:
    def make(maker: Maker, shape: tuple[int, ...]) -> Sample:
        return Sample((maker.key(), shape), {"dtype": maker.dtype})

    shapes: dict[int, tuple[tuple[int, ...], ...]] = {
        0: ((),),
        1: ((7,), (1,), (4,), (9001,), (0,)),
        3: ((2, 3, 5), (1, 1, 1), (3, 0, 2)),
    }
    return OpCase(
        op="normal",
        name=f"{dims}d",
        make=make,
        shapes=shapes[dims],
        grad_shape=shapes[dims][0],
        big_shape=(71,) * dims,
        dims=((0, 40),) * dims,
    )


def _reparam_kl(noise: bool) -> OpCase:
    def make(maker: Maker, shape: tuple[int, ...]) -> Sample:
        given = tuple(maker.randn(*shape) for _ in range(3 if noise else 2))
        return Sample(given, {} if noise else {"key": maker.key()})

    return OpCase(
        op="reparam_kl",
        name="noise" if noise else "key",
        make=make,
        shapes=((4, 6), (3, 2, 5, 7), (1, 1), (5,), (2, 9001), (0, 4), (3, 0)),
        grad_shape=(2, 3),
        big_shape=(257, 129),
        dims=((0, 5), (0, 40)),
        grad=(0, 1, 2) if noise else (0, 1),
        vmap=(0, 1, 2) if noise else (0, 1),
    )


def _codebook_shape(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(N, K, D) or (H, N, K, D) -> the shapes of x and codebook."""
    *heads, rows, codes, size = shape
    return (*heads, rows, size), (*heads, codes, size)


_VQ_SHAPES = ((37, 9, 5), (65, 1, 3), (1, 1, 1), (7, 33, 16), (2, 70, 19), (0, 4, 3), (3, 4, 0))
_VQ_HEADS = ((3, 17, 9, 5), (1, 5, 1, 1), (0, 3, 2, 4), (2, 0, 3, 4), (2, 5, 3, 0))


def _vq_nearest(name: str, shapes: tuple[tuple[int, ...], ...], **options: Any) -> OpCase:
    def make(maker: Maker, shape: tuple[int, ...]) -> Sample:
        x, codebook = _codebook_shape(shape)
        return Sample((maker.randn(*x), maker.randn(*codebook)), options)

    return OpCase(
        op="vq_nearest",
        name=name,
        make=make,
        shapes=shapes,
        grad_shape=shapes[0],
        big_shape=(*shapes[0][:-3], 1003, 67, 33),
        dims=((1, 3),) * (len(shapes[0]) - 3) + ((0, 40), (1, 70), (0, 40)),
        vmap=(0, 1),
    )


def _vq_quantize(name: str, shapes: tuple[tuple[int, ...], ...], wanted: int) -> OpCase:
    def make(maker: Maker, shape: tuple[int, ...]) -> Sample:
        x, codebook = _codebook_shape(shape)
        options = {"commitment_weight": 0.5, "codebook_weight": 2.0}
        return Sample((maker.randn(*x), maker.randn(*codebook)), options)

    return OpCase(
        op="vq_quantize",
        name=name,
        make=make,
        shapes=shapes,
        grad_shape=(*shapes[0][:-3], 5, 3, 2),
        big_shape=(*shapes[0][:-3], 1003, 67, 33),
        dims=((1, 3),) * (len(shapes[0]) - 3) + ((0, 40), (1, 70), (0, 40)),
        # One argument a row: stop-gradients make the second derivatives that mix both zero.
        grad=(wanted,),
        numeric_gradient=False,
        vmap=(wanted,),
    )


def _vq_codebook_stats(maker: Maker, shape: tuple[int, ...]) -> Sample:
    *rows, codes, size = shape
    return Sample((maker.randn(*rows, size), maker.randint(codes, *rows), codes))


def _rq_spline(inverse: bool, sum_log_det: bool) -> OpCase:
    def make(maker: Maker, shape: tuple[int, ...]) -> Sample:
        *dims, bins = shape
        sizes = (bins, bins, bins - 1)
        raw = (maker.randn(*dims, k, scale=0.3) for k in sizes)
        return Sample(
            (maker.randn(*dims, scale=2.0), *raw), {"inverse": inverse, "sum_log_det": sum_log_det}
        )

    def magnitudes(sample: Sample) -> tuple[Tensor | None, ...]:
        terms = ops.rq_spline(*sample.args, inverse=inverse, backend="reference")[1]
        return None, sum_per_sample(terms.abs())

    direction = "inverse" if inverse else "forward"
    return OpCase(
        op="rq_spline",
        name=f"{direction}-sum" if sum_log_det else direction,
        make=make,
        shapes=((9, 23, 8), (5, 2, 3, 7), (1, 1, 8), (5, 5), (6, 3, 2), (2, 1031, 4))
        + ((0, 4, 8), (3, 0, 8)),
        grad_shape=(2, 2, 3),
        big_shape=(67, 129, 8),
        dims=((0, 4), (0, 30), (2, 20)),
        grad=(0, 1, 2, 3),
        vmap=(0, 1, 2, 3),
        # Second derivatives amplify the rounding of a knot; tests/ops/test_rq_spline.py compares
        # the errors of many elements.
        ulps=16.0,
        magnitudes=magnitudes if sum_log_det else None,
    )


#: Every row. Keep the rows of an op together, in the order of fastgen/ops/__init__.py.
CASES: tuple[OpCase, ...] = (
    _plane_norm("adain", "", lambda shape: shape[:2]),
    _plane_norm("adain", "channels_last", lambda shape: shape[:2]),
    *(
        _affine_coupling(scale, min_scale, inverse)
        for scale, min_scale in (
            *((scale, 0.0) for scale in ("exp", "tanh", "sigmoid", "atan", "softplus")),
            ("sigmoid", 1e-3),
            ("softplus", 0.05),
        )
        for inverse in (False, True)
    ),
    _plane_norm("instance_norm", "affine", lambda shape: shape[1:2]),
    _plane_norm("instance_norm", "bare", None),
    *(_normal(dims) for dims in (0, 1, 3)),
    *(_reparam_kl(noise) for noise in (False, True)),
    OpCase(
        op="vq_codebook_stats",
        name="",
        make=_vq_codebook_stats,
        shapes=((37, 9, 5), (3, 5, 7, 300), (1, 1, 1), (4, 70, 2), (0, 4, 3), (3, 4, 0)),
        grad_shape=(5, 3, 2),
        big_shape=(2003, 67, 33),
        dims=((0, 40), (1, 9), (0, 40)),
        grad=(0,),
        vmap=(0, 1),
    ),
    _vq_nearest("", _VQ_SHAPES),
    _vq_nearest("distance", _VQ_SHAPES, return_distance=True),
    _vq_nearest("cosine", _VQ_SHAPES, metric="cosine"),
    _vq_nearest("heads", _VQ_HEADS, return_distance=True),
    _vq_quantize("x", _VQ_SHAPES, 0),
    _vq_quantize("codebook", _VQ_SHAPES, 1),
    _vq_quantize("heads-x", _VQ_HEADS, 0),
    _vq_quantize("heads-codebook", _VQ_HEADS, 1),
    *(_rq_spline(inverse, summed) for summed in (False, True) for inverse in (False, True)),
)
