"""The training objective: noise, target and weighted loss of a diffusion or flow model, from rows of coefficients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import converting, explaining, from_scheduler, loss_gradient, loss_record, losses, ops, recycling, sampling
from . import packed as sequences
from . import prediction as kinds
from . import timesteps as samplers_of_t
from . import weighting as weightings
from .backends.interface import run
from .backends.registry import remakes_noise
from .calls import LossCall, NoiseCall, Packed, UniformCall
from .coefficients import Coefficients, Rows, Traced, drawn
from .distributed.noising import noise_of
from .distributed.part import Part
from .losses import Loss
from .names import OF_OBJECTIVE, answers_keywords
from .noised import Noised, check_noised, tensor_of
from .numeric import check_numbers
from .ops.checks import (
    check_data,
    check_order,
    check_tensor,
    check_unambiguous,
    compute_dtype,
    refuse_dtensor,
)
from .ops.dispatch import get as backend_of
from .ops.noise import check_noise, made_noise
from .philox import MOST_OF_SAMPLE, Stream, check_rng, seeded
from .prediction import Prediction
from .process import Process, as_times, check_process
from .program import Program
from .samplers import Sampler
from .showing import brief, warn
from .tensors import value_checks_are_free
from .timesteps import Timesteps
from .tokens import Tokens, joined, split, times_of
from .weighting import WeightingLike

# The attributes of an objective that its coefficients are made of: they cannot be changed.
_FIXED = ("process", "prediction", "weighting", "loss_function", "error_space")
# How a loss is reduced: see ``Objective._fast_loss``.
_PLAIN = None, "mean", None, "none"


class Objective:
    """What a network is trained on: a process, a prediction kind, a weighting and an error function.

    Args:
        process: ``VariancePreserving``, ``RectifiedFlow``, ``EDM``, ``VPSDE``, ``VESDE``, ``SubVPSDE``, ``Cosine`` or
            ``TrigFlow``.
        prediction: what the network predicts: "epsilon", "sample", "v_prediction", "flow" (n - x0), "reversed_flow",
            "score", "previous_sample", "edm" (Karras et al.'s F), "trigflow" (cos(t) sigma_data n - sin(t) x0), or a
            ``Prediction``.
        weighting: None (uniform), a weighting such as ``MinSNR(5.0)``, its name, or a callable of the ``Levels``.
        loss: "mse", "l1", "huber", "smooth_l1", "pseudo_huber", "log_cosh", or an object of ``fastdiff.losses``, such
            as ``losses.Combined(mse=0.5, l1=0.3)``, a weighted sum.
        timesteps: how t is drawn when it is not given: an object of ``fastdiff.timesteps`` or its name; None: uniform,
            and EDM's lognormal for EDM.
        error_space: the prediction kind in which the error is taken; None: the network's own. "sample" is what SD3's
            (preconditioned) and CogVideoX's trainers do. The error is scaled, nothing of full size is converted.
        noise_offset: strength of the offset noise, one normal a (sample, channel), added to noise made here.
        noise_offset_dim: which dimension of x0 is the channels': 1; 2 or -1 for packed tokens [batch, tokens,
            channels]; 2 for video with its frames first, [batch, frames, channels, ...]. Other than 1, the noise is
            made as a tensor, and kept.
        input_perturbation: the network sees n + input_perturbation xi, the target n (Ning et al. 2023). These three
            and ``timesteps`` may be set anew between steps; what the coefficients are made of may not.

    Raises ValueError or TypeError for unknown names, for combinations that mean nothing, and for a weighting that gives
    NaN or an error scale that is infinite at some timestep; warns where a weight is infinite (see
    ``fastdiff.weighting``: that timestep gets weight 0).
    """

    @answers_keywords(OF_OBJECTIVE)
    def __init__(
        self,
        process: Process,
        prediction: str | Prediction = "epsilon",
        weighting: WeightingLike = None,
        loss: str | Loss = "mse",
        *,
        timesteps: str | Timesteps | None = None,
        error_space: str | Prediction | None = None,
        noise_offset: float = 0.0,
        noise_offset_dim: int = 1,
        input_perturbation: float = 0.0,
    ):
        check_process(process)
        self.process = process
        self.prediction = kinds.get(prediction)
        self.weighting = weightings.get(weighting)
        self.loss_function = losses.get(loss)
        self.timesteps = timesteps
        self.error_space = self.prediction if error_space is None else kinds.get(error_space)
        self.noise_offset, self.input_perturbation = noise_offset, input_perturbation
        self.noise_offset_dim = noise_offset_dim
        unused = self.weighting.unused(self.prediction, self.error_space) if hasattr(self.weighting, "unused") else None
        if unused:
            warn(unused)
        self._prepare()

    def _prepare(self) -> None:
        """Make the coefficients from the process as it is now."""
        process = self.process
        self._changes, self._drawn = process._changes, None
        # A combination that means nothing should not wait for the first batch to be found.
        example = self.timesteps(torch.tensor([0.5], dtype=torch.float64, device="cpu"), process)
        levels = process.levels(example)
        weightings.check(self.weighting, levels)
        made = Coefficients(process, self.prediction, self.weighting, self.loss_function, self.error_space)
        if not process.discrete:
            made.formulas(levels)
        self._made = made

    @property
    def _coefficients(self) -> Coefficients:
        """The coefficients of the process as it is now."""
        if self._changes != self.process._changes:
            self._prepare()
        return self._made

    def _program(self, of_noise: bool = False) -> Program | None:
        """``Coefficients.program`` of the process as it is now."""
        if self._changes != self.process._changes:
            self._prepare()
        return self._made.program(of_noise)

    def _times(self) -> Traced:
        """The program that draws t."""
        if self._drawn is None or self._changes != self.process._changes:
            self._drawn = drawn(self.timesteps, self.process)
        return self._drawn

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and name in self.__dict__:
            raise AttributeError(f"{name} cannot be changed: the coefficients are made of it. Make another Objective.")
        if name in ("noise_offset", "input_perturbation"):
            check_numbers(**{name: value})
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0; got {value!r}.")
            value = float(value)
        if name == "timesteps":
            value = samplers_of_t.get(value, self.process)
            super().__setattr__("_drawn", None)
        if name == "noise_offset_dim":
            if value == 0 or isinstance(value, bool) or not hasattr(value, "__index__"):
                raise ValueError(f"noise_offset_dim must be a dimension other than the batch's, 0; got {value!r}.")
            value = value.__index__()
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        shown = [repr(self.process), repr(self.prediction.name)]
        if not isinstance(self.weighting, weightings.Uniform):
            shown.append(f"weighting={brief(self.weighting)}")
        if self.loss_function != losses.MSE():
            shown.append(f"loss={brief(self.loss_function)}")
        if self.error_space is not self.prediction:
            shown.append(f"error_space={self.error_space.name!r}")
        return f"Objective({', '.join(shown)})"

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        *,
        snr_gamma: float | None = None,
        snr_form: str = "paper",
        prediction: str | Prediction | None = None,
        weighting: WeightingLike = None,
        **options: Any,
    ) -> Objective:
        """The objective that a scheduler of the diffusers library stands for in training.

        Args:
            scheduler: one with ``alphas_cumprod`` (its own numbers are used), a flow-matching one (``RectifiedFlow``
                with its shift, prediction "flow") or an EDM one (``EDM``, preconditioned).
            snr_gamma: min-SNR weights with this gamma, in the form ``snr_form`` (``MinSNR``).
            prediction: what the network predicts, in place of the scheduler's ``prediction_type``.
            weighting, options: as in ``Objective``.

        Raises TypeError for what is no such scheduler, ValueError for combinations that mean nothing.
        """
        from_scheduler.check_scheduler(scheduler, "Objective.from_scheduler")
        if snr_gamma is not None:
            if weighting is not None:
                raise ValueError("snr_gamma is a weighting of its own: pass snr_gamma or weighting, not both.")
            weighting = weightings.MinSNR(float(snr_gamma), snr_form)
        process, kind = from_scheduler.process_of(scheduler), from_scheduler.prediction_of(scheduler, prediction)
        return cls(process, kind, weighting, **options)

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
        keep_noise: bool | None = None,
        rng: str = "exact",
        with_target: bool = False,
        dtype: torch.dtype | None = None,
        tokens: Tokens | None = None,
        part: Part | None = None,
        lengths: Sequence[int] | Tensor | None = None,
    ) -> Noised:
        """Noise a batch.

        Args:
            x0: clean data [batch, ...], floating point; or, with ``dtype``, uint8 images, decoded as x0 / 127.5 - 1.
            t: times of the process: one a sample [batch], a frame [batch, frames], a token, one for all, or with as
                many dimensions as x0, 1 where shared. None draws one a sample. For video with as many channels as
                frames, [batch, frames] could be either's and is refused: give it all dimensions.
            sigma: in place of t, for continuous processes: the noise level itself, after any shift. The factor of the
                noise for RectifiedFlow, in [0, 1]; sigma / alpha for the others. A sigma passed as t would be shifted
                again.
            noise: shaped as x0, used as it is (no offset is added); None makes it from the seed. It is drawn in the
                order of x0's elements: latents that were packed before get other noise than with ``tokens``.
            generator: the seed is drawn from it (None: PyTorch's default one), on its device.
            seed: use this 64-bit seed (int or int64 tensor) instead of drawing one. With the same seed, t and noise of
                a sample depend on its index alone: noising a batch of 8 is noising its halves, the second with
                ``sample_offset=4``.
            sample_offset: the index of the batch's first sample. None: 0. Several processes (``torch.distributed``)
                that give neither a seed nor ``ids`` draw different t and noise, see
                ``fastdiff.distributed.data_parallel``.
            ids: in its place a number for each sample, integers [batch]: its index in the data set, and with one seed
                for all of training it keeps its t and noise when batches are shuffled, split or resumed (add an epoch
                to the seed for others); or the number of its pair or group, which then share t and noise.
            keep_noise: whether noise that is made here is kept for the loss, or made again there: a full-size buffer
                less, for more arithmetic. The numbers are the same. None: kept, but for the Triton backend, which makes
                it faster than it could read it.
            rng: "exact", or "fast" for normals from a GPU's approximate instructions: see ``fastdiff.ops.Philox``.
            with_target: write ``noised.target`` now, for a loss of one's own: in the same launch with Triton, in a
                second pass elsewhere. ``loss`` does not need it: it makes the target as it goes.
            dtype: of x_t: float32, bfloat16 or float16; None: the dtype of x0.
            tokens: x_t, its target and the network's output are packed tokens of x0 [B, C, H, W]: see
                ``fastdiff.Tokens``. Data, noise, masks and element weights stay as they are, with one time a sample.
            part: x0 is this slice of a whole batch that several processes share, see ``fastdiff.distributed.Part``:
                ``sample_offset`` is the index of the whole's first sample, t, noise and ``ids`` are those of the slice.
            lengths: x0 is packed sequences, [tokens, ...] or [1, tokens, ...], of so many tokens each: whole numbers,
                or a tensor of such on the CPU (of cumulative ones: ``cu_seqlens.diff()``). A sequence is a sample, with
                the t and noise of a batch of its own, [1, tokens, ...]. t is one a sequence, or one a token: then the
                noise is made as a tensor, and kept.

        Returns a ``Noised``. Differentiable in a floating x0. Raises TypeError or ValueError for unfit inputs.
        """
        if isinstance(t, Tensor) and isinstance(x0, Tensor) and t.ndim > max(x0.ndim, 1) and t.numel() > 1:
            raise ValueError(f"x0 has shape {tuple(x0.shape)} and t {tuple(t.shape)}: swapped? The data comes first.")
        check_data(x0, dtype)
        if not x0.ndim:
            raise ValueError("x0 must have a batch dimension; got a scalar.")
        if sigma is not None:
            if t is not None:
                raise ValueError("t and sigma both say which noise level: pass one of them.")
            t = self.process.time_of(sigma.to(x0.device) if isinstance(sigma, Tensor) else sigma)
        packed, by_token, samples = None, False, x0.shape[0]
        if lengths is not None:
            if part is not None:
                raise ValueError("packed sequences are shared out whole: leave part out, and pass ids= of this rank's.")
            packed = sequences.packed_of(x0, lengths, tokens)
            t, samples = sequences.times_of(t, packed, x0), packed.sequences
            by_token = t is not None and t.shape != (samples,)
        elif tokens is not None:
            t = times_of(tokens, x0, t)
        if rng != "exact":
            check_rng(rng)
        backend = backend_of(x0.device)
        needed = noise is None or t is None or self.input_perturbation > 0
        window = None
        if part is None:
            seed, sample_offset = seeded(seed, generator, ids, sample_offset, samples, x0.device, needed)
        else:
            how = seed, generator, ids, sample_offset, needed
            seed, sample_offset, window, t = noise_of(self, part, x0, t, *how)
        offset = noise is None and self.noise_offset and (self.noise_offset_dim != 1 or packed is not None)
        if offset or (noise is None and window is not None):
            how = seed, sample_offset, self.noise_offset, self.noise_offset_dim, rng
            noise = made_noise(x0, *how, window) if packed is None else sequences.offset_noise(x0, packed, *how)
        if keep_noise is None:
            keep_noise = not remakes_noise(x0.device)
        fast = backend.fast
        if fast is not None and tokens is None and not by_token and not with_target and not self.input_perturbation:
            done = self._fast_noise(fast, backend, x0, t, noise, seed, sample_offset, keep_noise, rng, dtype, packed)
            if done is not None:
                done.part = part
                return done
        made = source = None
        if seed is not None:
            made = ops.Philox(seed, sample_offset, offset=self.noise_offset, rng=rng)
        if noise is not None:
            try:
                check_noise(x0=x0, noise=noise)
            except (TypeError, ValueError):
                check_order(x0, t, noise, "x0, t, noise")
                raise
            source = noise
        else:
            made.check((samples, *x0.shape[1:]))
            source = made
            if isinstance(t, Tensor) and x0.ndim > 1 and t.shape == x0.shape and self._no_times(t):
                raise ValueError(
                    f"t has the shape of x0, {tuple(t.shape)}, and is no times of {self.process!r}: if it is noise, "
                    f"write noise=."
                )
        if t is None:
            t = self._draw(backend, UniformCall(seed, samples, Stream.TIMESTEP, sample_offset, x0.device))
        data, source, order = split(tokens, x0, source)
        xi = ops.Philox(seed, sample_offset, Stream.PERTURBATION, rng=rng) if self.input_perturbation else None
        if xi is not None and window is not None:
            xi = split(tokens, x0, ops.materialize(xi, x0.shape, x0.device, window=window))[1]
        if by_token:  # rows are tokens, as in any batch, and samples are not: their noise is made apart
            source, xi = (sequences.materialize(n, packed, x0) for n in (source, xi))
        of_rows = None if by_token else packed
        rows, t = self._rows_at(t, sequences.placed_for(data, of_rows), compute_dtype(x0, noise))
        how = self.input_perturbation, xi, keep_noise, dtype, order, of_rows
        call = NoiseCall(data, source, rows.alpha, rows.sigma, *how)
        target = None
        if with_target:
            p, q = rows.p if self.prediction.uses_x0 else None, rows.q if self.prediction.uses_noise else None
            x_t, n, target = backend.noise_and_target(call, p, q)
        else:
            x_t, n = run(backend, call)
        x_t, n, target = joined(tokens, x0, x_t, n if noise is None else noise, target)
        return Noised(self, x0, x_t, t, n, rows, target, tokens, part, packed=packed)

    def _no_times(self, t: Tensor) -> bool:
        """Whether numbers like noise, where looking at them is free, cannot be times."""
        return t.is_floating_point() and (
            self.process.discrete or (value_checks_are_free(t) and bool((t < self.process.t_min).any()))
        )

    def _fast_noise(
        self, fast: Any, backend: Any, x0: Tensor, t: Any, noise: Tensor | None, seed: Any, sample_offset: int | Tensor,
        keep: bool, rng: str, dtype: torch.dtype | None, packed: Packed | None = None,
    ) -> Noised | None:  # fmt: skip
        """``noise`` if a fast call of the backend does it, else None."""
        if seed is not None and type(seed) is not int and (type(seed) is not Tensor or seed.device != x0.device):
            return None
        program = self._program(of_noise=True)
        if program is None:
            return None
        if noise is None and x0.numel() > MOST_OF_SAMPLE * x0.shape[0]:
            return None
        draw, offset = None, self.noise_offset
        if t is None:
            times = self._times().program()
            if times is None:
                samples = len(x0) if packed is None else packed.sequences
                t = self._draw(backend, UniformCall(seed, samples, Stream.TIMESTEP, sample_offset, x0.device))
            else:
                draw = times, Stream.TIMESTEP
        made, data = (seed, Stream.NOISE, sample_offset, offset), x0
        if not x0.is_contiguous():
            # Noise that is made counts elements in their logical order, so there is a copy in any case.
            if noise is not None or x0.requires_grad:
                return None
            data = x0.contiguous()
        done = fast.noise(program, draw, data, t, noise, made, keep, rng, dtype, packed)
        if done is None:
            return None
        x_t, n, t, known = done
        if data is not x0:  # a channels_last network gets a channels_last x_t
            x_t = recycling.empty_like(x0, dtype=x_t.dtype).copy_(x_t)
        if noise is not None:
            n = noise
        elif n is None:
            n = ops.Philox(seed, sample_offset, offset=offset, rng=rng)
        placed = x0 if packed is None else sequences.placed_for(x0, packed)
        rows = Rows(self._made, t, placed, compute_dtype(x0, noise), backend, program, known)
        return Noised(self, x0, x_t, t, n, rows, packed=packed)

    def _draw(self, backend: Any, call: UniformCall) -> Tensor:
        """The times that the uniforms of ``call`` stand for, in their shape."""
        program = None if torch.compiler.is_compiling() else self._times().program()
        t = None if program is None else backend.times(program, call, self.process.discrete)
        return self.timesteps(run(backend, call), self.process) if t is None else t

    def _rows(self, t: Tensor, x0: Tensor, dtype: torch.dtype, packed: Packed | None = None) -> Rows:
        """The coefficients at ``t``, one time a row, which has been checked, for ``x0``."""
        x0 = x0 if packed is None else sequences.placed_for(x0, packed)
        return Rows(self._coefficients, t, x0, dtype, backend_of(x0.device))

    def _rows_at(self, t: Any, x0: Tensor, dtype: torch.dtype) -> tuple[Rows, Tensor]:
        """The coefficients at ``t`` for ``x0``, and ``t`` as one time a row, on its device. Raises for unfit times."""
        if type(t) is not Tensor:
            refuse_dtensor("t", t)
        if not isinstance(t, Tensor) or t.device != x0.device:
            t = as_times(t, x0.device)
        if t.ndim != 1 or len(t) != len(x0):
            if t.numel() == 1:
                t = t.reshape(()).expand(len(x0))
        check_unambiguous("t", t.shape, x0.shape)
        self.process.check_t(t)
        return self._rows(t, x0, dtype), t

    def loss(
        self,
        prediction: Tensor,
        noised: Noised,
        mask: Tensor | None = None,
        reduction: str = "mean",
        *,
        weight: Tensor | float | None = None,
        mask_normalization: str = "none",
        target: Tensor | None = None,
        y: Tensor | None = None,
        r: Tensor | float | None = None,
    ) -> Tensor:
        """The loss of the network's output.

        Args:
            prediction: the output for ``noised``, shaped as x_t (tokens, if x_t is), any floating-point dtype.
            noised: from ``noise``, of this or of another objective with the same process: weights, error and target are
                this one's.
            mask: bool or float, broadcastable to prediction, with fewer dimensions aligned at the left, as t is:
                [batch], or [batch, frames]; see ``mask_normalization``. What it leaves out with 0, and
                rows of weight 0, add 0 to the loss and to the gradient, whatever they hold.
            reduction: "mean" over all elements, "sum", or "none": one mean a row (the shape of t), or a sample with
                mask_normalization="sample"; or "elements": the weighted error of each element, for a reduction of your
                own. Of packed sequences with one time each, a row is a sequence: the mean over
                the sequences' own means is mask_normalization="row", with or without a mask.
            weight: further weights, one a row or a number (prior preservation, learned uncertainty); may require grad.
                Or one an element: floating point without a gradient, with as many dimensions as prediction, 1 where
                elements share one. What divides is the sum of the mask alone: sum(w m e) / sum(m).
            mask_normalization: divide by the number of elements ("none"), each row by its mask's sum ("row"; a row with
                nothing in its mask is left out of the mean), each sample by its mask's sum ("sample"; with a time a
                frame or token, where a row is one of them), or all by the mask's sum ("global").
            target: what the prediction is compared with in place of the objective's own target, shaped as prediction: a
                teacher's output, say. The weights stay those of the objective.
            y, r: a third term of the target, which becomes target + r y, in the same pass: y is shaped as prediction
                (another output of the network, a target of another sample); r is a number (None: 1), or one a row.

        For data with a ``part`` this is the loss of the whole, on every rank that shares it; "none" gives the rows of
        which this rank has something, each over all of its elements, "elements" the errors of the part, from which no
        rank learns of another. Masks and weights are those of the part.

        Returns float32 (float64 with float64 inputs): a scalar, or for "none" and "elements" as said, the latter shaped
        as prediction; differentiable in prediction, x0, noise, target, y
        and weight. Raises TypeError or ValueError for unfit inputs, RuntimeError if its times, or the seed of
        noise that is not kept, were written into since. Warns, on the CPU, of a mask that is 0 everywhere.
        """
        how = mask, reduction, weight, mask_normalization
        return loss_record.of_noised(self, prediction, noised, how, target, y, r)

    def loss_and_gradient(
        self,
        prediction: Tensor,
        noised: Noised,
        scale: Tensor | float = 1.0,
        mask: Tensor | None = None,
        reduction: str = "mean",
        *,
        weight: Tensor | float | None = None,
        mask_normalization: str = "none",
        target: Tensor | None = None,
        y: Tensor | None = None,
        r: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the gradient of scale * loss by the network's output, in one pass over the data::

            loss, gradient = objective.loss_and_gradient(prediction, noised, scale=1 / accumulation_steps)
            prediction.backward(gradient)

        These are the numbers of ``loss`` and of its ``backward(scale)``, without their part of a graph: a launch and an
        entry into autograd less, also in float16 and whatever the scale is.

        Args:
            prediction, noised: as in ``loss``. It does not matter whether prediction requires grad.
            scale: a number, or a tensor [], floating point, on the device of prediction, which nothing waits for:
                ``scaler.scale(torch.ones([], device=...))`` of a ``torch.amp.GradScaler``. It is multiplied in before
                the gradient is rounded.
            mask, weight, mask_normalization, target, y, r: as in ``loss``.
            reduction: "mean" or "sum".

        For data with a ``part`` it is the loss of the whole, and the gradient by the part of the prediction. Where a
        mask's sum divides, a GPU takes two passes, and so do parts that are weighted, masked or of unequal sizes.

        Returns (loss, gradient): the loss a scalar as ``loss`` gives it, detached; the gradient shaped as prediction,
        in its dtype and memory layout. Raises TypeError or ValueError as ``loss`` does, for a scale or a reduction that
        is none of these, and where anything but the prediction requires grad, because it would get none.
        """
        how = mask, reduction, weight, mask_normalization
        return loss_gradient.loss_and_gradient(self, prediction, noised, scale, how, target, y, r)

    def _fast_loss(
        self, prediction: Any, x0: Tensor, noise: Any, t: Any, rows: Rows | None, how: tuple[Any, ...] = _PLAIN,
        packed: Packed | None = None, upstream: Tensor | float | None = None,
    ) -> Any:  # fmt: skip
        """The loss if a fast call of a backend can compute it, else None. rows: where there are some. how: (mask,
        reduction, weight, mask_normalization). With ``upstream``, (the loss, its gradient)."""
        if not isinstance(prediction, Tensor):
            return None
        backend = backend_of(prediction.device)
        fast = backend.fast
        if fast is None:
            return None
        program = self._program()
        if program is None:
            return None
        x0_, n = (x0 if self.prediction.uses_x0 else None), (noise if self.prediction.uses_noise else None)
        # The prediction itself is not held: a loss that is kept would keep it.
        record = partial(self._record, x0, noise, t, rows, how, packed)
        at_hand = rows.at_hand if rows is not None and rows.program is program else None
        function = self.loss_function.function
        more = record, how, packed, upstream
        return fast.loss(program, self._made.present, function, prediction, x0_, n, t, at_hand, *more)

    def _record(
        self, x0: Tensor, noise: Any, t: Any, rows: Rows | None, how: tuple[Any, ...], packed: Packed | None,
        prediction: Tensor, *_: Any,
    ) -> LossCall:  # fmt: skip
        """The record of a loss that a fast call computed, with ``rows`` or, where there are none of the process as it
        is now, with others. What else the fast call has kept is held here too."""
        if rows is None or rows.coefficients is not self._made:
            rows = self._rows(t, x0, compute_dtype(x0, tensor_of(noise), prediction), packed)
        return loss_record.record(self, prediction, x0, noise, rows, t.shape, *how, packed=packed)

    def _loss(self, *how: Any, **more: Any) -> Any:
        """The general way: see ``loss_record.loss``."""
        return loss_record.loss(self, *how, **more)

    def _rows_of_loss(self, rows: Rows) -> tuple[Any, ...]:
        """(p, q, scale, weight, c), None for what this objective does not use."""
        return (
            rows.p if self.prediction.uses_x0 else None,
            rows.q if self.prediction.uses_noise else None,
            None if self.error_space is self.prediction else rows.scale,
            rows.loss_weight,
            rows.c if self.loss_function.uses_c else None,
        )

    def predict_x0(self, prediction: Tensor, noised: Noised) -> Tensor:
        """The x0 that the network's output stands for, shaped and typed as prediction; differentiable."""
        return self.convert(prediction, noised, "sample")

    def sample(
        self,
        model: Callable[..., Tensor],
        shape: tuple[int, ...],
        sampler: str | Sampler = "ddpm",
        steps: int | None = None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draw samples from a network trained with this objective: ``fastdiff.sample`` with its process and prediction.

        Args:
            model: called as ``model(x, t)``, or ``model(x, t, cond)``, with what training calls it with: the
                ``model_input`` and ``model_time`` of a ``Noised``.
            shape: [batch, ...] of the samples.
            sampler, steps, options: as in ``fastdiff.sample``: ``cond``, ``guidance``, ``seed``, ``device``, ...

        Returns the samples, of ``shape``. Raises ValueError or TypeError for unfit inputs.
        """
        return sampling.sample(model, shape, self, sampler, steps, **options)

    def explain(self, x0: Tensor | None = None) -> str:
        """What computes the coefficients and the times of this objective; and, given a batch like those of training,
        which backend noises it and computes its loss, and why the faster ways do not.

        Args:
            x0: [batch, ...], as ``noise`` takes it. Nothing of PyTorch's generators is drawn.

        Returns a few lines to print.
        """
        return explaining.explain(self, x0)

    def convert(self, prediction: Tensor, noised: Noised, kind: str | Prediction) -> Tensor:
        """The network's output as another prediction kind: ``convert(m, noised, "epsilon")``.

        Raises ValueError (on the CPU; NaN elsewhere) where the output does not determine it: x0 from epsilon at zero
        SNR.
        """
        check_noised(prediction, noised)
        check_tensor("prediction", prediction, "prediction")
        noised.check_unchanged()
        return converting.convert(self, prediction, noised.x_t, noised.t, kinds.get(kind), noised.packed_rows)
