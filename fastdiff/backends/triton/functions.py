"""Elementary functions, and the error functions and their derivatives, in forms that keep their digits.

They use no library function: those differ by target, and the interpreter has none. The polynomials are interpolations
at Chebyshev points, good to 2.2 units of 2^-24. ASM: on an NVIDIA GPU, whose own instructions for 1/x, 1/sqrt(x) and
2^x are good to 1, 1.1 and 2 units of 2^-23 where neither numbers nor results are denormal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import fma


@triton.jit
def inverse(x, ASM: tl.constexpr):
    """1 / x"""
    if ASM:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return 1.0 / x


@triton.jit
def _inverse_root(x, ASM: tl.constexpr):
    """1 / sqrt(x)"""
    if ASM:
        return tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.rsqrt(x)


@triton.jit
def _power_of_2(x, ASM: tl.constexpr):
    """2^x; 0 where that is denormal, on an NVIDIA GPU."""
    if ASM:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.exp2(x)


@triton.jit
def _sign(e):
    """-1, 0 or 1; NaN stays."""
    return tl.where(e > 0, 1.0, tl.where(e < 0, -1.0, e))


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
def exponential(x, ASM: tl.constexpr, EMULATE: tl.constexpr):
    """exp(x); 0 where that is denormal, on an NVIDIA GPU. What the product with 1 / ln 2 rounds off, and what the
    constant leaves out, becomes a factor."""
    x = tl.clamp(x, -150.0, 150.0, tl.PropagateNan.ALL)
    product = x * 1.4426950408889634
    rest = fma(x, 1.4426950408889634, -product, EMULATE) + x * 1.925963033500649e-08
    return _power_of_2(product, ASM) * tl.fma(rest, 0.6931471805599453, 1.0)


@triton.jit
def exp_excess(z):
    """exp(z) - 1 - z for abs(z) <= 1."""
    value = tl.fma(z, 2.806280260870996e-06, 2.5358512243303926e-05)
    value = tl.fma(z, value, 0.00019838101968248692)
    value = tl.fma(z, value, 0.0013885396911830943)
    value = tl.fma(z, value, 0.008333339675919085)
    value = tl.fma(z, value, 0.041666736595236314)
    value = tl.fma(z, value, 0.16666666646842102)
    value = tl.fma(z, value, 0.49999999781421695)
    return z * z * value


@triton.jit
def _twice_artanh(w):
    """2 artanh(w) = ln((1 + w) / (1 - w)) for abs(w) <= 1/3."""
    z = w * w
    value = tl.fma(z, 0.28157778359061375, 0.27965157746385366)
    value = tl.fma(z, value, 0.40024595230576043)
    value = tl.fma(z, value, 0.6666632164138252)
    value = tl.fma(z, value, 2.0000000076817583)
    return w * value


@triton.jit
def log_1_plus(x, ASM: tl.constexpr):
    """ln(1 + x) for x from 0 to 1."""
    return _twice_artanh(x * inverse(2.0 + x, ASM))


@triton.jit
def logarithm(x, ASM: tl.constexpr):
    """ln(x) for normal numbers x; about -88 for 0 and denormal ones."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # so that the fraction is from sqrt(1/2) to sqrt(2)
    fraction = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    log = _twice_artanh((fraction - 1.0) * inverse(fraction + 1.0, ASM))
    return tl.where(x != x, x, tl.fma(exponent.to(tl.float32), 0.6931471805599453, log))


@triton.jit
def reciprocal(c):
    """1 / c, at most the largest float32, so that 0 times it is 0: what the functions with a c take, once a row.
    NaN, as of a t out of range, stays."""
    return tl.minimum(tl.div_rn(1.0, c), 3.4028234663852886e38, tl.PropagateNan.ALL)


@triton.jit
def _slope_of_root(e, inverse_c, ASM: tl.constexpr):
    """(u, 1 / sqrt(1 + u^2)) of u = e / c. A u of more than 1e18 in size is as good as infinite, and would overflow."""
    u = tl.clamp(e * inverse_c, -1e18, 1e18, tl.PropagateNan.ALL)
    return u, _inverse_root(tl.fma(u, u, 1.0), ASM)


@triton.jit
def _log_cosh(size, ASM: tl.constexpr):
    z = size * size
    value = tl.fma(z, -2.5617302526370622e-05, 0.0001761986204655841)
    value = tl.fma(z, value, -0.0006794098881073296)
    value = tl.fma(z, value, 0.0021612918935716152)
    value = tl.fma(z, value, -0.006739799398928881)
    value = tl.fma(z, value, 0.022221464663743973)
    value = tl.fma(z, value, -0.08333329856395721)
    value = tl.fma(z, value, 0.5)
    # For large ones size - ln 2 + ln(1 + q), q = exp(-2 size) <= 0.14.
    q = _power_of_2(-2.8853900817779268 * size, ASM)
    log = tl.fma(q, 0.15275874733924866, -0.24472633004188538)
    log = tl.fma(q, log, 0.3330850899219513)
    log = tl.fma(q, log, -0.4999958574771881)
    log = tl.fma(q, log, 1.0)
    return tl.where(size < 1, z * value, tl.fma(q, log, size - 0.6931471805599453))


