"""``fastdiff demo`` and ``fastdiff sample``: what happens in which order, and what is said about it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import time
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdiff

from ..files import held, remove_leftovers, write_atomically
from . import DemoError, checkpoint, extras, generate, latent, motion, plots, terms
from .classifier import train_classifier
from .data import ImageData, digits, folder
from .ranks import Ranks, check_parallel, joined, on_this_machine, own_device
from .settings import Recipe, Settings, build, differing, make_sampler, resolve
from .training import Trainer
from .videos import moving_digits

OUTPUTS = ("checkpoint.pt", "report.json", "loss.png", "samples.png", "trajectory.png")
VIDEO_OUTPUTS = (*OUTPUTS, "samples.gif")
DIGITS_A_CLASS = 50  # generated, for the accuracy
VIDEOS_A_CLASS = 20
SHOWN_A_CLASS = 8
GIF_ROWS = 2, 3  # of real and of generated videos, a column each class
SHOWN_CLASSES = 10
TRAJECTORIES = 5
MAX_THREADS = 8
# On images up to this size two threads save a third of the time (115 to 76 ms a step of 256 digits on two cores), but
# take ten times as long (1 to 2 s) whenever another program wants one of the cores.
SINGLE_THREAD_SIZE = 16


@dataclass(frozen=True)
class DemoOptions:
    """What ``fastdiff demo`` was asked for. ``settings`` maps names of ``Settings`` to a value, or None: not given."""

    settings: dict[str, Any]
    out: Path | None = None
    resume: bool = False
    device: str = "auto"
    threads: int | None = None
    save_every: int = 100
    parallel: str | None = None


def demo(options: DemoOptions) -> dict[str, Any]:
    """Train, or go on training, and write the outputs. Returns the report."""
    started = time.perf_counter()
    # tqdm and matplotlib are wanted at the end of the training: missing ones should be noticed before it.
    extras.require("numpy", "sklearn", "matplotlib", "PIL", "tqdm")
    for name, value in (("--save-every", options.save_every), ("--threads", options.threads)):
        if value is not None and value < 1:
            raise DemoError(f"{name} must be at least 1; got {value}.")
    device = own_device(pick_device(options.device))
    with joined(device) as ranks:
        return _demo(options, device, ranks, started)


def _demo(options: DemoOptions, device: torch.device, ranks: Ranks, started: float) -> dict[str, Any]:
    settings, resumed = ranks.from_first(lambda: _settings_of(options, ranks.count))
    recipe, data = build(settings), _load(settings)
    if resumed is not None and resumed.data["fingerprint"] != data.fingerprint():
        raise DemoError(
            f"the images of {settings.data or 'scikit-learn'} are not those that the checkpoint was made with."
        )
    terms.check(settings, data)
    threads = options.threads or _default_threads(settings, resumed)
    machine = _prepare_machine(device, threads, resumed, ranks)
    if not ranks.first:
        Trainer(settings, recipe, data, device, machine, resumed, ranks).train(lambda state: None, options.save_every)
        return {}
    out = _prepare_folder(options.out)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(out))
        except BlockingIOError as error:
            raise DemoError(f"another run writes into {out}: wait for it, or choose another --out.") from error
        for name in VIDEO_OUTPUTS:  # of killed runs: nobody else writes there now
            remove_leftovers(out / name)
        if resumed is None and settings.latent:
            print(f"training the autoencoder first: {settings.steps} steps", flush=True)
        trainer = Trainer(settings, recipe, data, device, machine, resumed, ranks)
        return _train(trainer, options, out, started)


def _load(settings: Settings) -> ImageData:
    if settings.video:
        return moving_digits(settings.seed)
    return digits() if settings.data is None else folder(Path(settings.data), settings.size, settings.gray)


def _train(trainer: Trainer, options: DemoOptions, out: Path, started: float) -> dict[str, Any]:
    settings, recipe, data, device = trainer.settings, trainer.recipe, trainer.data, trainer.device
    _announce(trainer, out)
    path = out / "checkpoint.pt"
    if not trainer.step:
        # So that --resume knows the settings however early the run is killed.
        checkpoint.save(trainer.checkpoint(), path)
    if trainer.step < settings.steps:
        try:
            trainer.train(lambda state: checkpoint.save(state, path), options.save_every)
        except KeyboardInterrupt:
            print(f"\ninterrupted; continue with  fastdiff demo --out {out} --resume")
            raise
    training_done = time.perf_counter()
    state = trainer.checkpoint()
    report = _write_outputs(state, recipe, data, device, out) | {"processes": trainer.ranks.count}
    if trainer.terms is not None:
        report["terms"] = terms.report(state.terms["values"], trainer.terms.measure(state.ema_network(device)))
    report["seconds"] = round(trainer.seconds + time.perf_counter() - training_done, 2)
    report["seconds_of_this_call"] = round(time.perf_counter() - started, 2)
    text = json.dumps(report, indent=2) + "\n"
    write_atomically(out / "report.json", lambda file: file.write(text.encode()))
    _print_report(report, out)
    return report


def draw_samples(
    path: Path,
    out: Path | None = None,
    classes: list[str] | None = None,
    count: int | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
    device: str = "auto",
) -> None:
    """Draw a grid of images, or of videos, from the averaged weights of a checkpoint. None: as in the run that made it.

    Args:
        path: the checkpoint, or the folder of its run.
        out: a .png file, of videos a .gif file. None: samples.png or samples.gif.
        classes: the class of each image, by name or index. None: ``count`` images of the classes in turn.
    """
    extras.require("numpy", "matplotlib", "PIL", "tqdm")
    if steps is not None and steps < 1:
        raise DemoError(f"--steps must be at least 1; got {steps}.")
    saved = checkpoint.find(path)
    what, suffix = _what(saved.settings), ".gif" if saved.settings.video else ".png"
    out = Path(f"samples{suffix}") if out is None else out
    if out.suffix.lower() != suffix:
        raise DemoError(f"--out must name a {suffix} file: {path} draws {what}; got {out}.")
    if out.exists() and not overwrite:
        raise DemoError(f"{out} exists: choose another --out, or pass --overwrite.")
    names = saved.data["class_names"]
    if classes is not None:
        labels = [_class_index(name, names) for name in classes]
        columns = min(len(labels), 10)
    else:
        columns = min(len(names), 10) if len(names) > 1 else 8
        count = 8 * columns if count is None else count
        if count < 1:
            raise DemoError(f"--count must be at least 1; got {count}.")
        labels = [index % len(names) for index in range(count)]
        columns = min(columns, count)
    recipe = build(saved.settings)
    if sampler is not None:
        try:
            recipe = dataclasses.replace(recipe, sampler=make_sampler(sampler, saved.settings.latent))
        except ValueError as error:
            raise DemoError(str(error)) from error
    steps = saved.settings.sample_steps if steps is None else steps
    guidance = saved.settings.guidance if guidance is None else guidance
    device = pick_device(device)
    network, autoencoder = saved.ema_network(device), saved.autoencoder_network(device)
    torch.set_num_threads(saved.machine["threads"])
    images = generate.draw(network, recipe, torch.tensor(labels), steps, guidance, seed, autoencoder=autoencoder)
    if saved.step < saved.settings.steps:
        print(f"note: this checkpoint has done {saved.step} of {saved.settings.steps} training steps.")
    out.parent.mkdir(parents=True, exist_ok=True)
    title = f"{sampler or saved.settings.sampler}, {steps} steps, guidance {guidance:g}, seed {seed}"
    if saved.settings.video:
        plots.gif(out, [images], columns)
    else:
        plots.grid_plot(out, images, [names[label] for label in labels], columns, title)
    print(f"{len(labels)} {what}: {out}")


def pick_device(name: str) -> torch.device:
    """ "auto": the GPU if there is one. Raises DemoError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DemoError(f"the device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _settings_of(options: DemoOptions, processes: int) -> tuple[Settings, checkpoint.Checkpoint | None]:
    """The settings, and the checkpoint to continue from, if any. Raises DemoError for what cannot be a run."""
    settings, resumed = _begun_or_not(options)
    build(settings)
    latent.check(settings)
    check_parallel(options.parallel, processes, settings)
    return settings, resumed


def _begun_or_not(options: DemoOptions) -> tuple[Settings, checkpoint.Checkpoint | None]:
    """The settings, and the checkpoint to continue from, if any. Refuses to write where there is something already."""
    if options.out is None:
        if options.resume:
            raise DemoError("--resume needs --out: the folder of the run to continue.")
        return resolve(options.settings), None
    present = [name for name in VIDEO_OUTPUTS if (options.out / name).exists()]
    if not options.resume:
        if present:
            raise DemoError(
                f"{options.out} already holds {', '.join(present)}: choose another --out, or continue it with --resume."
            )
        return resolve(options.settings), None
    if "checkpoint.pt" not in present:
        if present:
            raise DemoError(f"{options.out} holds {', '.join(present)} but no checkpoint.pt to resume: choose another.")
        raise DemoError(f"{options.out} holds no run to resume: name its folder, or leave out --resume to begin one.")
    resumed = checkpoint.load(options.out / "checkpoint.pt")
    if differences := differing(resumed.settings, options.settings):
        raise DemoError(
            f"{options.out} was made with other settings: {'; '.join(differences)}. Leave them out to continue with "
            f"the checkpoint's, or choose another --out."
        )
    given_data = options.settings.get("data")
    return dataclasses.replace(resumed.settings, data=given_data or resumed.settings.data), resumed


def _default_threads(settings: Settings, resumed: checkpoint.Checkpoint | None) -> int:
    """Those of the run that is resumed, since sums over several threads round differently."""
    if resumed is not None:
        return resumed.machine["threads"]
    if settings.size <= SINGLE_THREAD_SIZE and not settings.video:
        return 1
    return max(1, min(_usable_cores(), MAX_THREADS) // on_this_machine())


def _prepare_machine(
    device: torch.device, threads: int, resumed: checkpoint.Checkpoint | None, ranks: Ranks
) -> dict[str, Any]:
    """Make results repeatable, and say so if they cannot be those of the run that is resumed."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    backend = fastdiff.backends.choose(device)
    machine = {"device": device.type, "backend": backend, "threads": threads, "torch": str(torch.__version__)}
    machine |= {"processes": ranks.count}
    if resumed is not None and ranks.first:
        for name, now in machine.items():
            if (before := resumed.machine.get(name, 1)) != now:
                print(
                    f"note: resuming with {name} {now} a run begun with {before}: the results may differ in their last "
                    f"bits from those of an uninterrupted run."
                )
    return machine


def _prepare_folder(out: Path | None) -> Path:
    """Create the output folder; a fresh one if none was named."""
    if out is not None:
        if out.exists() and not out.is_dir():
            raise DemoError(f"--out {out} is not a folder.")
        out.mkdir(parents=True, exist_ok=True)
        return out
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        fresh = Path("runs") / f"demo-{stamp}{suffix}"
        try:
            fresh.mkdir(parents=True)
            return fresh
        except FileExistsError:
            continue
    raise DemoError("no fresh folder can be made in runs/: name one with --out.")


def _write_outputs(
    state: checkpoint.Checkpoint, recipe: Recipe, data: ImageData, device: torch.device, out: Path
) -> dict[str, Any]:
    """Draw from the averaged weights, judge, plot; returns the report."""
    settings = state.settings
    is_digits, video = settings.data is None, settings.video
    network, autoencoder = state.ema_network(device), state.autoencoder_network(device)
    names = data.class_names
    classes = range(len(names) if is_digits else min(len(names), SHOWN_CLASSES))
    a_class = DIGITS_A_CLASS if is_digits else VIDEOS_A_CLASS if video else SHOWN_A_CLASS
    labels = torch.tensor(classes).repeat_interleave(a_class)
    started = time.perf_counter()
    drawing = settings.sample_steps, settings.guidance, settings.seed
    images = generate.draw(network, recipe, labels, *drawing, autoencoder=autoencoder)
    sampling_seconds = time.perf_counter() - started
    shown_names = [names[index] for index in classes]
    process = f"{settings.process} in latents" if settings.latent else settings.process
    subject = f"{process}, predicting {settings.prediction}, {state.step} steps of {settings.batch} {_what(settings)}"
    how = f"{settings.sampler}, {settings.sample_steps} steps, guidance {settings.guidance:g}"
    values = state.terms.get("values", {})
    plots.loss_plot(out / "loss.png", state.losses, state.time_loss, recipe.process, f"Training: {subject}", values)
    real = moving_digits(settings.seed, motion.HELD_OUT, held_out=True) if video else data
    sides = (real.images, real.labels), (images, labels)
    shown = [[of[label == index][:SHOWN_A_CLASS] for index in classes] for of, label in sides]
    if video:
        grids = [
            torch.stack([each[:rows] for each in side], dim=1).flatten(0, 1) for side, rows in zip(shown, GIF_ROWS)
        ]
        plots.gif(out / "samples.gif", grids, columns=len(names))
        shown = [[each[0].transpose(0, 1) for each in side] for side in shown]  # the frames of one video a class
    plots.samples_plot(
        out / "samples.png",
        *shown,
        shown_names,
        f"Real and generated {_what(settings)}\n{subject}; {how}",
    )
    chosen = torch.tensor(classes[:TRAJECTORIES])
    columns, seen, estimates = generate.trajectory(network, recipe, chosen, *drawing, autoencoder=autoencoder)
    plots.trajectory_plot(
        out / "trajectory.png",
        columns,
        seen,
        estimates,
        shown_names[:TRAJECTORIES],
        f"From noise to {'a middle frame' if video else 'image'}: {process}, predicting {settings.prediction}; {how}",
    )
    report: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "process": repr(recipe.process),
        "device": _device_name(device),
        "backend": fastdiff.backends.choose(device),
        "threads": state.machine["threads"],
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "images": len(data.images),
        "classes": names,
        "steps": state.step,
        "loss_first": state.losses[0].item(),
        "loss_last": state.losses[-1].item(),
        "loss_last_mean": state.losses[-100:].mean().item(),
        "seconds": None,  # filled in last
        "training_seconds": round(state.seconds, 2),
        "images_per_second": round(state.step * settings.batch / state.seconds, 1),
        "sampling_seconds": round(sampling_seconds, 2),
        "samples_drawn": len(labels),
        "digit_accuracy": None,
        "digits_recognised": None,
        "classifier_accuracy": None,
        "autoencoder": None,
        "terms": None,
        "video": None,
        "losses_sha256": _sha256(state.losses),
        "samples_sha256": _sha256(images),
        "versions": _versions(),
    }
    if autoencoder is not None:
        report["autoencoder"] = autoencoder.report(data.images.to(device))
    if is_digits:
        classifier = train_classifier(data.images, data.labels)
        recognised = classifier.recognise(images) == labels
        report["digit_accuracy"] = recognised.double().mean().item()
        report["digits_recognised"] = {name: int(recognised[labels == index].sum()) for index, name in enumerate(names)}
        report["classifier_accuracy"] = classifier.held_out_accuracy
    if video:
        judge = motion.Judge.of(data.first(motion.LEARNED))
        report["video"] = {"real": judge(real.images, real.labels), "generated": judge(images, labels)}
    return report


def _what(settings: Settings) -> str:
    return "videos" if settings.video else "images"


def _announce(trainer: Any, out: Path) -> None:
    settings, data = trainer.settings, trainer.data
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    channels, *frames, height, width = data.images.shape[1:]
    each = f"{width} x {height} x {channels}" + "".join(f", {number} frames," for number in frames)
    processes = f" in each of {trainer.ranks.count} processes" if trainer.ranks.count > 1 else ""
    print(
        f"{len(data.images)} {_what(settings)} {each} in {len(data.class_names)} class(es); "
        f"{settings.process}, {settings.prediction}, weighting {settings.weighting}, loss {settings.loss}\n"
        f"U-Net of {parameters / 1e6:.2f}M parameters on {_device_name(trainer.device)}, "
        f"{trainer.machine['threads']} thread(s){processes}, backend {fastdiff.backends.choose(trainer.device)}; "
        f"writing to {out}",
        flush=True,
    )
    if trainer.step:
        print(f"resuming after step {trainer.step} of {settings.steps}", flush=True)


def _print_report(report: dict[str, Any], out: Path) -> None:
    what = "images" if report["video"] is None else "videos"
    rows = [
        ("training", f"{report['steps']} steps in {report['training_seconds']:.1f} s"),
        ("speed", f"{report['images_per_second']:.0f} {what}/s"),
        ("loss", f"{report['loss_first']:.4f} at first, {report['loss_last_mean']:.4f} over the last steps"),
        ("sampling", f"{report['samples_drawn']} {what} in {report['sampling_seconds']:.1f} s"),
        ("total", f"{report['seconds']:.1f} s"),
    ]
    if report["digit_accuracy"] is not None:
        recognised = report["digits_recognised"]
        rows += [
            ("classifier", f"{report['classifier_accuracy']:.1%} of held-out real digits recognised"),
            (
                "generated digits",
                f"{sum(recognised.values())} of {report['samples_drawn']} recognised as the class asked for "
                f"({report['digit_accuracy']:.1%})",
            ),
            ("by class", "  ".join(f"{name}: {number}" for name, number in recognised.items())),
        ]
    if report["video"] is not None:
        rows += motion.said(report["video"])
    if report["autoencoder"] is not None:
        error, divergence = report["autoencoder"]["squared_error"], report["autoencoder"]["divergence"]
        rows.append(("autoencoder", f"squared error {error:.4f} a pixel, divergence {divergence:.1f} nats an image"))
    for name, term in (report["terms"] or {}).items():
        rows.append((f"loss: {name}", terms.said(name, term)))
    width = max(len(name) for name, _ in rows)
    print()
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    print("\nfiles:")
    for name in OUTPUTS if report["video"] is None else VIDEO_OUTPUTS:
        print(f"  {out / name}")


def _class_index(name: str, names: list[str]) -> int:
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(names):
        return int(name)
    raise DemoError(f"there is no class {name!r}: use names or indices of {', '.join(names)}.")


def _usable_cores() -> int:
    """The cores this process may run on, which in a container can be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _versions() -> dict[str, str]:
    versions = {"fastdiff": fastdiff.__version__, "python": platform.python_version()}
    for package in ("torch", *extras.PACKAGES.values()):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
