"""Packed sequences: a batch of sequences of different lengths, one after another, without padding."""

from __future__ import annotations

import math
from itertools import accumulate
from operator import index
from typing import Any

import torch
from torch import Tensor

from . import element_weights, ops
from .calls import Packed
from .ops.checks import compute_dtype
from .ops.noise import made_noise
from .philox import INTEGERS, Philox
from .process import as_times
from .showing import brief


def packed_of(x0: Tensor, lengths: Any, tokens: Any = None) -> Packed:
    """Where the sequences of ``x0``, [tokens, ...] or [1, tokens, ...], lie.

    Raises TypeError or ValueError for lengths that are not whole numbers on the host, one a sequence, which add up to
    the tokens; for other data; and beside ``tokens``, which is for images.
    """
    if tokens is not None:
        raise ValueError("tokens= is for images, and lengths= for data that is tokens already: pass one of them.")
    dim = 1 if x0.ndim > 2 and x0.shape[0] == 1 else 0
    size = math.prod(x0.shape[dim + 1 :])
    if x0.ndim < 2 or size == 0:
        raise ValueError(
            f"packed sequences are [tokens, ...] or [1, tokens, ...], and a token has elements; got x0 "
            f"{tuple(x0.shape)}."
        )
    if torch.compiler.is_compiling() and isinstance(lengths, Tensor):  # its values are not known
        ends = lengths.long().cumsum(0) * size
        return Packed(torch.nn.functional.pad(ends, (1, 0)), dim)
    starts = [n * size for n in accumulate(_checked(lengths, x0.shape[dim], x0.shape), initial=0)]
    return Packed(torch.tensor(starts, dtype=torch.int64, device="cpu"), dim)


def _checked(lengths: Any, tokens: int, shape: torch.Size) -> list[int]:
    found = lengths
    if isinstance(lengths, Tensor):
        if not lengths.is_cpu:
            raise ValueError(f"lengths are on {lengths.device}: keep them on the CPU, where all of this is planned.")
        found = lengths.tolist() if lengths.dtype in INTEGERS and lengths.ndim == 1 else None
    try:
        found = list(map(index, found))
    except TypeError:
        raise TypeError(f"lengths must be whole numbers, one a sequence; got {brief(lengths)}.") from None
    total = sum(found)
    if total == tokens and min(found, default=0) >= 0:
        return found
    hint = ""
    if found and found[0] == 0 and found[-1] == tokens:
        hint = " These are cumulative: pass their differences, cu_seqlens.diff()."
    raise ValueError(
        f"lengths must be at least 0 and add up to the {tokens} tokens of x0 {tuple(shape)}; got {brief(lengths)}, in "
        f"all {total}.{hint}"
    )


def of_rows(packed: Packed | None, row_shape: torch.Size) -> Packed | None:
    """``packed`` where rows of ``row_shape``, that of t, are its sequences; None where they are something else."""
    return packed if packed is not None and row_shape == (packed.sequences,) else None


def placed_for(data: Tensor, packed: Packed | None) -> Tensor:
    """What rows are placed for: the data, or, where they are packed sequences, a tensor with one entry for each."""
    return data if packed is None else data.new_empty(packed.rows(data.shape))


def times_of(t: Any, packed: Packed, x0: Tensor) -> Tensor | None:
    """``t`` as one a sequence, [sequences], or one a token, shaped to be placed for ``x0``; None stays."""
    if t is None:
        return None
    if not isinstance(t, Tensor) or t.device != x0.device:
        t = as_times(t, x0.device)
    if t.numel() == 1:
        return t.reshape(()).expand(packed.sequences)
    if t.shape == (packed.sequences,) or t.ndim == x0.ndim or t.shape == x0.shape[: packed.dim + 1]:
        return t
    if t.shape != (x0.shape[packed.dim],):
        raise ValueError(
            f"t has shape {tuple(t.shape)}; it must be one for all, one a sequence, [{packed.sequences}], or one a "
            f"token, [{x0.shape[packed.dim]}]."
        )
    return t.unsqueeze(0)


def materialize(noise: Philox | None, packed: Packed, x0: Tensor) -> Tensor | None:
    """The noise of ``x0`` as a tensor, in the compute dtype."""
    n = ops.dispatch.get(x0.device).materialize(noise, x0.shape, x0.device, packed=packed)
    return n if n is None else n.to(compute_dtype(x0))


def offset_noise(
    x0: Tensor, packed: Packed, seed: int | Tensor, samples: int | Tensor, strength: float, dim: int, rng: str
) -> Tensor:
    """Noise with offsets, made one sequence after another, each as a batch of one, [1, tokens, ...]."""
    made = []
    for k, sequence in enumerate(packed.split(x0)):
        of = samples[k : k + 1] if isinstance(samples, Tensor) else samples + k
        sequence = sequence if packed.dim else sequence.unsqueeze(0)
        made.append(made_noise(sequence, seed, of, strength, dim, rng))
    return torch.cat(made, 1).view(x0.shape) if made else x0.new_empty(x0.shape, dtype=compute_dtype(x0))


def carried(
    packed: Packed, weight: Tensor, mask: Tensor | None, normalization: str, reduction: str, rows: tuple[int, ...],
    data: Tensor, dtype: torch.dtype,
) -> tuple[Tensor, Tensor | float]:  # fmt: skip
    """``element_weights.carried`` for packed sequences."""
    if rows != packed.rows(data.shape):  # one time a token
        if normalization == "sample":
            raise ValueError(
                "weights of elements, with one time a token, are divided by mask_normalization 'none', 'row' or "
                "'global'; got 'sample'. With one time a sequence it is there too."
            )
        return element_weights.carried(weight, mask, normalization, reduction, rows, data, dtype)
    both, _ = element_weights.carried(weight, mask, "none", reduction, rows, data, dtype)
    if normalization == "none":
        return both, 1.0
    sizes = packed.sizes.double().to(data.device, non_blocking=True).view(rows)
    sums = sizes if mask is None else packed.sums(mask.double().expand(data.shape)).view(rows)
    empty = sums == 0
    if normalization == "global":
        sums = sums.sum() / max(1, packed.sequences)
    # What the loss divides by if there is no normalization: of "none" the row's elements, else the mean number of them.
    divided = sizes if reduction == "none" else data.numel() / max(1, packed.sequences)
    factor = torch.where(sums == 0, 0.0, divided / torch.where(sums == 0, 1.0, sums))
    if normalization == "row" and reduction == "mean":  # what has nothing in its mask is left out of the mean
        factor = factor * (packed.sequences / (~empty).sum().clamp(min=1))
    return both, factor
