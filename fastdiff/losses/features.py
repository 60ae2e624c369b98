"""Losses that look at what the x0 estimate shows: its features, its meaning, its class, its frequencies.

Each is a callable of images or latents, and returns one loss a sample, float32 [batch] (float64 of float64 data)::

    x0_hat = objective.predict_x0(prediction, noised)
    loss = objective.loss(prediction, noised) + 0.1 * Perceptual(extractor)(x0_hat, x0).mean()

``fastdiff.losses.Sum`` adds them up with weights. They are ordinary PyTorch: autocast, ``torch.compile`` and second
derivatives work. The networks that they are given stay as they are: gradients flow through them to their input, and
their parameters get none. That holds for modules and for methods of modules (``clip.encode_image``). A function that
hides a network cannot be looked into: call ``network.requires_grad_(False)`` first. Call ``network.eval()`` for any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..numeric import check_numbers
from ..ops.checks import check_alike, check_floating, check_tensor, compute_dtype
from ..showing import brief

__all__ = ["Alignment", "Classification", "Fourier", "Perceptual", "Wavelet"]

_EPS = 1e-10  # of the lpips package, added to the norm
_HAAR = ((0.5**0.5, 0.5**0.5), (0.5**0.5, -(0.5**0.5)))


class _Method(nn.Module):
    """A method of a module as a module, whose parameters are the owner's."""

    def __init__(self, method: Any):
        super().__init__()
        self.owner, self.name = method.__self__, method.__name__

    def forward(self, *inputs: Any) -> Any:
        return getattr(self.owner, self.name)(*inputs)


