"""Checkpoints: plain tensors, numbers and strings in one file, complete or absent."""

from __future__ import annotations

import dataclasses
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import write_atomically
from ..showing import printable
from . import DemoError, terms
from .latent import Autoencoder
from .settings import Settings, build
from .unet import UNet
from .video_unet import VideoUNet

FORMAT = "fastdiff-demo-2"


@dataclass(frozen=True)
class Checkpoint:
    """A run as far as it has come.

    Attributes:
        settings: of the run.
        data: "channels", "class_names" and "fingerprint" of the images.
        network: arguments of ``UNet``, or of ``VideoUNet`` if the data is videos.
        step: training steps done.
        model, ema, optimizer: state dicts.
        losses: float64 [step], the loss of every step.
        time_loss: float64 [2, quarters, bins], sum and number of the losses by quarter of training and by time.
        autoencoder: state dict of the ``Autoencoder``, of a run with latents; else empty.
        terms: of a run with terms, what ``Terms.state`` returns, and "values": by name, float32 [step], those of every
            step, NaN where none was computed; else empty.
        machine: "device", "backend", "threads", "torch" and "processes" of the run so far: with others the bits may
            differ.
        seconds: spent in training.
    """

    settings: Settings
    data: dict[str, Any]
    network: dict[str, Any]
    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]
    losses: Tensor
    time_loss: Tensor
    autoencoder: dict[str, Tensor]
    terms: dict[str, Any]
    machine: dict[str, Any]
    seconds: float

    def ema_network(self, device: torch.device) -> UNet:
        """The network with the averaged weights, which samples are drawn from."""
        network = network_class(self.settings)(**self.network)
        network.load_state_dict(self.ema)
        return network.to(device).eval().requires_grad_(False)

    def autoencoder_network(self, device: torch.device) -> Autoencoder | None:
        """What the latents of the network are decoded by; None where it works on images."""
        if not self.settings.latent:
            return None
        made = Autoencoder(self.data["channels"])
        made.load_state_dict(self.autoencoder)
        return made.to(device).eval().requires_grad_(False)


def network_class(settings: Settings) -> type[UNet]:
    """Of the network that a run trains."""
    return VideoUNet if settings.video else UNet


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write atomically."""
    contents = {field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)}
    contents |= {"format": FORMAT, "settings": dataclasses.asdict(checkpoint.settings)}
    write_atomically(path, lambda file: torch.save(contents, file))


def find(path: Path) -> Checkpoint:
    """``load`` the file, or that of the run whose folder is named."""
    if path.is_dir():
        if not (path / "checkpoint.pt").exists():
            raise DemoError(f"{path} holds no checkpoint.pt: name the folder of a run of fastdiff demo, or the file.")
        path /= "checkpoint.pt"
    return load(path)


def load(path: Path) -> Checkpoint:
    """Read onto the CPU. Raises DemoError for a file that is missing, truncated, corrupt or something else."""
    if not path.is_file():
        raise DemoError(f"there is no checkpoint {path}.")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load does not compare the checksums.
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, zlib, pickle and torch raise a dozen kinds for damaged files
        # torch's advice to allow what a file asks for is not the user's to take.
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than plain tensors" if unsafe else str(error).strip().split("\n")[0]
        raise DemoError(f"{path} is truncated, damaged or no checkpoint of fastdiff's demo ({reason}).") from error
    if not isinstance(contents, dict) or contents.pop("format", None) != FORMAT:
        raise DemoError(f"{path} is no checkpoint of this version of fastdiff's demo.")
    try:
        found = Checkpoint(**contents | {"settings": Settings(**contents["settings"])})
        _check(found)
    except Exception as error:  # whatever a file that was made up holds
        reason = printable(str(error).strip().split("\n")[0])[:200]
        raise DemoError(f"{path} is no checkpoint of this version of fastdiff's demo ({reason}).") from error
    return found


def _check(found: Checkpoint) -> None:
    """Raises, with whatever error, unless the parts are what they should be and go together."""
    kinds = {"str": str, "str | None": (str, type(None)), "int": int, "float": (int, float), "bool": bool}
    for field in dataclasses.fields(Settings):
        value = getattr(found.settings, field.name)
        if not isinstance(value, kinds[str(field.type)]):
            raise TypeError(f"settings: {field.name} is {value!r}")
    names = found.data["class_names"]
    if not names or any(type(name) is not str or printable(name) != name for name in names):
        raise ValueError(f"class_names is {names!r}")
    if type(found.step) is not int or len(found.losses) != found.step or found.step < 0:
        raise ValueError(f"{len(found.losses)} losses of {found.step!r} steps")
    if type(found.machine["threads"]) is not int or not 1 <= found.machine["threads"] <= 4096:
        raise ValueError(f"threads is {found.machine['threads']!r}")
    if not isinstance(found.data["fingerprint"], str) or not isinstance(found.seconds, (int, float)):
        raise TypeError("fingerprint and seconds are no text and no number")
    build(found.settings)
    settings, channels = found.settings, found.data["channels"]
    with torch.device("meta"):
        weights = [(network_class(settings)(**found.network), state) for state in (found.model, found.ema)]
        if settings.latent:
            weights.append((Autoencoder(channels), found.autoencoder))
        if chosen := terms.chosen(settings):
            weights.append((terms.networks(channels, settings.size, len(names)), found.terms["networks"]))
    for network, state in weights:
        if {name: weight.shape for name, weight in state.items()} != _shapes(network):
            raise ValueError("the weights are not those of the networks")
    if chosen and {name: len(values) for name, values in found.terms["values"].items()} != dict.fromkeys(
        terms.logged(chosen), found.step
    ):
        raise ValueError(f"the values of the terms are not those of {found.step} steps")


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in network.state_dict().items()}
