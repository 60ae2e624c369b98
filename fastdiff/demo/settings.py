"""What a run is made of: the settings by name, their defaults, and the fastdiff objects they stand for."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastdiff

from ..names import find
from . import DemoError, videos


@dataclass(frozen=True)
class ProcessChoice:
    """A process by name, and what goes with it unless told otherwise.

    time_scale maps its ``model_time`` to about 0..1000, the range that the U-Net's sinusoids resolve.
    """

    make: Callable[[], fastdiff.Process]
    prediction: str = "epsilon"
    sampler: str = "ddpm"
    time_scale: float = 1.0


PROCESSES = {
    "vp-linear": ProcessChoice(lambda: fastdiff.VariancePreserving("linear")),
    "vp-cosine": ProcessChoice(lambda: fastdiff.VariancePreserving("cosine")),
    "vp-scaled-linear": ProcessChoice(lambda: fastdiff.VariancePreserving("scaled_linear")),
    "vp-zero-snr": ProcessChoice(lambda: fastdiff.VariancePreserving(zero_terminal_snr=True), "v_prediction"),
    "flow": ProcessChoice(fastdiff.RectifiedFlow, "flow", "ddim", 1000.0),
    "edm": ProcessChoice(fastdiff.EDM, "edm", "ddim", 1000.0),
    "vp-sde": ProcessChoice(fastdiff.VPSDE, time_scale=1000.0),
    "sub-vp-sde": ProcessChoice(fastdiff.SubVPSDE, time_scale=1000.0),
    "ve-sde": ProcessChoice(fastdiff.VESDE, "edm", "ddim", 20.0),
}
EDM_TIME_SCALE = 250.0  # for ln(sigma) / 4, about -1.6 to 1.1

MOVING_DIGITS = "moving-digits"  # the --data that is no folder, but videos

# A prediction that belongs to another process than the default one.
PROCESS_OF_PREDICTION = {"flow": "flow", "reversed_flow": "flow", "edm": "edm"}
SAMPLERS = dict(fastdiff.samplers.NAMES)
FOR_IMAGES = ("latent", "perceptual", "adversarial", "align", "classifier")  # and for a run in one process


@dataclass(frozen=True)
class Settings:
    """All that decides what a run computes. ``data`` None is scikit-learn's digits, "moving-digits" videos of them."""

    data: str | None
    size: int
    gray: bool
    process: str
    prediction: str
    weighting: str
    loss: str
    sampler: str
    guidance: float
    steps: int
    batch: int
    sample_steps: int
    width: int
    seed: int
    perceptual: bool
    adversarial: bool
    align: bool
    classifier: bool
    latent: bool

    @property
    def video(self) -> bool:
        """Whether the data is videos."""
        return self.data == MOVING_DIGITS


@dataclass(frozen=True)
class Recipe:
    """The fastdiff objects that settings stand for."""

    process: fastdiff.Process
    objective: fastdiff.Objective
    sampler: fastdiff.samplers.Sampler
    time_scale: float


