"""The checks that every operation makes before it launches anything, and the placing of coefficients.

An error says what was given, what is accepted and what to do. Values (a t out of range, an empty mask) are looked at on
the CPU only: on an accelerator that would wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..numeric import check_numbers
from ..tensors import Gathered, as_tensor

IMAGES_TO = (torch.float32, torch.bfloat16, torch.float16)  # what x_t may be stored in where a dtype is given


def check_tensor(what: str, value: Any, name: str) -> None:
    """Raise TypeError for a value that is no tensor. If it holds a tensor (a loader's batch, a network's output), the
    error says where.

    Args:
        what: what the error calls the value.
        name: the variable that holds it in the user's code.
    """
    if isinstance(value, Tensor):
        if type(value) is not Tensor:
            refuse_dtensor(name, value)
        return
    given, found = type(value).__name__, ""
    if isinstance(getattr(value, "sample", None), Tensor):  # the outputs of diffusers' networks
        found = f": its tensor is {name}.sample"
    elif isinstance(getattr(getattr(value, "latent_dist", value), "parameters", None), Tensor):  # their autoencoders'
        found = f": its moments are {name}{'.latent_dist' * hasattr(value, 'latent_dist')}.parameters"
    elif isinstance(value, Mapping):
        data = [key for key, v in value.items() if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 1]
        if len(data) == 1:
            found = f": its data is {name}[{data[0]!r}]"
        else:
            found = f": pass one of its entries, {', '.join(map(repr, value))}"
    elif isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
        found = f": its first tensor is {name}[0]"
    elif hasattr(value, "__array__"):
        found = f": write torch.from_numpy({name})"
    raise TypeError(f"{what} must be a tensor; got {given}{found}.")


def refuse_dtensor(name: str, tensor: Tensor) -> None:
    """Raise TypeError for a ``DTensor``: its noise and its sums would be those of each process."""
    if hasattr(tensor, "device_mesh") and hasattr(tensor, "to_local"):
        raise TypeError(
            f"{name} is a DTensor, of which each process has a part: pass {name}.to_local(). objective.noise is told "
            "which part of the data that is by part=fastdiff.distributed.Part.of(x0); losses of it are those of the "
            "whole."
        )


def check_floating(**tensors: Tensor) -> None:
    """Raise TypeError for a value that is no dense floating-point tensor."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            if type(tensor) is not Tensor:
                refuse_dtensor(name, tensor)
            if tensor.layout is not torch.strided or tensor.is_nested:
                kind = "a nested tensor: use torch.nested.to_padded_tensor and a mask, or packed sequences (lengths=)"
                given = kind if tensor.is_nested else f"one of {tensor.layout}: use {name}.to_dense()"
                raise TypeError(f"{name} must be dense; got {given}.")
            continue
        check_tensor(name, tensor, name)
        scale = ""
        if name in ("x0", "x", "known"):
            scale = f" Scale images to about [-1, 1] first, for example {name}.float() / 127.5 - 1."
        raise TypeError(
            f"{name} must be floating point (float16, bfloat16, float32 or float64); got {tensor.dtype}.{scale}"
        )


def is_image(x0: Any) -> bool:
    """Whether x0 is a tensor of uint8, which stands for x0 / 127.5 - 1."""
    return isinstance(x0, Tensor) and x0.dtype == torch.uint8


def check_data(x0: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise TypeError or ValueError unless x0 is floating point, or uint8 together with ``dtype``, that of x_t."""
    if dtype is None and type(x0) is Tensor and x0.is_floating_point():
        return
    if dtype is not None and dtype not in IMAGES_TO:
        accepted = ", ".join(map(str, IMAGES_TO))
        raise ValueError(f"dtype, of x_t, must be one of {accepted}, or None for that of x0; got {dtype!r}.")
    if not is_image(x0):
        check_floating(x0=x0)
    elif dtype is None:
        raise TypeError(
            "x0 must be floating point, or uint8 with dtype=, the dtype of x_t; got torch.uint8 without dtype. With "
            "dtype=torch.bfloat16, say, images are decoded while they are noised, as x0.float() / 127.5 - 1 is."
        )


def check_alike(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors have the shape and the device of the first. None is passed over."""
    first: Tensor | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first_name, first, shape, device = name, tensor, tensor.shape, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but {first_name} on {device}: move one with .to(device).")
        elif tensor.shape != shape:
            hint = ""
            if tensor.ndim == first.ndim > 1 and tensor.shape[1] / max(shape[1], 1) in (2, 0.5):
                hint = " A network that predicts a variance too: split its channels with .chunk(2, dim=1) first."
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but {first_name} {tuple(shape)}; they must be equal." + hint
            )


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def place_rows(name: str, rows: Tensor, shape: torch.Size) -> Tensor:
    """View coefficients so that they broadcast to a tensor of ``shape``.

    Args:
        name: what an error calls them.
        rows: one number for all elements ([]); one for each entry of the leading dimensions ([B], [B, F], ...); or a
            tensor with as many dimensions as the data, of size 1 where elements share a number ([B, 1, F, 1, 1]).

    Raises ValueError for any other shape.
    """
    placed = placed_shape(name, rows.shape, shape)
    return rows if placed == rows.shape else rows.reshape(placed)


