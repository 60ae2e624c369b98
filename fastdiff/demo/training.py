"""The training loop. Random choices are functions of (seed, step): a resumed run repeats an uninterrupted one."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff import Noised, drop_condition
from fastdiff.autoencoder import noise_latents

from . import latent, terms
from .checkpoint import Checkpoint, network_class
from .data import ImageData
from .ranks import ALONE, Ranks
from .seeds import generator, with_weights_of
from .settings import Recipe, Settings

LEARNING_RATE = 2e-3
WARM_UP = 100  # steps, or a tenth of a shorter run
EMA_DECAY = 0.995
LABEL_DROPOUT = 0.1
QUARTERS, TIME_BINS = 4, 25
LN_SIGMA_RANGE = (math.log(0.01), math.log(20.0))  # EDM's sigmas as its LogNormal draws them, about +- 2.9 std


class Trainer:
    """A network, its average and its optimizer, somewhere between step 0 and the last.

    Args:
        data: the images, or videos, to learn.
        resume: continue from it instead of starting.
        machine: recorded in the checkpoints.
        ranks: the processes of the run, each of which has its share of every batch; all have the same state.
    """

    def __init__(
        self,
        settings: Settings,
        recipe: Recipe,
        data: ImageData,
        device: torch.device,
        machine: dict[str, Any],
        resume: Checkpoint | None = None,
        ranks: Ranks = ALONE,
    ):
        self.settings, self.recipe, self.data, self.device, self.machine = settings, recipe, data, device, machine
        self.ranks = ranks
        self.data_description = {
            "channels": data.images.shape[1],
            "class_names": data.class_names,
            "fingerprint": data.fingerprint(),
        }
        # Small enough for any device; indexing there saves a copy a step.
        learned, held_out = data.to(device), None
        names = terms.chosen(settings)
        if names:
            learned, held_out = terms.split(learned)
        self.images, self.labels = learned.images, learned.labels
        self.autoencoder = self.moments = None
        if settings.latent:
            self.autoencoder = self._autoencoder(resume)
            self.moments = self.autoencoder.moments(self.images)
        self.terms = None
        if names:
            objective, state = recipe.objective, resume.terms if resume else None
            self.terms = terms.Terms(settings, objective, learned, held_out, names, self.autoencoder, state)
            self.term_values = torch.full((len(self.terms.logged), settings.steps), math.nan, device=device)
        channels, *frames, size, _ = self.images.shape[1:]
        if settings.latent:
            channels, size = latent.CHANNELS, size // latent.FACTOR
        shape = channels, *frames, size, len(data.class_names), recipe.time_scale, settings.width
        network = with_weights_of(settings.seed, "weights", lambda: network_class(settings)(*shape))
        self.model = network.to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=device.type != "mps"
        )
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.time_loss = torch.zeros(2, QUARTERS, TIME_BINS, dtype=torch.float64)
        if resume is not None:
            self.model.load_state_dict(resume.model)
            self.ema.load_state_dict(resume.ema)
            self.optimizer.load_state_dict(resume.optimizer)
            self.step, self.seconds = resume.step, resume.seconds
            self.losses, self.time_loss = resume.losses.tolist(), resume.time_loss.clone()
            if names:
                for row, name in enumerate(self.terms.logged):
                    self.term_values[row, : self.step] = resume.terms["values"][name]

    def _autoencoder(self, resume: Checkpoint | None) -> latent.Autoencoder:
        if resume is not None:
            return resume.autoencoder_network(self.device)
        deviation = self.recipe.process.sigma_data if self.settings.prediction == "edm" else 1.0
        return latent.train_autoencoder(self.settings, self.images, deviation)

    def checkpoint(self) -> Checkpoint:
        """The state as it is now; it shares memory with the trainer."""
        return Checkpoint(
            settings=self.settings,
            data=self.data_description,
            network=self.model.settings,
            step=self.step,
            model=self.model.state_dict(),
            ema=self.ema.state_dict(),
            optimizer=self.optimizer.state_dict(),
            losses=torch.tensor(self.losses, dtype=torch.float64),
            time_loss=self.time_loss,
            autoencoder={} if self.autoencoder is None else self.autoencoder.state_dict(),
            terms={} if self.terms is None else self.terms.state() | {"values": self._values_of_terms()},
            machine=self.machine,
            seconds=self.seconds,
        )

    def _values_of_terms(self) -> dict[str, Tensor]:
        """Of every step so far, by name: here they leave the device."""
        done = self.term_values[:, : self.step].cpu()
        return dict(zip(self.terms.logged, done, strict=True))

    def train(self, save: Callable[[Checkpoint], None], save_every: int) -> None:
        """Run to the last step under a progress bar; ``save`` every so many steps and after the last."""
        from tqdm.auto import tqdm

        settings = self.settings
        what, quiet = "videos" if settings.video else "images", not self.ranks.first
        with tqdm(total=settings.steps, initial=self.step, unit="step", desc="training", disable=quiet) as bar:
            started, seconds_before, first_step = time.perf_counter(), self.seconds, self.step
            while self.step < settings.steps:
                loss = self.train_step()
                elapsed = time.perf_counter() - started
                self.seconds = seconds_before + elapsed
                speed = (self.step - first_step) * settings.batch / elapsed
                bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} {what}/s", refresh=False)
                bar.update()
                if self.step % save_every == 0 or self.step == settings.steps:
                    save(self.checkpoint())

    def train_step(self) -> float:
        """One step; returns its loss."""
        settings, objective = self.settings, self.recipe.objective
        share = self.ranks.share(settings.batch)
        index = batch_indices(len(self.images), settings.batch, self.step, settings.seed)[share].to(self.device)
        # The seed gives t, noise and what is dropped by sample index: no sample of the run has those of another, and
        # each has its own in whichever process it is.
        source = {"seed": settings.seed, "sample_offset": self.step * settings.batch + share.start}
        images, labels = self.images[index], self.labels[index]
        given, _ = drop_condition(labels, LABEL_DROPOUT, self.model.null_class, **source)
        noised = self._noised(index, source)
        output = self.model(noised.model_input, noised.model_time, given)
        row_losses = objective.loss(output, noised, reduction="none")
        if self.terms is None:
            loss = row_losses.sum() / settings.batch
        else:
            loss = self.terms.loss(output, noised, images, labels, self.step)

        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, settings.steps)
        self.optimizer.zero_grad()
        loss.backward()
        bins = (time_fraction(noised) * TIME_BINS).long().clamp(0, TIME_BINS - 1)
        seen = torch.zeros(2, settings.batch, device=self.device)  # of the whole batch: losses, and bins of their times
        seen[:, share] = torch.stack([row_losses.detach(), bins])
        loss = loss.detach()
        self.ranks.add_up([*(parameter.grad for parameter in self.model.parameters()), seen, loss])
        self.optimizer.step()
        if self.terms is not None:
            self.term_values[:, self.step] = self.terms.after(images)
        self._update_ema()

        quarter = QUARTERS * self.step // settings.steps
        row_losses, bins = seen[0].double().cpu(), seen[1].long().cpu()
        self.time_loss[0, quarter] += torch.bincount(bins, row_losses, TIME_BINS)
        self.time_loss[1, quarter] += torch.bincount(bins, minlength=TIME_BINS)
        self.losses.append(loss.item())
        self.step += 1
        return self.losses[-1]

    def _noised(self, index: Tensor, source: dict[str, int]) -> Noised:
        if self.autoencoder is None:
            return self.recipe.objective.noise(self.images[index], **source)
        shift, scale = self.autoencoder.shift, self.autoencoder.scale
        return noise_latents(self.recipe.objective, self.moments[index], shift=shift, scale=scale, **source)

    @torch.no_grad()
    def _update_ema(self) -> None:
        # The ramp lets the average forget the random start, as in TensorFlow's ExponentialMovingAverage.
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)


def batch_indices(count: int, batch: int, step: int, seed: int) -> Tensor:
    """int64 [batch]: the batch of a step from the endless row of shuffled epochs."""
    first = step * batch
    epochs = range(first // count, (first + batch - 1) // count + 1)
    order = torch.cat([torch.randperm(count, generator=generator(seed, "order", epoch)) for epoch in epochs])
    return order[first % count :][:batch]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a half cosine to 0."""
    warm_up = max(1, min(WARM_UP, steps // 10))
    return LEARNING_RATE * min(1.0, (step + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def time_fraction(noised: Noised) -> Tensor:
    """Where each sample's time lies on the axis of the loss-by-time plot, [B]: 0 is clean, 1 is noise."""
    process = noised.objective.process
    if process.t_is_sigma:
        low, high = LN_SIGMA_RANGE
        return (noised.t.log() - low) / (high - low)
    return process.fraction(noised.t)
