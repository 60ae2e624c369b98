"""What is moved and kept: bytes, launches and peak memory, counted on the calls themselves.

Eager code is traced operation by operation, of compiled code the generated source is read, and our kernels are recorded
where they are launched. docs/performance.md says what each count takes in.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..backends.layout import stored_elements
from ..recycling import release_memory
from .cases import DTYPES, Case, Operands


@dataclass(frozen=True)
class Count:
    """Bytes read and written by so many launches, and how that is known."""

    bytes: int
    launches: int | None
    by: str


def floor_bytes(case: Case) -> int:
    """What must be moved at the least: every input read once, every result written once, no noise stored."""
    reads_x0 = case.kind != "epsilon"
    if case.operation == "noising images":
        return case.elements + 2 * case.tensor_bytes  # bytes, noise; x_t
    tensors = {
        "noising": 3,  # x0, noise; x_t
        "loss": 2 + reads_x0,  # prediction, noise, and x0 where the target needs it
        "loss+gradient": 3 + reads_x0,
        "loss and gradient": 3 + reads_x0,
        "hybrid loss": 5,  # both halves of the output, noise; the gradient's halves (x0 only where t is 0)
        "latents": 4,  # both halves of the moments; z, x_t
        "divergence+gradient": 4,  # both halves of the moments, and of their gradient
        "training step": 4 + reads_x0,  # x0; x_t, and with the network between, prediction, x0; its gradient
        "sampler step": 3 if case.kind == "flow" else 4,  # x, model output, noise; x
        "sampler step+noise": 3,
        "row moments": 2,
        "noising+loss of tokens": 6 + reads_x0,  # x0, noise; x_t; prediction, noise and x0; its gradient
    }[case.operation]
    return tensors * case.tensor_bytes


# ---- eager: a trace of the operations that are dispatched

_NO_TRAFFIC = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"} | {
    "_local_scalar_dense"  # one number, for the host
}
_WRITE_ONLY = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"}
_LIKE = {"randn_like", "rand_like", "randint_like", "zeros_like", "ones_like", "full_like"}  # read only the shape
_GATHERS = {"index", "index_select", "gather", "embedding"}


class Trace(TorchDispatchMode):
    """Records (operation, bytes read, bytes written) of every dispatched operation that touches memory.

    An operation reads each tensor it is given and writes each it returns, once; a broadcast tensor counts as what it
    stores, a gather reads as much as it returns, and views move nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = func._schema
        name = schema.name.split("::")[-1]
        aliases = [value.alias_info for value in schema.returns]
        is_view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
        if is_view or name in _NO_TRAFFIC:
            return result
        written_in_place = [
            value
            for argument, value in _bound(schema, args, kwargs)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor)
        ]
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        only_written = name in _WRITE_ONLY or "out" in kwargs
        if only_written:
            inputs = [value for value in inputs if not any(value is written for written in written_in_place)]
        if name in _LIKE:
            inputs = []
        outputs = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        outputs = written_in_place or outputs
        read = sum(stored_bytes(value) for value in inputs)
        written = sum(stored_bytes(value) for value in outputs)
        if name in _GATHERS:
            read = written + sum(stored_bytes(value) for value in inputs[1:])
        self.records.append((name, read, written))
        return result


