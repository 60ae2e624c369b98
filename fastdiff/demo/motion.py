"""What videos of moving digits are judged by: whether each frame shows the digit, and how the digit moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .classifier import DigitClassifier, train_classifier
from .data import ImageData

WINDOW = 8  # pixels of a digit
FAINT = 0.1  # of white: less is background, not mass
LEARNED, HELD_OUT = 1000, 400  # real videos that a judge learns from and is tried on
USUAL = 0.01, 0.99  # quantiles of real videos, between which a motion is like theirs


def centres(videos: Tensor) -> Tensor:
    """[N, 1, F, H, W] in [-1, 1] -> the centre of mass of each frame, [N, F, (y, x)] in pixels. White is 1, black 0;
    that of a black frame is the middle."""
    mass = (videos[:, 0].clamp(-1, 1) + 1) / 2
    mass = torch.where(mass < FAINT, 0.0, mass)
    mass = torch.where(mass.sum((-2, -1), keepdim=True) > 0, mass, 1.0)
    pixel = torch.arange(videos.shape[-1])
    along = torch.stack([(mass.sum(-1) * pixel).sum(-1), (mass.sum(-2) * pixel).sum(-1)], dim=-1)
    return along / mass.sum((-2, -1))[..., None]


def windows(videos: Tensor) -> Tensor:
    """[N, 1, F, H, W] -> [N F, 1, WINDOW, WINDOW]: what lies around the centre of mass of each frame."""
    pixel = centres(videos).flatten(0, 1)[..., None] + torch.arange(WINDOW) - (WINDOW - 1) / 2  # [N F, (y, x), WINDOW]
    y, x = (2 * pixel / (videos.shape[-1] - 1) - 1).unbind(1)
    y, x = torch.broadcast_tensors(y[:, :, None], x[:, None, :])
    frames = videos.transpose(1, 2).flatten(0, 1)
    return F.grid_sample(frames + 1, torch.stack([x, y], dim=-1), align_corners=True) - 1  # black, where it ends


def speed(videos: Tensor) -> Tensor:
    """[N, 1, F, H, W] -> how far the centre of mass goes from a frame to the next, in pixels: the mean of each, [N]."""
    return centres(videos).diff(dim=1).norm(dim=-1).mean(-1)


def turning(videos: Tensor) -> Tensor:
    """[N, 1, F, H, W] -> how much that step changes, in pixels: the mean of each, [N]. 0 at a constant velocity."""
    return centres(videos).diff(n=2, dim=1).norm(dim=-1).mean(-1)


def said(found: dict[str, dict[str, float]]) -> list[tuple[str, str]]:
    """Rows of the report, from what a judge saw in "generated" and in held-out "real" videos."""
    made, real = found["generated"], found["real"]
    return [
        (title, f"{made[name]:{form}} {text} (of held-out real ones {real[name]:{form}})")
        for title, name, form, text in (
            ("digit in a frame", "frames_recognised", ".1%", "of the frames recognised as the class asked for"),
            ("digit in a video", "keeps_its_digit", ".1%", "of the videos show one digit in all frames"),
            ("motion", "moves_as_real", ".1%", "of the videos move as real ones do"),
            ("speed", "speed", ".2f", "pixels a frame"),
            ("turning", "turning", ".2f", "pixels a frame of change"),
        )
    ]


@dataclass(frozen=True)
class Judge:
    """Knows real videos alone: their digits, by a classifier of windows, and the usual range of their motion."""

    classifier: DigitClassifier
    speeds: tuple[float, float]
    turnings: tuple[float, float]

    @classmethod
    def of(cls, real: ImageData) -> Judge:
        """One that has learned these videos."""
        frames = real.images.shape[2]
        usual = [
            tuple(of(real.images).double().quantile(torch.tensor(USUAL, dtype=torch.float64)).tolist())
            for of in (speed, turning)
        ]
        return cls(train_classifier(windows(real.images), real.labels.repeat_interleave(frames)), *usual)

    def __call__(self, videos: Tensor, labels: Tensor) -> dict[str, Any]:
        """What is seen in videos [N, 1, F, H, W] that should show the digits ``labels`` [N].

        "frames_recognised": the share of frames that show that digit; "keeps_its_digit": of videos whose frames all
        show one digit, whichever; "moves_as_real": of videos that are neither slower or faster nor turn more than is
        usual; "speed", "turning": the means over the videos, in pixels a frame.
        """
        seen = self.classifier.recognise(windows(videos)).view(len(videos), -1)
        speeds, turnings = speed(videos), turning(videos)
        usual = (speeds >= self.speeds[0]) & (speeds <= self.speeds[1]) & (turnings <= self.turnings[1])
        shares = {
            "frames_recognised": seen == labels[:, None],
            "keeps_its_digit": (seen == seen[:, :1]).all(1),
            "moves_as_real": usual,
            "speed": speeds,
            "turning": turnings,
        }
        return {name: each.double().mean().item() for name, each in shares.items()}
