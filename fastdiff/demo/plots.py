"""The demo's pictures, as PNG and GIF files written atomically."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import Process

from ..files import write_atomically
from ..losses.bits_per_dim import BitsPerDim
from .training import LN_SIGMA_RANGE

CELL = 0.55  # inches an image takes
GAP = 0.06  # between images, as a part of an image
MIN_WIDTH = 8.5  # inches: room for the longest title
ENLARGED, FRAME_MS, BETWEEN = 4, 150, 0.35  # of a GIF: screen pixels a pixel, milliseconds, the gray between videos
GRAYS = 32  # of a GIF: the fewer, the smaller the file
COLOURS = ("#b9c6d6", "#84a3c4", "#3f74a8", "#0b3c68")  # the quarters of training, early to late


def loss_plot(
    path: Path,
    losses: Tensor,
    time_loss: Tensor,
    process: Process,
    title: str,
    terms: Mapping[str, Tensor] | None = None,
) -> None:
    """The loss of every step, smoothed too; the mean loss by time in each quarter of the training; and, if there are
    terms, the smoothed values of each, [steps], by name. A value that is NaN was not computed."""
    figure = _figure(15 if terms else 10, 4.7)
    figure.suptitle(_plain(title), fontsize=11)
    curve, by_time, *more = figure.subplots(1, 3 if terms else 2)
    steps = torch.arange(1.0, len(losses) + 1, dtype=torch.float64)
    point = "." if len(losses) == 1 else None  # a line of one point cannot be seen
    curve.plot(steps, losses, color=COLOURS[0], linewidth=0.6, label="each step", marker=point)
    window = max(2, len(losses) // 40)
    if len(losses) >= window:
        label = f"mean of the {window} steps around"
        curve.plot(_running_mean(steps, window), _running_mean(losses, window), color=COLOURS[-1], label=label)
    curve.set(xlabel="training step", ylabel="loss", title="Loss during training")
    by_time.set(ylabel="mean loss", title="Loss against time", xlabel=_time_label(process))
    times = _bin_centres(process, time_loss.shape[-1])
    for quarter, (total, number) in enumerate(time_loss.transpose(0, 1)):
        seen = number > 0
        if bool(seen.any()):
            label = f"{('first', 'second', 'third', 'last')[quarter]} quarter of training"
            by_time.plot(times[seen], (total / number)[seen], color=COLOURS[quarter], label=label, marker=".")
    for axes, (name, values) in ((axes, entry) for axes in more for entry in terms.items()):
        computed = ~values.isnan()
        if smooth := min(window, int(computed.sum())):
            axes.plot(*(_running_mean(part[computed], smooth) for part in (steps, values)), label=name, marker=point)
        axes.set(xlabel="training step", ylabel="value, without its weight", title="Terms of the loss")
    for axes in (curve, by_time, *more):
        if min(line.get_ydata().min() for line in axes.lines) > 0:
            axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
        # Below the axes, where no curve can be.
        axes.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    _write(figure, path)


def bits_plot(path: Path, found: BitsPerDim, title: str) -> None:
    """The terms of the bound by timestep, and their sum from the noisiest on."""
    figure = _figure(10, 4.2)
    figure.suptitle(_plain(title), fontsize=11)
    terms, total = figure.subplots(1, 2)
    seen = ~found.terms.isnan()
    times = torch.arange(len(seen))[seen]
    terms.plot(times, found.terms[seen], color=COLOURS[0], linewidth=0.8, marker="." if len(times) < 50 else None)
    terms.set(xlabel="timestep t", ylabel="bits per dimension", title="Each term L_t")
    if float(found.terms[seen].min()) > 0:
        terms.set_yscale("log")
    sums = found.prior + found.terms.nan_to_num(0.0).flip(0).cumsum(0).flip(0)
    total.plot(torch.arange(len(sums)), sums, color=COLOURS[-1])
    total.set(xlabel="timestep t", ylabel="bits per dimension", title="L_T and the terms from T down to t")
    for axes in (terms, total):
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
    _write(figure, path)


def samples_plot(path: Path, real: Sequence[Tensor], generated: Sequence[Tensor], names: list[str], title: str) -> None:
    """One row a class: real images left, generated ones right. Each entry is [n, C, H, W] of one class."""
    columns = [max(len(images) for images in side) for side in (real, generated)]
    figure = _figure(max(MIN_WIDTH, CELL * (sum(columns) + 1) + 1.2), CELL * len(names) + 1.1)
    figure.suptitle(_plain(title), fontsize=11)
    grids = figure.subplots(1, 2, width_ratios=columns)
    for axes, side, width, heading in zip(grids, (real, generated), columns, ("real", "generated"), strict=True):
        _show_grid(axes, [_filled(images, width) for images in side])
        axes.set_title(heading)
    _name_rows(grids[0], names)
    _write(figure, path)


def trajectory_plot(
    path: Path, columns: list[str], seen: Tensor, estimates: Tensor, names: list[str], title: str
) -> None:
    """From noise to image: x and the network's estimate of x0, each [columns, rows, C, H, W]."""
    figure = _figure(max(MIN_WIDTH, CELL * 1.25 * (2 * len(columns) + 1) + 1.2), CELL * 1.25 * len(names) + 1.5)
    figure.suptitle(_plain(title), fontsize=11)
    figure.get_layout_engine().set(h_pad=0.1)  # inches: between the title and the headings
    # A process that does not keep the variance starts far outside of [-1, 1]: show it as noise, not as black and white.
    seen = seen / seen.std(dim=(1, 2, 3, 4), keepdim=True).clamp(min=1)
    grids = figure.subplots(1, 2)
    for axes, images, heading in zip(grids, (seen, estimates), ("x after the step", "estimate of x0"), strict=True):
        _show_grid(axes, list(images.transpose(0, 1)))
        axes.set_title(heading, fontsize=10, pad=24)
        axes.set_xticks(_centres(len(columns), images.shape[-1]), columns, fontsize=7)
        axes.xaxis.tick_top()
    _name_rows(grids[0], names)
    _write(figure, path)


