"""Diffusion forcing (Chen et al. 2024, arXiv 2407.01392): each frame has a noise level of its own, in training
(``RFLoss(per="frame")``) and in sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .. import prediction as kinds
from ..names import find
from ..noised import Noised, refuse_packed
from ..numeric import check_numbers
from ..objective import Objective
from ..ops.checks import check_alike, check_floating, check_tensor
from ..philox import Stream, seeded
from ..process import Levels
from ..showing import brief
from ..tensors import value_checks_are_free

_SCHEDULES = {name: name for name in ("full_sequence", "autoregressive", "pyramid", "trapezoid")}


def fused_snr(noised: Noised, gamma: float = 5.0, decay: float = 0.9, *, frames: int | None = None) -> Tensor:
    """Fused-SNR weights: min-SNR weights that also count what earlier frames tell (Chen et al. 2024, and their code).

    S_f is the SNR of frame f, c_f = min(S_f, gamma) / gamma, and d = decay. Their moving average is C_0 = c_0,
    C_f = d C_{f - 1} + (1 - d) c_f. What frame f knows from before it is h_f = d C_{f - 1}, and h_0 = 0. Fused with it,
    c'_f = 1 - (1 - h_f) (1 - c_f) and S'_f = 1 - (1 - h_f) (1 - S_f / gamma).

    The weight of an error of x0 is gamma c'. That of another kind is multiplied by the square of what makes the error
    one of x0, at the SNR gamma S': c' / S' for "epsilon", gamma c' / (gamma S' + 1) for "v_prediction", and
    gamma c' / (1 + sqrt(gamma S'))^2 for "flow". With decay = 0 they are the weights of ``MinSNR(gamma)``.

    Args:
        noised: a batch with a time for each frame, of an objective with ``error_space`` of these kinds. Its own
            weighting should be None.
        gamma: > 0.
        decay: in [0, 1).
        frames: of data that is tokens, [B, L, D]: how many frames they are, one after the other, L / frames tokens
            each, which share a time.

    Returns float64 of the shape of ``noised.t``, to be given to ``objective.loss(..., weight=)``. Raises ValueError for
    unfit inputs, and for packed sequences.
    """
    check_numbers(gamma=gamma, decay=decay)
    if not gamma > 0:
        raise ValueError(f"gamma must be positive; got {gamma!r}.")
    if not 0 <= decay < 1:
        raise ValueError(f"decay must lie in [0, 1); got {decay!r}.")
    refuse_packed(noised, "fused SNR")
    t, objective = noised.t, noised.objective
    if t.ndim < 2:
        raise ValueError(f"fused SNR needs a time for each frame, [B, F]; got t of shape {tuple(t.shape)}.")
    t = _of_frames(noised, frames)
    snr = objective.process.levels(t).snr / gamma
    clipped = snr.clamp(max=1.0)
    known = clipped @ _from_before(snr.shape[1], decay, snr.device)
    clipped_fused, fused = (1 - (1 - known) * (1 - each) for each in (clipped, snr))
    kind = objective.error_space.name
    if kind == "sample":
        weight = gamma * clipped_fused
    elif kind == "epsilon":
        weight = clipped_fused / fused
        weight = torch.where(fused == 0, 1.0, weight)  # its limit
    elif kind == "v_prediction" and objective.process.variance_preserving:
        weight = gamma * clipped_fused / (gamma * fused + 1)
    elif kind == "flow":
        weight = gamma * clipped_fused / (1 + (gamma * fused).sqrt()) ** 2
    else:
        raise ValueError(
            f"fused SNR is of errors of 'sample', 'epsilon', 'v_prediction' (variance-preserving processes) or 'flow'; "
            f"got {kind!r} of {objective.process!r}."
        )
    return weight.repeat_interleave(noised.t.shape[1:].numel() // t.shape[1], 1).reshape(noised.t.shape)


def _of_frames(noised: Noised, frames: int | None) -> Tensor:
    """The times of the frames, [B, F]."""
    t = noised.t.flatten(1)
    if noised.x0.ndim != 3:
        if frames is not None:
            raise ValueError("frames is for data that is tokens; a video has its frames in its shape: leave it out.")
        return t
    count = t.shape[1]
    if type(frames) is not int or frames < 1 or count % frames:
        raise ValueError(
            f"t of shape {tuple(noised.t.shape)} is one a token, of data {tuple(noised.x0.shape)}: pass frames=, how "
            f"many frames the tokens are; got {frames!r}."
        )
    by_frame = t.view(len(t), frames, count // frames)
    if value_checks_are_free(t) and not bool((by_frame == by_frame[..., :1]).all()):
        raise ValueError(f"the tokens of a frame must share a time; got {brief(noised.t)} for {frames} frames.")
    return by_frame[..., 0]


def _from_before(frames: int, decay: float, device: torch.device) -> Tensor:
    """[F, F], by which c becomes h."""
    f = torch.arange(frames, dtype=torch.float64, device=device)
    age = f[None] - f[:, None]  # of frame i as seen from frame j
    powers = torch.where(age > 0, decay ** age.clamp(min=1), 0.0)
    own = torch.full_like(f, 1 - decay).masked_fill(f == 0, 1.0)
    return own[:, None] * powers


def frame_schedule(kind: str, steps: int, frames: int, *, uncertainty: float = 1.0, chunk: int | None = None) -> Tensor:
    """Which noise level each frame has before and after each step of sampling: float64 [rows, F] on the CPU, of
    fractions k / steps, from 1 (noise) down to 0 (clean).

    Frame f begins d_f steps late: its level in row m is that of k = steps + d_f - m, within 0 and steps.

    Args:
        kind: "full_sequence", d_f = 0: all frames at once; "autoregressive", d_f = f steps: one after the other;
            "pyramid", d_f = floor(f uncertainty): the future is less certain; "trapezoid",
            d_f = floor(min(f, F - 1 - f) uncertainty): the middle is, between two ends.
        steps: from noise to clean data, for each frame.
        frames: F.
        uncertainty: how many steps a frame is later than its neighbour; at least 0.
        chunk: so many frames follow the schedule, then the next so many, when they are clean; None: all together.

    Raises ValueError for unfit arguments.
    """
    kind = find("schedule", kind, _SCHEDULES, {})
    for name, value in {"steps": steps, "frames": frames, "chunk": frames if chunk is None else chunk}.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}.")
    check_numbers(uncertainty=uncertainty)
    if not 0 <= uncertainty < float("inf"):
        raise ValueError(f"uncertainty must be at least 0, and finite; got {uncertainty!r}.")
    parts, chunk = [], frames if chunk is None else chunk
    for first in range(0, frames, chunk):
        count = min(chunk, frames - first)
        f = torch.arange(count, dtype=torch.float64, device="cpu")
        late = {
            "full_sequence": 0 * f,
            "autoregressive": f * steps,
            "pyramid": (f * uncertainty).floor(),
            "trapezoid": (torch.minimum(f, count - 1 - f) * uncertainty).floor(),
        }[kind]
        m = torch.arange(steps + int(late.max()) + 1, dtype=torch.float64, device="cpu")
        own = (steps + late - m[:, None]).clamp(0, steps) / steps
        rows = torch.ones(len(m), frames, dtype=torch.float64, device="cpu")
        rows[:, :first], rows[:, first : first + count] = 0.0, own
        parts.append(rows if not parts else rows[1:])  # the first row is where the chunk before it ended
    return torch.cat(parts)


@torch.no_grad()
def sample(
    model: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, ...],
    objective: Objective,
    schedule: Tensor,
    *,
    frame_dim: int = 2,
    x: Tensor | None = None,
    known: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    sample_offset: int | None = None,
    ids: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw videos whose frames have noise levels of their own, by steps of DDIM without noise (for a flow: of Euler),
    one pass over the data each. A frame whose level stays is left as it is, whatever the network says of it.

    Args:
        model: called as ``model(x, t)``, t [B, F], the ``model_time`` of training: whole numbers, or float32 (float64
            for float64 samples). It is used as it is: call ``.eval()`` first.
        shape: of the samples, [B, C, F, H, W], or with ``frame_dim=1`` [B, F, C, H, W] (or [B, F, ...]).
        objective: of training: a ``video.RFLoss``, or any ``Objective`` with a time for each frame.
        schedule: fractions of the process [rows, F], as ``frame_schedule`` makes them; of a flow shifted, if that is
            wanted, by ``shifts.shifted(schedule, shift)``. They may not rise.
        frame_dim: which dimension the frames are.
        x: where to start, floating point of ``shape``; None: noise from the seed.
        known: data of ``shape``. It is what frames hold that the schedule has at 0 from the start: history.
        seed, generator, sample_offset, ids: what the noise is made from, as in ``fastdiff.sample``.
        device, dtype: of the samples; device None: that of x, of known, or of the model's parameters.

    Of a discrete process with T timesteps, fraction f is timestep floor(f T) - 1; below 0 a frame is clean, and the
    model is told timestep 0. Returns the samples. Raises TypeError or ValueError for unfit inputs.
    """
    shape = torch.Size(shape)
    if not 1 <= frame_dim < len(shape):
        raise ValueError(f"frame_dim must be a dimension of {tuple(shape)} behind the batch; got {frame_dim!r}.")
    schedule = _checked_schedule(schedule, shape[frame_dim])
    for name, data in {"x": x, "known": known}.items():
        if data is not None:
            check_floating(**{name: data})
            if data.shape != shape:
                raise ValueError(f"{name} must have the shape of the samples, {tuple(shape)}; got {tuple(data.shape)}.")
    device = _device(device, x, known, model)
    placed = [1] * len(shape)
    placed[frame_dim] = shape[frame_dim]
    held = schedule[0] == 0
    if bool(held.any()) and known is None and x is None:
        raise ValueError("the schedule has frames that are clean from the start: pass known=, the data that they hold.")
    if x is None:
        seed, samples = seeded(seed, generator, ids, sample_offset, shape[0], device)
        x = ops.materialize(ops.Philox(seed, samples, Stream.INITIAL), shape, device)
    x = x.to(device, dtype)
    if known is not None:
        x = torch.where(held.to(device).view(placed), known.to(device, dtype), x)
    levels = [_levels(objective.process, row) for row in schedule]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for now, then in zip(levels, levels[1:]):
        k_x, k_m, time, moves = _step(objective, now, then)
        m = model(x, time.to(device, wide if time.is_floating_point() else None).expand(shape[0], -1))
        check_tensor("the model's output", m, "output")
        check_alike(x=x, **{"the model's output": m})
        moved = ops.convert(m.to(dtype), x, k_x.view(placed), k_m.view(placed))
        # Of a frame that stays, 0 m is NaN where m is not finite.
        x = moved if bool(moves.all()) else torch.where(moves.to(device).view(placed), moved, x)
    return x