@triton.jit
def _tanh(e, ASM: tl.constexpr):
    size = tl.abs(e)
    z = e * e
    value = tl.fma(z, -0.006212138570845127, 0.021074384450912476)
    value = tl.fma(z, value, -0.05386674776673317)
    value = tl.fma(z, value, 0.13332870602607727)
    value = tl.fma(z, value, -0.3333333134651184)
    q = _power_of_2(-2.8853900817779268 * size, ASM)
    large = tl.fma(-2.0 * q, inverse(1.0 + q, ASM), 1.0)
    return tl.where(size < 0.6, tl.fma(e * z, value, e), tl.where(e < 0, -large, large))


@triton.jit
def error(e, c, inverse_c, FUNCTION: tl.constexpr, ASM: tl.constexpr):
    """rho(e; c)"""
    if FUNCTION == "mse":
        return e * e
    elif FUNCTION == "l1":
        return tl.abs(e)
    elif FUNCTION == "smooth_l1":  # e^2 / 2 c, or |e| - c / 2
        slope = derivative(e, inverse_c, FUNCTION, ASM)
        return slope * tl.fma(-0.5 * c, slope, e)
    elif FUNCTION == "pseudo_huber":  # sqrt(e^2 + c^2) - c = |e| |u| / (sqrt(1 + u^2) + 1)
        u, root = _slope_of_root(e, inverse_c, ASM)
        return tl.abs(e) * (tl.abs(u) * inverse(tl.fma(u, u, 1.0) * root + 1.0, ASM))
    else:
        tl.static_assert(FUNCTION == "log_cosh")
        return _log_cosh(tl.abs(e), ASM)


@triton.jit
def derivative(e, inverse_c, FUNCTION: tl.constexpr, ASM: tl.constexpr):
    """d rho / d e; 0 at the corner of |e|."""
    if FUNCTION == "mse":
        return 2.0 * e
    elif FUNCTION == "l1":
        return _sign(e)
    elif FUNCTION == "smooth_l1":
        return tl.clamp(e * inverse_c, -1.0, 1.0, tl.PropagateNan.ALL)
    elif FUNCTION == "pseudo_huber":  # e / sqrt(e^2 + c^2)
        u, root = _slope_of_root(e, inverse_c, ASM)
        return u * root
    else:
        tl.static_assert(FUNCTION == "log_cosh")
        return _tanh(e, ASM)


@triton.jit
def _constant(own, of_row):
    """The constant of a function in a weighted sum; NaN stands for the row's."""
    return tl.where(own != own, of_row, own)


@triton.jit
def combined_error(e, c, mse, l1, smooth_l1, pseudo_huber, log_cosh, c_smooth_l1, c_pseudo_huber, ASM: tl.constexpr):
    """The weighted sum of rho(e; c) over the functions whose strength is not 0."""
    total = tl.zeros_like(e)
    if mse != 0:
        total += mse * error(e, c, c, "mse", ASM)
    if l1 != 0:
        total += l1 * error(e, c, c, "l1", ASM)
    if smooth_l1 != 0:
        own = _constant(c_smooth_l1, c)
        total += smooth_l1 * error(e, own, reciprocal(own), "smooth_l1", ASM)
    if pseudo_huber != 0:
        own = _constant(c_pseudo_huber, c)
        total += pseudo_huber * error(e, own, reciprocal(own), "pseudo_huber", ASM)
    if log_cosh != 0:
        total += log_cosh * error(e, c, c, "log_cosh", ASM)
    return total


@triton.jit
def combined_derivative(e, c, mse, l1, smooth_l1, pseudo_huber, log_cosh, c_smooth_l1, c_pseudo_huber,
                        ASM: tl.constexpr):  # fmt: skip
    """The weighted sum of d rho / d e."""
    total = tl.zeros_like(e)
    if mse != 0:
        total += mse * derivative(e, c, "mse", ASM)
    if l1 != 0:
        total += l1 * derivative(e, c, "l1", ASM)
    if smooth_l1 != 0:
        total += smooth_l1 * derivative(e, reciprocal(_constant(c_smooth_l1, c)), "smooth_l1", ASM)
    if pseudo_huber != 0:
        total += pseudo_huber * derivative(e, reciprocal(_constant(c_pseudo_huber, c)), "pseudo_huber", ASM)
    if log_cosh != 0:
        total += log_cosh * derivative(e, c, "log_cosh", ASM)
    return total