def _bound(schema: Any, args: tuple, kwargs: dict) -> Iterator[tuple[Any, Any]]:
    for position, argument in enumerate(schema.arguments):
        if position < len(args):
            yield argument, args[position]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements of a tensor."""
    return stored_elements(tensor) * tensor.element_size()


def trace(call: Callable[[], Any]) -> Count:
    """Count a call by tracing it."""
    with Trace() as records:
        call()
    moved = sum(read + written for _, read, written in records.records)
    return Count(moved, len(records.records), "dispatch trace")


# ---- torch.compile: the buffers of the generated code


class Generated:
    """Collects the source that torch.compile generates inside the ``with``, also where it comes from its cache."""

    def __init__(self) -> None:
        self.sources: list[str] = []

    def __enter__(self) -> Generated:
        try:
            lowering = importlib.import_module("torch._inductor.graph").GraphLowering
            self._patch = mock.patch.object(lowering, "save_output_code", self._save)
            self._patch.start()
        except (ImportError, AttributeError):  # another PyTorch: no count, the times are there all the same
            self._patch = None
        return self

    def _save(self, source: str) -> None:
        if source not in self.sources:
            self.sources.append(source)

    def __exit__(self, *_: object) -> None:
        if self._patch is not None:
            self._patch.stop()


def generated(sources: list[str]) -> Count | None:
    """Bytes of the buffers that the kernels of generated code are given, each counted once a kernel, twice where it is
    both read and written. None where there is no source."""
    if not sources:
        return None
    moved = launches = 0
    for source in sources:
        sizes = _buffer_sizes(source)
        directions = _kernel_directions(source)
        for name, arguments in _kernel_calls(source):
            launches += 1
            for position, argument in enumerate(arguments):
                size = sizes.get(argument, 0)
                known = directions.get(name, [])
                moved += size * (2 if position < len(known) and known[position] == "in_out" else 1)
    return Count(moved, launches, "generated code")


_ITEM = {f"torch.{str(dtype).removeprefix('torch.')}": dtype.itemsize for dtype in DTYPES.values()} | {
    "torch.float64": 8,
    "torch.int64": 8,
    "torch.int32": 4,
    "torch.int16": 2,
    "torch.int8": 1,
    "torch.uint8": 1,
    "torch.bool": 1,
}
_ALLOCATION = re.compile(
    r"^\s*(\w+) = (?:empty_strided\w*|rand_strided)\(\(([^)]*)\), \(([^)]*)\), .*?(torch\.\w+)\)", re.M
)
_ALIAS = re.compile(r"^\s*(\w+) = (?:reinterpret_tensor\()?(\w+)[;,]", re.M)


def _buffer_sizes(source: str) -> dict[str, int]:
    """Bytes of every named buffer: those allocated, the inputs (named in the benchmark part), and renamed ones."""
    sizes: dict[str, int] = {}
    for name, shape, stride, dtype in _ALLOCATION.findall(source):
        elements = 1
        for size, step in zip(_numbers(shape), _numbers(stride)):
            elements *= size if step else 1
        sizes[name] = elements * _ITEM.get(dtype, 4)
    for name, original in _ALIAS.findall(source):
        if original in sizes:
            sizes.setdefault(name, sizes[original])
    return sizes


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"-?\d+", text)]


def _kernel_directions(source: str) -> dict[str, list[str]]:
    """For each kernel "in", "out" or "in_out" of its pointers, in order."""
    found = {}
    for name, parameters in re.findall(
        r"^(\w+) = async_compile\.\w+\(.*?(?:void\s+kernel|def \w+)\(([^)]*)\)", source, re.M | re.S
    ):
        pointers = re.findall(r"\b(in_out|in|out)_ptr\d+", parameters)
        found[name] = pointers
    return found


def _kernel_calls(source: str) -> Iterator[tuple[str, list[str]]]:
    kernels = set(re.findall(r"^(\w+) = async_compile\.", source, re.M))
    for line in source.split("def call(", 1)[-1].splitlines():
        line = line.strip()
        match = re.match(r"(\w+)(?:\.run)?\((.*)\)$", line)
        if match and match[1] in kernels:
            # A view of a buffer is passed as reinterpret_tensor(buf0, ...): it is that buffer.
            text = re.sub(r"reinterpret_tensor\((\w+),[^()]*(?:\([^()]*\)[^()]*)*\)", r"\1", match[2])
            yield match[1], [argument.strip() for argument in text.split(",")]
        elif (match := re.match(r"(?:extern_kernels|aten|torch\.ops\.aten)\.([\w.]+)\((.*)\)$", line)) is not None:
            yield match[1], re.findall(r"\b(?:buf|arg|primals_|tangents_)\w*", match[2])


# ---- ours


def recorded(call: Callable[[], Any]) -> Count | None:
    """Count a call with the launch recorder of the Triton backend, and PyTorch's operations around those launches by
    tracing them; None where there is no recorder, or nothing is launched."""
    try:
        launches = importlib.import_module("fastdiff.backends.triton.launch").launches
    except ImportError:
        return None
    with launches() as records:
        others = trace(call)
    if not records:
        return None
    moved = others.bytes + sum(record.bytes for record in records)
    return Count(moved, len(records) + (others.launches or 0), "launch recorder")


def profiled_launches(call: Callable[[], Any], device: torch.device) -> int | None:
    """How many kernels, copies and fills of memory a call has a GPU do, by PyTorch's profiler; None where it sees
    none."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize(device)
        events = profiler.profiler.kineto_results.events()
    except (AttributeError, RuntimeError):
        return None
    return sum(event.device_type() == torch.autograd.DeviceType.CUDA for event in events) or None


