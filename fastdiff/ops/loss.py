"""The loss operation: target, weighted error, mask and reduction in one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.interface import able
from ..calls import LossCall, Packed
from ..codes import REDUCTIONS
from ..losses import FUNCTIONS, NEED_C, Loss
from ..philox import Philox
from ..showing import warn
from ..tensors import as_tensor, number, value_checks_are_free
from . import dispatch
from .checks import check_alike, check_floating, check_tensor, compute_dtype, is_image, place_all
from .noise import check_noise

MASK_NORMALIZATIONS = ("none", "row", "sample", "global")


def loss(
    prediction: Tensor,  # [B, ...]
    x0: Tensor | None,  # [B, ...]
    n: Tensor | Philox | None,  # [B, ...]
    *,
    p: Tensor | float | None = None,  # [B], or another shape that place_rows takes
    q: Tensor | float | None = None,  # as p
    weight: Tensor | float = 1.0,  # as p
    scale: Tensor | float | None = None,  # as p
    c: Tensor | float | None = None,  # as p
    y: Tensor | None = None,  # [B, ...]
    r: Tensor | float | None = None,  # as p
    mask: Tensor | None = None,  # broadcasts to [B, ...]
    function: str | Loss = "mse",
    mask_normalization: str = "none",
    reduction: str = "mean",
    row_shape: tuple[int, ...] | None = None,
) -> Tensor:
    """weight * mask * rho(scale * (prediction - (p x0 + q n + r y)); c), reduced.

    Args:
        prediction: the network's output, any floating-point dtype, [batch, ...].
        x0, n: data and noise, shaped as prediction. x0 may be uint8 images, as in ``noise``. x0 is not read where p is
            None, n not where q is None. A ``Philox`` makes the noise again.
        p, q, weight, scale, c, r: rows (``fastdiff.ops.checks.place_rows``) or numbers. ``weight`` may require grad.
        y: a third operand of the target, shaped as prediction (another output of the network, say); not read where r is
            None.
        mask: bool or float, broadcastable to prediction. One with fewer dimensions is aligned at the left: [batch], or
            [batch, frames]. An element under a mask of 0, and a row of weight 0, add 0 to the loss and to the gradient,
            whatever they hold.
        function: "mse" e^2, "l1" abs(e), "smooth_l1" and "pseudo_huber" with constant c, "log_cosh". Or an object of
            ``fastdiff.losses`` that has its constants itself: ``Huber(0.1)``, ``Combined(mse=0.5, l1=0.3)``.
        mask_normalization: what the sum of the errors is divided by:
            "none": the number of elements.
            "row": each row by the sum of its mask. A row with an empty mask is 0, and is left out of the mean.
            "sample": each sample by the sum of its mask. The rows of a sample (frames, tokens) then count by how much
            is in their masks. A sample with an empty mask is left out of the mean.
            "global": the sum of the whole mask.
        reduction: "mean" over all; "sum" without any division; "none": one mean a row, [batch] with "sample";
            "elements": the error of each element, to be reduced by the caller; with mask_normalization "none".
        row_shape: the shape of "none"'s result and of the rows; default: that of ``weight``, or [batch].

    Returns a scalar, ``row_shape``, or the shape of prediction: float32 (float64 with float64 inputs). Sums are taken
    in float64. Differentiable in prediction, a floating x0, n, y and weight. A batch of size 0 has the sum 0 and, as in
    PyTorch, the mean NaN.

    Raises TypeError or ValueError for unfit inputs. Warns, on the CPU, where looking costs nothing, of a mask that is 0
    everywhere: the loss and its gradient are 0.
    """
    x0, n, y = (x0 if p is not None else None), (n if q is not None else None), (y if r is not None else None)
    mask = check_loss(prediction, x0, n, mask, mask_normalization, reduction, y)
    if isinstance(function, Loss):
        function, c, weight = _parameters(function, c, weight)
    else:
        _one_of("function", function, FUNCTIONS)
        if function in NEED_C and c is None:
            raise ValueError(f"{function} needs its constant c.")
        c = c if function in NEED_C else None
    given = n if isinstance(n, Tensor) else None
    dtype = compute_dtype(prediction, x0, given, y)
    shape, device = prediction.shape, prediction.device
    if row_shape is None:
        shared = not isinstance(weight, Tensor) or weight.numel() == 1
        row_shape = tuple(shape[:1]) if shared else tuple(weight.shape)
    p, q, weight, scale, c, r = place_all(shape, dtype, device, p=p, q=q, weight=weight, scale=scale, c=c, r=r)
    placed_shape = tuple(row_shape) + (1,) * (len(shape) - len(row_shape))
    weight = weight.expand(placed_shape)
    result = normalized(
        LossCall(prediction, x0, n, p, q, scale, weight, c, mask, y, r, function, mask_normalization, reduction)
    )
    return result.reshape(row_shape) if reduction == "none" and mask_normalization != "sample" else result


def _parameters(loss: Loss, c: Any, weight: Any) -> tuple[Any, float | None, Any]:
    """(function, c, weight) of an error function that has its constants itself."""
    if c is not None:
        raise ValueError(f"{loss!r} has its constant itself: leave c out, or name the function.")
    c, factor = loss.fixed
    if factor is None or (loss.uses_c and c is None):
        raise ValueError(f"{loss!r} follows the noise level, which an operation does not know: use an Objective.")
    return loss.function, c, weight if factor == 1 else weight * factor


def normalized(call: LossCall, sequences: Packed | None = None) -> Tensor:
    """The loss of ``call``. "sample" is made of its means of rows, for all backends alike. With ``sequences``, rows are
    the tokens of packed sequences, and those are the samples."""
    device = call.prediction.device
    if call.mask_normalization != "sample":
        return dispatch.run(call, device)
    return _of_samples(call, dispatch.run(_by_row(call), device), _sizes_of_samples(call, sequences), sequences)


def normalized_with_gradient(
    upstream: Tensor | float, call: LossCall, sequences: Packed | None = None
) -> tuple[Tensor, Tensor]:
    """(``normalized``, its gradient by the prediction times ``upstream``) of a mean or a sum, without autograd, which
    would give the same bits."""
    backend = dispatch.get(call.prediction.device)
    if call.mask_normalization != "sample":
        return able(backend, call).value_and_gradient(upstream, call)
    shape, counts, call_of_rows = call.prediction.shape, _sizes_of_samples(call, sequences), _by_row(call)
    rows = call_of_rows.weight.shape
    upstream = number(upstream, call.weight.dtype, call.prediction.device).double()
    each = upstream / (counts != 0).sum().clamp(min=1) / torch.where(counts == 0, 1.0, counts)
    if sequences is not None:
        each = sequences.spread(each, shape).expand(shape).sum_to_size(rows)
    else:
        each = (each * _elements(call, rows)).view(-1, *(1,) * (len(rows) - 1)).expand(rows)
    each = each.to(call.weight.dtype)
    found, gradient = able(backend, call_of_rows).value_and_gradient(each, call_of_rows)
    return _of_samples(call, found, counts, sequences), gradient


def _by_row(call: LossCall) -> LossCall:
    """The means of rows that a loss of normalization "sample" is made of."""
    weight, batch = as_tensor(call.weight), len(call.prediction)
    if weight.shape[0] != batch:  # rows that samples share
        weight = weight.expand(batch, *weight.shape[1:])
    return call._replace(weight=weight, mask_normalization="none", reduction="none")


def _elements(call: LossCall, rows: Sequence[int]) -> int:
    """How many elements a row has, where ``rows`` is the shape of the rows."""
    return math.prod(call.prediction.shape) // max(1, math.prod(rows))


def _sizes_of_samples(call: LossCall, sequences: Packed | None) -> Tensor:
    """The sum of the mask of each sample: float64 [samples]."""
    prediction, mask, shape = call.prediction, call.mask, call.prediction.shape
    if sequences is not None:
        kept = torch.ones((), dtype=call.weight.dtype, device=prediction.device) if mask is None else mask
        return sequences.sums(kept.double().expand(shape))
    if mask is None:
        return torch.full(shape[:1], math.prod(shape[1:]), dtype=torch.float64, device=prediction.device)
    own = mask.double().flatten(1).sum(1) if mask.ndim > 1 else mask.double()
    return (own * (math.prod(shape[1:]) // max(1, math.prod(mask.shape[1:])))).expand(len(prediction))


def _of_samples(call: LossCall, rows: Tensor, counts: Tensor, sequences: Packed | None) -> Tensor:
    """The loss from its means of rows, and the sums of the masks of samples."""
    if sequences is not None:
        sums = sequences.sums(rows.double().expand(call.prediction.shape))
    else:
        sums = rows.double().flatten(1).sum(1) if rows.ndim > 1 else rows.double()
        sums = sums * _elements(call, rows.shape)
    means = sums / torch.where(counts == 0, 1.0, counts)
    if call.reduction == "none":
        return means.to(rows.dtype)
    return (means.sum() / (counts != 0).sum().clamp(min=1)).to(rows.dtype)


def check_loss(
    prediction: Tensor,
    x0: Tensor | None,
    n: Tensor | Philox | None,
    mask: Tensor | None,
    mask_normalization: str,
    reduction: str,
    y: Tensor | None = None,
    alone: bool = True,
    packed: Packed | None = None,
) -> Tensor | None:
    """Raise TypeError or ValueError unless these go together. Returns the mask, with all of its dimensions. ``alone``:
    the mask is not a part of one, of which the other parts may not be empty."""
    check_floating(prediction=prediction)
    if x0 is not None:
        if not is_image(x0):
            check_floating(x0=x0)
        check_alike(x0=x0, prediction=prediction)
    if y is not None:
        check_floating(y=y)
        check_alike(y=y, prediction=prediction)
    if n is not None:
        check_noise(packed, prediction=prediction, noise=n)
    if not prediction.ndim:
        raise ValueError("prediction must have a batch dimension; got a scalar.")
    _one_of("reduction", reduction, (*REDUCTIONS, "elements"))
    _one_of("mask_normalization", mask_normalization, MASK_NORMALIZATIONS)
    if reduction == "elements" and mask_normalization != "none":
        raise ValueError(
            f"reduction='elements' divides by nothing: use mask_normalization='none' with it; got "
            f"{mask_normalization!r}. Divide what you sum up by the mask's sum."
        )
    if mask is not None:
        return _placed_mask(mask, mask_normalization, reduction, prediction, alone)
    return None


def _placed_mask(mask: Tensor, normalization: str, reduction: str, prediction: Tensor, alone: bool) -> Tensor:
    check_tensor("mask", mask, "mask")
    if mask.device != prediction.device:
        raise ValueError(f"mask is on {mask.device}, but prediction on {prediction.device}: move it with .to(device).")
    if mask.is_complex():
        raise TypeError("mask must be bool or real; got a complex one.")
    more = max(0, prediction.ndim - mask.ndim)
    if mask.ndim > prediction.ndim or not _broadcasts(mask.shape, prediction.shape):
        hint = ""
        ways = {"the last dimensions": (*[1] * more, *mask.shape)} if more else {}
        if more and mask.ndim > 1:
            ways["all channels"] = (mask.shape[0], *[1] * more, *mask.shape[1:])
        for what, shape in ways.items():
            if _broadcasts(shape, prediction.shape):
                hint = f" A mask of {what} is mask.view({', '.join(map(str, shape))})."
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, which does not fit {tuple(prediction.shape)}: it is aligned at the "
            f"left, as t and weight are.{hint}"
        )
    if reduction == "sum" and normalization != "none":
        raise ValueError("reduction='sum' divides by nothing: use mask_normalization='none' with it.")
    if alone and value_checks_are_free(mask) and prediction.numel() and not bool(mask.any()):
        # No error: one process of many would raise it, and the others wait for it.
        warn("mask is 0 everywhere: the loss and its gradient are 0.")
    return mask.reshape(*mask.shape, *(1,) * more) if more else mask


def _broadcasts(own: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether the dimensions that ``own`` has are 1, or those of ``shape``."""
    for m, s in zip(own, shape):
        if m != 1 and m != s:
            return False
    return True


def _one_of(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {value!r}.")
