"""``fastdiff bits``: the variational bound of a run of the demo, in bits per dimension, with its parts."""

from __future__ import annotations

from pathlib import Path

import torch

from ..losses.bits_per_dim import BitsPerDim, bits_per_dim
from . import DemoError, checkpoint, extras, plots
from .data import digits, folder
from .run import pick_device
from .settings import build

BINS_OF_DIGITS = 17  # they are whole numbers from 0 to 16
BATCH = 256


def show_bits(
    path: Path,
    out: Path,
    data: Path | None = None,
    variance: str = "fixed_small",
    draws: int | None = None,
    count: int | None = None,
    seed: int = 0,
    state: Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
) -> BitsPerDim:
    """Print and plot the bound of the averaged weights of a checkpoint over the images that it was trained on.

    Args:
        path: the checkpoint, or the folder of its run.
        out: the plot.
        data: other images than the run's: a folder.
        count: so many of the images, the first ones; None: all.
        variance, draws, seed: see ``bits_per_dim``.
        state: a file that keeps what was computed; if it exists, the computation goes on from it.
    """
    extras.require("numpy", "matplotlib", "tqdm")
    if out.suffix.lower() != ".png":
        raise DemoError(f"--out must name a .png file; got {out}.")
    if out.exists() and not overwrite:
        raise DemoError(f"{out} exists: choose another --out, or pass --overwrite.")
    for name, value in (("--draws", draws), ("--count", count)):
        if value is not None and value < 1:
            raise DemoError(f"{name} must be at least 1; got {value}.")
    saved = checkpoint.find(path)
    settings = saved.settings
    if settings.video:
        raise DemoError(f"{path} is of videos, whose pixels lie between those of the digits: use a run of images.")
    if settings.latent:
        raise DemoError(
            f"{path} is of a diffusion in latents: its bound is one of latents, not of images, so there are no bits a "
            f"dimension to compare with those of others. Use a run without --latent."
        )
    source = data or (None if settings.data is None else Path(settings.data))
    images = digits() if source is None else folder(source, settings.size, settings.gray)
    if images.images.shape[1] != saved.data["channels"] or len(images.class_names) != len(saved.data["class_names"]):
        raise DemoError(f"the images of {source} are of another kind than those that {path} was trained on.")
    recipe, network = build(settings), saved.ema_network(pick_device(device))
    torch.set_num_threads(saved.machine["threads"])
    x0, labels = images.images[:count], images.labels[:count]
    try:
        found = bits_per_dim(
            network,
            list(zip(x0.split(BATCH), labels.split(BATCH))),
            recipe.process,
            settings.prediction,
            variance=variance,
            bins=BINS_OF_DIGITS if source is None else 256,
            draws=draws,
            seed=seed,
            device=next(network.parameters()).device,
            checkpoint=state,
        )
    except (TypeError, ValueError) as error:
        raise DemoError(str(error)) from error
    if saved.step < settings.steps:
        print(f"note: this checkpoint has done {saved.step} of {settings.steps} training steps.")
    _print(found)
    out.parent.mkdir(parents=True, exist_ok=True)
    plots.bits_plot(out, found, f"{found.total:.3f} bits per dimension ({settings.process}, {variance})")
    print(f"the terms by timestep: {out}")
    return found


def _print(found: BitsPerDim) -> None:
    """The bound, and its parts in ranges of timesteps that each begin at twice the last."""
    print(f"{found.total:.4f} bits per dimension, +- {found.error:.4f} (standard error), of {found.samples} images")
    rows, first = [("L_0, the likelihood of the data", found.terms[:1])], 1
    while first < len(found.terms):
        last = min(2 * first, len(found.terms)) - 1
        name = f"L_{first}" if first == last else f"L_{first} to L_{last}"
        rows.append((name, found.terms[first : last + 1]))
        first = last + 1
    for name, terms in rows:
        seen = terms[~terms.isnan()]
        # Where t was drawn, the timesteps that were not count as the mean of those around.
        total = float(seen.mean()) * len(terms) if len(seen) else float("nan")
        print(f"  {name:32} {total:9.4f}")
    print(f"  {'L_T, the prior':32} {found.prior:9.4f}")
