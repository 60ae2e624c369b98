"""Counter-based noise: Philox4x32-10 and the normal transform that has the same bits on every device.

Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". uint32 words are kept in int64 tensors.
Element i of a sample is lane i mod 4 of group i div 4. Counter = (group, stream, sample id low, sample id high),
key = (seed low, seed high): noise depends on nothing but (seed, stream, sample, element). Bits of a group from 2^32 on
are flipped in the top 8 bits of the stream.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ...philox import Window, seed_tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def _rounds(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, ...]:
    for _ in range(10):
        # A 32 x 32 bit product wraps around in int64, but its 64 bits are the right ones.
        product0, product1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def philox4x32(counter: Tensor, key: tuple[int | Tensor, int | Tensor]) -> Tensor:
    """Philox4x32-10 of ``counter`` (int64 [..., 4] holding uint32) under ``key`` (two uint32): int64 [..., 4]."""
    k0, k1 = (torch.as_tensor(word, dtype=torch.int64, device=counter.device) for word in key)
    return torch.stack(torch.broadcast_tensors(*_rounds(*counter.unbind(-1), k0, k1)), -1)


def _lacks_float64(device: torch.device | str | None) -> bool:
    """Apple's MPS has none, and the transform needs it to emulate fma: there, noise comes from the CPU."""
    return device is not None and torch.device(device).type == "mps"


def _on_cpu(value: int | Tensor) -> int | Tensor:
    return value.cpu() if isinstance(value, Tensor) else value


def _words(
    seed: int | Tensor, samples: int, group: Tensor, stream: int, sample_offset: int | Tensor, device
) -> tuple[Tensor, ...]:
    """The four uint32 words of every group, int64 [groups]: int64, each [samples, groups]."""
    seed = seed_tensor(seed, device)
    if isinstance(sample_offset, Tensor):
        sample = sample_offset.to(device)
    else:
        sample = torch.arange(sample_offset, sample_offset + samples, dtype=torch.int64, device=device)
    sample = sample.reshape(samples, 1)
    words = _rounds(
        group & _MASK,
        (group >> 32 << 24) ^ stream,
        sample & _MASK,
        (sample >> 32) & _MASK,
        seed & _MASK,
        (seed >> 32) & _MASK,
    )
    return torch.broadcast_tensors(*words)


