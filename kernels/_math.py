"""Elementary functions for Triton kernels, in float32 and float64.

Triton's own float32 exp and log are the hardware's approximations, off by several ulp far from
zero (exp) and near one (log); libdevice does not run under Triton's interpreter. float32 here:
errors of one to three ulp; polynomials are those of the Cephes library (S. Moshier).
"""

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """e^x."""
    if x.dtype == tl.float64:
        y = tl.exp(x)
    else:
        # x = n log(2) + r with |r| <= log(2) / 2: n times the first part of log(2) is exact. The
        # hardware's exp2 is exact where its argument is an integer.
        x = tl.clamp(x, -150.0, 130.0, propagate_nan=tl.PropagateNan.ALL)
        n = tl.floor(1.4426950408889634 * x + 0.5)
        r = (x - n * 0.693359375) + n * 2.12194440e-4
        p = 1.9875691500e-4 * r + 1.3981999507e-3
        p = p * r + 8.3334519073e-3
        p = p * r + 4.1665795894e-2
        p = p * r + 1.6666665459e-1
        p = p * r + 5.0000001201e-1
        # 2^128 is too large, twice 2^127 need not be.
        y = (2.0 * (p * (r * r) + r) + 2.0) * tl.exp2(n - 1.0)
    return y


@triton.jit
def _log_polynomial(m):
    """log(1 + m) - m for m in [sqrt(1/2) - 1, sqrt(2) - 1]."""
    p = 7.0376836292e-2 * m - 1.1514610310e-1
    p = p * m + 1.1676998740e-1
    p = p * m - 1.2420140846e-1
    p = p * m + 1.4249322787e-1
    p = p * m - 1.6668057665e-1
    p = p * m + 2.0000714765e-1
    p = p * m - 2.4999993993e-1
    p = p * m + 3.3333331174e-1
    return p * m * m * m - 0.5 * m * m


@triton.jit
def log(x):
    """log(x) of a positive normal number, infinity or NaN."""
    if x.dtype == tl.float64:
        y = tl.log(x)
    else:
        # Exponent and mantissa in [sqrt(1/2), sqrt(2)).
        shifted = x.to(tl.int32, bitcast=True) - 0x3F3504F3
        exponent = (shifted >> 23).to(tl.float32)
        m = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
        y = m + (_log_polynomial(m) - 2.12194440e-4 * exponent)
        y = tl.where(x < float("inf"), 0.693359375 * exponent + y, x)
    return y


@triton.jit
def _log1p(u):
    """log(1 + u) for u in [0, 1]."""
    if u.dtype == tl.float64:
        # Kahan's correction: exact where 1 + u rounds.
        d = (1.0 + u) - 1.0
        y = tl.where(d == 0.0, u, tl.log(1.0 + u) * (u / tl.where(d == 0.0, 1.0, d)))
    else:
        near = u < 0.41421356
        m = tl.where(near, u, 0.5 * u - 0.5)
        p = _log_polynomial(m)
        y = tl.where(near, m + p, 0.693359375 + (m + (p - 2.12194440e-4)))
    return y


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def softplus(x):
    """log(1 + e^x) without overflow."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + _log1p(exp(-tl.abs(x)))


@triton.jit
def tanh(x):
    """tanh(x), relative error small near zero too."""
    a = tl.abs(x)
    z = x * x
    if x.dtype == tl.float64:
        # Lambert's continued fraction.
        f = 0.0 * z + 21.0
        for k in tl.static_range(9):
            f = (19.0 - 2.0 * k) + z / f
        small = x / (1.0 + z / f)
    else:
        p = -5.70498872745e-3 * z + 2.06390887954e-2
        p = p * z - 5.37397155531e-2
        p = p * z + 1.33314422036e-1
        p = p * z - 3.33332819422e-1
        small = p * z * x + x
    large = 1.0 - 2.0 / (exp(a + a) + 1.0)
    return tl.where(a < 0.625, small, tl.where(x < 0.0, -large, large))


@triton.jit
def atan(x):
    """atan(x)."""
    a = tl.abs(x)
    if x.dtype == tl.float64:
        # The angle is halved twice: tan(pi / 16) at most is left for the series.
        t = tl.where(a > 1.0, 1.0 / a, a)
        t = t / (1.0 + tl.sqrt(1.0 + t * t))
        t = t / (1.0 + tl.sqrt(1.0 + t * t))
        z = t * t
        p = 0.0 * z
        for k in tl.static_range(12):
            p = 1.0 / (25.0 - 2.0 * k) - z * p
        y = 4.0 * t * (1.0 - z * p)
        y = tl.where(a > 1.0, 1.5707963267948966 - y, y)
    else:
        big = a > 2.414213562373095
        mid = (a > 0.414213562373095) & (a <= 2.414213562373095)
        t = tl.where(big, -1.0, tl.where(mid, a - 1.0, a)) / tl.where(
            big, a, tl.where(mid, a + 1.0, 1.0)
        )
        # pi/4 as the sum of two numbers: the first alone would bias every angle.
        quarters = tl.where(big, 2.0, tl.where(mid, 1.0, 0.0))
        z = t * t
        p = 8.05374449538e-2 * z - 1.38776856032e-1
        p = p * z + 1.99777106478e-1
        p = p * z - 3.33329491539e-1
        y = 0.78539818525314331 * quarters + ((p * z * t - 2.1855694e-8 * quarters) + t)
    return tl.where(x < 0.0, -y, y)