def known_operands(case: Case, operands: Operands, result: Any) -> Count:
    """The tensors that one pass of ours reads and writes, from the tensors themselves. ``result`` is what the call
    returned: whether and how noise was kept is seen there."""
    o, reads_x0 = operands, case.kind != "epsilon"
    x0 = o.x0.nbytes if reads_x0 else 0
    gradient = o.prediction.grad.nbytes if o.prediction.grad is not None else 0
    if case.operation == "noising":
        moved = o.x0.nbytes + o.noise.nbytes + result.nbytes
    elif case.operation == "loss":
        moved = o.prediction.nbytes + o.noise.nbytes + x0
    elif case.operation == "loss+gradient":
        moved = o.prediction.nbytes + o.noise.nbytes + x0 + gradient
    elif case.operation == "loss and gradient":
        moved = o.prediction.nbytes + o.noise.nbytes + x0 + result[1].nbytes
    elif case.operation == "hybrid loss":
        moved = o.output.nbytes + o.noise.nbytes + o.output.grad.nbytes
    elif case.operation == "latents":
        kept = result.noise_source.nbytes if isinstance(result.noise_source, Tensor) else 0
        moved = o.output.nbytes + result.x0.nbytes + result.x_t.nbytes + kept
    elif case.operation == "divergence+gradient":
        moved = o.output.nbytes + o.output.grad.nbytes
    elif case.operation == "noising images":
        moved = o.images.nbytes + o.noise.nbytes + result.nbytes
    elif case.operation == "noising+loss of tokens":
        moved = o.x0.nbytes + x0 + 2 * o.noise.nbytes + result[0].nbytes + o.tokens.nbytes + o.tokens.grad.nbytes
    elif case.operation == "row moments":
        moved = o.x0.nbytes + o.prediction.nbytes
    elif case.operation == "training step":
        noised = result[0]
        kept = noised.noise_source.nbytes if isinstance(noised.noise_source, Tensor) else 0
        moved = o.x0.nbytes + noised.x_t.nbytes + kept  # noising
        moved += o.prediction.nbytes + kept + x0 + gradient  # loss
    else:
        given = o.noise.nbytes if case.operation == "sampler step" and case.kind != "flow" else 0
        moved = o.x0.nbytes + o.prediction.nbytes + given + result.nbytes
    return Count(moved, None, "known operands")


# ---- memory


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes allocated during a call at its peak, above what was allocated before. None where it can't be known."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del result
        return peak
    if device.type != "cpu":
        return None
    from torch.profiler import ProfilerActivity, profile

    release_memory()  # what comes from kept memory is not allocated
    try:
        with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = call()
        del result
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    except (AttributeError, RuntimeError):
        return None
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler of some builds writes a line to the terminal at its start and end."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
