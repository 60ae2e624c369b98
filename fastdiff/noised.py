"""A noised batch: what ``Objective.noise`` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import ne
from typing import Any

import torch
from torch import Tensor

from . import ops
from . import prediction as kinds
from .calls import NoiseCall, Packed
from .coefficients import CHANGED, Rows
from .distributed.part import Part
from .modes import version_of
from .ops.checks import compute_dtype, place_rows
from .packed import of_rows, placed_for
from .philox import seed_tensor
from .showing import brief
from .tensors import as_tensor
from .tokens import Tokens, joined, split


@dataclass(eq=False, repr=False)
class Noised:
    """A noised batch, as ``Objective.noise`` returns it.

    Attributes:
        x_t: noised data, in the dtype of x0 or the one that was asked for; shaped as x0, or packed in ``tokens``.
        t: the times, one a row: integers for discrete processes, float64 for continuous ones.
        alpha, sigma, snr, weight: rows of the shape of t, float32 (float64 if x0 is float64).
        x0: the data x_t was made of, as it was given.
        tokens: the ``fastdiff.Tokens`` that x_t is packed in, or None.
        part: the ``fastdiff.distributed.Part`` of a whole batch that this is, or None.
        clean: which rows a ``video.RFLoss`` kept clean, and leaves out of its loss: bool, of the shape of t; or None.
        packed: where the packed sequences lie, if there are any; otherwise None.
        noise_source: the noise, or the ``fastdiff.ops.Philox`` that makes it.
        noise, target, model_input, model_time: made when asked for (the target by ``noise`` with ``with_target``).
    """

    objective: Any  # the fastdiff.Objective that noised it
    x0: Tensor
    x_t: Tensor
    t: Tensor
    noise_source: Tensor | ops.Philox
    rows: Rows
    written_target: Tensor | None = None
    tokens: Tokens | None = None
    part: Part | None = None
    clean: Tensor | None = None
    packed: Packed | None = None

    def __post_init__(self):
        self._versions = self.rows.version, self._noise_versions()

    def __repr__(self) -> str:
        objective = f"{self.objective.process!r}, {self.objective.prediction.name!r}"
        return f"Noised(x_t={brief(self.x_t)}, t={brief(self.t)}, {objective})"

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy, which has no coefficients: they follow from the times. So a worker of a DataLoader may
        return a noised batch."""
        return {name: value for name, value in self.__dict__.items() if name not in ("rows", "_versions")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        x0, n, _ = split(self.tokens, self.x0, self.noise_source)
        self.rows = self.objective._rows(self.t, x0, compute_dtype(x0, tensor_of(n)), self.packed_rows)
        self.__post_init__()

    def tensors(self) -> dict[str, Tensor]:
        """What ``from_tensors`` makes this batch from again, as plain tensors: to send to another process, such as the
        last stage of a pipeline.

        Returns "x0", "x_t", "t"; "noise", or where the loss makes it again "seed" int64 [1] and "ids" int64 [batch];
        "target" where it was written; and "clean" where rows are kept clean. Nothing waits for the device.

        Raises ValueError for packed sequences, whose lengths are no tensor of the device: pickle those.
        """
        if self.packed is not None:
            raise ValueError("tensors() is of batches, not of packed sequences: pickle the Noised, it is the same.")
        found = {"x0": self.x0, "x_t": self.x_t, "t": self.t}
        n = self.noise_source
        if isinstance(n, Tensor) or n.rng != "exact" or n.offset != self.objective.noise_offset:
            found["noise"] = self.noise
        else:
            self.check_unchanged()
            found["seed"] = seed_tensor(n.seed, self.x0.device).reshape(1)
            ids = n.sample_offset
            if not isinstance(ids, Tensor):
                ids = torch.arange(ids, ids + len(self.x0), dtype=torch.int64, device=self.x0.device)
            found["ids"] = ids
        further = {"target": self.written_target, "clean": self.clean}
        return found | {name: tensor for name, tensor in further.items() if tensor is not None}

    @classmethod
    def from_tensors(
        cls, objective: Any, tensors: Mapping[str, Tensor], *, tokens: Tokens | None = None, part: Part | None = None
    ) -> Noised:
        """The batch that ``tensors()`` was called on, in this process.

        Args:
            objective: like the one that noised it.
            tensors: what ``tensors()`` returned.
            tokens, part: those of the batch.

        Raises ValueError for other tensors.
        """
        if not {"x0", "x_t", "t"} <= tensors.keys() or not ("noise" in tensors or {"seed", "ids"} <= tensors.keys()):
            raise ValueError(
                f"these are no tensors of a Noised, which are x0, x_t, t, and noise or seed and ids; got "
                f"{', '.join(tensors) or 'none'}."
            )
        n = tensors.get("noise")
        if n is None:
            n = ops.Philox(tensors["seed"], tensors["ids"], offset=objective.noise_offset)
        x0, t = tensors["x0"], tensors["t"]
        data, source, _ = split(tokens, x0, n)
        rows = objective._rows(t, data, compute_dtype(data, tensor_of(source)))
        return cls(objective, x0, tensors["x_t"], t, n, rows, tensors.get("target"), tokens, part, tensors.get("clean"))

    @property
    def packed_rows(self) -> Packed | None:
        """``packed`` if each sequence has one time, so that a row is a sequence."""
        return of_rows(self.packed, self.t.shape)

    def _noise_versions(self) -> tuple[int | None, ...]:
        """The versions of the tensors that the noise is made from again: its seed, the ids of its samples."""
        if isinstance(self.noise_source, Tensor):
            return None, None
        seed, ids = self.noise_source.seed, self.noise_source.sample_offset
        return (
            version_of(seed) if isinstance(seed, Tensor) else None,
            version_of(ids) if isinstance(ids, Tensor) else None,
        )

    def check_unchanged(self) -> None:
        """Raise RuntimeError if ``t``, or what noise is made from again, was written into since."""
        if not torch.compiler.is_compiling() and self._versions != (version_of(self.t), self._noise_versions()):
            changed = version_of(self.t) != self._versions[0], *map(ne, self._noise_versions(), self._versions[1])
            what = ("t", "the seed", "the tensor of ids")[changed.index(True)]
            raise RuntimeError(CHANGED.format(what))

    @property
    def noise(self) -> Tensor:
        """The noise that the target is made of, shaped as x0: the tensor that was given, or noise that was made, in
        float32 (float64 with float64 data)."""
        if isinstance(self.noise_source, Tensor):
            return self.noise_source
        self.check_unchanged()
        backend, how = ops.dispatch.get(self.x0.device), (self.noise_source, self.x0.shape, self.x0.device)
        return backend.materialize(*how, packed=self.packed).to(self.rows.alpha.dtype)

    @property
    def alpha(self) -> Tensor:
        return as_tensor(self.rows.alpha).reshape(self.t.shape)

    @property
    def sigma(self) -> Tensor:
        return as_tensor(self.rows.sigma).reshape(self.t.shape)

    @property
    def snr(self) -> Tensor:
        return (self.alpha / self.sigma) ** 2

    @property
    def weight(self) -> Tensor:
        return as_tensor(self.rows.weight).reshape(self.t.shape)

    @property
    def target(self) -> Tensor:
        """The target of the network: p x0 + q n, shaped and typed as x_t."""
        if self.written_target is not None:
            return self.written_target
        x0, n, order = split(self.tokens, self.x0, self.noise_source)
        p, q = as_tensor(self.rows.p), as_tensor(self.rows.q)
        call = NoiseCall(x0, n, p, q, keep_noise=False, dtype=self.x_t.dtype, order=order, packed=self.packed_rows)
        return joined(self.tokens, x0, ops.dispatch.run(call, x0.device)[0], None, None)[0]

    @property
    def model_input(self) -> Tensor:
        """The input of the network: x_t, or c_in x_t for a preconditioned prediction ("edm"). It is shaped and typed
        as x_t."""
        scale, _ = self._model_input()
        if scale is None:
            return self.x_t
        scale = place_rows("scale", scale.to(self.rows.alpha.dtype), placed_for(self.x_t, self.packed_rows).shape)
        if self.packed_rows is not None:
            scale = self.packed.spread(scale, self.x_t.shape)
        return (scale * self.x_t).to(self.x_t.dtype)

    @property
    def model_time(self) -> Tensor:
        """The time that the network is called with, shaped as t: t itself; sigma for RectifiedFlow (1 - sigma with
        ``data_at=1``) and VESDE; ln(sigma) / 4 for "edm"."""
        _, time = self._model_input()
        return time.to(self.rows.alpha.dtype) if time.is_floating_point() else time

    def _model_input(self) -> tuple[Tensor | None, Tensor]:
        return kinds.model_input(self.objective.prediction, self.objective.process.levels(self.t))


def check_noised(prediction: Any, noised: Any) -> None:
    if isinstance(noised, Noised):
        return
    if isinstance(prediction, Noised):
        raise TypeError("the arguments are swapped: the network's output comes first, then noised.")
    raise TypeError(
        f"noised must be what objective.noise returned; got {brief(noised)}. With x0, noise and t of your own: "
        f"fastdiff.diffusion_loss(model_output, x0, noise, t, process, prediction), or objective.noise(x0, t, noise)."
    )


def refuse_packed(noised: Noised, what: str) -> None:
    """Raise ValueError for packed sequences, which ``what`` would take for samples of one size."""
    if noised.packed is not None:
        raise ValueError(f"{what} takes a batch [batch, ...]; this one is of packed sequences (noise(lengths=)).")


def tensor_of(noise: Any) -> Tensor | None:
    """The noise if it is a tensor, otherwise None: noise that is made has no dtype of its own."""
    return noise if isinstance(noise, Tensor) else None