def resolve(given: dict[str, Any]) -> Settings:
    """Settings from those given by the user (None: not given) and the defaults for the others."""
    given = {name: value for name, value in given.items() if value is not None}
    for name in given.keys() & {"prediction", "weighting", "loss"}:
        given[name] = given[name].replace("-", "_")
    if "prediction" in given:
        with contextlib.suppress(ValueError):  # an unknown one is reported by ``build``
            given["prediction"] = fastdiff.prediction.get(given["prediction"]).name
    video = given.get("data") == MOVING_DIGITS
    from_folder = "data" in given and not video
    if from_folder:
        # Absolute, so that a run can be resumed from anywhere.
        given["data"] = str(Path(given["data"]).resolve())
    if not from_folder and given.keys() & {"size", "gray"}:
        raise DemoError(
            f"--size and --gray go with --data and a folder: {MOVING_DIGITS if video else 'the digits'} are "
            f"{f'{videos.SIZE} x {videos.SIZE}' if video else '8 x 8'} and gray."
        )
    if video and (unfit := [name for name in FOR_IMAGES if given.get(name)]):
        raise DemoError(f"--{unfit[0]} is for images, and {MOVING_DIGITS} are videos: leave it out.")
    for_flows = "flow" if video or str(given.get("sampler")).startswith("flow_") else "vp-linear"
    process = given.get("process") or PROCESS_OF_PREDICTION.get(given.get("prediction"), for_flows)
    if process not in PROCESSES:
        raise DemoError(f"unknown process {process!r}: use one of {', '.join(PROCESSES)}.")
    choice = PROCESSES[process]
    defaults = Settings(
        data=None,
        size=videos.SIZE if video else 32 if from_folder else 8,
        gray=not from_folder,
        process=process,
        prediction=choice.prediction,
        weighting="uniform",
        loss="mse",
        sampler=choice.sampler,
        guidance=1.5,
        steps=2000 if video else 1000,
        batch=16 if video else 64 if from_folder else 256,
        sample_steps=30 if video else 50,
        width=16 if video else 32,
        seed=0,
        perceptual=False,
        adversarial=False,
        align=False,
        classifier=False,
        latent=False,
    )
    settings = dataclasses.replace(defaults, **given)
    for name, low, high in (
        ("steps", 1, 10**7),
        ("batch", 1, 10**5),
        ("sample_steps", 1, 10**4),
        ("size", 4, 1024),
        ("seed", 0, 2**63 - 1),
    ):
        if not low <= getattr(settings, name) <= high:
            raise DemoError(f"--{name.replace('_', '-')} must lie in [{low}, {high}]; got {getattr(settings, name)}.")
    if not math.isfinite(settings.guidance):
        raise DemoError(f"--guidance must be a finite number; got {settings.guidance}.")
    if settings.width < 8 or settings.width % 8:
        raise DemoError(f"--width must be a positive multiple of 8; got {settings.width}.")
    return settings


def build(settings: Settings) -> Recipe:
    """The objects. Raises DemoError for names that are unknown and combinations that mean nothing."""
    choice = PROCESSES[settings.process]
    try:
        process = choice.make()
        timesteps = "logit_normal" if settings.video and settings.process == "flow" else None
        objective = fastdiff.Objective(
            process, settings.prediction, settings.weighting, settings.loss, timesteps=timesteps
        )
        sampler = make_sampler(settings.sampler, settings.latent)
        # Now, not after the training that it would make useless.
        sampler.plan(process, settings.sample_steps, settings.prediction)
    except (ValueError, TypeError) as error:
        raise DemoError(str(error)) from error
    return Recipe(process, objective, sampler, EDM_TIME_SCALE if settings.prediction == "edm" else choice.time_scale)


def make_sampler(name: str, latent: bool = False) -> fastdiff.samplers.Sampler:
    """The sampler of that name, for images in [-1, 1] or for latents. Raises ValueError for an unknown one."""
    found = find("sampler", name, SAMPLERS, {"euler_a": "euler_ancestral"})
    if latent:
        return found()
    how = {"rederive_epsilon": True} if found is fastdiff.samplers.DDIM else {}
    return found(clip=1.0, **how)


def differing(old: Settings, given: dict[str, Any]) -> list[str]:
    """Which of the settings given differ from the old ones, as "--steps 20 (the checkpoint has 10)".

    The path of the data may differ: its contents are compared instead.
    """
    kept = dataclasses.asdict(old)
    if old.data is None or old.video:
        kept |= {"size": None, "gray": None}
    new = resolve(kept | {name: value for name, value in given.items() if value is not None})
    return [
        f"--{name.replace('_', '-')} {getattr(new, name)} (the checkpoint has {getattr(old, name)})"
        for name in (field.name for field in dataclasses.fields(Settings))
        if name != "data" and getattr(new, name) != getattr(old, name)
    ]
