"""The loss of a whole batch from those of its parts: local sums, one all-reduce, a backward that communicates nothing.

Every loss here is a quotient of sums over elements. A sum of errors, times its weights, comes from the loss operation
of the part; what divides it is known (a number of elements), or a sum over the mask. All that has to be added up goes
in one buffer of float64. The gradient by the part of the prediction is that of the local sum, times numbers that are
known after the forward.

- A mean over all elements, and a sum: the divisor is known, so it is in the weight of the local loss, and the gradient
  that a CPU stores along with a loss is right as it is.
- The mean by the sum of the whole mask: one number more in the buffer, the gradient divided by their sum.
- Means of rows or samples: where a row lies on one rank only, its quotient is taken there, and the ranks add up sums of
  quotients; where several may have a part of it, the buffer has two numbers for each row of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops.loss import check_loss
from ..tokens import Tokens
from .agreeing import compare, comparing
from .part import Part


class _Whole(torch.autograd.Function):
    """The value of a whole loss, whose gradient is that of the local loss times ``factor`` (None: 1)."""

    @staticmethod
    def forward(ctx, local, made):
        value, ctx.factor = made
        return value

    @staticmethod
    def backward(ctx, upstream):
        if ctx.factor is not None:
            missing = ctx.factor.ndim - upstream.ndim  # a number for a sample goes with all of its times
            upstream = upstream.reshape((*upstream.shape, *(1,) * missing)) * ctx.factor
        return upstream, None


def summed(local: Tensor, part: Part) -> Tensor:
    """The whole's loss, where it is the sum of those of the parts over ``part.factor``."""
    (total,) = _added(part, [local.detach()])
    return _Whole.apply(local, ((total / part.factor).to(local.dtype), None))


def compare_loss(noised: Any, prediction: Any, mask: Any, reduction: str, weight: Any, normalization: str) -> None:
    """``agreeing.compare`` for a loss, before anything is computed."""
    if not comparing(noised.part):
        return
    given = {"reduction": reduction, "mask_normalization": normalization, "dimensions of t": noised.t.ndim}
    given |= {"mask": mask is not None, "weight": weight is not None, "dtype": getattr(prediction, "dtype", None)}
    given["prediction shaped as x_t"] = getattr(prediction, "shape", None) == noised.x_t.shape
    compare("objective.loss", noised.part, tuple(noised.x0.shape), **given)


def share(part: Part, shape: Sequence[int]) -> float:
    """Which part of the whole's elements is in a slice of ``shape``, times ``part.factor``: where this is 1, the mean
    of the slice is what is to be ``summed``."""
    return part.factor * math.prod(shape) / math.prod(part.shape)


