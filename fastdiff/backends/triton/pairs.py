"""Numbers as pairs of float32, the second being what the first leaves out: twice the digits, without float64."""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import fma


@triton.jit
def pair_sum(a, a_low, b, b_low):
    """a + b (Knuth's two-sum, and the low parts)."""
    total = a + b
    back = total - a
    return total, a_low + b_low + ((a - (total - back)) + (b - back))


@triton.jit
def pair_product(a, a_low, b, EMULATE: tl.constexpr):
    """a times the float32 b."""
    product = a * b
    return product, fma(a, b, -product, EMULATE) + a_low * b


@triton.jit
def pair_quotient(a, a_low, b, b_low, EMULATE: tl.constexpr):
    """a / b"""
    quotient = tl.div_rn(a, b)
    rest = fma(-quotient, b, a, EMULATE) + (a_low - quotient * b_low)
    return quotient, tl.div_rn(rest, b)


@triton.jit
def pair_rest(a, a_low):
    """The low part of a pair; 0 for infinity, which leaves out nothing (it comes out of the arithmetic as NaN)."""
    return tl.where(a - a == 0, a_low, 0.0)


@triton.jit
def pair_rounded(a, a_low):
    """A pair as one float32."""
    return a + pair_rest(a, a_low)
