"""Coefficients placed before they are used, in any order: a step, or a noising, is one launch and little of the host's
time. For schedulers that are called from outside; a run of one's own is a ``trajectory``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.native.prepared import noise_runner, row_runner
from ..codes import COLUMNS
from ..tensors import cached
from . import dispatch
from .checks import check_alike, check_clip, check_floating, compute_dtype, place_rows

# What ``PreparedSteps.run`` is told, added up. X0, ENTRY: what is wanted besides y. MODEL_DTYPE: results in m's dtype,
# not x's. ONE_DTYPE: x and m must have the same. DRAW: draw the noise as torch.randn does, in m's dtype; DRAW_FLOAT: in
# float32 whatever that is.
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
        self.held: dict[Any, Any] = {}  # what is kept with the table, such as by a backend

    def placed(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The table on ``device``; copied at the first call."""
        return cached(self._placed, (device, dtype), lambda: self.table.to(device, dtype))

    def __len__(self) -> int:
        return len(self.table)

    def __reduce__(self):  # a copy must not share what backends keep: it points into this one's memory
        return type(self), (self.table,)


class PreparedSteps(_Placed):
    """Rows of ``fastdiff.ops.step``, ``[rows, len(COLUMNS)]``, float64 on the CPU.

    Attributes:
        run: (k, x, m, clip, history, noise, log_variance, flags) -> (y, x0 or None, entry or None): the quick way of
            the plain case, which is contiguous float32, float16 or bfloat16 on the CPU and nothing to differentiate.
            None in any other, and nothing was drawn. ``noise``: a tensor or None; to DRAW, a generator, None or [one].
    """

    def __init__(self, table: Tensor):
        super().__init__(table, len(COLUMNS))
        self.run: Callable = row_runner(self.table)

    def __call__(
        self,
        k: int,
        x: Tensor,
        m: Tensor,
        *,
        clip: float | None = None,
        history: Sequence[Tensor] = (),
        noise: Tensor | None = None,
        log_variance: Tensor | None = None,
        threshold: Tensor | None = None,
        dtype: torch.dtype | None = None,
        return_x0: bool = True,
        return_entry: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The step of row ``k``: arguments and result as of ``fastdiff.ops.step``; ``dtype`` is that of y and
        of the x0 estimate, by default that of x. Raises TypeError or ValueError for unfit inputs."""
        if not isinstance(x, Tensor):
            check_floating(x=x)
        dtype = x.dtype if dtype is None else dtype
        wanted = (return_x0, return_entry)
        backend = dispatch.get(x.device)
        run = getattr(backend, "run_row", None)
        if run is not None and threshold is None:
            done = run(self, k, x, m, clip, history, noise, log_variance, dtype, wanted)
            if done is not None:
                return done
        tensors = {"model_output": m, "noise": noise, "log_variance": log_variance}
        tensors |= {f"history[{j}]": entry for j, entry in enumerate(history)}
        check_floating(x=x, **{name: tensor for name, tensor in tensors.items() if tensor is not None})
        check_alike(x=x, **tensors)
        check_clip(clip)
        compute = compute_dtype(x, m)
        if threshold is not None:
            threshold = place_rows("threshold", threshold.to(x.device, compute), x.shape)
        row = self.placed(x.device, compute)[k]
        return backend.step(
            x, m, None, 1.0, row, clip, tuple(history), noise, log_variance, dtype, wanted, threshold=threshold
        )


class PreparedNoise(_Placed):
    """Rows (alpha, sigma) of ``fastdiff.ops.noise``, [rows, 2], float64 on the CPU.

    Attributes:
        run: (index, x0, n) -> x_t, the quick way of the plain case: as in ``PreparedSteps``, and one dtype. Or None.
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
        backend = dispatch.get(x0.device)
        run = getattr(backend, "run_noise", None)
        if run is not None:
            done = run(self, index, x0, n)
            if done is not None:
                return done
        check_floating(x0=x0, noise=n)
        check_alike(x0=x0, noise=n)
        rows = self.placed(x0.device, compute_dtype(x0, n))[index]
        alpha, sigma = (place_rows("index", column, x0.shape) for column in rows.unbind(-1))
        return backend.noise(x0, n, alpha, sigma, 0.0, None, True)[0]
