"""Philox4x32-10 and the normal transforms, as device functions. ``reference/philox.py`` is the definition.

Triton's interpreter has no fma and truncates where a GPU rounds to bfloat16. ``EMULATE`` makes it round as a GPU does;
compiled kernels never have it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fma(a, b, c, EMULATE: tl.constexpr):
    """a * b + c with one rounding."""
    if EMULATE:  # the product is exact in float64, the sum rounded to odd there, so that float32 is the only rounding
        product = a.to(tl.float64) * tl.cast(b, tl.float64)
        wide = tl.cast(c, tl.float64)
        total = product + wide
        back = total - product
        error = (product - (total - back)) + (wide - back)
        bits = total.to(tl.int64, bitcast=True)
        towards = tl.where((error > 0) == (total > 0), 1, -1).to(tl.int64)
        inexact = tl.abs(error) > 0  # NaN where the sum is not finite
        odd = tl.where(inexact & ((bits & 1) == 0), bits + towards, bits)
        return odd.to(tl.float64, bitcast=True).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def widen(x, PAIRS: tl.constexpr, EMULATE: tl.constexpr):
    """A loaded value as float32. PAIRS: on an NVIDIA GPU, of data that is loaded by vectors.

    Bytes are images, and stand for x / 127.5 - 1, with the bits of two rounded operations: the product with the first
    part of 1 / 127.5 is exact, so that it does not matter which product a sum takes in (``fastdiff.tensors.decoded``).
    """
    if x.dtype == tl.uint8:
        u = x.to(tl.float32)
        return tl.fma(u, 0.00784301757812500, u * 1.1967678403834725e-07) - 1.0
    elif EMULATE and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif PAIRS and x.dtype == tl.bfloat16:  # one instruction each; the compiler's own way takes two for the second
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;", "=&r,=&r,r", [x], tl.float32, True, 2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """float32 rounded to what is stored."""
    if EMULATE and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _product(x, y: tl.constexpr, ASM: tl.constexpr):
    """(high, low half) of a product of uint32, by one wide multiplication where each half apart would be one."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$1, $0}, p; }",
            "=r,=r,r,r",
            [x, y],
            (tl.uint32, tl.uint32),
            True,
            1,
        )
    else:
        product = x.to(tl.uint64) * y
        return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def words(c0, c1, c2, c3, k0, k1, ASM: tl.constexpr = False):
    """Ten rounds on uint32."""
    for _ in tl.static_range(10):
        high0, low0 = _product(c0, 0xD2511F53, ASM)
        high1, low1 = _product(c2, 0xCD9E8D57, ASM)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _signed(x, sign):
    """x with its sign flipped by the top bit of ``sign``."""
    return (x.to(tl.uint32, bitcast=True) ^ (sign & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _flipped(x, sign):
    """x with its sign flipped by the lowest bit of ``sign``: one instruction, where an exclusive or takes two."""
    return (x.to(tl.uint32, bitcast=True) + (sign << 31)).to(tl.float32, bitcast=True)


@triton.jit
def _sqrt(y, ASM: tl.constexpr):
    """The correctly rounded root of y in [1e-30, 64]."""
    if ASM:
        # What sqrt.rn.f32 itself becomes for numbers of this size, without the test for others and what it branches to.
        return tl.inline_asm_elementwise(
            """{ .reg .f32 r, s, t, u;
            rsqrt.approx.ftz.f32 r, $1; mul.rn.f32 s, $1, r; mul.rn.f32 r, r, 0f3F000000;
            neg.f32 t, s; fma.rn.f32 u, t, s, $1; fma.rn.f32 $0, u, r, s; }""",
            "=f,f", [y], tl.float32, True, 1,
        )  # fmt: skip
    else:
        return tl.sqrt_rn(y)


@triton.jit
def _radius_exact(i1, ASM: tl.constexpr, EMULATE: tl.constexpr):
    f = (i1 | 1).to(tl.float32)
    bits = f.to(tl.int32, bitcast=True)
    exponent = ((bits - 0x3F3504F3) >> 23) << 23
    t = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    value = fma(t, 0.20757412910461426, -0.326762855052948, EMULATE)
    value = fma(t, value, 0.34424856305122375, EMULATE)
    value = fma(t, value, -0.397684723138809, EMULATE)
    value = fma(t, value, 0.49943119287490845, EMULATE)
    value = fma(t, value, -0.6667121648788452, EMULATE)
    value = fma(t, value, 1.000006914138794, EMULATE)
    value = fma(t, value, -1.9999998807907104, EMULATE)
    rest = fma(exponent.to(tl.float32), -1.6525916635146132e-07, 44.361419677734375, EMULATE)
    y = fma(value, t, rest, EMULATE)
    return _sqrt(tl.maximum(y, 1e-30), ASM)


@triton.jit
def _radius_fast(i1, ASM: tl.constexpr):
    """The root of -log2(u), u in (0, 1]: the normals' radius over sqrt(2 ln 2)."""
    u = (i1 | 1).to(tl.float32) * 2.3283064365386963e-10  # 2^-32
    # The size of the logarithm: approximate ones of numbers near 1 may be positive.
    if ASM:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1; abs.f32 $0, $0; sqrt.approx.ftz.f32 $0, $0;",
            "=f,f", [u], tl.float32, True, 1,
        )  # fmt: skip
    else:
        return tl.sqrt(tl.abs(tl.log2(u)))


@triton.jit
def _rounded_product(x, y, ASM: tl.constexpr):
    """x y, which no later sum takes in, also where a kernel is compiled with contraction."""
    if ASM:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, True, 1)
    else:
        return x * y


