"""The affine kernel: noising, normals, conversion, and the gradients of these."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import modes
from ...tensors import as_tensor
from ..interface import differentiable
from . import launch
from .arguments import fits, source_of, untouched
from .coefficients import arrange
from .plan import plan, tile_of


def affine_launch(
    shape: tuple[int, ...], device: torch.device, u: Tensor | None, a: Any, v: Any, b: Any,
    out: Tensor | None, kept: Tensor | None = None, gamma: float = 0.0, xi: Any = None,
    target: Tensor | None = None, p: Any = None, q: Any = None,
) -> tuple[tuple[int, int], tuple, tuple]:  # fmt: skip
    """The launch of out = a u + b (v + gamma xi), kept = v, target = p u + q v: (grid, arguments, constants). Tensors
    are contiguous; v and xi may be a ``Philox``."""
    rows = arrange(shape, a, b, p, q)
    (seed, stream, sample_offset, strength), (kind, seed_kind, offset) = source_of(v, device)
    (xi_seed, xi_stream, xi_offset, xi_strength), (xi_kind, xi_seed_kind, xi_has_offset) = source_of(xi, device)
    made = kind in ("exact", "fast") or xi_kind in ("exact", "fast")
    written = out if out is not None else kept
    tile = tile_of(written.numel(), written.element_size())
    how = plan(shape, rows.shape, tile, made, offset or xi_has_offset)
    return (
        how.grid,
        (
            *(out, kept, target, u, v if kind == "tensor" else None, xi if xi_kind == "tensor" else None),
            *(*rows.pointers, rows.index, seed, xi_seed),
            *(stream, sample_offset, strength, xi_stream, xi_offset, xi_strength, gamma),
            *(rows.steps, rows.stride, *how.numbers, how.sample_runs, how.channel_runs),
        ),
        (
            *(*rows.kinds, rows.index_kind, kind, seed_kind, offset, xi_kind, xi_seed_kind, xi_has_offset),
            *(*how.constants, launch.has_approximate_instructions(device), launch.INTERPRETED),
        ),
    )


def affine(shape: tuple[int, ...], device: torch.device, *operands: Any) -> None:
    """Launch the kernel: see ``affine_launch``."""
    launch.affine(device, *affine_launch(shape, device, *operands))


def scaled(gradient: Tensor, wanted: Any) -> list[Tensor | None]:
    """row * gradient, rounded once, for each (row, dtype, whether it is wanted)."""
    results: list[Tensor | None] = []
    for row, dtype, needed in wanted:
        if not needed:
            results.append(None)
        elif (
            differentiable(gradient)
            or not fits(gradient)
            or not gradient.numel()
            or not untouched()
            or modes.is_many(gradient)
        ):
            results.append((as_tensor(row) * gradient.to(torch.float32)).to(dtype))
        else:
            out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
            affine(tuple(out.shape), out.device, gradient.contiguous(), row, None, None, out)
            results.append(out)
    return results
