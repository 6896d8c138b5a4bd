"""The elementary functions of csrc/cpu/vmath.h against float64, on every instruction set."""

import numpy as np
import pytest

from fastgen.ops import _library

EXACT = {
    "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "tanh": np.tanh,
    "arctan": np.arctan,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.logaddexp(0, x),
}
#: Largest error in units in the last place, away from subnormal results.
ULPS = {"exp": 1.5, "log": 1.5, "tanh": 2.5, "arctan": 3.0} | {
    "expm1": 3.5,
    "sigmoid": 3.0,
    "softplus": 3.0,
}


@pytest.fixture(scope="session")
def evaluate(native):
    return native("vmath").evaluate


def every_scale():
    """Positive and negative values of every exponent, and a dense range around zero."""
    generator = np.random.default_rng(0)
    words = generator.integers(0, 2**32, 1 << 20, dtype=np.uint32).view(np.float32)
    dense = generator.uniform(-12, 12, 1 << 20).astype(np.float32)
    near = generator.normal(0, 1e-3, 1 << 16).astype(np.float32)
    return np.concatenate([words[np.isfinite(words)], dense, near, 1 + near])


@pytest.mark.parametrize("isa", _library.CPU_ISAS)
@pytest.mark.parametrize("name", EXACT)
def test_accuracy(evaluate, name, isa):
    x = every_scale()
    try:
        y = evaluate(name, _library.CPU_ISAS.index(isa), x)
    except RuntimeError:
        pytest.skip(f"this machine has no {isa}")
    with np.errstate(all="ignore"):
        exact = EXACT[name](x.astype(np.float64))
        rounded = exact.astype(np.float32)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(rounded))
    normal = np.isfinite(rounded) & (np.abs(exact) > np.finfo(np.float32).tiny)
    ulp = np.spacing(np.abs(rounded[normal]))
    error = np.abs(y[normal].astype(np.float64) - exact[normal]) / ulp
    worst = error.argmax()
    assert error[worst] <= ULPS[name], (
        f"{name}({x[normal][worst]!r}) = {y[normal][worst]!r}: {error[worst]:.2f} ulp"
    )


@pytest.mark.parametrize("isa", _library.CPU_ISAS)
def test_special_values(evaluate, isa):
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38], np.float32)
    for name, exact in EXACT.items():
        try:
            y = evaluate(name, _library.CPU_ISAS.index(isa), x)
        except RuntimeError:
            pytest.skip(f"this machine has no {isa}")
        with np.errstate(all="ignore"):
            expected = exact(x.astype(np.float64)).astype(np.float32)
        np.testing.assert_allclose(y, expected, rtol=3e-7, atol=1e-38, err_msg=name)
