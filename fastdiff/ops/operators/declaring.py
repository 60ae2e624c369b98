"""How operators are declared, and noise among their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...backends import interface
from ...backends.registry import get
from ...calls import Call
from ...philox import Philox, seed_tensor

NAMES: list[str] = []  # of the operators


def declare(name: str, schema: str, fake: Callable) -> Callable:
    """A decorator: it makes a function the operator ``fastdiff::name``, whose results ``fake`` has the shapes of."""
    NAMES.append(name)
    name = f"fastdiff::{name}"
    torch.library.define(name, schema)

    def decorate(implementation: Callable) -> Callable:
        @torch.library.impl(name, "CompositeExplicitAutograd")
        def run(*arguments):
            with torch.no_grad():
                return implementation(*arguments)

        torch.library.register_fake(name, fake)
        return implementation

    return decorate


def run(call: Call, tensor: Tensor) -> Any:
    """The result of ``call``, whose data is on the device of ``tensor``, by the backend that is chosen for it."""
    return interface.run(get(tensor.device), call)


def noise_arguments(name: str) -> str:
    """The arguments of an operator that stand for noise: a tensor, or what a ``Philox`` says, or neither."""
    return (
        f"Tensor? {name}, Tensor? {name}_seed, int {name}_stream, SymInt {name}_sample_offset, float {name}_offset, "
        f"str {name}_rng"
    )


def parts(n: Any, device: torch.device) -> tuple:
    """Noise as the arguments of ``noise_arguments``."""
    if n is None or isinstance(n, Tensor):
        return n, None, 0, 0, 0.0, "exact"
    return None, seed_tensor(n.seed, device), n.stream, n.sample_offset, n.offset, n.rng


def source(n: Tensor | None, seed: Tensor | None, stream: int, sample_offset: int, offset: float, rng: str) -> Any:
    """Noise from its arguments, as a record holds it: the inverse of ``parts``."""
    if seed is None:
        return n
    return Philox(seed, sample_offset, stream, offset, rng)


def strided(result: Tensor, like: Tensor) -> Tensor:
    """``result`` with the strides that the fake implementation promises."""
    promised = torch.empty_like(like, dtype=result.dtype)
    return result if result.stride() == promised.stride() else promised.copy_(result)


def keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep all arguments of an operator for its backward."""
    ctx.arguments = tuple(None if isinstance(a, Tensor) else a for a in inputs)
    ctx.tensors = tuple(k for k, a in enumerate(inputs) if isinstance(a, Tensor))
    ctx.save_for_backward(*(inputs[k] for k in ctx.tensors))


def kept_arguments(ctx: Any) -> list[Any]:
    """The arguments of ``keep_arguments``, in order."""
    arguments = list(ctx.arguments)
    for k, tensor in zip(ctx.tensors, ctx.saved_tensors):
        arguments[k] = tensor
    return arguments


def affine_gradient(upstream: Tensor, row: Tensor, dtype: torch.dtype) -> Tensor:
    return (row * upstream.to(row.dtype)).to(dtype)
