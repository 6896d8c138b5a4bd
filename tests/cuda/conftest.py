"""Sanitized programs of tests/cpp/emulation; the kernels of vector quantization on the host
emulator, and their float64 oracle."""

import os
import shutil
import subprocess
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgen.ops._autograd import accumulate_dtype

#: The builds: flags, the environment to run under, and the library that the compiler must have.
BUILDS = {
    "plain": (("-O1",), {}, None),
    "asan": (
        ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
        {"ASAN_OPTIONS": "detect_leaks=0"},
        "libasan.so",
    ),
    "tsan": (
        ("-O1", "-g1", "-fsanitize=thread", "-DFASTGEN_EMULATION_THREADS"),
        {"TSAN_OPTIONS": "halt_on_error=1"},
        "libtsan.so",
    ),
}

#: Shared memory of a block, as Hopper has it.
SHARED_BYTES = 227 * 1024


def has_library(name):
    """gcc answers with a path where it has the library, and with the bare name where not."""
    compiler = shutil.which("c++") or shutil.which("g++")
    asked = [compiler, f"-print-file-name={name}"]
    found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return os.path.isabs(found)


@pytest.fixture(scope="session")
def run_program(compiled):
    """run_program(build, program, *arguments): the finished process."""

    def run(build, program, *arguments):
        flags, environment, library = BUILDS[build]
        if library is not None and not has_library(library):
            pytest.skip(f"the compiler has no {library}")
        path = compiled(f"emulation/{program}.cpp", f".{build}", *flags)
        return subprocess.run(
            [path, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, **environment},
        )

    return run


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def poisoned(shape, dtype):
    return torch.full(shape, -1 if dtype == torch.int64 else torch.nan, dtype=dtype)


class Result(NamedTuple):
    """What is not asked for is empty; open_rows: rows of head 0 that were screened again."""

    indices: Tensor
    distance: Tensor
    quantized: Tensor
    errors: Tensor
    open_rows: int


class VectorQuantization:
    """The kernels for tensors; results are poisoned before."""

    def __init__(self, module):
        self.module = module

    def search(
        self,
        x,
        codebook,
        *,
        cosine=False,
        hopper=False,
        distance=False,
        quantize=False,
        image_bytes=1 << 25,
        seed=0,
    ):
        """The search for rows x (N, D) or (H, N, D)."""
        heads, rows, size = x.shape if codebook.dim() == 3 else (1, *x.shape)
        shape = x.shape[:-1]
        results = (
            poisoned(shape, torch.int64),
            poisoned(shape if distance else (0,), accumulate_dtype(x.dtype)),
            poisoned(x.shape if quantize else (0,), x.dtype),
            poisoned(shape if quantize else (0,), torch.float64),
        )
        open_rows = self.module.search(
            dtype_name(x.dtype),
            x.data_ptr(),
            codebook.data_ptr(),
            (heads, rows, codebook.shape[-2], size),
            cosine,
            hopper,
            SHARED_BYTES,
            image_bytes,
            seed,
            *(t.data_ptr() if t.numel() else 0 for t in results),
        )
        return Result(*results, open_rows)

    def codebook_stats(self, x, indices, codes):
        """counts, sums of rows x (N, D)."""
        dtype = accumulate_dtype(x.dtype)
        counts, sums = poisoned((codes,), dtype), poisoned((codes, x.shape[-1]), dtype)
        self.module.stats(
            dtype_name(x.dtype),
            x.data_ptr(),
            indices.data_ptr(),
            (1, len(x), codes, x.shape[-1]),
            counts.data_ptr(),
            sums.data_ptr(),
        )
        return counts, sums

    def loss(self, errors, factor, dtype):
        """factor * the sum of errors."""
        loss = poisoned((), dtype)
        self.module.loss(dtype_name(dtype), errors.data_ptr(), len(errors), factor, loss.data_ptr())
        return loss

    def backward(self, grad, grad_loss, x, codebook, indices, commitment_weight, codebook_weight):
        """The gradients of x (H, N, D) and codebook (H, K, D)."""
        results = poisoned(x.shape, x.dtype), poisoned(codebook.shape, x.dtype)
        self.module.backward(
            dtype_name(x.dtype),
            *(t.data_ptr() for t in (grad, grad_loss, x, codebook, indices)),
            (*x.shape[:2], codebook.shape[1], x.shape[2]),
            commitment_weight * 2 / x.numel(),
            -codebook_weight * 2 / x.numel(),
            *(t.data_ptr() for t in results),
        )
        return results

    @staticmethod
    def oracle(x, codebook, cosine=False):
        """The argmin of the float64 keys, summed in order, lowest index on ties; its key."""
        x, codebook = x.double().numpy(), codebook.double().numpy()
        keys = np.zeros((len(x), len(codebook)))
        squares = np.zeros(len(codebook))
        with np.errstate(all="ignore"):
            for j in range(x.shape[1]):
                e = codebook[:, j]
                keys += x[:, j, None] * e if cosine else (x[:, j, None] - e) ** 2
                squares += e**2
            if cosine:
                keys = np.where(squares == 0, 0, -keys * np.abs(keys) / squares)
            index = np.where(np.isfinite(keys), keys, np.inf).argmin(1)
        return torch.from_numpy(index), torch.from_numpy(keys[np.arange(len(x)), index])


@pytest.fixture(scope="session")
def vq(native):
    return VectorQuantization(native("vq_emulated"))
