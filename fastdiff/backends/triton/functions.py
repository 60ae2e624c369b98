"""The error functions and their derivatives, as device functions, in forms that keep their digits.

They use no library function: those differ by target, and the interpreter has none. The polynomials are interpolations
at Chebyshev points, good to 2.2 units of 2^-24.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sign(e):
    """-1, 0 or 1; NaN stays."""
    return tl.where(e > 0, 1.0, tl.where(e < 0, -1.0, e))


@triton.jit
def _hypot(size, c):
    """sqrt(size^2 + c^2) for positive c, without overflow."""
    large = tl.where(size > c, size, c)
    small = tl.where(size > c, c, size)
    ratio = small / large
    return large * tl.sqrt(tl.fma(ratio, ratio, 1.0))


@triton.jit
def accurate_exp(x):
    """exp(x) to about 2 units of 2^-24 wherever it is no overflow: the exponent is split before 2^f is approximated."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = tl.fma(n, 2.1219444e-4, tl.fma(n, -0.693359375, x))  # ln 2 in two parts
    fraction = tl.exp2(rest * 1.4426950408889634)
    # Two factors, so that neither overflows before the product does.
    half = tl.floor(n * 0.5)
    scaled = fraction * tl.exp2(half) * tl.exp2(n - half)
    return tl.where(x > 89.0, float("inf"), tl.where(x < -104.0, 0.0, scaled))


@triton.jit
def _log_cosh(size):
    z = size * size
    value = tl.fma(z, -2.5617302526370622e-05, 0.0001761986204655841)
    value = tl.fma(z, value, -0.0006794098881073296)
    value = tl.fma(z, value, 0.0021612918935716152)
    value = tl.fma(z, value, -0.006739799398928881)
    value = tl.fma(z, value, 0.022221464663743973)
    value = tl.fma(z, value, -0.08333329856395721)
    value = tl.fma(z, value, 0.5)
    # For large ones size - ln 2 + ln(1 + q), q = exp(-2 size) <= 0.14: twice the inverse hyperbolic tangent of s.
    q = tl.exp(-2.0 * size)
    s = q / (2.0 + q)
    w = s * s
    log = 2.0 * s * tl.fma(w, tl.fma(w, tl.fma(w, 0.14285714285714285, 0.2), 0.3333333333333333), 1.0)
    return tl.where(size < 1, z * value, (size - 0.6931471805599453) + log)


@triton.jit
def _tanh(e):
    size = tl.abs(e)
    z = e * e
    value = tl.fma(z, -0.006212138570845127, 0.021074384450912476)
    value = tl.fma(z, value, -0.05386674776673317)
    value = tl.fma(z, value, 0.13332870602607727)
    value = tl.fma(z, value, -0.3333333134651184)
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.6, tl.fma(e * z, value, e), tl.where(e < 0, -large, large))


@triton.jit
def error(e, c, FUNCTION: tl.constexpr):
    """rho(e; c)"""
    if FUNCTION == "mse":
        return e * e
    elif FUNCTION == "l1":
        return tl.abs(e)
    elif FUNCTION == "smooth_l1":
        size = tl.abs(e)
        return tl.where(size < c, tl.div_rn(0.5 * e * e, c + e * 0.0), size - 0.5 * c)
    elif FUNCTION == "pseudo_huber":
        size = tl.abs(e)
        return size * (size / (_hypot(size, c) + c))
    else:
        tl.static_assert(FUNCTION == "log_cosh")
        return _log_cosh(tl.abs(e))


@triton.jit
def derivative(e, c, FUNCTION: tl.constexpr):
    """d rho / d e; 0 at the corner of |e|."""
    if FUNCTION == "mse":
        return 2.0 * e
    elif FUNCTION == "l1":
        return _sign(e)
    elif FUNCTION == "smooth_l1":
        return tl.where(tl.abs(e) < c, tl.div_rn(e, c + e * 0.0), _sign(e))
    elif FUNCTION == "pseudo_huber":
        return e / _hypot(tl.abs(e), c)
    else:
        tl.static_assert(FUNCTION == "log_cosh")
        return _tanh(e)