def uniform(
    seed: int | Tensor,
    samples: int,
    stream: int,
    sample_offset: int | Tensor = 0,
    device=None,
    count: int | None = None,
) -> Tensor:
    """Uniforms in the open interval (0, 1), 52 random bits each: float64 [samples], or [samples, count].

    Uniform k of a sample is made of the first two words of group k div 2, or of the last two where k is odd.
    """
    if _lacks_float64(device):
        return uniform(_on_cpu(seed), samples, stream, _on_cpu(sample_offset), None, count).float().to(device)
    several = 1 if count is None else count
    groups = torch.arange((several + 1) // 2, dtype=torch.int64, device=device)
    o0, o1, o2, o3 = _words(seed, samples, groups, stream, sample_offset, device)
    bits = torch.stack([(o0 << 20) | (o1 >> 12), (o2 << 20) | (o3 >> 12)], -1)
    found = (bits.flatten(1)[:, :several].double() + 0.5) * 2.0**-52
    return found[:, 0] if count is None else found


def normal(
    seed: int | Tensor,
    shape: tuple[int, ...],
    stream: int = 0,
    sample_offset: int | Tensor = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    window: Window | None = None,
) -> Tensor:
    """Standard normals of ``shape`` = [samples, ...] from 64-bit ``seed`` (a number, or an int64 tensor of one).

    The bits of a value depend on (seed, stream, sample, its place in the sample) alone. Samples count from
    ``sample_offset``, or have the ids that it holds, int64 [samples]. With a ``window``, ``shape`` is a slice of each.
    They are float32 values whatever ``dtype`` they are returned in.
    """
    samples, elements = shape[0], 1
    for size in shape[1:]:
        elements *= size
    if samples == 0 or elements == 0:
        return torch.empty(shape, dtype=dtype, device=device)
    if _lacks_float64(device):
        return normal(_on_cpu(seed), shape, stream, _on_cpu(sample_offset), dtype, window=window).to(device)
    if window is not None:
        place = torch.zeros((), dtype=torch.int64, device=device)
        for size, own, start in zip(window.shape, shape[1:], window.start):
            place = place[..., None] * size + torch.arange(start, start + own, dtype=torch.int64, device=device)
        place = place.flatten()
        group, lane = place // 4, place % 4
        o0, o1, o2, o3 = _words(seed, samples, group, stream, sample_offset, device)
        normals = *_box_muller(o0, o1), *_box_muller(o2, o3)
        return torch.stack(normals).gather(0, lane.expand(1, samples, elements)).reshape(shape).to(dtype)
    groups = (elements + 3) // 4
    group = torch.arange(groups, dtype=torch.int64, device=device)
    o0, o1, o2, o3 = _words(seed, samples, group, stream, sample_offset, device)
    lanes = torch.stack([*_box_muller(o0, o1), *_box_muller(o2, o3)], -1)
    return lanes.reshape(samples, groups * 4)[:, :elements].reshape(shape).to(dtype)


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


# -2 ln(1 + t) / t for t in [-0.293, 0.414), highest coefficient first.
_LOG = [
    _float32(c)
    for c in (
        0.20757412910461426,
        -0.326762855052948,
        0.34424856305122375,
        -0.397684723138809,
        0.49943119287490845,
        -0.6667121648788452,
        1.000006914138794,
        -1.9999998807907104,
    )
]
_LOG_OF_EXPONENT = _float32(-1.6525916635146132e-07)  # -2 ln 2 / 2^23
_LOG_OF_SCALE = _float32(44.361419677734375)  # 2 * 32 ln 2
# sin and cos of a quarter turn, over sqrt(2), in z = a^2 for a in [-1/2, 1/2).
_SIN = [_float32(c) for c in (0.05512253, -0.45665085882, 1.1107191455)]
_COS = [_float32(c) for c in (-0.01442851647, 0.1793213209912, -0.872355524, 0.70710676169)]


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """float32 a * b + c with one rounding, on devices and in libraries that have no such operation.

    The product is exact in float64. The sum is rounded to odd there, so that the rounding to float32 is the only one.
    """
    product = a.double() * (b.double() if isinstance(b, Tensor) else b)
    c = c.double() if isinstance(c, Tensor) else c
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = total.view(torch.int64)
    towards = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where((error != 0) & (bits & 1 == 0), bits + towards, bits)
    return odd.view(torch.float64).float()


def _polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    value: Tensor | float = coefficients[0]
    for c in coefficients[1:]:
        value = _fma(x, value, c)
    return value


def _sqrt(x: Tensor) -> Tensor:
    # Through float64: PyTorch's float32 square root is not correctly rounded on every CPU; this is.
    return x.double().sqrt().float()


def _box_muller(i1: Tensor, i2: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals from two uint32: radius from i1, angle and signs from i2. Every step is one IEEE float32 operation
    (add, multiply, fma, square root), so that C++, CUDA and Triton give the same bits."""
    u = (i1 | 1).float()  # 2^32 times a uniform in (0, 1]
    bits = u.view(torch.int32).long()
    exponent = (bits - 0x3F3504F3) & 0xFF800000  # splits around sqrt(1/2)
    exponent = exponent - ((exponent & 0x80000000) << 1)  # as a signed word
    t = (bits - exponent).int().view(torch.float32) - 1
    y = _fma(_polynomial(t, _LOG), t, _fma(exponent.float(), _LOG_OF_EXPONENT, _LOG_OF_SCALE))  # -2 ln u
    radius = _sqrt(y.clamp(min=1e-30))

    a = ((i2 >> 9) + 0x3F800000).int().view(torch.float32) - 1.5
    z = a * a
    sine, cosine = a * _polynomial(z, _SIN), _polynomial(z, _COS)
    n1, n2 = radius * (cosine - sine), radius * (cosine + sine)
    return torch.where(i2 & 1 == 1, -n1, n1), torch.where(i2 & 2 == 2, -n2, n2)
