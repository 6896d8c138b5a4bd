"""The elementary functions of the Triton kernels against float64, under Triton's interpreter."""

import pytest
import torch

from fastgen.ops import _library

if not _library.triton_interprets:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from fastgen.kernels import _math  # noqa: E402

REFERENCES = {
    "exp": torch.exp,
    "log": torch.log,
    "sigmoid": torch.sigmoid,
    "softplus": lambda x: torch.nn.functional.softplus(x, threshold=50),
    "tanh": torch.tanh,
    "atan": torch.atan,
}
#: Largest errors in ulp: float32, float64.
ULPS = {
    "exp": (2, 2),
    "log": (2, 2),
    "sigmoid": (4, 4),
    "softplus": (4, 4),
    "tanh": (4, 8),
    "atan": (3, 8),
}


@triton.jit
def _kernel(x_ptr, y_ptr, size, NAME: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < size, 1.0)
    if NAME == "exp":
        y = _math.exp(x)
    elif NAME == "log":
        y = _math.log(x)
    elif NAME == "sigmoid":
        y = _math.sigmoid(x)
    elif NAME == "softplus":
        y = _math.softplus(x)
    elif NAME == "tanh":
        y = _math.tanh(x)
    else:
        y = _math.atan(x)
    tl.store(y_ptr + i, y, i < size)


def compute(name, x):
    y = torch.empty_like(x)
    _kernel[(triton.cdiv(x.numel(), 4096),)](x, y, x.numel(), NAME=name, BLOCK=4096)
    return y


def arguments(name, dtype):
    """Numbers of every magnitude and sign that the function takes, dense around one and zero."""
    near = torch.linspace(-4, 4, 20001, dtype=torch.float64)
    powers = torch.logspace(-30, 1.9, 5001, dtype=torch.float64)
    x = torch.cat((near, powers, -powers))
    return (x[x > 0] if name == "log" else x).to(dtype)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_triton_errors_of_a_few_ulp(name, dtype):
    x = arguments(name, dtype)
    y, exact = compute(name, x), REFERENCES[name](x.double())
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(exact.clamp(-info.max, info.max))
    ulp = info.eps * torch.exp2(exponent.double() - 1)
    normal = (exact.abs() >= info.tiny) & (exact.abs() <= info.max)
    error = ((y.double() - exact).abs() / ulp)[normal].max()
    assert error <= ULPS[name][dtype == torch.float64], f"{name} {dtype}: {error:.2f} ulp"


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_triton_limits(name, dtype):
    """Infinities, zeros, NaN, and arguments beyond the range give what PyTorch gives."""
    x = [0.0, float("inf"), float("nan"), 1e4, 1e30] + [-0.0, -float("inf"), -1e4, -1e30]
    x = torch.tensor(x[:3] + x[3:5] if name == "log" else x, dtype=dtype)
    x = x[1:] if name == "log" else x
    torch.testing.assert_close(compute(name, x), REFERENCES[name](x), equal_nan=True)
