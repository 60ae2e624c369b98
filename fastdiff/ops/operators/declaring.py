"""How operators are declared, and noise among their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...backends import interface
from ...backends.registry import get
from ...calls import Call, Packed
from ...philox import Philox, seed_tensor

NAMES: list[str] = []  # of the operators
PARTS = 7  # arguments that stand for noise


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
        f"Tensor? {name}, Tensor? {name}_seed, int {name}_stream, SymInt {name}_sample_offset, Tensor? {name}_ids, "
        f"float {name}_offset, str {name}_rng"
    )


def parts(n: Any, device: torch.device) -> tuple:
    """Noise as the arguments of ``noise_arguments``."""
    if n is None or isinstance(n, Tensor):
        return n, None, 0, 0, None, 0.0, "exact"
    return None, seed_tensor(n.seed, device), n.stream, *offset_and_ids(n.sample_offset), n.offset, n.rng


def source(arguments: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """(noise as a record holds it, the arguments behind it) of ``arguments`` that begin with ``parts``."""
    n, seed, stream, sample_offset, ids, offset, rng = arguments[:PARTS]
    if seed is not None:
        n = Philox(seed, sample_offset if ids is None else ids, stream, offset, rng)
    return n, arguments[PARTS:]


# The arguments of an operator that stand for ``Packed``; both None for ordinary data.
PACKED = "Tensor? starts, int? dim"


def packed_of(starts: Tensor | None, dim: int | None) -> Packed | None:
    return None if starts is None else Packed(starts, dim)


def offset_and_ids(sample_offset: int | Tensor) -> tuple[int, Tensor | None]:
    """Which samples noise is of, as two arguments: "SymInt sample_offset, Tensor? ids"."""
    return (0, sample_offset) if isinstance(sample_offset, Tensor) else (sample_offset, None)


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


def affine_gradient(upstream: Tensor, row: Tensor, dtype: torch.dtype, packed: Packed | None = None) -> Tensor:
    row = row if packed is None else packed.spread(row, upstream.shape)
    return (row * upstream.to(row.dtype)).to(dtype)
