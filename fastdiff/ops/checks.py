"""What every operation asks of its tensors, before anything is launched, and the placing of rows."""

from __future__ import annotations

import torch
from torch import Tensor


def check_floating(**tensors: Tensor) -> None:
    """Raise TypeError for what is no floating-point tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}.")
        if not tensor.is_floating_point():
            raise TypeError(
                f"{name} must be floating point (float16, bfloat16, float32 or float64); got {tensor.dtype}. "
                f"Scale images to about [-1, 1] first, for example {name}.float() / 127.5 - 1."
            )


def check_alike(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all are of one shape and on one device. The first is what the others are held to; those
    that are None are passed over."""
    (first_name, first), *others = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but {first_name} on {first.device}: move one with .to(device)."
            )
        if tensor.shape != first.shape:
            hint = ""
            if tensor.ndim == first.ndim > 1 and tensor.shape[1] == 2 * first.shape[1]:
                hint = " A network that predicts a variance too: split its channels with .chunk(2, dim=1) first."
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but {first_name} {tuple(first.shape)}; they must be equal."
                + hint
            )


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def place_rows(name: str, rows: Tensor, shape: torch.Size) -> Tensor:
    """View ``rows`` so that it broadcasts to a tensor of ``shape``.

    Rows are one number for all ([]), for leading dimensions ([B], [B, F], ...) or given with as many dimensions as the
    tensor, 1 where shared ([B, 1, F, 1, 1]). Raises ValueError for anything else.
    """
    if rows.ndim == len(shape) and all(r in (1, s) for r, s in zip(rows.shape, shape)):
        return rows
    if rows.ndim < len(shape) and rows.shape == shape[: rows.ndim]:
        return rows.reshape(rows.shape + (1,) * (len(shape) - rows.ndim))
    if rows.numel() == 1:
        return rows.reshape((1,) * len(shape))
    full = [1] * len(shape)
    if rows.ndim == 2 and len(shape) > 2 and rows.shape[1] in shape[2:]:
        full[0], full[2 + list(shape[2:]).index(rows.shape[1])] = rows.shape[0], rows.shape[1]
        hint = f" For frames behind the channels pass it as {tuple(full)}."
    else:
        hint = ""
    raise ValueError(
        f"{name} has shape {tuple(rows.shape)}, which fits no rows of {tuple(shape)}: it must be a single value, have "
        f"the leading dimensions (such as {tuple(shape[:1])}), or {len(shape)} dimensions, 1 where shared.{hint}"
    )


def place_all(shape: torch.Size, dtype: torch.dtype, device: torch.device, **rows: Tensor | float | None):
    """``place_rows`` for several rows, numbers and Nones among them, in ``dtype`` on ``device``: a list in order."""
    placed = []
    for name, value in rows.items():
        if isinstance(value, Tensor):
            value = place_rows(name, value.to(device, dtype), shape)
        elif value is not None:  # filled on the device: a copy to it would wait
            value = torch.full((1,) * len(shape), value, dtype=dtype, device=device)
        placed.append(value)
    return placed


def check_clip(clip: float | None) -> None:
    """Raise ValueError unless ``clip`` is None or a positive bound."""
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, or None for no clamping; got {clip!r}.")
