"""The step on a CUDA device: the arguments of the reference's, run by ``fastdiff._C``."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ... import modes
from ...torch_access import _C, unavailable_because
from ..devices import Trial
from ..native.launch import memory

if _C is not None:
    unavailable_because = "" if _C.cuda_architectures() else "fastdiff was built without nvcc"
if torch.version.hip is not None:
    unavailable_because = "this PyTorch is for ROCm"
built = not unavailable_because

DATA = frozenset((torch.float32, torch.bfloat16, torch.float16))
MASKS = DATA | {torch.bool}
MOST = 2**32 - 256  # elements: one thread each at worst
_Parameter = torch.nn.Parameter
_is_compiling, wrapping = torch.compiler.is_compiling, modes.wrapping


def description() -> str:
    """What runs, for ``fastdiff doctor``."""
    names = ", ".join(f"{number // 10}.{number % 10}" for number in _C.cuda_architectures())
    return f"CUDA, the sampler step, for compute capability {names} and what runs their code"


def no_device_because() -> str:
    """Why it cannot run on this machine; empty if it can. It looks for a device, which initialises CUDA."""
    return "" if torch.cuda.is_available() else "PyTorch finds no CUDA device"


def elsewhere() -> ModuleType:
    """The backend for what is not here."""
    from ..registry import _MODULES

    triton = _MODULES.get("triton")
    return triton if triton is not None and triton.available else _MODULES["reference"]


def on_device(tensor: Tensor) -> bool:
    return tensor.is_cuda


def ordinal(tensor: Tensor) -> int:
    return tensor.get_device()


def queue(device: int) -> int:
    """The handle of PyTorch's current stream on ``device``."""
    return torch._C._cuda_getCurrentRawStream(device)


def _load(device: torch.device) -> None:
    if not torch.cuda.is_available():
        raise RuntimeError(no_device_because())
    _C.cuda_load(device.index)


# Why the kernel cannot run on a device: it has no code for it, or the driver is too old. Where it can, it is loaded, as
# a launch into a graph that is being captured could not.
unfit_because = Trial(_load)


def plain(*tensors: Any) -> bool:
    """Whether all tensors have memory to point at on a CUDA device: none is traced, wrapped or a subclass. What is no
    tensor is passed over."""
    if _is_compiling() or wrapping() is not None:
        return False
    for tensor in tensors:
        kind = type(tensor)
        if kind is Tensor or kind is _Parameter:
            if not on_device(tensor):
                return False
        elif isinstance(tensor, Tensor):
            return False
    return True


def differentiable(*tensors: Any) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                return True
    return False


def of_data(*tensors: Any) -> bool:
    """Whether what is a tensor has a dtype that the kernel reads."""
    return all(tensor.dtype in DATA for tensor in tensors if isinstance(tensor, Tensor))


def one_or_each(numbers: Any, x: Tensor) -> bool:
    """Whether rows, as ``place_rows`` leaves them, are one number or one a sample."""
    return not isinstance(numbers, Tensor) or (
        numbers.dtype == torch.float32 and (numbers.numel() == 1 or numbers.numel() == x.shape[0] == numbers.shape[0])
    )


def numbers(value: Any) -> Any:
    """A number, or contiguous memory."""
    return memory(value) if isinstance(value, Tensor) else float(value)


def source(noise: Any, streams: Tensor | None = None) -> Any:
    """Noise, a tensor or a ``Philox``, as the kernel takes it."""
    if noise is None or isinstance(noise, Tensor):
        return memory(noise)
    seed = noise.seed
    key = memory(seed) if isinstance(seed, Tensor) else int(seed)
    return key, noise.stream if streams is None else memory(streams), noise.sample_offset, 0.0


def settled(noise: Any, x: Tensor) -> Any:
    """``noise`` in one of the forms that ``source`` takes: offset noise is made into a tensor first."""
    if noise is None or isinstance(noise, Tensor):
        return noise if noise is None else noise.contiguous()
    return noise.tensor(x.shape, x.device) if noise.offset else noise


def repeated(mask: Tensor | None, x: Tensor) -> tuple[Tensor | None, int, int]:
    """(mask in memory, elements after which it repeats within a sample, elements from one sample to the next)."""
    if mask is None:
        return None, 1, 0
    shape = (1,) * (x.ndim - mask.ndim) + tuple(mask.shape)
    first = 1
    while first < x.ndim - 1 and shape[first] == 1 != x.shape[first]:
        first += 1
    kept = mask.reshape(shape)[(slice(None), *(0,) * (first - 1))]
    kept = kept.expand((shape[0], *x.shape[first:])).contiguous()
    inner = kept[0].numel()
    return kept, inner, inner if shape[0] > 1 else 0


def of_mask(mask: tuple[Tensor | None, int, int]) -> tuple | None:
    return None if mask[0] is None else (*memory(mask[0]), mask[1], mask[2])


def step(
    x: Tensor,
    m: Tensor,
    uncond: Tensor | None,
    guidance: Tensor | float,
    table: Tensor,
    clip: float | None,
    history: tuple[Tensor, ...],
    noise: Any,
    log_variance: Tensor | None,
    dtype: torch.dtype,
    wanted: tuple[bool, bool],
    *,
    threshold: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    known_noise: Any = None,
    model_input: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As ``reference.step``."""
    rows = (guidance, table, threshold)
    data = (x, m, uncond, *history, noise, log_variance, known, known_noise)
    if (
        not built
        or not plain(*rows, *data, mask, model_input, getattr(noise, "seed", None), getattr(known_noise, "seed", None))
        or differentiable(*rows, *data, mask)
        or dtype != x.dtype
        or table.dtype != torch.float32
        or not of_data(*data, model_input)
        or (mask is not None and mask.dtype not in MASKS)
        or not (one_or_each(guidance, x) and one_or_each(threshold, x))
        or not 0 < x.numel() < MOST
        or x.ndim == 0
        or (model_input is not None and not model_input.is_contiguous())
        or unfit_because(x.device)
    ):
        return elsewhere().step(
            x, m, uncond, guidance, table, clip, history, noise, log_variance, dtype, wanted, threshold=threshold,
            mask=mask, known=known, known_noise=known_noise, model_input=model_input,
        )  # fmt: skip
    device, samples = ordinal(x), x.shape[0]
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    x0 = torch.empty(x.shape, dtype=dtype, device=x.device) if wanted[0] else None
    entry = torch.empty(x.shape, dtype=torch.float32, device=x.device) if wanted[1] else None
    # Whatever is pointed at must be held until the launch.
    held = [t if t is None else t.contiguous() for t in (x, m, uncond, table, log_variance, known, threshold)]
    entries = [t.contiguous() for t in history]
    noise, known_noise = settled(noise, x), settled(known_noise, x)
    scale = guidance.contiguous() if isinstance(guidance, Tensor) else guidance
    masked = repeated(mask, x)
    _C.cuda_step(
        device,
        queue(device),
        (samples, x.numel() // samples),
        memory(held[3]),
        None,
        None,
        memory(held[0]),
        memory(held[1]),
        memory(held[2]),
        numbers(scale),
        clip,
        None if threshold is None else numbers(held[6]),
        tuple(memory(t) for t in entries),
        False,
        source(noise),
        memory(held[4]),
        of_mask(masked),
        memory(held[5]),
        source(known_noise),
        memory(y),
        memory(x0),
        memory(entry),
        memory(model_input),
    )
    if not x.is_contiguous():  # a channels_last network gets a channels_last x
        y, x0, entry = (t if t is None else torch.empty_like(x, dtype=t.dtype).copy_(t) for t in (y, x0, entry))
    return y, x0, entry
