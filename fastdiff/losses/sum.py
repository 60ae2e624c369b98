"""The loss of an objective and losses of its x0 estimate, added up with weights."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from .. import converting
from .. import prediction as kinds
from ..modes import version_of
from ..noised import Noised, check_noised, refuse_packed
from ..numeric import check_numbers
from ..ops.checks import check_alike, check_floating, check_tensor, compute_dtype, place_rows
from ..process import Levels, Process
from ..showing import brief
from ..tensors import decoded
from .features import frozen

__all__ = ["Sum", "Term"]

_OF = ("x0", "latents", "noise")
# Keywords of a call that go to Objective.loss, and those that no term may have as a name of its own.
_OPTIONS = ("mask", "weight", "mask_normalization", "target", "y", "r")
_TOLD = {"truth", "t", "kept"}  # what a sum itself tells a term
_OWN = ("step", "images", "prediction", "noised", "reduction", *_OPTIONS)


@dataclass(frozen=True, eq=False)
class Term:
    """One loss of the x0 estimate in a ``Sum``.

    Args:
        loss: a callable that gives one loss a sample, [rows]. Its first parameter is the estimate; it gets the others
            by their names: ``truth`` is what is estimated, ``t`` the times, ``kept`` which samples are not left out
            (bool [rows], or None for all), and any other, such as ``condition`` or ``labels``, is a keyword of the
            sum's call, which may be left out if the parameter has a default. The losses of ``fastdiff.losses.features``
            and ``adversarial.Discriminator`` are such callables.
        weight: a number of at least 0, or a callable of the training step that gives one. In a step in which it is 0
            the loss is not called; if it has a method ``forget``, that is called.
        weighting: a callable of the noise levels (``fastdiff.process.Levels``) that gives a weight a sample; None: 1.
        min_snr: samples with a signal-to-noise ratio below it are left out.
        share: the share of the batch that the loss looks at, in (0, 1]: so many of its samples (rounded, at least
            one), those with the highest signal-to-noise ratio. The others are neither converted, decoded nor looked
            at, and add 0. As their number is known, nothing waits for the device.
        of: what the estimate is of. "x0": of the data, decoded where the sum has a decoder. "latents": of the data,
            never decoded. "noise": of the noise, so that the truth is ``noised.noise``.

    A sample that is left out, or whose weight is 0, adds 0 to the loss and to the gradient, whatever it holds. Of a
    sample with several times (a video with one a frame) the noisiest counts for ``min_snr`` and ``share``, and the mean
    of its weights. Raises TypeError or ValueError for unfit settings.
    """

    loss: Callable[..., Tensor]
    weight: float | Callable[[int], float] = 1.0
    weighting: Callable[[Levels], Tensor] | None = None
    min_snr: float = 0.0
    share: float = 1.0
    of: str = "x0"

    def __post_init__(self):
        if not callable(self.loss) or isinstance(self.loss, type):
            raise TypeError(
                f"loss must be a callable of the estimate, such as Perceptual(...); got {brief(self.loss)}."
            )
        if not callable(self.weight):
            _check_weight("weight", self.weight)
        if self.weighting is not None and not callable(self.weighting):
            raise TypeError(f"weighting must be a callable of the noise levels, or None; got {brief(self.weighting)}.")
        check_numbers(min_snr=self.min_snr, share=self.share)
        if not 0 <= self.min_snr < math.inf:
            raise ValueError(f"min_snr must be at least 0, and finite; got {self.min_snr!r}.")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1]; got {self.share!r}.")
        if self.of not in _OF:
            raise ValueError(f"of must be one of {', '.join(_OF)}; got {self.of!r}.")
        signature = inspect.signature(self.loss.forward if isinstance(self.loss, nn.Module) else self.loss)
        first, *others = [*signature.parameters.values()] or [None]
        unnamed = [p for p in others if p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY)]
        if first is None or unnamed or first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
            raise TypeError(
                f"a loss has the estimate as its first parameter, and a name for each other; got one of {signature}."
            )
        others = [p for p in others if p.kind is not p.VAR_KEYWORD]
        for parameter in others:
            if parameter.name in _OWN:
                raise ValueError(f"a loss cannot ask for {parameter.name!r}, which is a keyword of the sum itself.")
        object.__setattr__(self, "takes", tuple(p.name for p in others))
        object.__setattr__(self, "needs", tuple(p.name for p in others if p.default is p.empty))


class Sum:
    """The loss of an objective, and terms that look at its x0 estimate, added up with weights::

        total = losses.Sum(
            objective,
            decoder=vae.decode,
            perceptual=losses.Term(features.Perceptual(extractor), weight=0.1, min_snr=1.0, share=0.5),
            alignment=losses.Term(features.Alignment(phi, psi), weight=lambda step: min(1.0, step / 1000)),
        )
        loss = total(prediction, noised, condition=captions, step=step)
        loss.backward()

    Each term adds weight(step) times the mean over the batch of weighting x loss to
    ``objective.loss(prediction, noised)``. What it looks at is ``objective.predict_x0(prediction, noised)``, in the
    dtype of x_t and shaped as x0 (tokens are unpacked), made and decoded once for all terms, for the largest share
    among them. Terms of weight 0 cost nothing. Nothing waits for the device; the terms are ordinary PyTorch, so
    autocast and ``torch.compile`` work. They may have parameters, whose gradients come by ``backward``: so a sum has no
    ``loss_and_gradient``.

    Args:
        objective: the ``fastdiff.Objective``.
        decoder: ``decoder(latents)`` gives images, [rows, ...]. The parameters of a module, or of the module whose
            method it is, get no gradient; what a function hides, freeze. None: the terms look at the data itself.
        checkpoint: the decoder is run once more in the backward pass instead of keeping what it computes
            (``torch.utils.checkpoint``).
        terms: the ``Term`` of each name.

    Attributes:
        values: of the last call, by name: the objective's loss ("objective"), and of each term that was computed what
            its weight multiplies. Tensors without a gradient, on the device; ``.item()`` makes a number of one, and
            waits for the device.

    Raises TypeError or ValueError for unfit arguments.
    """

    def __init__(
        self,
        objective: Any,
        *,
        decoder: Callable[[Tensor], Tensor] | None = None,
        checkpoint: bool = False,
        **terms: Term,
    ):
        if not isinstance(getattr(objective, "process", None), Process):
            raise TypeError(f"objective must be a fastdiff.Objective; got {brief(objective)}.")
        if decoder is not None and not callable(decoder):
            raise TypeError(f"decoder must be a callable of latents, or None; got {brief(decoder)}.")
        if checkpoint and decoder is None:
            raise ValueError("checkpoint says how the decoder is run: pass a decoder too.")
        for name, term in terms.items():
            if not isinstance(term, Term):
                raise TypeError(f"{name} must be a losses.Term, such as Term(Perceptual(...), 0.1); got {brief(term)}.")
        self.objective, self.decoder, self.checkpoint, self.terms = objective, decoder, checkpoint, terms
        self.values: dict[str, Tensor] = {}

    def __call__(
        self,
        prediction: Tensor,
        noised: Noised,
        *,
        step: int | None = None,
        images: Tensor | None = None,
        **given: Any,
    ) -> Tensor:
        """The weighted sum, a scalar: float32 (float64 with float64 inputs), differentiable in prediction.

        Args:
            prediction: the network's output for ``noised``, shaped as x_t.
            noised: from ``objective.noise``.
            step: the training step, which weights that are callables are given.
            images: the data before it was encoded, [batch, ...]: the truth of decoded estimates. None: x0 is decoded,
                without a gradient, if a term asks for the truth.
            given: what terms ask for by name (``condition``, ``labels``), tensors [batch, ...] or lists or dicts of
                such; and the options of ``Objective.loss`` but ``reduction``, which are for the objective's loss alone.

        Raises TypeError or ValueError for unfit inputs: an unknown keyword, one that a term needs and does not have, a
        decoder that changes the batch.
        """
        check_noised(prediction, noised)
        refuse_packed(noised, "losses.Sum")
        check_floating(prediction=prediction)
        options = {name: given.pop(name) for name in _OPTIONS if name in given}
        self._check_given(given, len(prediction), images)
        weights = {name: self._weight(name, step) for name in self.terms}
        active = {name: self.terms[name] for name, weight in weights.items() if weight != 0}
        for name, term in self.terms.items():
            if name not in active and hasattr(term.loss, "forget"):
                term.loss.forget()
        loss = self.objective.loss(prediction, noised, **options)
        values = {"objective": loss.detach()}
        batch = _Batch(self, active, prediction, noised, images)
        for name, term in active.items():
            value = batch.value(name, term, given)
            values[name] = value.detach()
            loss = loss + weights[name] * value
        self.values = values
        return loss

    def _check_given(self, given: Mapping[str, Any], batch: int, images: Tensor | None) -> None:
        takes = {name for term in self.terms.values() for name in term.takes} - _TOLD
        for name in given:
            if name not in takes:
                accepted = ", ".join([*sorted(takes), "step", "images", *_OPTIONS])
                raise TypeError(f"{name!r} is a keyword that no term asks for, and no option; there are {accepted}.")
        for name, term in self.terms.items():
            for needed in term.needs:
                if needed not in _TOLD and given.get(needed) is None:
                    raise TypeError(f"the term {name!r} needs {needed}=, which was not given.")
        if images is None:
            return
        if self.decoder is None:
            raise ValueError("images are the truth of decoded estimates, but there is no decoder.")
        check_floating(images=images)
        if not images.ndim or len(images) != batch:
            raise ValueError(f"images must be [batch, ...] with a batch of {batch}; got {brief(images)}.")

    def _weight(self, name: str, step: int | None) -> float:
        weight = self.terms[name].weight
        if not callable(weight):
            return weight
        if step is None:
            raise TypeError(f"the weight of {name!r} is a callable of the training step: pass step=.")
        weight = weight(step)
        _check_weight(f"the weight of {name!r}", weight)
        return weight


class _Batch:
    """A batch as the terms see it: its rows from the least noisy on, converted and decoded once."""

    def __init__(
        self, owner: Sum, terms: Mapping[str, Term], prediction: Tensor, noised: Noised, images: Tensor | None
    ):
        self.owner, self.prediction, self.noised, self.images = owner, prediction, noised, images
        self.size, self.made = len(prediction), {}
        self.order, self.snr, self.levels = None, None, None
        if any(term.share < 1 or term.min_snr > 0 or term.weighting is not None for term in terms.values()):
            self.levels = owner.objective.process.levels(noised.t)
            self.snr = self._of_samples(self.levels.snr).amin(1)
        self.taken = self.size
        if any(term.share < 1 for term in terms.values()):
            self.taken = max(self.rows(term) for term in terms.values())
            self.order = self.snr.argsort(descending=True, stable=True)[: self.taken]
        self.weights = {name: self._weight(name, term) for name, term in terms.items()}
        # Of each kind of estimate: which rows some term that looks at it does not leave out; None: all.
        self.kept: dict[str, Tensor | None] = {}
        for kind in (kinds.EPSILON, kinds.SAMPLE):
            kept = [self._kept(name, term) for name, term in terms.items() if self._kind(term) is kind]
            whole = not kept or any(rows is None for rows in kept)
            self.kept[kind.name] = None if whole else torch.stack(kept).any(0)

    def rows(self, term: Term) -> int:
        """How many rows a term looks at."""
        return self.size if term.share == 1 else min(self.size, max(1, round(term.share * self.size)))

    def value(self, name: str, term: Term, given: Mapping[str, Any]) -> Tensor:
        """The mean of a term over the batch."""
        rows, weight = self.rows(term), self.weights[name]
        asked: dict[str, Any] = {}
        for key in term.takes:
            if key == "truth":
                asked[key] = self._truth(term)[:rows]
            elif key == "t":
                asked[key] = self._taken("t", self._times(), rows)
            elif key == "kept":
                asked[key] = None if weight is None else weight[:rows] != 0
            elif given.get(key) is not None:
                asked[key] = self._taken(key, given[key], rows)
        shared = [tensor for tensor in (self._estimate(term)[:rows], asked.get("truth")) if tensor is not None]
        before = [version_of(tensor) for tensor in shared]
        found = term.loss(shared[0], **asked)
        if before != [version_of(tensor) for tensor in shared]:
            raise ValueError(
                f"the loss of {name!r} wrote into the estimate or the truth, which other terms look at too: let it "
                f"work on a copy, .clone(), or without inplace=True in its first module."
            )
        check_tensor(f"the loss of {name!r}", found, name)
        if not found.is_floating_point() or found.shape != (rows,):
            raise ValueError(f"the loss of {name!r} must be one a sample, floating point [{rows}]; got {brief(found)}.")
        found = found.to(compute_dtype(found))
        if weight is not None:
            weight = weight[:rows].to(found.dtype)
            found = torch.where(weight != 0, found * weight, 0.0)
        return found.sum() / self.size

    def _weight(self, name: str, term: Term) -> Tensor | None:
        """The weight of each row in order, 0 where it is left out, or None for 1."""
        if term.min_snr == 0 and term.weighting is None:
            return None
        weight = torch.ones_like(self.snr)
        if term.weighting is not None:
            weight, t = term.weighting(self.levels), self.noised.t
            check_tensor(f"the weighting of {name!r}", weight, "weight")
            if weight.shape != t.shape:
                raise ValueError(
                    f"the weighting of {name!r} must give weights of the shape of the times, {list(t.shape)}; got "
                    f"{brief(weight)}."
                )
            weight = self._of_samples(weight.to(self.snr.dtype)).mean(1)
        return self._taken("weight", torch.where(self.snr >= term.min_snr, weight, 0.0))

    def _kept(self, name: str, term: Term) -> Tensor | None:
        """Which of the rows in order a term does not leave out, bool [rows]; None: all."""
        weight, rows = self.weights[name], self.rows(term)
        kept = None if weight is None else weight != 0
        if rows < self.taken:
            within = torch.arange(self.taken, device=self.order.device) < rows
            kept = within if kept is None else kept & within
        return kept

    @staticmethod
    def _kind(term: Term) -> Any:
        """What the prediction is converted to for a term."""
        return kinds.EPSILON if term.of == "noise" else kinds.SAMPLE

    def _estimate(self, term: Term) -> Tensor:
        if term.of == "x0" and self.owner.decoder is not None:
            return self._images()
        return self._converted(self._kind(term))

    def _truth(self, term: Term) -> Tensor:
        if term.of == "noise":
            return self._once("true noise", self._true_noise)
        if term.of == "x0" and self.owner.decoder is not None:
            return self._once("true images", self._true_images)
        return self._true_latents()

    def _images(self) -> Tensor:
        return self._once("images", lambda: self._decoded(self._converted(kinds.SAMPLE), self.owner.checkpoint))

    def _true_noise(self) -> Tensor:
        return self._masked(self._taken("noise", self.noised.noise.to(self.noised.x_t.dtype)), kinds.EPSILON)

    def _true_latents(self) -> Tensor:
        def make() -> Tensor:
            return self._masked(decoded(self._taken("x0", self.noised.x0)).to(self.noised.x_t.dtype), kinds.SAMPLE)

        return self._once("true latents", make)

    def _true_images(self) -> Tensor:
        if self.images is None:
            with torch.no_grad():
                return self._decoded(self._true_latents(), False)
        images = self._masked(self._taken("images", self.images), kinds.SAMPLE)
        check_alike(**{"images": images, "the decoded estimate": self._images()})
        return images

    def _decoded(self, latents: Tensor, checkpoint: bool) -> Tensor:
        decoder = self.owner.decoder
        if checkpoint:
            images = recomputed(frozen, decoder, latents, use_reentrant=False)
        else:
            images = frozen(decoder, latents)
        check_tensor("the decoder's output", images, "images")
        if not images.ndim or len(images) != len(latents):
            raise ValueError(
                f"the decoder must return one image for each of {len(latents)} latents; got {brief(images)}."
            )
        return images

    def _converted(self, kind: Any) -> Tensor:
        """The estimate of x0 or of the noise, of the rows in order, shaped as x0."""
        return self._once(kind.name, lambda: self._unpacked(self._convert(kind)))

    def _unpacked(self, data: Tensor) -> Tensor:
        tokens = self.noised.tokens
        return data if tokens is None else tokens.unpack(data, *self.noised.x0.shape[2:])

    def _convert(self, kind: Any) -> Tensor:
        objective, noised, kept = self.owner.objective, self.noised, self.kept[kind.name]
        prediction = self.prediction.to(noised.x_t.dtype)
        if self.order is None and kept is None:
            return objective.convert(prediction, noised, kind)
        prediction = self._masked(self._taken("prediction", prediction), kind)
        x_t, t = self._masked(self._taken("x_t", noised.x_t), kind), self._taken("t", self._times())
        return converting.of_rows(objective, prediction, x_t, t, kind, kept)

    def _masked(self, data: Tensor, kind: Any) -> Tensor:
        """``data`` with zeros in rows that all terms of this kind leave out: what they hold reaches nothing."""
        kept = self.kept[kind.name]
        return data if kept is None else torch.where(place_rows("kept", kept, data.shape), data, 0.0)

    def _once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def _times(self) -> Tensor:
        t = self.noised.t
        return t.expand(self.size, *t.shape[1:])

    def _of_samples(self, rows: Tensor) -> Tensor:
        """Numbers of the shape of the times, [batch, those of a sample]."""
        return rows.unsqueeze(-1).flatten(1).expand(self.size, -1)

    def _taken(self, name: str, value: Any, rows: int | None = None) -> Any:
        """The first ``rows`` rows of ``value`` in order: of a tensor, or of the tensors in a list or dict."""
        if isinstance(value, Mapping):
            return {key: self._taken(f"{name}[{key!r}]", part, rows) for key, part in value.items()}
        if isinstance(value, Tensor):
            if not value.ndim or len(value) != self.size:
                raise ValueError(f"{name} must be [batch, ...] with a batch of {self.size}; got {brief(value)}.")
            return value if self.order is None else value.index_select(0, self.order[:rows])
        if self.order is None:
            return value
        if isinstance(value, (list, tuple)) and all(isinstance(part, Tensor) for part in value):
            return [self._taken(f"{name}[{number}]", part, rows) for number, part in enumerate(value)]
        raise TypeError(
            f"of {name} only some rows are needed (share < 1), so it must be a tensor [batch, ...], or a list or dict "
            f"of such; got {brief(value)}. Encode it first."
        )


def _check_weight(name: str, weight: Any) -> None:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"{name} must be a number, not a tensor, so that nothing waits for it; got {brief(weight)}.")
    if not 0 <= weight < math.inf:
        raise ValueError(f"{name} must be at least 0, and finite; got {weight!r}.")