@triton.jit
def _circle(i2, ASM: tl.constexpr, EMULATE: tl.constexpr):
    """Cosine and sine of an angle in the first quarter, from the top bits of i2."""
    # Uniform in [-1/2, 1/2): of a quarter turn, from its middle.
    a = ((i2 >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.5
    z = a * a
    value = fma(z, 0.05512253, -0.45665085882, EMULATE)
    value = fma(z, value, 1.1107191455, EMULATE)
    s = _rounded_product(a, value, ASM)
    c = fma(z, -0.01442851647, 0.1793213209912, EMULATE)
    c = fma(z, c, -0.872355524, EMULATE)
    c = fma(z, c, 0.70710676169, EMULATE)
    return c - s, c + s


@triton.jit
def _pair(i1, i2, ASM: tl.constexpr, EMULATE: tl.constexpr):
    """Two normals from two uint32: radius from i1, angle and signs from i2."""
    first, second = _circle(i2, ASM, EMULATE)
    radius = _radius_exact(i1, ASM, EMULATE)
    return _flipped(radius * first, i2), _signed(radius * second, i2 << 30)


@triton.jit
def _pair_fast(i1, i2, factor, ASM: tl.constexpr, EMULATE: tl.constexpr):
    """``factor`` times two normals. The products come last, so that sums they go into take them in."""
    if ASM:
        m = ((i2 >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
        angle = tl.fma(m, 1.5707963267948966, -1.5707963267948966)
        first = tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
        second = tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
    else:
        first, second = _circle(i2, ASM, EMULATE)
    radius = _radius_fast(i1, ASM) * (1.1774100225154747 * factor)
    return radius * _flipped(first, i2), radius * _signed(second, i2 << 30)


@triton.jit
def normals(seed, stream, sample, group, lane, factor, FAST: tl.constexpr, ASM: tl.constexpr, EMULATE: tl.constexpr):
    """The normal of each element 4 ``group`` + ``lane`` of its ``sample``; FAST: times ``factor``.

    Written for one element, and four normals are computed for each; but neighbours have the same counter, and the
    compiler finds that the four of a thread are the same work.
    """
    c0 = group.to(tl.uint32)
    zero = c0 * 0
    c1 = zero + stream.to(tl.uint32)
    c2 = zero + sample.to(tl.uint32)
    c3 = zero + (sample >> 32).to(tl.uint32)
    o0, o1, o2, o3 = words(c0, c1, c2, c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32), ASM)
    if FAST:
        n0, n1 = _pair_fast(o0, o1, factor, ASM, EMULATE)
        n2, n3 = _pair_fast(o2, o3, factor, ASM, EMULATE)
    else:
        n0, n1 = _pair(o0, o1, ASM, EMULATE)
        n2, n3 = _pair(o2, o3, ASM, EMULATE)
    return tl.where(lane < 2, tl.where(lane == 0, n0, n1), tl.where(lane == 2, n2, n3))
