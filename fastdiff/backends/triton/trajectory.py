"""A run of sampler steps on a GPU: a step is one call of C++ (``sequence.py``), where it has no rare option. Any other
step, and one that C++ declines, is the backend's ``step``, which makes the same launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...calls import RunCall, StepCall
from ...codes import KEPT_STEPS
from ...philox import Philox
from ..interface import Backend
from ..reference import Trajectory as Any_Trajectory
from . import launch
from .arguments import seed_of
from .sequence import Kept, Launches, Value, native_because
from .step import declines, step, step_launch

_STEP = (
    "x", "m", "row", "noise", "seed", "stream", "sample_offset", "strength", "fast", "guidance", "clip",
    "h1", "h2", "h3", "h4", "guided", "keeps", "feeds", "twice",
)  # fmt: skip
_NOISE = "seed", "stream", "sample_offset", "strength"
_kept = Kept()
_NONE = (None,) * KEPT_STEPS


class Trajectory(Any_Trajectory):
    """See ``reference.Trajectory``."""

    def __init__(self, backend: Backend, call: RunCall):
        super().__init__(backend, call)
        x, guidance, clip, n = call.x, call.guidance, call.clip, call.philox
        common = call.mask is None and call.known is None and not isinstance(guidance, Tensor)
        self._common = common and launch._direct(x.device) and not native_because()
        if not self._common:
            return
        self._rows = self._placed.unbind(0)
        self._numbers = float(guidance), None if clip is None else float(clip)
        self._source = (None, 0, 0.0, False)
        if n is not None:
            seed = n.seed if isinstance(n.seed, Tensor) else seed_of(n.seed, x.device)[0]
            self._source = seed, n.sample_offset, float(n.offset), n.rng == "fast"

    def step(
        self, k: int, m: Tensor, guided: bool = False, noise: Tensor | int | None = None, copies: int = 1,
        want_x0: bool = False, log_variance: Tensor | None = None, threshold: Tensor | None = None,
        row: Tensor | None = None, history: tuple[Tensor, ...] | None = None,
    ) -> None:  # fmt: skip
        """See ``reference.Trajectory.step``."""
        rare = want_x0 or log_variance is not None or threshold is not None or row is not None or history is not None
        if rare or not self._common or launch.are_recorded() or not self._take(k, m, bool(guided), noise, copies):
            super().step(k, m, guided, noise, copies, want_x0, log_variance, threshold, row, history)

    def _take(self, k: int, m: Tensor, guided: bool, noise: Any, copies: int) -> bool:
        """Whether C++ took the step, or has been told how to take such steps."""
        seed, samples, strength, fast = self._source
        if type(noise) is int:
            made = None, seed, noise, samples, strength, fast
        else:
            made = noise, None, 0, 0, 0.0, False
        past = (*self._history[: self.reads[k]], *_NONE)[:KEPT_STEPS]
        twice = copies > 1
        if twice and not guided:
            return False  # the first guided step comes next
        how = guided, bool(self.keeps[k]), twice or bool(copies and self.scales[k] != 1), twice
        given = ("step", self.x, m, self._rows[k], *made, *self._numbers, *past, *how)
        done = _kept.run(*given)
        if done is None:
            done, self._common = self._tell(given)
        if type(done) is not tuple:
            return False
        self.x, entry, seen = done
        self.seen = self.x if seen is None else seen
        if entry is not None:
            self._history = [entry, *self._history[:3]]
        return True

    def _tell(self, given: tuple) -> tuple[tuple | None, bool]:
        """Take a step of a new kind, and tell C++ how: (its results, whether C++ was told). No results: the backend is
        to take it, or to refuse it."""
        values = dict(zip(_STEP, given[1:]))
        x, m, guided = values["x"], values["m"], values["guided"]
        wanted = (2 * len(x) if guided else len(x), *x.shape[1:])
        operands = [values[name] for name in ("noise", "h1", "h2", "h3", "h4") if values[name] is not None]
        if m.shape != wanted or any(type(t) is not Tensor or not t.is_contiguous() for t in (x, m, *operands)):
            return None, False
        if any(t.shape != x.shape for t in operands):
            return None, False
        to = Launches(x.device, ("y", "entry" if values["keeps"] else None, "seen" if values["feeds"] else None))
        to.made["y"] = "x", x.dtype
        if values["keeps"]:
            to.made["entry"] = "x", torch.float32
        if values["feeds"]:
            to.made["seen"] = "m" if values["twice"] else "x", x.dtype
        results = {name: to.make(name, values) for name in to.made}
        call = self._call(values, results.get("seen"))
        if declines(call):
            return None, False
        past = (*call.history, *_NONE)[:KEPT_STEPS]
        made = results["y"], None, results.get("entry"), results.get("seen")
        launched = step_launch(call, (x, call.m, call.uncond, *past, call.noise, None), made)
        names = [name for name in ("x", "h1", "h2", "h3", "h4", *results) if values[name] is not None]
        changing = {name: Value(name) for name in names} | {"m": Value("m")}
        if guided:
            changing |= {"m": Value("m", len(x)), "uncond": Value("m"), "guidance": Value("guidance")}
        changing["table"] = Value("row")
        if values["clip"] is not None:
            changing["clip"] = Value("clip")
        if values["noise"] is not None:
            changing["v"] = Value("noise")
        elif values["seed"] is not None:
            ids = isinstance(values["sample_offset"], Tensor)
            changing |= {name: Value(name) for name in _NOISE if not (ids and name == "sample_offset")}
            changing |= {"ids": Value("sample_offset")} if ids else {}
        to.add(step, launched, changing)
        done, variants = to.run(values)
        return done, _kept.keep(to, ("", *_STEP), given, values, variants)

    def _call(self, values: dict[str, Any], seen: Tensor | None) -> StepCall:
        x, m, noise = values["x"], values["m"], values["noise"]
        uncond, m = (m[: len(x)], m[len(x) :]) if values["guided"] else (None, m)
        if noise is None and values["seed"] is not None:
            rng = "fast" if values["fast"] else "exact"
            noise = Philox(values["seed"], values["sample_offset"], values["stream"], values["strength"], rng)
        past = tuple(values[name] for name in ("h1", "h2", "h3", "h4") if values[name] is not None)
        return StepCall(
            x, m, values["row"], uncond, values["guidance"], values["clip"], past, noise, None, x.dtype, False,
            values["keeps"], model_input=seen,
        )  # fmt: skip