def as_module(function: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a module as a module; any other function as it is."""
    return _Method(function) if isinstance(getattr(function, "__self__", None), nn.Module) else function


def frozen(function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``. The parameters of a module, or of the module whose method it is, get no gradient."""
    module = as_module(function)
    if not isinstance(module, nn.Module):
        return function(*inputs)
    learned = {name: part.detach() for name, part in module.named_parameters() if part.requires_grad}
    return torch.func.functional_call(module, learned, inputs) if learned else module(*inputs)


def _check_callable(**functions: Any) -> None:
    for name, function in functions.items():
        if not callable(function) or isinstance(function, type):
            raise TypeError(f"{name} must be a module or another callable; got {brief(function)}.")


def _check_images(estimate: Tensor, truth: Tensor, dims: int) -> None:
    check_floating(estimate=estimate, truth=truth)
    check_alike(truth=truth, estimate=estimate)
    if estimate.ndim < dims:
        raise ValueError(f"estimate must have at least {dims} dimensions; got shape {tuple(estimate.shape)}.")


def _wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype that is computed in."""
    dtype = compute_dtype(*tensors)
    return [tensor.to(dtype) for tensor in tensors]


class _Layers(nn.Module):
    """The outputs of some modules of an ``nn.Sequential``, which runs no further than the last of them."""

    def __init__(self, modules: nn.Sequential, layers: tuple[int, ...]):
        super().__init__()
        self.modules_, self.layers = modules, layers

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs, last = {}, max(self.layers)
        for number, module in zip(range(last + 1), self.modules_):
            x = module(x)
            if number in self.layers:
                outputs[number] = x
                if number < last and isinstance(x, Tensor):
                    x = x.clone()  # a later module may work in place
        return [outputs[layer] for layer in self.layers]


@dataclass(frozen=True, eq=False)
class Perceptual:
    """The difference of two images in the features of a network.

    "lpips" is the formula of Zhang et al. 2018 (arXiv 1801.03924), as the lpips package 0.1.4 computes it: at each
    place the features of both images are divided by their norm over the channels (plus 1e-10), the squared differences
    are weighted and added up over the channels, averaged over the places, and added up over the layers. Where all
    features of a place are 0 the norm has gradient 0; the package gives NaN there. "mse" and "l1" are the mean of
    the squared or absolute differences of the features, added up over the layers.

    Args:
        extractor: ``extractor(images)`` gives a tensor of features [batch, channels, ...], or a list or dict of them.
            It contains whatever its network needs: scaling, resizing.
        layers: which entries of the list or dict; None: all. Of an ``nn.Sequential``, the numbers of the modules whose
            outputs are the features, as they are before later modules that work in place; None: the last.
        weights: one for each layer: a number, or a tensor of one weight a channel [channels], on the device of the
            features. None: 1.
        distance: "lpips", "mse" or "l1".
        channel_dim: where the features' channels are: -1 for tokens [batch, tokens, channels].

    ``(estimate, truth)``, [batch, ...] of one shape, gives [batch]. Raises TypeError or ValueError for unfit settings
    and inputs, and for an extractor that gives nothing, no tensors, or another batch.
    """

    extractor: Callable[[Tensor], Any]
    layers: Sequence[int | str] | None = None
    weights: Sequence[float | Tensor] | None = None
    distance: str = "lpips"
    channel_dim: int = 1

    def __post_init__(self):
        _check_callable(extractor=self.extractor)
        if self.distance not in ("lpips", "mse", "l1"):
            raise ValueError(f"distance must be one of lpips, mse, l1; got {self.distance!r}.")
        if type(self.channel_dim) is not int or self.channel_dim == 0:
            raise ValueError(f"channel_dim must be a dimension other than the batch's, 0; got {self.channel_dim!r}.")
        layers = self.layers
        if layers is not None:
            if isinstance(layers, (str, int)) or not len(layers):
                raise TypeError(f"layers must be a list of at least one entry; got {brief(layers)}.")
            object.__setattr__(self, "layers", tuple(layers))
        if isinstance(self.extractor, nn.Sequential) and layers is not None:
            count = len(self.extractor)
            if not all(type(layer) is int and 0 <= layer < count for layer in layers):
                raise ValueError(
                    f"layers of this nn.Sequential are numbers from 0 to {count - 1}; got {brief(layers)}."
                )
            object.__setattr__(self, "extractor", _Layers(self.extractor, self.layers))
            object.__setattr__(self, "layers", None)
        if self.weights is not None:
            if isinstance(self.weights, Tensor) or not isinstance(self.weights, Sequence):
                raise TypeError(f"weights must be a list, one entry for each layer; got {brief(self.weights)}.")
            for weight in self.weights:
                if not isinstance(weight, Tensor):
                    check_numbers(weights=weight)

    @classmethod
    def from_lpips(cls, model: Any) -> Perceptual:
        """The loss that an ``lpips.LPIPS`` computes, with its network and learned weights, for images in [-1, 1].

        Raises TypeError for what is no such model, or one that does without the learned weights.
        """
        lins, scale, net = (getattr(model, name, None) for name in ("lins", "scaling_layer", "net"))
        if lins is None or scale is None or net is None:
            raise TypeError(f"model must be an lpips.LPIPS with lpips=True; got {brief(type(model).__name__)}.")
        if model.version == "0.0":  # it was trained without the scaling
            scale = nn.Identity()
        weights = [next(lin.parameters()) for lin in lins]
        return cls(nn.Sequential(scale, net), weights=weights)

    def __call__(self, estimate: Tensor, truth: Tensor) -> Tensor:
        _check_images(estimate, truth, 1)
        ours, theirs = self._features("estimate", estimate), self._features("truth", truth)
        weights = (1.0,) * len(ours) if self.weights is None else self.weights
        if len(weights) != len(ours):
            raise ValueError(f"there are {len(weights)} weights for {len(ours)} layers of features.")
        total = 0.0
        for number, (a, b, weight) in enumerate(zip(ours, theirs, weights)):
            check_alike(**{f"layer {number} of the truth": b, f"layer {number} of the estimate": a})
            total = total + self._difference(*_wide(a, b), weight, number)
        return total

    def _difference(self, a: Tensor, b: Tensor, weight: float | Tensor, number: int) -> Tensor:
        channels = self.channel_dim
        if not -a.ndim < channels < a.ndim:
            raise ValueError(f"layer {number} has shape {tuple(a.shape)}: it has no dimension {channels} of channels.")
        if isinstance(weight, Tensor):
            weight = weight.detach().flatten()  # lpips keeps [1, channels, 1, 1]
            if len(weight) != a.shape[channels]:
                raise ValueError(f"layer {number} has {a.shape[channels]} channels, but {len(weight)} weights.")
            shape = [1] * a.ndim
            shape[channels] = -1
            weight = weight.to(a.dtype).view(shape)
        if self.distance == "lpips":
            a, b = (x / (torch.linalg.vector_norm(x, dim=channels, keepdim=True) + _EPS) for x in (a, b))
        error = (a - b).abs() if self.distance == "l1" else (a - b).square()
        error = weight * error
        if self.distance == "lpips":
            error = error.sum(channels, keepdim=True)
        return error.flatten(1).mean(1)

    def _features(self, of: str, images: Tensor) -> list[Tensor]:
        found = frozen(self.extractor, images)
        if isinstance(found, Tensor):
            found = [found]
        if self.layers is not None:
            try:
                found = [found[layer] for layer in self.layers]
            except (KeyError, IndexError, TypeError) as error:
                there = list(found) if isinstance(found, Mapping) else brief(found)
                raise ValueError(f"the extractor's output lacks layers of {list(self.layers)}: {there}.") from error
        elif isinstance(found, Mapping):
            found = list(found.values())
        if not isinstance(found, (list, tuple)) or not found:
            raise TypeError(f"the extractor must return a tensor, or a list or dict of tensors; got {brief(found)}.")
        for number, features in enumerate(found):
            if not isinstance(features, Tensor) or not features.is_floating_point():
                raise TypeError(
                    f"layer {number} of the extractor's output must be a floating-point tensor; got {brief(features)}."
                )
            if features.ndim < 2 or len(features) != len(images):
                raise ValueError(
                    f"layer {number} of the {of} must be [batch, channels, ...] with the batch of {len(images)} that "
                    f"the extractor was given; it returned shape {tuple(features.shape)}."
                )
        return list(found)


@dataclass(frozen=True, eq=False)
class Alignment:
    """1 - the cosine between the embedding of the x0 estimate and that of its condition: phi(x0_hat) and psi(y).

    Args:
        image_encoder: phi, ``image_encoder(images)`` gives [batch, dims].
        condition_encoder: psi, ``condition_encoder(condition)`` gives [batch, dims]; None: the condition is its
            embedding already.

    ``(estimate, condition)`` gives [batch]. Raises TypeError or ValueError for unfit encoders, and for embeddings of
    different shapes.
    """

    image_encoder: Callable[[Tensor], Tensor]
    condition_encoder: Callable[[Any], Tensor] | None = None

    def __post_init__(self):
        _check_callable(image_encoder=self.image_encoder)
        if self.condition_encoder is not None:
            _check_callable(condition_encoder=self.condition_encoder)

    def __call__(self, estimate: Tensor, condition: Any) -> Tensor:
        check_floating(estimate=estimate)
        image = frozen(self.image_encoder, estimate)
        own = condition if self.condition_encoder is None else frozen(self.condition_encoder, condition)
        for name, embedding in (("the image's embedding", image), ("the condition's embedding", own)):
            check_tensor(name, embedding, "embedding")
            if embedding.ndim != 2 or len(embedding) != len(estimate):
                raise ValueError(
                    f"{name} must be [batch, dims] with the batch of {len(estimate)}; got {brief(embedding)}."
                )
        check_alike(**{"the condition's embedding": own, "the image's embedding": image})
        return 1 - F.cosine_similarity(*_wide(image, own), dim=1)


@dataclass(frozen=True, eq=False)
class Classification:
    """The cross-entropy of a classifier of the x0 estimate against labels.

    Args:
        classifier: ``classifier(images)`` gives logits [batch, classes].
        with_time: it is called as ``classifier(images, t)``, with the times of the noised batch.

    ``(estimate, labels)``, or ``(estimate, labels, t)``, gives [batch]; the labels are class numbers int64 [batch], or
    probabilities [batch, classes]. Raises TypeError or ValueError for an unfit classifier, and for labels that do not
    fit its logits.
    """

    classifier: Callable[..., Tensor]
    with_time: bool = False

    def __post_init__(self):
        _check_callable(classifier=self.classifier)

    def __call__(self, estimate: Tensor, labels: Tensor, t: Tensor | None = None) -> Tensor:
        check_floating(estimate=estimate)
        check_tensor("labels", labels, "labels")
        if self.with_time and t is None:
            raise TypeError("a classifier with_time needs t, the times of the noised batch.")
        logits = frozen(self.classifier, estimate, t) if self.with_time else frozen(self.classifier, estimate)
        check_tensor("the classifier's output", logits, "logits")
        if logits.ndim != 2 or len(logits) != len(estimate):
            raise ValueError(
                f"the classifier must return logits [batch, classes] with the batch of {len(estimate)}; got "
                f"{brief(logits)}."
            )
        numbers = labels.dtype == torch.int64 and labels.shape == logits.shape[:1]
        if not numbers and not (labels.is_floating_point() and labels.shape == logits.shape):
            raise ValueError(
                f"labels must be class numbers, int64 {list(logits.shape[:1])}, or probabilities, floating point "
                f"{list(logits.shape)}; got {brief(labels)}."
            )
        (logits,) = _wide(logits)
        return F.cross_entropy(logits, labels if numbers else labels.to(logits.dtype), reduction="none")


@dataclass(frozen=True)
class Fourier:
    """The difference of the spectra of two images, by an orthonormal Fourier transform over the last two dimensions.

    "focal" is the focal frequency loss (Jiang et al. 2021, arXiv 2012.12821): the mean of w abs(Fa - Fb)^2, with
    w = abs(Fa - Fb)^alpha over its largest value in the channel, without a gradient, so that the frequencies that are
    hard count most. With alpha = 0 it is the mean squared error of the images. "amplitude" is the mean of
    abs(abs(Fa) - abs(Fb)) (Fuoli et al. 2021, arXiv 2106.00783), which does not see where things are.

    Args:
        form: "focal" or "amplitude".
        alpha: the exponent of the focal weights, at least 0.

    ``(estimate, truth)``, [batch, ..., height, width] of one shape, gives [batch]. Raises TypeError or ValueError for
    unfit settings and inputs.
    """

    form: str = "focal"
    alpha: float = 1.0

    def __post_init__(self):
        if self.form not in ("focal", "amplitude"):
            raise ValueError(f"form must be one of focal, amplitude; got {self.form!r}.")
        check_numbers(alpha=self.alpha)
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be at least 0, and finite; got {self.alpha!r}.")

    def __call__(self, estimate: Tensor, truth: Tensor) -> Tensor:
        _check_images(estimate, truth, 3)
        a, b = _wide(estimate, truth)
        if self.form == "amplitude":
            a, b = (torch.fft.fft2(x, norm="ortho").abs() for x in (a, b))
            return (a - b).abs().flatten(1).mean(1)
        spectrum = torch.view_as_real(torch.fft.fft2(a - b, norm="ortho"))
        error = spectrum.square().sum(-1)
        size = error.detach() ** (self.alpha / 2)
        # Where there is no difference at all, every weight is 0 (alpha = 0: 1), and not 0 / 0.
        largest = size.amax((-2, -1), keepdim=True)
        weight = size / torch.where(largest > 0, largest, 1)
        return (weight * error).flatten(1).mean(1)


@dataclass(frozen=True)
class Wavelet:
    """The mean absolute difference of each sub-band of a wavelet transform over the last two dimensions, added up: as
    in Korkmaz et al. 2024 (arXiv 2404.11273), of decimated sub-bands.

    A transform along one dimension is out[n] = sum over k of f[k] x[2 n + k], periodic, with f the low-pass or the
    high-pass filter; along both it gives four sub-bands of half the size. The next level transforms the one that is
    low-pass in both. So there are 3 levels + 1 sub-bands.

    Args:
        filters: "haar", or (low, high): two lists of numbers of one even length.
        levels: how many times the size is halved, at least 1.

    ``(estimate, truth)``, [batch, ..., height, width] of one shape, gives [batch]. Raises TypeError or ValueError for
    unfit settings and inputs, such as a size that 2^levels does not divide.
    """

    filters: str | Sequence[Sequence[float]] = "haar"
    levels: int = 1

    def __post_init__(self):
        filters = _HAAR if self.filters == "haar" else self.filters
        if isinstance(filters, str) or not isinstance(filters, Sequence) or len(filters) != 2:
            raise ValueError(f"filters must be 'haar', or (low, high), two lists of numbers; got {brief(filters)}.")
        low, high = (tuple(f) for f in filters)
        for number in (*low, *high):
            check_numbers(filters=number)
        if len(low) != len(high) or len(low) < 2 or len(low) % 2:
            raise ValueError(f"the filters must have one even length; got {len(low)} and {len(high)} numbers.")
        if type(self.levels) is not int or self.levels < 1:
            raise ValueError(f"levels must be a whole number of at least 1; got {self.levels!r}.")
        object.__setattr__(self, "filters", (tuple(map(float, low)), tuple(map(float, high))))

    def __call__(self, estimate: Tensor, truth: Tensor) -> Tensor:
        _check_images(estimate, truth, 3)
        if any(size % 2**self.levels for size in estimate.shape[-2:]):
            raise ValueError(
                f"height and width must be multiples of {2**self.levels} for {self.levels} levels; got shape "
                f"{tuple(estimate.shape)}."
            )
        a, b = _wide(estimate, truth)
        rest, total = a - b, 0.0  # the transform is linear
        for _ in range(self.levels):
            halves = [_filtered(rest, f, -2) for f in self.filters]
            rest, *details = [_filtered(half, f, -1) for half in halves for f in self.filters]
            total = total + sum(band.abs().flatten(1).mean(1) for band in details)
        return total + rest.abs().flatten(1).mean(1)


def _filtered(x: Tensor, f: tuple[float, ...], dim: int) -> Tensor:
    """out[n] = sum over k of f[k] x[2 n + k] along ``dim``, periodic."""
    even_odd = x.unflatten(dim, (-1, 2)).unbind(dim)
    return sum(factor * even_odd[k % 2].roll(-(k // 2), dim) for k, factor in enumerate(f))
