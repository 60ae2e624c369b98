"""The variational bound of a trained network over a data set, in bits per dimension, with its parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import remove_leftovers, write_atomically
from ..objective import Objective
from ..ops.checks import check_tensor
from ..philox import check_seed, whole
from ..prediction import Prediction
from ..process import Process
from .vlb import VariationalBound

_STRIDE = 2**32  # between the seeds of the passes over a sample


@dataclass(frozen=True)
class BitsPerDim:
    """The bound, averaged over the samples, in bits per dimension.

    Attributes:
        total: prior + the sum of the terms: an upper bound of -log2 p(x0) / dimensions.
        error: the standard error of ``total``: of the samples, and of the t that were drawn.
        prior: L_T.
        terms: L_t of each timestep, float64 [steps]; where t was drawn, the mean of those drawn, NaN where none was.
        counts: how many terms were computed at each timestep, int64 [steps].
        samples: how many samples there were.
    """

    total: float
    error: float
    prior: float
    terms: Tensor
    counts: Tensor
    samples: int


def bits_per_dim(
    model: Callable[..., Tensor],
    data: Iterable[Any],
    process: Process,
    prediction: str | Prediction = "epsilon",
    *,
    variance: str = "fixed_small",
    bins: int | None = 256,
    draws: int | None = None,
    clip: float | None = 1.0,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    save_every: int = 10,
) -> BitsPerDim:
    """The whole variational bound of ``model`` over ``data``: Ho et al. 2020, equation 5; Nichol and Dhariwal 2021.

    Noise and t are functions of (seed, place in the data): the batch size changes no number but by rounding, and a run
    that goes on from its checkpoint gives what it would have given.

    Args:
        model: ``model(x_t, t)``, or ``model(x_t, t, condition)`` where the data has conditions. Put it in eval mode.
        data: batches: tensors x0 [batch, ...] in [-1, 1], or pairs (x0, condition). In the same order when resumed.
        process, prediction, variance, bins: see ``VariationalBound``; with a learned variance the model returns twice
            the channels.
        draws: None: every timestep of every sample. A number: so many t drawn for each sample, uniformly; an unbiased
            estimate at a small part of the cost.
        clip: clamp x0 estimates to [-clip, clip], as the papers do; None for data that is not bounded.
        device: where to compute; None: where each batch is.
        progress: show a bar, if tqdm is installed.
        checkpoint: a file that keeps what was computed, written every ``save_every`` batches and at the end. If it
            exists, the batches that it has are passed over.

    Raises TypeError or ValueError for unfit arguments, or a checkpoint of other settings; ValueError for no data.
    """
    objective = Objective(process, prediction)
    bound = VariationalBound(objective, variance, bins)
    check_seed(seed)
    seed, save_every = whole("seed", seed), whole("save_every", save_every)
    if draws is not None and (type(draws) is not int or draws < 1):
        raise ValueError(f"draws must be a number of timesteps for each sample, at least 1, or None; got {draws!r}.")
    if save_every < 1:
        raise ValueError(f"save_every must be at least 1; got {save_every!r}.")
    path = None if checkpoint is None else Path(checkpoint)
    settings = {
        "process": repr(process), "alpha_bar": process.alpha_bar.sum().item(), "prediction": objective.prediction.name,
        "variance": variance, "bins": bins, "draws": draws, "clip": clip, "seed": seed,
    }  # fmt: skip
    sums = _load(path, settings, process.steps)
    passes = range(process.steps) if draws is None else range(draws)
    with torch.no_grad(), _bar(progress, data, len(passes)) as bar:
        fresh = 0
        for number, batch in enumerate(data):
            if number < sums["batches"]:
                bar.update(len(passes))
                continue
            x0, *condition = batch if isinstance(batch, (tuple, list)) else (batch,)
            check_tensor("a batch of data", x0, "batch")
            x0 = x0 if device is None else x0.to(device)
            condition = [c.to(x0.device) if isinstance(c, Tensor) else c for c in condition]
            done = sums["samples"]
            prior = bound.prior(x0).double().cpu()
            total = prior.clone()
            for k in passes:
                t = torch.full((len(x0),), k, device=x0.device) if draws is None else None
                noised = objective.noise(x0, t, seed=(seed + k * _STRIDE) % 2**63, sample_offset=done)
                output = model(noised.model_input, noised.model_time, *condition)
                terms, t = bound.terms(output, noised, clip).double().cpu(), noised.t.cpu()
                sums["terms"].index_add_(0, t, terms)
                sums["counts"].index_add_(0, t, torch.ones_like(t))
                total += terms if draws is None else terms * (process.steps / draws)
                bar.update(1)
            sums["prior"] += prior.sum().item()
            sums["total"] += total.sum().item()
            sums["squares"] += (total**2).sum().item()
            sums["samples"] += len(x0)
            sums["batches"] += 1
            fresh += 1
            if path is not None and fresh % save_every == 0:
                _save(path, settings, sums)
    if path is not None and fresh % save_every:
        _save(path, settings, sums)
    count = sums["samples"]
    if not count:
        raise ValueError("data has no samples: an iterator that is used up? Pass a list or a DataLoader.")
    mean = sums["total"] / count
    spread = max(0.0, sums["squares"] / count - mean**2) / max(1, count - 1)
    return BitsPerDim(
        total=mean,
        error=math.sqrt(spread),
        prior=sums["prior"] / count,
        terms=sums["terms"] / sums["counts"],
        counts=sums["counts"],
        samples=count,
    )


def _load(path: Path | None, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    if path is None or not path.exists():
        zeros = torch.zeros(steps, dtype=torch.float64, device="cpu")
        return {
            "terms": zeros, "counts": zeros.long(), "prior": 0.0, "total": 0.0, "squares": 0.0, "samples": 0,
            "batches": 0,
        }  # fmt: skip
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(saved, dict) or set(saved) != {"settings", "sums"}:
        raise ValueError(f"{path} is no checkpoint of bits_per_dim: name another file.")
    others = [name for name, value in settings.items() if saved["settings"].get(name) != value]
    if others:
        was = ", ".join(f"{name}={saved['settings'].get(name)!r}" for name in others)
        raise ValueError(f"{path} was made with {was}: name another file, or use these settings.")
    return saved["sums"]


def _save(path: Path, settings: dict[str, Any], sums: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    write_atomically(path, lambda file: torch.save({"settings": settings, "sums": sums}, file))


class _Silent:
    def update(self, _: int) -> None:
        pass


def _bar(progress: bool, data: Any, passes: int) -> Any:
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            pass
        else:
            batches = len(data) if hasattr(data, "__len__") else None
            total = None if batches is None else batches * passes
            return tqdm(total=total, desc="bits per dimension", unit="pass", leave=False)
    return nullcontext(_Silent())
