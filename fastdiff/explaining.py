"""Which way the calls of an objective go, and why the faster ones do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends.interface import Backend
from .backends.registry import remakes_noise
from .calls import Call, LossCall, NoiseCall
from .coefficients import Traced
from .ops.dispatch import get
from .philox import Philox
from .program import Program


def explain(objective: Any, x0: Tensor | None = None) -> str:
    """See ``Objective.explain``."""
    lines = [
        f"coefficients: {_formula(objective._coefficients.traced)}",
        f"times: {_formula(objective._times())}",
    ]
    if x0 is not None:
        lines += _of_batch(objective, x0)
    return "\n".join(lines)


def _formula(traced: Traced | Program) -> str:
    program = traced if isinstance(traced, Program) else traced.program()
    if program is None:
        return f"evaluated in PyTorch for each batch, as {traced.why}"
    if program.table is not None:
        return f"looked up in a table of {len(program.table)} timesteps"
    count = len(program.code)
    return f"a program of {count} operation{'s' * (count != 1)}, run by the backend"


def _of_batch(objective: Any, x0: Tensor) -> list[str]:
    """How a batch like ``x0`` would be noised, and the loss of a network's output for it computed."""
    backend = get(x0.device)
    dtype = torch.bfloat16 if x0.dtype == torch.uint8 else None
    noised = objective.noise(x0.detach(), seed=0, dtype=dtype)
    n, rows, t = noised.noise_source, noised.rows, noised.t
    fast = "one fast call of the backend {}{}"
    keep = not remakes_noise(x0.device)
    done = None
    if backend.fast is not None and not objective.input_perturbation and t.ndim == 1:
        done = objective._fast_noise(backend.fast, backend, x0, None, None, 0, 0, keep, "exact", dtype)
    call: Call = NoiseCall(x0, Philox(0), rows.alpha, rows.sigma, objective.input_perturbation, None, keep, dtype)
    way = fast.format(backend.name, _slower(backend, objective)) if done is not None else _way(backend, call)
    lines = ["noise: " + way]
    prediction = noised.x_t.detach().requires_grad_()
    done = objective._fast_loss(prediction, x0, n, t, rows)
    p, q, scale, weight, c = objective._rows_of_loss(rows)
    call = LossCall(
        prediction, x0 if p is not None else None, n, p, q, scale, weight, c,
        function=objective.loss_function.function,
    )  # fmt: skip
    way = fast.format(backend.name, _slower(backend, objective)) if done is not None else _way(backend, call)
    return [*lines, "loss: " + way]


def _slower(backend: Backend, objective: Any) -> str:
    """Why the host takes longer than it would for fast calls, in brackets; empty if nothing does."""
    because = backend.fast.declined(objective._program(of_noise=True))
    return f" (launched by Python: {because})" if because else ""


def _way(backend: Backend, call: Call) -> str:
    """The backend that does a call, and why those before it do not."""
    declined = []
    while not (answer := backend.supports(call))[0]:
        declined.append(f"{backend.name} does not: {answer[1]}")
        backend = backend.otherwise
    return "; ".join([f"the operation of the backend {backend.name}", *declined])
