"""The step on a CUDA device, run by ``fastdiff._C``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import modes
from ...calls import StepCall, made_from
from ...philox import Philox
from ...torch_access import _C, unavailable_because
from ..devices import Trial
from ..interface import Backend, differentiable
from ..native.launch import memory

if _C is not None:
    unavailable_because = "" if _C.cuda_architectures() else "fastdiff was built without nvcc"
if torch.version.hip is not None:
    unavailable_because = "this PyTorch is for ROCm"
built = not unavailable_because

NO_DEVICE = "PyTorch finds no CUDA device"
DATA = frozenset((torch.float32, torch.bfloat16, torch.float16))
MASKS = DATA | {torch.bool}
MOST = 2**32 - 256  # elements: one thread each at worst
_Parameter = torch.nn.Parameter
_is_compiling, wrapping = torch.compiler.is_compiling, modes.wrapping


def on_device(tensor: Tensor) -> bool:
    return tensor.is_cuda


def ordinal(tensor: Tensor) -> int:
    return tensor.get_device()


def queue(device: int) -> int:
    """The handle of PyTorch's current stream on ``device``."""
    return torch._C._cuda_getCurrentRawStream(device)


def _load(device: torch.device) -> None:
    if not torch.cuda.is_available():
        raise RuntimeError(NO_DEVICE)
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


def made_in_kernel(noise: Philox) -> bool:
    """Whether the kernel makes this noise: it adds no offset noise, and counts the samples itself."""
    return not noise.offset and type(noise.sample_offset) is int


def settled(noise: Any, x: Tensor, maker: Backend) -> Any:
    """``noise`` in one of the forms that ``source`` takes: others are made into tensors first."""
    if noise is None or isinstance(noise, Tensor):
        return noise if noise is None else noise.contiguous()
    return noise if made_in_kernel(noise) else maker.materialize(noise, x.shape, x.device)


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


def declines(call: StepCall) -> str:
    """Why this step is not done here; empty where it is."""
    x, guidance, row, mask, seen = call.x, call.guidance, call.row, call.mask, call.model_input
    rows, data = (guidance, row, call.threshold), call.data
    if not built:
        return unavailable_because
    if not plain(*rows, *data, mask, seen, *made_from(call.noise), *made_from(call.known_noise)):
        return "what is no plain tensor on the device"
    if differentiable(*rows, *data, mask):
        return "gradients of a step"
    if call.dtype not in (None, x.dtype):
        return "results in another dtype than x's"
    if row.dtype != torch.float32 or not of_data(*data, seen) or (mask is not None and mask.dtype not in MASKS):
        return "another dtype than float32, bfloat16 and float16"
    if not (one_or_each(guidance, x) and one_or_each(call.threshold, x)):
        return "guidance or a threshold by frame or token"
    if not 0 < x.numel() < MOST or x.ndim == 0:
        return "no elements, or more than 2^32"
    if seen is not None and not seen.is_contiguous():
        return "a model_input that is not contiguous"
    return unfit_because(x.device)


def run(call: StepCall, backend: Backend) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See ``StepCall``."""
    x, m, table, uncond, guidance, clip, history, noise, log_variance = call[:9]
    threshold, mask, known, known_noise, model_input = call[-5:]
    dtype = x.dtype
    device, samples = ordinal(x), x.shape[0]
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    x0 = torch.empty(x.shape, dtype=dtype, device=x.device) if call.want_x0 else None
    entry = torch.empty(x.shape, dtype=torch.float32, device=x.device) if call.want_entry else None
    # Whatever is pointed at must be held until the launch.
    held = [t if t is None else t.contiguous() for t in (x, m, uncond, table, log_variance, known, threshold)]
    entries = [t.contiguous() for t in history]
    noise, known_noise = settled(noise, x, backend.otherwise), settled(known_noise, x, backend.otherwise)
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