def _of_patches(part: Part, tokens: Tokens) -> Part:
    """The part in the dimensions [B, C, h, p, w, q] of patches."""
    (b, c, height, width), (p, q) = part.shape, tokens.sizes
    first, channel, top, left = part.start
    if height % p or width % q or top % p or left % q:
        raise ValueError(
            f"a part of {part.shape} that begins at {part.start} cuts through the {p} x {q} patches of tokens."
        )
    shape, start = (b, c, height // p, p, width // q, q), (first, channel, top // p, 0, left // q, 0)
    split, rows = (of and tuple((0, 1, 2, 4)[d] for d in of) for of in (part.split, part.rows))
    return replace(part, shape=shape, start=start, split=split, rows=rows)


def whole_loss(
    loss: Callable[..., Tensor], part: Part, tokens: Tokens | None, prediction: Tensor, row_shape: tuple[int, ...],
    mask: Tensor | None, reduction: str, weight: Any, normalization: str,
) -> Tensor:  # fmt: skip
    """The loss of the whole, or for reduction "none" the rows of this part.

    Args:
        loss: ``loss(mask, reduction, weight, normalization)``: the loss of this part.
        tokens, prediction: the prediction as it is compared with x0; where x_t is ``tokens``, as patches.
        row_shape: of the times of this part.
        mask, reduction, weight, normalization: as ``Objective.loss`` takes them.
    """
    mask = check_loss(prediction, None, None, mask, normalization, reduction, alone=False)
    part = part if tokens is None else _of_patches(part, tokens)
    part.check("prediction", prediction.shape)
    if reduction == "sum" or (reduction == "mean" and (mask is None or normalization in ("none", "global"))):
        return _of_all(loss, part, prediction, mask, reduction, weight, normalization)
    rows = _Rows(part, prediction.shape, row_shape, normalization == "sample")
    return _of_rows(loss, part, prediction, rows, mask, reduction, weight, normalization)


def _of_all(
    loss: Callable[..., Tensor], part: Part, prediction: Tensor, mask: Tensor | None, reduction: str, weight: Any,
    normalization: str,
) -> Tensor:  # fmt: skip
    """A sum over all elements, divided by a number that is known or by the sum of the mask."""
    by_mask = reduction == "mean" and mask is not None and normalization == "global"
    divisor = math.prod(part.shape) if reduction == "mean" and not by_mask else 1
    local = loss(mask, "sum", _times(weight, part.factor / divisor), "none")
    if not by_mask:
        return summed(local, part)
    total, count = _added(part, [local.detach(), _sums(mask, prediction.shape, ())])
    inverse = 1 / _divisor(count)
    return _Whole.apply(local, ((total * inverse / part.factor).to(local.dtype), inverse.to(local.dtype)))


class _Rows:
    """Where the rows of a part lie among those of the whole.

    Attributes:
        row_shape: the shape of the times.
        by_sample: whether a row is a sample, whatever the times are of.
        dims: the dimensions of the data in which rows differ.
        shape, start: of the rows of the whole, and where the part's begin among them.
        own: the shape of the part's rows.
        all_elements: of one row of the whole.
        mine: the elements that share a time here.
        shared: whether several ranks may hold parts of one row.
    """

    def __init__(self, part: Part, sizes: Sequence[int], row_shape: Sequence[int], by_sample: bool):
        self.row_shape, self.by_sample = tuple(row_shape), by_sample
        dims = tuple(range(len(row_shape)))
        if len(row_shape) == len(sizes) and part.rows is not None:
            dims = part.rows
        elif len(row_shape) == len(sizes):
            for d in dims:
                if d and row_shape[d] == sizes[d] == 1 and part.shape[d] > 1 and not by_sample:
                    raise ValueError(
                        f"t {tuple(row_shape)} has 1 in dimension {d}, of which this rank holds 1 of {part.shape[d]}: "
                        "that could be one time for each, or one for all. Say in which dimensions times differ by "
                        f"Part(..., rows=(0, ...)), or pass t with leading dimensions only."
                    )
            dims = tuple(d for d in dims if row_shape[d] == sizes[d] and part.shape[d] > 1)
        self.mine = math.prod(sizes[d] for d in range(len(sizes)) if d not in dims)
        if by_sample:
            if row_shape[0] != sizes[0]:
                raise ValueError(
                    f"t {tuple(row_shape)} is shared by samples: expand it to the {sizes[0]} that there are."
                )
            dims = (0,)
        rest = [d for d in range(len(sizes)) if d not in dims]
        self.dims = dims
        self.shape, self.start, self.own = ([of[d] for d in dims] for of in (part.shape, part.start, sizes))
        self.all_elements = math.prod(part.shape[d] for d in rest)
        self.shared = any(part.may_split(d) for d in rest)

    def gathered(self, of_times: Tensor) -> Tensor:
        """The sums of rows from those of what shares a time."""
        if not self.by_sample:
            return of_times.reshape(self.own)
        return of_times.flatten(1).sum(1) if of_times.ndim > 1 else of_times

    def spread(self, of_rows: Tensor) -> Tensor:
        """Numbers of rows for what shares a time."""
        if self.by_sample:
            return of_rows.reshape(-1, *(1,) * (len(self.row_shape) - 1)).expand(self.row_shape)
        return of_rows.reshape(self.row_shape)

    def in_whole(self, own: Tensor) -> Tensor:
        """Numbers of the part's rows, among zeros for the others of the whole."""
        every = own.new_zeros(self.shape)
        self.of_part(every).copy_(own)
        return every

    def of_part(self, every: Tensor) -> Tensor:
        """The numbers of the part's rows, a view."""
        for d, (start, size) in enumerate(zip(self.start, self.own)):
            every = every.narrow(d, start, size)
        return every


def _of_rows(
    loss: Callable[..., Tensor], part: Part, prediction: Tensor, rows: _Rows, mask: Tensor | None, reduction: str,
    weight: Any, normalization: str,
) -> Tensor:  # fmt: skip
    """Means of rows or of samples, and their mean."""
    if prediction.numel():
        local = loss(mask, "none", weight, "none")  # means over the elements that are here
    else:
        local = loss(mask, "sum", weight, "none").expand(rows.row_shape)  # zeros
    sums = rows.gathered(local.detach().double() * rows.mine)
    counts, of_all, by_row = sums.new_full((), rows.all_elements), False, False
    if mask is not None and normalization != "none":
        of_all, by_row = normalization == "global", normalization != "global"
        counts = _sums(mask, prediction.shape, () if of_all else rows.dims)
    if reduction == "mean" and not rows.shared:
        total, kept = _added(part, [(sums / _divisor(counts)).sum(), (counts != 0).sum()])
    elif rows.shared:
        found = _added(part, [rows.in_whole(sums), *([counts] if of_all else [rows.in_whole(counts)] * by_row)])
        sums, counts = found[0], found[1] if of_all or by_row else counts
        total, kept = (sums / _divisor(counts)).sum(), (counts != 0).sum()
        sums, counts = rows.of_part(sums), rows.of_part(counts) if by_row else counts
    elif of_all:
        (counts,) = _added(part, [counts])
    if of_all:
        counts = counts / math.prod(rows.shape)
    inverse = 1 / _divisor(counts)
    if reduction == "mean":
        kept = kept.clamp(min=1)
        value, inverse = total / kept, torch.where(counts == 0, 0.0, inverse) / kept
    else:
        value = (sums * inverse).reshape(sums.shape if rows.by_sample else rows.row_shape)
    factor = rows.spread((inverse * (part.factor * rows.mine)).expand(sums.shape))
    return _Whole.apply(local, (value.to(local.dtype), factor.to(local.dtype)))


def _divisor(counts: Tensor) -> Tensor:
    """What sums are divided by: 1 where nothing was counted, and the sum is 0."""
    return torch.where(counts == 0, 1.0, counts)


def _added(part: Part, values: Sequence[Tensor]) -> list[Tensor]:
    """Each of the tensors added up over the ranks, in float64, by one all-reduce. A second copy of a slice adds 0."""
    buffer = torch.cat([value.double().flatten() for value in values])
    if part.copy:
        buffer.zero_()
    if part.size > 1:
        torch.distributed.all_reduce(buffer, group=part.group)
    parts = buffer.split([value.numel() for value in values])
    return [total.reshape(value.shape) for total, value in zip(parts, values)]


def _sums(mask: Tensor, sizes: Sequence[int], dims: Sequence[int]) -> Tensor:
    """The sums of a mask, which is broadcast to ``sizes``, for each entry of the dimensions ``dims``: float64."""
    others = [d for d in range(len(sizes)) if d not in dims]
    repeats = math.prod(sizes[d] for d in others if mask.shape[d] == 1)
    sums = (mask.sum(others, dtype=torch.float64) if others else mask.double()) * repeats
    return sums.expand([sizes[d] for d in dims])


def _times(weight: Any, factor: float) -> Any:
    """Weights times a number, in at least float32."""
    if weight is None or factor == 1.0:
        return factor if weight is None else weight
    if isinstance(weight, Tensor) and weight.dtype not in (torch.float32, torch.float64):
        weight = weight.float()
    return weight * factor
