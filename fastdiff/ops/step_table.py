"""Step tables: coefficients that are placed on a device before they are used, for callers that come one step at a time
and in any order (the schedulers of diffusers). A step, or a noising, is then one launch and little of the host's time.
A sampling run of one's own is a ``trajectory``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.native.step_table import noise_runner, row_runner
from ..calls import NoiseCall, StepCall
from ..codes import COLUMNS
from ..tensors import cached
from . import dispatch
from .checks import check_alike, check_clip, check_floating, compute_dtype, place_rows

# Flags of ``PreparedSteps.run``, which may be added up. X0, ENTRY: the x0 estimate, the history entry is wanted.
# MODEL_DTYPE: the results have the dtype of m, not of x. ONE_DTYPE: x and m must have the same dtype. DRAW: the noise
# is drawn as torch.randn draws it, in the dtype of m; DRAW_FLOAT: the same, in float32.
X0, ENTRY, MODEL_DTYPE, ONE_DTYPE, DRAW, DRAW_FLOAT = 1, 2, 4, 8, 16, 16 | 32


class _Placed:
    """A float64 table [rows, columns] on the CPU, and copies of it where and in what dtype they were asked for."""

    def __init__(self, table: Tensor, columns: int):
        check_floating(table=table)
        if table.ndim != 2 or table.shape[1] != columns or table.device.type != "cpu":
            raise ValueError(
                f"table must be [rows, {columns}] on the CPU; got {tuple(table.shape)} on {table.device.type}."
            )
        self.table = table.detach().to(torch.float64, copy=True).contiguous()
        self._placed: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.held: dict[Any, Any] = {}  # what backends make of the table and keep with it

    def placed(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The table on ``device``; copied at the first call."""
        return cached(self._placed, (device, dtype), lambda: self.table.to(device, dtype))

    def __len__(self) -> int:
        return len(self.table)

    def __reduce__(self):  # a copy must not share what backends keep: it points into this one's memory
        return type(self), (self.table,)


class PreparedSteps(_Placed):
    """A step table: rows of coefficients of ``fastdiff.ops.step``, ``[rows, len(COLUMNS)]``, float64 on the CPU.

    Attributes:
        run: the fast call, (k, x, m, clip, history, noise, log_variance, flags) -> (y, x0 or None, entry or None), for
            contiguous float32, float16 or bfloat16 tensors [batch, ...] on the CPU without gradients. For others it
            returns None, and has drawn nothing. ``noise`` is a tensor or None; with DRAW, the generator to draw from,
            None for the default one, or a list of one.
    """

    def __init__(self, table: Tensor):
        super().__init__(table, len(COLUMNS))
        self.run: Callable = row_runner(self.table)

    def __call__(
        self,
        k: int,
        x: Tensor,  # [B, ...]
        m: Tensor,  # [B, ...]
        *,
        clip: float | None = None,
        history: Sequence[Tensor] = (),  # [B, ...] each
        noise: Tensor | None = None,  # [B, ...]
        log_variance: Tensor | None = None,  # [B, ...]
        threshold: Tensor | None = None,  # [B], or another shape that place_rows takes
        dtype: torch.dtype | None = None,
        return_x0: bool = True,
        return_entry: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The step of row ``k``: arguments and result as of ``fastdiff.ops.step``; ``dtype`` is that of y and
        of the x0 estimate, by default that of x. Raises TypeError or ValueError for unfit inputs."""
        if not isinstance(x, Tensor):
            check_floating(x=x)
        dtype = x.dtype if dtype is None else dtype
        tensors = {"model_output": m, "noise": noise, "log_variance": log_variance}
        tensors |= {f"history[{j}]": entry for j, entry in enumerate(history)}
        check_floating(x=x, **{name: tensor for name, tensor in tensors.items() if tensor is not None})
        check_alike(x=x, **tensors)
        check_clip(clip)
        compute = compute_dtype(x, m)
        if threshold is not None:
            threshold = place_rows("threshold", threshold.to(x.device, compute), x.shape)
        row = self.placed(x.device, compute)[k]
        call = StepCall(
            x, m, row, None, 1.0, clip, tuple(history), noise, log_variance, dtype, return_x0, return_entry, threshold
        )
        return dispatch.run(call, x.device)


class PreparedNoise(_Placed):
    """A table of the coefficients (alpha, sigma) of ``fastdiff.ops.noise``: [rows, 2], float64 on the CPU.

    Attributes:
        run: the fast call, (index, x0, n) -> x_t, for tensors as ``PreparedSteps.run`` takes them, all of one dtype. It
            returns None for others.
    """

    def __init__(self, table: Tensor):
        super().__init__(table, 2)
        self.run: Callable = noise_runner(self.table)

    def __call__(self, index: int | Tensor, x0: Tensor, n: Tensor) -> Tensor:
        """alpha x0 + sigma n in the dtype of x0.

        Args:
            index: the row, or int64 [batch], the row of each sample. As indexing does, -1 is the last, and one out of
                range raises IndexError on the CPU.
            x0, n: floating-point tensors of one shape.

        Raises TypeError or ValueError for unfit inputs.
        """
        if not isinstance(x0, Tensor):
            check_floating(x0=x0)
        check_floating(x0=x0, noise=n)
        check_alike(x0=x0, noise=n)
        rows = self.placed(x0.device, compute_dtype(x0, n))[index]
        alpha, sigma = (place_rows("index", column, x0.shape) for column in rows.unbind(-1))
        call = NoiseCall(x0, n, alpha, sigma)
        return dispatch.run(call, x0.device)[0]