def _checked_schedule(schedule: Any, frames: int) -> Tensor:
    check_floating(schedule=schedule)
    if schedule.ndim != 2 or schedule.shape[1] != frames or len(schedule) < 2:
        raise ValueError(f"schedule must be [rows, {frames}], of at least two rows; got {brief(schedule)}.")
    schedule = schedule.to("cpu", torch.float64)
    if not bool(((schedule >= 0) & (schedule <= 1)).all()) or not bool((schedule.diff(dim=0) <= 0).all()):
        raise ValueError("schedule must be fractions in [0, 1] that do not rise from a row to the next.")
    return schedule


def _device(device: Any, x: Tensor | None, known: Tensor | None, model: Any) -> torch.device:
    if device is not None:
        return torch.device(device)
    for data in (x, known, *getattr(model, "parameters", lambda: ())()):
        if data is not None:
            return data.device
    return torch.device("cpu")


def _levels(process: Any, fractions: Tensor) -> Levels:
    """The noise levels of the frames [F]; alpha 1 and sigma 0 where a fraction is 0."""
    if process.discrete:
        # Fractions k / steps times steps may come out just below a whole number.
        t = (fractions * process.steps + 1e-9).floor().long() - 1
        clean, t = t < 0, t.clamp(min=0)
    else:
        clean, t = fractions == 0, process.time(fractions)
    levels = process.levels(t)
    alpha, sigma = torch.where(clean, 1.0, levels.alpha), torch.where(clean, 0.0, levels.sigma)
    return Levels(t, alpha, sigma, process)


def _step(objective: Objective, now: Levels, then: Levels) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(k_x, k_m, the time that the model is told, whether the level moves), [F] each: x becomes k_x x + k_m m."""
    scale, time = kinds.model_input(objective.prediction, now)
    if scale is not None:
        raise ValueError(f"samples of frames are not drawn with the preconditioned {objective.prediction.name!r}.")
    moves = (now.alpha != then.alpha) | (now.sigma != then.sigma)
    (x0_x, x0_m), (n_x, n_m) = (
        kinds.conversion(objective.prediction, kind, now) for kind in (kinds.SAMPLE, kinds.EPSILON)
    )
    k_x = torch.where(moves, then.alpha * x0_x + then.sigma * n_x, 1.0)
    k_m = torch.where(moves, then.alpha * x0_m + then.sigma * n_m, 0.0)
    if not bool((k_x.isfinite() & k_m.isfinite()).all()):
        raise ValueError(
            f"{objective.prediction.name!r} does not determine x0 where the schedule begins (zero SNR): use a network "
            f"with another prediction, or a schedule that begins below 1."
        )
    return k_x, k_m, time, moves
