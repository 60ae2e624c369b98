"""Rectified flow on videos: times of samples, frames or tokens, shifted by the size of the data; frames kept clean."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import from_scheduler, samplers
from ..calls import Packed, UniformCall
from ..distributed.noising import noise_of
from ..distributed.part import Part
from ..losses import Loss
from ..names import find
from ..noised import Noised, check_noised
from ..objective import Objective
from ..ops.checks import check_data, check_tensor, check_unambiguous
from ..ops.dispatch import get as backend_of
from ..ops.loss import check_loss
from ..ops.noise import made_noise
from ..packed import offset_noise, packed_of
from ..philox import Stream, Window, seeded
from ..process import RectifiedFlow, as_times
from ..samplers import Sampler
from ..samplers.schedule import Scheduled
from ..showing import brief
from ..weighting import WeightingLike
from . import shifts
from .correlation import KINDS, check_alpha, frame_noise

_PER = {"sample": "sample", "frame": "frame", "token": "token"}


class RFLoss(Objective):
    """The rectified-flow loss of video models: an ``Objective`` of ``RectifiedFlow()`` that predicts "flow", n - x0.

    Data is video [B, C, F, H, W], or [B, F, C, H, W] with ``frame_dim=1``; or tokens [B, L, D]. The times of ``noise``
    are noise levels, sigma, after any shift: what ``t=`` is given is shifted no more.

    Args:
        weighting, loss: as in ``Objective``. A weighting by fraction goes by sigma.
        per: what has a time of its own where times are drawn: a "sample", a "frame" (diffusion forcing) or a "token".
            They come from the ``timesteps`` sampler, one uniform each: that of frame f of a sample depends on the seed,
            the sample and f alone.
        shift: of drawn times, and of ``sample``'s: "sd3", "resolution", "flux", "ltx", "wan", "hunyuanvideo" (see
            ``video.shifts``), a number, or a callable ``shift(frames, height, width, tokens)`` of the sizes of x0.
        patch: how many frames, rows and columns of x0 are a token, for ``shift``; None: the model's own, (1, 1, 1) for
            "ltx" and (1, 2, 2) for the others. Data that is tokens is counted as it is.
        frame_dim: which dimension the frames are, 2 or 1.
        frame_noise: "mixed" or "progressive": frames share their noise in part, by ``frame_noise_alpha`` (see
            ``video.frame_noise``). It is made as a tensor, and kept. Only for video, not for tokens.
        options: ``timesteps``, ``error_space``, ``noise_offset``, ``input_perturbation``: as in ``Objective``. The
            channels that have an offset are those of the video; of tokens they are the last dimension.

    ``per``, ``shift``, ``patch``, ``frame_noise`` and ``frame_noise_alpha`` may be set anew between steps. Raises
    TypeError or ValueError as ``Objective`` does.
    """

    def __init__(
        self,
        weighting: WeightingLike = None,
        loss: str | Loss = "mse",
        *,
        per: str = "sample",
        shift: str | float | Callable[..., Any] = 1.0,
        patch: tuple[int, int, int] | None = None,
        frame_dim: int = 2,
        frame_noise: str | None = None,
        frame_noise_alpha: float = 1.0,
        **options: Any,
    ):
        self.per, self.shift, self.patch, self.frame_dim = per, shift, patch, frame_dim
        self.frame_noise, self.frame_noise_alpha = frame_noise, frame_noise_alpha
        super().__init__(RectifiedFlow(), "flow", weighting, loss, **{"noise_offset_dim": 3 - frame_dim} | options)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "per":
            value = find("per", value, _PER, {}) if isinstance(value, str) else value
            if value not in _PER:
                raise TypeError(f"per must be 'sample', 'frame' or 'token'; got {value!r}.")
        elif name == "shift":
            shifts.rule(value)
        elif name == "patch" and value is not None:
            value = tuple(value)
            if len(value) != 3 or not all(type(size) is int and size > 0 for size in value):
                raise ValueError(f"patch must be (frames, rows, columns), whole sizes of at least 1; got {value!r}.")
        elif name == "frame_noise" and value is not None:
            value = find("kind of frame noise", value, KINDS, {}, "None")
        elif name == "frame_noise_alpha":
            check_alpha(name, value)
        elif name == "frame_dim":
            if name in self.__dict__:
                raise AttributeError("frame_dim cannot be changed: make another RFLoss.")
            if value not in (1, 2):
                raise ValueError(f"frame_dim must be 2, for [B, C, F, H, W], or 1, for [B, F, C, H, W]; got {value!r}.")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"RFLoss(per={self.per!r}, shift={brief(self.shift)}, {super().__repr__()})"

    @classmethod
    def from_scheduler(cls, scheduler: Any, *, weighting: WeightingLike = None, **options: Any) -> RFLoss:
        """The objective of a flow-matching scheduler of the diffusers library, with its shift: a number, or where it
        shifts dynamically one by the number of tokens.

        Raises TypeError for another scheduler, ValueError for one that inverts its sigmas.
        """
        process = from_scheduler.process_of(scheduler)
        if not process.straight:
            raise TypeError(f"a flow-matching scheduler is needed; got {type(scheduler).__name__}.")
        if process.data_at:
            raise ValueError(
                "the scheduler inverts its sigmas, and RFLoss has times from data, 0, to noise, 1: use "
                "Objective.from_scheduler."
            )
        options = {"shift": _shift_of_scheduler(scheduler, process.shift)} | options
        return cls(weighting, **options)

    def noise(
        self,
        x0: Tensor,
        t: Any = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        sigma: Any = None,
        seed: int | Tensor | None = None,
        sample_offset: int | None = None,
        ids: Tensor | None = None,
        part: Part | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        clean: int | Tensor | None = None,
        frames: int | None = None,
        shift: Any = None,
        **options: Any,
    ) -> Noised:
        """Noise a batch of videos. Arguments that are not listed are those of ``Objective.noise``.

        Args:
            x0: video, [B, C, F, H, W] or with ``frame_dim=1`` [B, F, C, H, W]; or tokens [B, L, D].
            t: noise levels in [0, 1], after any shift: one a sample [B], a frame [B, F] (of tokens too, with
                ``frames``), a token [B, L], or one for all. None draws as many as ``per`` says.
            sigma: another name of t here.
            part: as in ``Objective.noise``: of a slice of frames, or of tokens, drawn times are the slice's. t and a
                mask ``clean`` are of the slice; ``frames``, a number ``clean``, and the sizes that a shift goes by, are
                of the whole.
            lengths: as in ``Objective.noise``: x0 is packed sequences, [tokens, D] or [1, tokens, D]. Times are drawn
                one a sequence, with the shift of its own length; ``clean`` is bool, one a token.
            clean: rows that are kept clean: history, or an image to go on from. A number of first frames; or bool,
                [F] or [B, F], [L] or [B, L]. There t is 0 and x_t is x0, and the loss leaves them out.
            frames: of data that is tokens: how many frames they are, one after the other, L / frames tokens each.
            shift: for this batch in place of the objective's: as that, or a tensor of one a sample [B] or
                sequence (such as ``shifts.flux(lengths)``).

        Returns a ``Noised``; its t is [B], or with times of frames [B, 1, F, 1, 1] ([B, F, 1, 1, 1] with frames first),
        of tokens [B, L]. ``noised.model_time.flatten(1)`` is [B, F]. Raises TypeError or ValueError for unfit inputs.
        """
        check_data(x0, options.get("dtype"))
        packed = None if lengths is None else packed_of(x0, lengths, options.get("tokens"))
        self._check_data(x0, frames, x0.shape if part is None else part.shape, packed)
        drawn, made = t is None and sigma is None, noise is None and self._makes_noise(x0, packed)
        whose: dict[str, Any] = {"sample_offset": sample_offset, "ids": ids}
        samples: int | Tensor = 0
        window = None
        if drawn or made:
            how = seed, generator, ids, sample_offset
            if part is None:
                seed, samples = seeded(*how, len(x0) if packed is None else packed.sequences, x0.device)
                whose = {"ids" if isinstance(samples, Tensor) else "sample_offset": samples}
            else:
                seed, samples, window, _ = noise_of(self, part, x0, 0.0, *how, True)
            generator = None
        if drawn:
            t = self._drawn_times(x0, frames, shift, seed, samples, part, packed)
        elif shift is not None:
            raise ValueError(
                "shift is of times that are drawn; t and sigma are noise levels after it: leave shift out."
            )
        elif sigma is not None:
            if t is not None:
                raise ValueError("t and sigma both say which noise level: pass one of them.")
            t = sigma
        t = as_times(t, x0.device)
        if t.ndim == 2 and packed is None:
            t = self._placed("t", t, x0, None if drawn else frames, part)
        left_out = None
        if clean is not None and packed is not None:
            left_out = _clean_tokens(clean, packed, x0)
            if t.numel() == 1:
                t = t.reshape(()).expand(left_out.shape)
            elif t.shape == (packed.sequences,):
                t = packed.spread(t.view(-1, *(1,) * (x0.ndim - 1)), x0.shape)
            t = t.reshape(left_out.shape)
        elif clean is not None:
            first = 0 if part is None or x0.ndim != 5 else part.start[self.frame_dim]
            whole = self._frames(x0.shape if part is None else part.shape, frames)
            kept = _as_mask(clean, whole, x0.device)
            if isinstance(clean, int):
                last = first + x0.shape[self.frame_dim]
                kept = kept[:, first:last] if x0.ndim == 5 else self._of_frames(kept, x0, part)
            left_out = self._placed("clean", kept, x0, None if isinstance(clean, int) else frames, part)
            t = t.view(-1, *(1,) * (left_out.ndim - 1)) if t.ndim < 2 else t
        if left_out is not None:
            t = torch.where(left_out, torch.zeros((), dtype=t.dtype, device=t.device), t)
        if t.ndim > 1 and len(t) == 1 and packed is None and (t.numel() > 1 or left_out is not None):
            t = t.expand(len(x0), *t.shape[1:])  # one for all videos
        if left_out is not None:
            left_out = left_out.expand(t.shape).clone()  # the user's own may be written into
        if made:
            noise = self._made_noise(x0, seed, samples, window, packed, options.get("rng", "exact"))
        part = self._with_rows(part, t)
        noised = super().noise(x0, t, noise, generator, seed=seed, part=part, lengths=lengths, **whose, **options)
        noised.clean = left_out
        return noised

    def loss(
        self,
        prediction: Tensor,
        noised: Noised,
        mask: Tensor | None = None,
        reduction: str = "mean",
        *,
        weight: Tensor | float | None = None,
        mask_normalization: str | None = None,
        **options: Any,
    ) -> Tensor:
        """The loss of the network's output: as ``Objective.loss``, but for rows that are kept clean. They add 0 to it
        and to the gradient, whatever they hold.

        Args:
            mask: as in ``Objective.loss``. With clean rows, what is left is what the mask leaves of the others.
            weight: as in ``Objective.loss``. At clean rows it counts as 0, whatever it holds.
            mask_normalization: what divides. "global": the number of elements that are left, m: sum(w m e) / sum(m);
                "sample": each video's own number, then the mean of the videos; "row": each frame's or token's own, then
                the mean of those that have any; "none": the number of all elements, clean ones too. None: "global" for
                a mean (without a mask it is over the rows that are not clean), "row" for reduction "none", "none" for a
                sum and for "elements".
            options: ``target``, ``y``, ``r``: as in ``Objective.loss``.
        """
        how = self._asked(prediction, noised, mask, reduction, weight, mask_normalization)
        return super().loss(prediction, noised, **how, **options)

    def loss_and_gradient(
        self,
        prediction: Tensor,
        noised: Noised,
        scale: Tensor | float = 1.0,
        mask: Tensor | None = None,
        reduction: str = "mean",
        *,
        weight: Tensor | float | None = None,
        mask_normalization: str | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """As ``Objective.loss_and_gradient``, with the arguments of ``loss``: rows that are kept clean have a gradient
        of 0."""
        how = self._asked(prediction, noised, mask, reduction, weight, mask_normalization)
        return super().loss_and_gradient(prediction, noised, scale, **how, **options)

    def _asked(
        self, prediction: Tensor, noised: Noised, mask: Tensor | None, reduction: str, weight: Tensor | float | None,
        mask_normalization: str | None,
    ) -> dict[str, Any]:  # fmt: skip
        """The arguments of ``Objective.loss`` for the rows that are not clean."""
        check_noised(prediction, noised)
        noised.part = self._with_rows(noised.part, noised.t)
        if mask_normalization is None:
            mask_normalization = "none"  # without a mask it is the same, and needs none
            if mask is not None or noised.clean is not None:
                mask_normalization = {"mean": "global", "none": "row"}.get(reduction, "none")
        if noised.clean is not None:
            if isinstance(mask, Tensor):
                check_unambiguous("mask", mask.shape, noised.x0.shape)
            mask = check_loss(prediction, noised.x0, None, mask, mask_normalization, reduction, alone=False)
            mask, weight = _left(mask, noised.clean, prediction), _of_left(weight, noised.clean, prediction)
        return {"mask": mask, "reduction": reduction, "weight": weight, "mask_normalization": mask_normalization}

    def sample(
        self,
        model: Callable[..., Tensor],
        shape: tuple[int, ...],
        sampler: str | Sampler = "flow_euler",
        steps: int | None = None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draw samples, all frames at one noise level (``video.sample`` takes one a frame): as ``Objective.sample``. A
        sampler that is given by its name visits noise levels with the shift of data of this shape."""
        if isinstance(sampler, str):
            named = samplers.get(sampler)
            shift = self.shift_of(shape)
            if shift != 1 and isinstance(named, Scheduled) and named.sigmas is None and named.timesteps is None:
                sampler = dataclasses.replace(named, sigmas=shifts.sigmas(50 if steps is None else steps, shift))
        return super().sample(model, shape, sampler, steps, **options)

    def shift_of(self, shape: tuple[int, ...], shift: Any = None) -> float | Tensor:
        """The shift of data of this shape; ``shift``: in place of the objective's."""
        made = shifts.rule(self.shift if shift is None else shift)
        if len(shape) == 3:
            return shifts.of_data(made, shape[1])
        if len(shape) != 5:
            raise ValueError(f"data must be {self._order}, or tokens [B, L, D]; got shape {tuple(shape)}.")
        sizes = shape[self.frame_dim], *shape[3:]
        tokens = 1
        for size, part in zip(sizes, self.patch or made.patch):
            tokens *= -(-size // part)
        return shifts.of_data(made, tokens, sizes)

    @property
    def _order(self) -> str:
        return "video [B, C, F, H, W]" if self.frame_dim == 2 else "video [B, F, C, H, W]"

    def _with_rows(self, part: Part | None, t: Tensor) -> Part | None:
        """``part``, told that frames differ in t: the sizes of a slice of one frame do not tell."""
        if part is None or t.ndim != 5 or part.rows is not None:
            return part
        return dataclasses.replace(part, rows=(0, self.frame_dim))

    def _makes_noise(self, x0: Tensor, packed: Packed | None) -> bool:
        """Whether noise that is not given is made here, as a tensor."""
        if self.frame_noise is None:
            return bool(self.noise_offset) and (packed is not None or x0.ndim == 3)
        if packed is not None or x0.ndim != 5:
            raise ValueError(
                f"frame_noise is shared by the frames of {self._order}; got {'packed ' if packed else ''}tokens, "
                f"{tuple(x0.shape)}: set frame_noise=None, or pass noise=."
            )
        if self.noise_offset:
            raise ValueError("offset noise is not added to frame_noise: set noise_offset or frame_noise, not both.")
        return True

    def _made_noise(
        self, x0: Tensor, seed: int | Tensor, samples: int | Tensor, window: Window | None, packed: Packed | None,
        rng: str,
    ) -> Tensor:  # fmt: skip
        if packed is not None:
            return offset_noise(x0, packed, seed, samples, self.noise_offset, -1, rng)
        if self.frame_noise is None:
            return made_noise(x0, seed, samples, self.noise_offset, -1, rng, window)
        if window is not None:
            raise ValueError("frame_noise is made for whole samples, not for slices of them: pass noise=.")
        like = x0 if x0.is_floating_point() else torch.empty(x0.shape, device=x0.device)
        of = {"ids" if isinstance(samples, Tensor) else "sample_offset": samples}
        return frame_noise(like, self.frame_noise, self.frame_noise_alpha, frame_dim=self.frame_dim, seed=seed, **of)

    def _check_data(self, x0: Tensor, frames: int | None, sizes: Sequence[int], packed: Packed | None) -> None:
        if packed is not None:
            if frames is not None:
                raise ValueError("frames is for samples of one length; packed sequences have lengths: leave it out.")
            return
        video = x0.ndim == 5
        if not video and x0.ndim != 3:
            raise ValueError(f"x0 must be {self._order}, or tokens [B, L, D]; got shape {tuple(x0.shape)}.")
        if frames is not None and video:
            raise ValueError("frames is for data that is tokens; a video has its frames in its shape: leave it out.")
        if frames is not None and (type(frames) is not int or frames < 1 or sizes[1] % frames):
            raise ValueError(f"frames must divide the {sizes[1]} tokens of x0; got {frames!r}.")

    def _frames(self, sizes: Sequence[int], frames: int | None) -> int | None:
        return sizes[self.frame_dim] if len(sizes) == 5 else frames

    def _drawn_times(
        self, x0: Tensor, frames: int | None, shift: Any, seed: int | Tensor, samples: int | Tensor,
        part: Part | None, packed: Packed | None,
    ) -> Tensor:  # fmt: skip
        """The noise levels of a batch: [B], [B, F] or [B, L]; of packed sequences [sequences]."""
        sizes, batch, first = x0.shape, len(x0), 0
        if part is not None:
            sizes = part.shape
            if self.timesteps.of_whole_batch:
                if isinstance(samples, Tensor):
                    name = type(self.timesteps).__name__
                    raise ValueError(f"{name} draws t for a whole batch: with a part, leave ids out, or pass t.")
                first, batch = part.start[0], part.shape[0]
                samples = samples - first
        if packed is not None:
            if self.per != "sample":
                raise ValueError(f"times of packed sequences are drawn one a sequence; got per={self.per!r}: pass t.")
            batch = packed.sequences
            lengths = packed.lengths(x0.shape).clamp(min=1)
            given = self.shift if shift is None else shift
            made = shifts.rule(given)
            if isinstance(given, Tensor) or torch.compiler.is_compiling():
                s = shifts.of_data(made, lengths)
            else:
                of_each = [shifts.of_data(made, length) for length in lengths.tolist()]
                s = torch.tensor([float(one) for one in of_each], dtype=torch.float64, device="cpu")
        else:
            s = self.shift_of(sizes, shift)
        count = None
        if self.per == "frame":
            count = self._frames(sizes, frames)
            if count is None:
                raise ValueError("a time for each frame of data that is tokens needs frames=, how many there are.")
        elif self.per == "token":
            if x0.ndim != 3:
                raise ValueError(f"per='token' is for tokens [B, L, D]; got x0 of shape {tuple(x0.shape)}.")
            count = sizes[1]
        t = self._draw(backend_of(x0.device), UniformCall(seed, batch, Stream.TIMESTEP, samples, x0.device, count))
        if packed is None:
            t = t[first : first + len(x0)]
        if isinstance(s, Tensor) and s.ndim:
            if len(s) != len(t):
                what = "sample" if packed is None else "sequence"
                raise ValueError(f"shift must be one a {what}, [{len(t)}]; got {brief(s)}.")
            s = s.to(x0.device).view(-1, *(1,) * (count is not None))
        t = shifts.shifted(t, s) if isinstance(s, Tensor) or s != 1 else t
        if count is not None and x0.ndim == 3 and self.per == "frame":
            return self._of_frames(t, x0, part)
        if part is None or count is None:
            return t
        d = self.frame_dim if x0.ndim == 5 else 1
        return t[:, part.start[d] : part.start[d] + x0.shape[d]]

    @staticmethod
    def _of_frames(rows: Tensor, x0: Tensor, part: Part | None) -> Tensor:
        """Rows of all frames, [B, F], as those of the tokens of x0, which may be a slice."""
        whole, first = (x0.shape[1], 0) if part is None else (part.shape[1], part.start[1])
        return rows.repeat_interleave(whole // rows.shape[1], 1)[:, first : first + x0.shape[1]]

    def _placed(self, name: str, rows: Tensor, x0: Tensor, frames: int | None, part: Part | None) -> Tensor:
        """[B, F] or [1, F] as rows of video; that or [B, L] as rows of tokens."""
        batch, count = rows.shape
        if batch in (1, len(x0)):
            if x0.ndim == 5 and count == x0.shape[self.frame_dim]:
                return rows.view(batch, *(count if d == self.frame_dim else 1 for d in range(1, 5)))
            if x0.ndim == 3 and count == x0.shape[1]:
                if part is not None and count == frames != part.shape[1]:
                    raise ValueError(
                        f"{name} {tuple(rows.shape)} may be of all {frames} frames or of the tokens of this slice: "
                        "leave frames out, and pass one a token."
                    )
                return rows
            if x0.ndim == 3 and count == frames:
                return self._of_frames(rows, x0, part)
        of = "frame" if x0.ndim == 5 else "token, or with frames= a frame"
        raise ValueError(f"{name} has shape {tuple(rows.shape)}, which is not one a {of}, of x0 {tuple(x0.shape)}.")


def _clean_tokens(clean: Any, packed: Packed, x0: Tensor) -> Tensor:
    """Tokens of packed sequences that are kept clean, bool, of the shape of a time a token."""
    shape = x0.shape[: packed.dim + 1]
    if not isinstance(clean, Tensor) or clean.dtype != torch.bool or clean.numel() != shape.numel():
        raise ValueError(f"clean of packed sequences must be bool, one a token, {list(shape)}; got {brief(clean)}.")
    return clean.to(x0.device).reshape(shape)


def _as_mask(clean: Any, frames: int | None, device: torch.device) -> Tensor:
    """Rows kept clean: bool [1, F], [B, F] or the same of tokens."""
    if isinstance(clean, int) and not isinstance(clean, bool):
        if frames is None:
            raise ValueError("clean is a number of first frames; of data that is tokens, pass frames= too, or a mask.")
        if not 0 <= clean <= frames:
            raise ValueError(f"clean must be from 0 to all {frames} frames; got {clean}.")
        return (torch.arange(frames, device=device) < clean)[None]
    check_tensor("clean", clean, "clean")
    if clean.dtype != torch.bool or clean.ndim not in (1, 2):
        raise TypeError(f"clean must be a number of frames, or bool, [F] or [B, F], or of tokens; got {brief(clean)}.")
    return torch.atleast_2d(clean.to(device))


def _placed(rows: Tensor, prediction: Tensor) -> Tensor:
    """Rows of the leading dimensions, with all of the prediction's."""
    return rows.reshape(*rows.shape, *(1,) * (prediction.ndim - rows.ndim))


def _left(mask: Tensor | None, clean: Tensor, prediction: Tensor) -> Tensor:
    """What ``mask``, which has all dimensions, leaves of the rows that are not clean."""
    clean = _placed(clean, prediction)
    # Not a product: what is left out may be NaN.
    return ~clean if mask is None else mask.masked_fill(clean, 0)


def _of_left(weight: Any, clean: Tensor, prediction: Tensor) -> Any:
    """``weight``, and where it is one a row, 0 at the clean ones: it may be infinite or NaN there."""
    if not isinstance(weight, Tensor) or weight.numel() == 1 or weight.ndim > prediction.ndim:
        return weight
    placed, clean = _placed(weight, prediction), _placed(clean, prediction)
    if any(size not in (1, row) for size, row in zip(placed.shape, clean.shape)):
        return weight  # of elements, which the mask leaves out; or unfit
    return torch.where(clean.to(weight.device), torch.zeros((), dtype=weight.dtype, device=weight.device), placed)


def _shift_of_scheduler(scheduler: Any, static: float) -> Any:
    def value(name: str, default: Any) -> Any:
        return from_scheduler.config_value(scheduler, name, default)

    if not value("use_dynamic_shifting", False):
        return static
    base = value("base_image_seq_len", 256), value("base_shift", 0.5)
    most = value("max_image_seq_len", 4096), value("max_shift", 1.15)
    if value("time_shift_type", "exponential") == "linear":
        raise ValueError("a scheduler with linear time shifts is not known: pass shift=, a number or a callable.")
    return partial(_of_tokens, base, most)


def _of_tokens(base: tuple, most: tuple, frames: Any, height: Any, width: Any, tokens: int) -> float:
    return shifts.exponential(tokens, base, most)