def placed_shape(name: str, own: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """The shape ``own`` of rows with as many dimensions as ``shape``: see ``place_rows``."""
    own, shape = tuple(own), tuple(shape)
    missing = len(shape) - len(own)
    if missing > 0 and own == shape[: len(own)]:
        return own + (1,) * missing
    if missing == 0 and all(r in (1, s) for r, s in zip(own, shape)):
        return own
    if math.prod(own) == 1:
        return (1,) * len(shape)
    full = [1] * len(shape)
    if len(own) == 2 and own[1] in shape[2:]:
        full[0], full[2 + list(shape[2:]).index(own[1])] = own
        hint = f" For frames behind the channels pass it as {tuple(full)}."
    else:
        hint = ""
    raise ValueError(
        f"{name} has shape {own}, which fits no rows of {shape}: it must be a single value, have "
        f"the leading dimensions (such as {shape[:1]}), or {len(shape)} dimensions, 1 where shared.{hint}"
    )


def check_unambiguous(name: str, own: Sequence[int], shape: Sequence[int]) -> None:
    """Raise ValueError if ``own`` is [B, F] and ``shape`` belongs to a video with as many channels as frames: then F
    could be either."""
    if len(own) == 2 and len(shape) >= 5 and own[1] == shape[1] == shape[2] > 1:
        behind, first = ([1] * len(shape) for _ in range(2))
        behind[0], behind[2] = first[0], first[1] = own
        raise ValueError(
            f"{name} has shape {tuple(own)}, which could be one a frame or one a channel of {tuple(shape)}: pass it as "
            f"{tuple(behind)} for frames behind the channels, as {tuple(first)} for frames before them."
        )


def place_all(shape: torch.Size, dtype: torch.dtype, device: torch.device, **rows: Tensor | float | None):
    """``place_rows`` for several coefficients, each a tensor, a number or None: a list in order, in ``dtype`` on
    ``device``."""
    placed = []
    for name, value in rows.items():
        if isinstance(value, Gathered):  # placed already
            assert value.dtype == dtype
        elif isinstance(value, Tensor):
            if value.dtype != dtype or value.device != device:
                value = value.to(device, dtype)
            value = place_rows(name, value, shape)
        elif value is not None:  # filled on the device: a copy to it would wait
            value = torch.full((1,) * len(shape), value, dtype=dtype, device=device)
        placed.append(value)
    return placed


def check_clip(clip: float | None) -> None:
    """Raise TypeError or ValueError unless ``clip`` is None or a positive bound."""
    if clip is not None:
        check_numbers(clip=clip)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, or None for no clamping; got {clip!r}.")


def place_given(name: str, rows: Tensor | float, row_shape: torch.Size, like: Tensor) -> Tensor | float:
    """Numbers that a user gives, one a row or one for all, placed for ``like``."""
    if isinstance(rows, Tensor):
        if type(rows) is not Tensor:
            refuse_dtensor(name, rows)
        placed = shape_of_rows(row_shape, like)
        if rows.ndim == like.ndim and all(r in (1, s) for r, s in zip(rows.shape, placed)):
            return rows.to(like.device).expand(placed)
        return place_rows(name, place_rows(name, rows.to(like.device), row_shape).expand(row_shape), like.shape)
    check_numbers(**{name: rows})
    return rows


def shape_of_rows(row_shape: torch.Size, like: Tensor) -> tuple[int, ...]:
    """``row_shape`` with as many dimensions as ``like``, 1 where elements share a row."""
    return (*row_shape, *(1,) * (like.ndim - len(row_shape)))


def in_dtype(row: Any, dtype: torch.dtype, like: Tensor) -> Any:
    """A placed coefficient, a number or None, as a record takes it."""
    if row is None or getattr(row, "dtype", None) == dtype:
        return row
    if isinstance(row, (int, float)):  # filled on the device: a copy to it would wait
        return torch.full((1,) * like.ndim, row, dtype=dtype, device=like.device)
    return as_tensor(row).to(dtype)


def check_order(x0: Tensor, t: Any, noise: Any, order: str) -> None:
    """Raise ValueError where ``noise``, which does not fit x0, is t by its shape."""
    if not isinstance(noise, Tensor) or noise.ndim >= x0.ndim or noise.shape != x0.shape[: noise.ndim]:
        return
    if t is None:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, but x0 {tuple(x0.shape)}: if it is t, write t=.")
    if isinstance(t, Tensor) and t.shape == x0.shape:
        raise ValueError(
            f"t has shape {tuple(t.shape)}, and noise {tuple(noise.shape)}: swapped? The order is {order}."
        )
