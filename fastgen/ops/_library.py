"""The one `torch.library.Library` of fastgen, and the loading of the compiled parts.

Schemas are defined here in Python, implementations in C++ (csrc/), so that a missing compiled part
leaves a clean NotImplementedError and never two definitions of one schema.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen import _build

#: Names of the instruction sets of the CPU kernels; raw operators `cpu_isa` and `force_cpu_isa`
#: speak of them by position.
CPU_ISAS = ("portable", "avx2", "avx512", "avx512bf16")

LIBRARY = torch.library.Library("fastgen", "DEF")


def define(
    schema: str, *, constant: bool = False, any_layout: bool = False
) -> torch._ops.OpOverload:
    """Declares the raw operator `torch.ops.fastgen.<name>` from its schema string; returns it.

    Args:
        schema: "name(arguments) -> results".
        constant: autograd takes the results for constants, instead of warning that it cannot
            differentiate through the raw operator.
        any_layout: kernels take dense tensors of any strides as they lie, and the fake kernel gives
            the strides of the results for them. torch.compile then passes what its convolutions
            give, channels_last, where it would otherwise copy to the strides of its trace.
    """
    name = schema.partition("(")[0]
    tags = [torch.Tag.pt2_compliant_tag]
    if any_layout:
        tags.append(torch.Tag.flexible_layout)
    LIBRARY.define(schema, tags=tags)
    if constant:
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    return getattr(torch.ops.fastgen, name).default


def register_fake(name: str) -> Callable[[Callable], Callable]:
    """Decorator: the shape-only twin of raw operator `name`, for torch.compile and meta tensors."""
    return torch.library.register_fake(f"fastgen::{name}", lib=LIBRARY)


def register_triton(op: str, *names: str) -> None:
    """Makes the functions `names` of fastgen.kernels.<op> the CUDA kernels of those raw operators.

    They are imported at the first call. Under TRITON_INTERPRET=1 they take the place of the CPU
    kernels too, so that one autograd pair serves every device.
    """
    for name in names:
        function = _triton_launcher(op, name)
        LIBRARY.impl(name, function, "CUDA")
        if triton_interprets:
            with warnings.catch_warnings():
                # PyTorch warns of the kernel that is replaced.
                warnings.simplefilter("ignore")
                LIBRARY.impl(name, function, "CPU")


def _triton_launcher(op: str, name: str) -> Callable[..., Any]:
    launcher: Callable[..., Any] | None = None

    def launch(first: Tensor, *args: Any) -> Any:
        nonlocal launcher
        if launcher is None:
            launcher = getattr(importlib.import_module(f"fastgen.kernels.{op}"), name)
        # Triton launches on the current device, which may not be that of the tensors.
        with torch.cuda.device_of(first):
            return launcher(first, *args)

    return launch


def register_vmap_fold(name: str) -> None:
    """vmap of raw operator `name` by folding the vmapped dimension into the batch.

    Right for operators whose every tensor argument and result has the batch first and whose samples
    do not depend on each other or on their index.
    """
    fold = functools.partial(fold_vmap, name)
    torch.library.register_vmap(f"fastgen::{name}", fold, lib=LIBRARY)


def fold_vmap(name: str, info: Any, in_dims: tuple, *args: Any) -> tuple:
    """The rule of :func:`register_vmap_fold`."""
    op = getattr(torch.ops.fastgen, name)
    if info.batch_size == 0:
        return _no_slices(op, in_dims, args)
    batched = [
        arg.movedim(dim, 0) if dim is not None else _expand(arg, info.batch_size)
        for arg, dim in zip(args, in_dims, strict=True)
    ]
    flat = [arg.flatten(0, 1) if isinstance(arg, Tensor) else arg for arg in batched]
    result = op(*flat)
    results = result if isinstance(result, (tuple, list)) else (result,)
    out = tuple(r.unflatten(0, (info.batch_size, r.shape[0] // info.batch_size)) for r in results)
    return (out, (0,) * len(out)) if isinstance(result, (tuple, list)) else (out[0], 0)


def register_vmap_loop(name: str) -> None:
    """vmap of raw operator `name` one slice at a time, where the batch cannot be folded."""
    op = getattr(torch.ops.fastgen, name)

    def loop(info: Any, in_dims: tuple, *args: Any) -> tuple:
        if info.batch_size == 0:
            return _no_slices(op, in_dims, args)
        slices = [
            op(
                *(
                    arg.select(dim, i) if isinstance(arg, Tensor) and dim is not None else arg
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(slices[0], Tensor):
            return torch.stack(slices), 0
        out = tuple(torch.stack(parts) for parts in zip(*slices, strict=True))
        return out, (0,) * len(out)

    torch.library.register_vmap(f"fastgen::{name}", loop, lib=LIBRARY)


def _no_slices(op: Callable, in_dims: tuple, args: tuple) -> tuple:
    """vmap over a dimension of size 0: what `op` gives for a slice of zeros has the shapes."""
    result = op(
        *(
            arg.new_zeros(arg.movedim(dim, 0).shape[1:])
            if isinstance(arg, Tensor) and dim is not None
            else arg
            for arg, dim in zip(args, in_dims, strict=True)
        )
    )
    if isinstance(result, Tensor):
        return result.new_empty((0, *result.shape)), 0
    return tuple(r.new_empty((0, *r.shape)) for r in result), (0,) * len(result)


def _expand(arg: Any, batch: int) -> Any:
    return arg.expand(batch, *arg.shape) if isinstance(arg, Tensor) else arg


def _load(module: str, expected: bool, why_not: str) -> str | None:
    """Imports a compiled module; returns None on success, else the reason it is unavailable."""
    if not expected:
        return why_not
    try:
        importlib.import_module(f"fastgen.{module}")
    except ImportError as error:
        return f"fastgen.{module} does not load: {error}"
    return None


define("cpu_isa() -> int")
define("best_cpu_isa() -> int")
define("force_cpu_isa(int isa) -> int")
# `pieces` chains of float32 multiply-adds, or of bfloat16 dot products, that nothing waits for;
# returns the operations done, 0 where the machine or the chosen instruction set has none.
define("fma_probe(int pieces, int repeats) -> int")
define("bf16_dot_probe(int pieces, int repeats) -> int")

_BUILD = _build.info()

#: Why the CPU kernels are unavailable, or None.
cpu_unavailable = _load("_C", _BUILD["cpu"], _BUILD["cpu_reason"])

#: Why the CUDA kernels are unavailable, or None. CPU torch lacks the symbols they need, so the
#: module is not even tried there.
cuda_unavailable = (
    _load("_C_cuda", _BUILD["cuda"], _BUILD["cuda_reason"])
    if torch.version.cuda
    else "this torch has no CUDA"
)

#: Why Triton kernels are unavailable, or None.
triton_unavailable = (
    None
    if importlib.util.find_spec("triton")
    else "Triton is not installed (CUDA builds of PyTorch bring it)"
)

#: Whether Triton runs its kernels in its interpreter, on the memory of any device.
triton_interprets = triton_unavailable is None and os.environ.get(
    "TRITON_INTERPRET", ""
).lower() in ("1", "true", "yes", "on", "y")

#: Type of the devices that Triton kernels run on, None for all.
triton_device = None if triton_interprets else "cuda"

#: Why the CPU kernels of an op that has Triton kernels are unavailable, or None.
cpu_unavailable_beside_triton = (
    "TRITON_INTERPRET=1 puts the Triton kernels in their place"
    if triton_interprets
    else cpu_unavailable
)

#: What is broken, as opposed to left out on purpose: a build that should load and does not.
broken = [
    reason
    for reason, expected in (
        (cpu_unavailable, _BUILD["cpu"]),
        (cuda_unavailable, _BUILD["cuda"] and bool(torch.version.cuda)),
    )
    if reason is not None and expected
]

if broken:
    message = (
        f"fastgen: {'; '.join(broken)}. Ops fall back to plain PyTorch. "
        "Reinstall with: pip install --no-build-isolation --force-reinstall --no-deps . ; "
        "see python -m fastgen.info"
    )
    if os.environ.get("FASTGEN_STRICT") == "1":
        raise ImportError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=2)