def _plain(text: str) -> str:
    """Text in which dollars are dollars, and no formula."""
    return text.replace("$", r"\$")


def grid_plot(path: Path, images: Tensor, captions: list[str], columns: int, title: str) -> None:
    """Images [N, C, H, W] in rows of ``columns``, each with its caption above."""
    rows = -(-len(images) // columns)
    figure = _figure(max(CELL * 1.4 * columns + 0.4, 5.0), CELL * 1.75 * rows + 0.6)
    figure.suptitle(_plain(title), fontsize=11)
    for axes, image, caption in zip(
        figure.subplots(rows, columns, squeeze=False).flat,
        [*images, *[None] * (rows * columns - len(images))],
        [*captions, *[""] * (rows * columns - len(images))],
        strict=True,
    ):
        axes.axis("off")
        if image is not None:
            axes.imshow(_pixels(image), vmin=0, vmax=1, cmap="gray", interpolation="nearest")
            axes.set_title(_plain(_shortened(caption)), fontsize=8, pad=2)
    _write(figure, path)


def gif(path: Path, parts: Sequence[Tensor], columns: int) -> None:
    """Videos [N, 1, F, H, W] in rows of ``columns``, enlarged and in a loop; a wider gap is between two parts."""
    from PIL import Image

    gap, rows = _gap(parts[0].shape[-1]), []
    for part in parts:
        cells = F.pad((part[:, 0].clamp(-1, 1) + 1) / 2, (0, gap, 0, gap), value=BETWEEN)  # [N, F, H, W]
        missing = cells.new_full((-len(cells) % columns, *cells.shape[1:]), BETWEEN)
        rows += [torch.cat(list(row), dim=-1) for row in torch.cat([cells, missing]).split(columns)]
        rows.append(torch.full_like(rows[-1][:, : 3 * gap], BETWEEN))
    large = torch.cat(rows[:-1], dim=1).mul(GRAYS - 1).round().mul(255 / (GRAYS - 1)).byte()
    large = large.repeat_interleave(ENLARGED, dim=1).repeat_interleave(ENLARGED, dim=2)
    first, *others = [Image.fromarray(frame.numpy()) for frame in large]
    how = dict(format="GIF", save_all=True, append_images=others, duration=FRAME_MS, loop=0)
    write_atomically(path, lambda file: first.save(file, **how))


def _figure(width: float, height: float) -> Any:
    # No pyplot: nothing global, no display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _write(figure: Any, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))


def _show_grid(axes: Any, rows: list[Tensor]) -> None:
    """Rows of images, each [columns, C, H, W], as one picture with gaps."""
    gap = _gap(rows[0].shape[-1])
    # Infinite outside of the images: transparent, whatever the background.
    picture = torch.cat([torch.cat(list(F.pad(row, (0, gap, 0, gap), value=torch.nan)), dim=-1) for row in rows], -2)
    axes.imshow(_pixels(picture), vmin=0, vmax=1, cmap="gray", interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.set_frame_on(False)


def _pixels(image: Tensor) -> Any:
    """[C, H, W] in [-1, 1] as matplotlib wants it: [H, W], or [H, W, 4] with transparency where it is NaN."""
    image = ((image.clamp(-1, 1) + 1) / 2).movedim(0, -1)
    if image.shape[-1] == 1:
        return image[..., 0].numpy()
    opaque = (~image[..., :1].isnan()).to(image.dtype)
    return torch.cat([image.nan_to_num(0), opaque], dim=-1).numpy()


def _filled(images: Tensor, count: int) -> Tensor:
    """[n, ...] with NaN images appended up to ``count``."""
    missing = images.new_full((count - len(images), *images.shape[1:]), torch.nan)
    return torch.cat([images, missing])


def _gap(size: int) -> int:
    return max(1, round(GAP * size))


def _centres(count: int, size: int) -> list[float]:
    pitch = size + _gap(size)
    return [index * pitch + (size - 1) / 2 for index in range(count)]


def _name_rows(axes: Any, names: list[str]) -> None:
    height = axes.images[0].get_array().shape[0] // len(names)
    size = next(size for size in range(1, height + 1) if size + _gap(size) == height)
    axes.set_yticks(_centres(len(names), size), [_plain(_shortened(name)) for name in names])
    axes.set_ylabel("class")


def _shortened(name: str, length: int = 14) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _running_mean(values: Tensor, window: int) -> Tensor:
    return values.unfold(0, window, 1).mean(-1)


def _bin_centres(process: Process, bins: int) -> Tensor:
    fraction = (torch.arange(bins) + 0.5) / bins
    if process.t_is_sigma:
        low, high = LN_SIGMA_RANGE
        return low + fraction * (high - low)
    return fraction * getattr(process, "steps", 1)


def _time_label(process: Process) -> str:
    if process.t_is_sigma:
        return "ln(sigma): clean to noise"
    return "timestep t: clean to noise" if process.discrete else "time t: clean to noise"
