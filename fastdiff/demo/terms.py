"""The terms that a run may add to its loss: they look at the x0 estimate through small networks trained on real images.

What the terms look through has seen one half of the images that the U-Net learns; what measures their effect, the other
half; and it measures it on images that none of them has seen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdiff
from fastdiff import losses
from fastdiff.losses import adversarial, features

from . import DemoError
from .data import ImageData
from .extractors import Extractors, discriminator, frechet_distance, train_extractors
from .latent import Autoencoder
from .seeds import derived_seed, generator, with_weights_of
from .settings import Settings

WEIGHTS = {"perceptual": 0.3, "adversarial": 0.01, "align": 0.1, "classifier": 0.05}  # and the order of the terms
# What ``Terms.measure`` gives, each the lower the better.
METRICS = {
    "perceptual": "LPIPS distance of held-out images",
    "adversarial": "Frechet distance of held-out images",
    "align": "1 - cosine of held-out images",
    "classifier": "cross-entropy of held-out images",
}
NEED_CLASSES = ("perceptual", "align", "classifier")
MIN_SNR = 0.05  # noisier samples add nothing: what can be estimated of them is no image yet
SHARE = 0.75  # of a batch, its least noisy samples
CRITIC_SHARE = (
    0.5  # the same of the discriminator, for which there is no least SNR: what a term leaves out it sees as 0
)
HELD_OUT = 8  # one image of so many
FEWEST = 4 * HELD_OUT  # images
MEASURED_SNR = 0.1
STRETCHES = 20  # of the training, in the report
R1_GAMMA, R1_EVERY = 1.0, 8
CRITIC_LEARNING_RATE = 5e-4


def chosen(settings: Settings) -> tuple[str, ...]:
    """The terms of a run."""
    return tuple(name for name in WEIGHTS if getattr(settings, name))


def check(settings: Settings, data: ImageData) -> None:
    """Raises DemoError for terms that these images cannot have."""
    names = chosen(settings)
    if names and len(data.images) < FEWEST:
        raise DemoError(f"--{names[0]} needs at least {FEWEST} images; there are {len(data.images)}.")
    if len(data.class_names) < 2 and (name := next((name for name in names if name in NEED_CLASSES), None)):
        raise DemoError(
            f"--{name} needs images of at least two classes, each in a subfolder: it looks at them through a network "
            f"that tells classes apart."
        )


def logged(names: tuple[str, ...]) -> tuple[str, ...]:
    """What of such a run has values: the objective's loss, each term, the discriminator's loss."""
    return ("objective", *names, *(("discriminator",) if "adversarial" in names else ()))


def split(data: ImageData) -> tuple[ImageData, ImageData]:
    """(to learn from, held out): every eighth image, the first among them, is held out."""
    out = torch.arange(len(data.images)) % HELD_OUT == 0
    return tuple(ImageData(data.images[which], data.labels[which], data.class_names) for which in (~out, out))


def networks(channels: int, size: int, classes: int) -> nn.ModuleDict:
    """What the terms look through ("looking"), what measures their effect ("measuring"), and the discriminator."""
    return nn.ModuleDict(
        {
            "looking": Extractors(channels, size, classes),
            "measuring": Extractors(channels, size, classes),
            "discriminator": discriminator(channels, size),
        }
    )


class Terms:
    """The loss of a run with terms, and how its effect is measured.

    Args:
        objective: whose loss the terms are added to.
        data: the images that the run learns, on its device.
        held_out: others, on the device too.
        names: of the terms; none: the objective's loss alone, which is measured all the same.
        autoencoder: of a network that works on latents: the terms look at what they are decoded to.
        state: as ``state`` returned it; None: the networks are trained now.
    """

    def __init__(
        self,
        settings: Settings,
        objective: fastdiff.Objective,
        data: ImageData,
        held_out: ImageData,
        names: tuple[str, ...],
        autoencoder: Autoencoder | None = None,
        state: Mapping[str, Any] | None = None,
    ):
        self.settings, self.objective, self.held_out, self.names = settings, objective, held_out, names
        self.autoencoder, self.logged = autoencoder, logged(names)
        channels, size = data.images.shape[1:3]
        make = functools.partial(networks, channels, size, len(data.class_names))
        self.networks = with_weights_of(settings.seed, "terms", make).to(data.images.device)
        judge = self.networks["discriminator"]
        optimizer = torch.optim.Adam(judge.parameters(), CRITIC_LEARNING_RATE, (0.0, 0.99))
        self.critic = adversarial.Discriminator(judge, optimizer, "hinge", r1_gamma=R1_GAMMA, r1_every=R1_EVERY)
        if state is None:
            for half, name in enumerate(("looking", "measuring")):
                images, labels = data.images[half::2], data.labels[half::2]
                train_extractors(self.networks[name], images, labels, settings.steps, generator(settings.seed, name))
        else:
            self.networks.load_state_dict(state["networks"])
            optimizer.load_state_dict(state["optimizer"])
            self.critic.steps = state["critic_steps"]
        self.networks.requires_grad_(False)
        judge.requires_grad_(True)
        self.sum = losses.Sum(objective, decoder=None if autoencoder is None else autoencoder.decode, **self._terms())

    def _terms(self) -> dict[str, losses.Term]:
        looking, begin = self.networks["looking"], self.settings.steps // 4
        made = {
            "perceptual": features.Perceptual(looking.classifier, looking.layers),
            "adversarial": self.critic,
            "align": features.Alignment(looking.image_encoder, looking.label_encoder),
            "classifier": features.Classification(looking.classifier),
        }
        weights = WEIGHTS | {"adversarial": lambda step: WEIGHTS["adversarial"] * (step >= begin)}
        where = dict.fromkeys(WEIGHTS, {"share": SHARE, "min_snr": MIN_SNR}) | {"adversarial": {"share": CRITIC_SHARE}}
        return {name: losses.Term(made[name], weights[name], **where[name]) for name in self.names}

    def loss(self, output: Tensor, noised: fastdiff.Noised, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """The loss of a step, a scalar.

        Args:
            output: of the network, for ``noised``.
            images, labels: of the batch, [B, C, H, W] and [B]; none of the labels dropped.
        """
        asked = {"align": {"condition": labels}, "classifier": {"labels": labels}}
        given = {key: value for name in self.names for key, value in asked.get(name, {}).items()}
        if self.autoencoder is not None:
            given["images"] = images
        return self.sum(output, noised, step=step, **given)

    def after(self, images: Tensor) -> Tensor:
        """What follows the backward pass of ``loss``: the discriminator's own step. Returns the value of each of
        ``logged``, without a weight: float32, on the device, NaN where the step did not compute it."""
        values = dict(self.sum.values)
        if "adversarial" in values:
            values |= self.critic.step(images)
        missing = images.new_full((), math.nan)
        return torch.stack([values.get(name, missing).float() for name in self.logged])

    @torch.no_grad()
    def measure(self, network: nn.Module) -> dict[str, float]:
        """Of the network's estimates of the images that were held out, from a fixed noise of a fixed level, each the
        lower the better:

        - "perceptual": their LPIPS distance from these images, in features of a classifier;
        - "adversarial": the Frechet distance of these features, of all estimates from those of all images;
        - "align": 1 - the cosine of the embeddings of an estimate and of its label;
        - "classifier": the cross-entropy of the classifier against the labels.
        """
        images, labels, measuring = self.held_out.images, self.held_out.labels, self.networks["measuring"]
        x0 = images if self.autoencoder is None else self.autoencoder.encode(images)
        t = time_of_snr(self.objective.process, MEASURED_SNR).to(images.device).expand(len(images))
        noised = self.objective.noise(x0, t, seed=derived_seed(self.settings.seed, "measured noise"))
        estimates = self.objective.predict_x0(network(noised.model_input, noised.model_time, labels), noised)
        if self.autoencoder is not None:
            estimates = self.autoencoder.decode(estimates)
        perceptual = features.Perceptual(measuring.classifier, measuring.layers)
        align = features.Alignment(measuring.image_encoder, measuring.label_encoder)
        found = {
            "perceptual": perceptual(estimates, images).mean(),
            "adversarial": frechet_distance(measuring.hidden(estimates), measuring.hidden(images)),
            "align": align(estimates, labels).mean(),
            "classifier": F.cross_entropy(measuring.classifier(estimates), labels),
        }
        return {name: value.item() for name, value in found.items()}

    def state(self) -> dict[str, Any]:
        """All that training changes or made: what ``state`` of the constructor takes."""
        return {
            "networks": self.networks.state_dict(),
            "optimizer": self.critic.optimizer.state_dict(),
            "critic_steps": self.critic.steps,
        }


def time_of_snr(process: fastdiff.Process, snr: float) -> Tensor:
    """The time with this signal-to-noise ratio, or the nearest timestep: a scalar as the process takes it."""
    t = process.levels_at(process.sigma_of_ratio(torch.tensor(snr**-0.5, dtype=torch.float64))).t
    return t.round().long() if process.discrete else t


def report(values: Mapping[str, Tensor], metrics: Mapping[str, float]) -> dict[str, Any]:
    """For report.json: of the objective's loss, of each term, and of the discriminator's loss, the "values" (means over
    stretches of the training, None where none was computed); and of each term its "weight" and its "metric".

    Args:
        values: by name, [steps], NaN where none was computed.
        metrics: from ``measure``.
    """
    found: dict[str, Any] = {}
    for name, each in values.items():
        means = [part.double().nanmean().item() for part in each.tensor_split(min(STRETCHES, len(each)))]
        found[name] = {"values": [None if math.isnan(mean) else mean for mean in means]}
        if name in WEIGHTS:
            found[name] |= {"weight": WEIGHTS[name], "metric": metrics[name]}
    return found


def said(name: str, entry: Mapping[str, Any]) -> str:
    """A line about an entry of the report."""
    known = [value for value in entry["values"] if value is not None]
    text = f"{known[0]:.4f} at first, {known[-1]:.4f} over the last steps" if known else "not computed"
    return f"{text}; {METRICS[name]} {entry['metric']:.4f}" if name in WEIGHTS else text
