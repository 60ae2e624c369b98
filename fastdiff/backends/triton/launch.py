"""From tensors and sizes to a running kernel: one compilation a variant, then a launch that costs few microseconds.

``triton.jit``'s own call inspects every argument every time. Here the caller knows what distinguishes two variants: the
dtypes of the pointers, whether the data is aligned, the constants and the device. That is the key; the integers are
arguments of a fixed type, never specialised on. Other versions of Triton than 3.6, AMD and Intel go through
``triton.jit``, which then makes the same variants. A kernel must have run once before a CUDA graph captures it.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ... import philox
from ..devices import is_capturing
from .functions import error
from .traffic import Launch

INTERPRETED = not isinstance(error, triton.runtime.JITFunction)
# The versions whose compiled kernels are known to be called as ``_Direct`` does; others go through triton.jit.
_DIRECT_VERSIONS = ("3.6",)

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_INT64 = {"seed", "xi_seed", "stream", "xi_stream", "sample_offset", "xi_sample_offset"} | {
    *("first", "t1", "t2", "t3", "t4"),
}
_FLOATS = {"strength", "xi_strength", "gamma", "size", "size_low", "mean", "both", "clip", "guidance", "least"} | {
    *("most", "mse", "l1", "smooth_l1", "pseudo_huber", "log_cosh", "c_smooth_l1", "c_pseudo_huber"),
}
# Sizes, counts and strides; with the two above, what is never a tensor.
_NUMBERS = {"steps", "stride", "units", "runs", "blocks", "per", "frames", "shared", "sample_runs", "channel_runs"} | {
    *("m1", "m2", "m3", "s0", "s1", "s2", "s3", "s4", "rows", "parts", "number", "width", "total", "each", "averaged"),
    *("c_size", "c_factor", "c_shift", "h_size", "h_factor", "h_shift", "w_size", "w_factor", "w_shift"),
}  # fmt: skip
_SEEDS = {"seed", "xi_seed"}  # a tensor, or a number
# Full-size data, which is loaded by vectors where it is aligned to 16 bytes.
_DATA = {"out", "kept", "u", "v", "xi", "prediction", "x0", "n", "gradient", "x", "m", "y", "entry", "log_variance"} | {
    "target", "uncond", "h1", "h2", "h3", "h4", "x0_out", "seen", "mask", "d_u", "d_v",
    *("moments", "z", "x_t", "d_z", "d_x_t", "errors", "d_errors"),
}  # fmt: skip

_records: list[Launch] | None = None


@contextlib.contextmanager
def launches() -> Iterator[list[Launch]]:
    """Collects the kernels that are launched in the block, in order: their names, and what they move."""
    global _records
    before, _records = _records, []
    try:
        yield _records
    finally:
        _records = before


class Kernel:
    """Decorator: a kernel function and its variants. Constants come last."""

    def __init__(self, written: Any):
        names = list(inspect.signature(written).parameters)
        constant = {name for name, kind in written.__annotations__.items() if "constexpr" in str(kind)}
        # ``triton.jit`` too is to tell variants apart by the alignment of full-size data, but not by numbers.
        written.__annotations__ |= {name: "int64" for name in names if name in _INT64 - _SEEDS}
        self.runtime = [name for name in names if name not in constant]
        self.function = triton.jit(written, do_not_specialize=[name for name in self.runtime if name not in _DATA])
        self.name: str = written.__name__
        self.constants = [name for name in names if name in constant]
        assert names == self.runtime + self.constants, "constants come last"
        self.data = [k for k, name in enumerate(self.runtime) if name in _DATA]
        numbers = (_NUMBERS | _INT64 | _FLOATS) - _SEEDS
        others = [k for k, name in enumerate(self.runtime) if name not in numbers]
        self._vectors = [k for k in others if k in self.data]
        self._scalars = [k for k in others if k not in self.data]
        self.wide = self.constants.index("WIDE") if "WIDE" in self.constants else None
        self._variants: dict[tuple, Any] = {}

    def key(self, arguments: tuple, constants: tuple, device: Any) -> tuple:
        """The key of a variant: the dtype of every pointer (None for no tensor, int for a number), whether all data is
        aligned, the constants and the device."""
        types = tuple(a.dtype if isinstance(a, Tensor) else None if a is None else int for a in arguments)
        aligned = all(arguments[k] is None or arguments[k].data_ptr() % 16 == 0 for k in self.data)
        return types, aligned, constants, device

    def source(self, types: tuple, aligned: bool, constants: tuple) -> ASTSource:
        """The source that is compiled for a key."""
        signature, attributes = self._signature(types, constants), {}
        values = dict(zip(((len(self.runtime) + k,) for k in range(len(constants))), constants))
        for k, kind in enumerate(types):
            if kind is None:
                values[(k,)] = None
            elif kind is not int and aligned and k in self.data:
                attributes[(k,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(self.constants, "constexpr")
        return ASTSource(fn=self.function, signature=signature, constexprs=values, attrs=attributes)

    def _signature(self, types: tuple, constants: tuple) -> dict[str, str]:
        """What Triton is told that each argument is."""
        number = "i64" if self.wide is not None and constants[self.wide] else "i32"
        signature = {}
        for name, kind in zip(self.runtime, types):
            if kind is None:
                signature[name] = "constexpr"
            elif kind is int:
                signature[name] = "i64" if name in _INT64 else "fp32" if name in _FLOATS else number
            else:
                signature[name] = POINTERS[kind]
        return signature

    def layout(self, types: tuple, constants: tuple) -> list[str | None]:
        """What each argument is packed as: see ``_Direct``."""
        packed = {"constexpr": None, "i64": "q", "i32": "i", "fp32": "f"}
        return [packed.get(kind, "Q") for kind in self._signature(types, constants).values()]

    def options(self, constants: tuple) -> dict[str, Any]:
        """How a variant is compiled. Only where no bits are promised may products and sums be contracted: where noise
        is made with the fast transform, and in losses. There the exact noise keeps its bits all the same: its only
        product that a sum takes in is an instruction of NVIDIA's that is not contracted."""
        named = dict(zip(self.constants, constants))
        noise = named.get("N", named.get("V"))
        kept = noise != "exact" or (named["ASM"] and not named.get("OFFSET"))
        contracted = noise == "fast" or (self.name in ("loss", "gaussian_kl", "kl_normal") and kept)
        return {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": contracted}

    def compile(self, key: tuple, target: GPUTarget) -> Any:
        """The compiled kernel of a key for any target; no GPU is needed."""
        return triton.compile(self.source(*key[:3]), target=target, options=self.options(key[2]))

    def __call__(
        self, device: torch.device, grid: tuple[int, int], arguments: tuple, constants: tuple
    ) -> _Direct | None:
        """Launch on the current stream of ``device``. Returns the compiled variant where it is called without
        ``triton.jit``."""
        if _records is not None:
            names = *self.runtime, *self.constants
            _records.append(Launch.of(self.name, dict(zip(names, (*arguments, *constants)))))
        if not _direct(device):
            with _on(device), _unseen():
                self.function[grid](*arguments, *constants, **self.options(constants))
            return None
        values, types, aligned = self._looked_at(arguments)
        short = (*types, aligned, device.index, constants)
        variant = self._variants.get(short)
        if variant is None or not is_current(device):
            with _on(device):
                if variant is None:
                    key = self.key(arguments, constants, device.index)
                    variant = self._variants[short] = self._loaded(device, key)
                    if self.of_capture(key) is not None:
                        unprepared.append((self, device, short, key))
                variant(grid, device, values, constants)
        else:
            variant(grid, device, values, constants)
        if unprepared:
            prepare_captures()
        return variant

    def _looked_at(self, arguments: tuple) -> tuple[list, list, bool]:
        """(the arguments as the kernel gets them, what tells variants apart as ``key`` does, from as few looks as there
        can be, and whether all data is aligned)."""
        values, types, bits = list(arguments), [], 0
        for k in self._vectors:
            a = arguments[k]
            if a is None:
                types.append(None)
            else:
                values[k] = pointer = a.data_ptr()
                bits |= pointer
                types.append(a.dtype)
        for k in self._scalars:
            a = arguments[k]
            if isinstance(a, Tensor):
                values[k] = a.data_ptr()
                types.append(a.dtype)
            else:
                types.append(a is None)
        return values, types, bits % 16 == 0

    def of_capture(self, key: tuple) -> tuple | None:
        """The key of the variant that takes from the device what seeds are numbers in ``key``; None without such."""
        types, aligned, constants, device = key
        types, constants = list(types), list(constants)
        for name in _SEEDS.intersection(self.runtime):
            k = self.runtime.index(name)
            if types[k] is int:
                types[k], constants[self.constants.index(name.upper())] = torch.int64, "tensor"
        return None if tuple(types) == key[0] else (tuple(types), aligned, tuple(constants), device)

    def _prepare_capture(self, device: torch.device, short: tuple, key: tuple) -> None:
        """Load the variant ``of_capture(key)``, which is found by ``short`` but for the seeds."""
        types, _, constants, _ = wanted = self.of_capture(key)
        found = list(short)
        for place, k in enumerate((*self._vectors, *self._scalars)):
            if types[k] is not key[0][k]:
                found[place] = types[k]
        found[-1] = constants
        if tuple(found) not in self._variants:
            self._variants[tuple(found)] = self._loaded(device, wanted)

    def _loaded(self, device: torch.device, key: tuple) -> _Direct:
        """The kernel of a key, compiled and loaded on ``device``, which is current."""
        capturing = is_capturing(device)
        try:
            compiled = self.compile(key, triton.runtime.driver.active.get_current_target())
            return _Direct(compiled, self.layout(key[0], key[2]))
        except Exception as error:
            if not capturing:
                raise
            raise RuntimeError(
                f"the kernel {self.name!r} could not be loaded while a CUDA graph is captured: run what is captured "
                "once before, with tensors of the same shapes and dtypes."
            ) from error


class _Direct:
    """A compiled kernel, called with pointers and numbers, without looking at them again. No launch metadata, and no
    hooks on entry or exit.

    Attributes:
        layout: what each argument is packed as, as in ``struct``; None for one that is no parameter.
        function, threads, shared: the driver's handle, the size of a block, and its bytes of shared memory; where
        unknown: why these do not say all of a launch, if they do not; otherwise empty.
    """

    def __init__(self, compiled: Any, layout: Sequence[str | None]):
        run = compiled.run  # loads the binary, so it comes first
        self.layout = layout
        self.unknown = _unknown_because(compiled, run, layout)
        if not self.unknown:
            warps, _, self.shared = compiled.packed_metadata
            self.function, self.threads = compiled.function, 32 * warps
        function, metadata = compiled.function, compiled.packed_metadata
        sizes = getattr(run, "global_scratch_size", None), getattr(run, "profile_scratch_size", None)
        if sizes == (0, 0):  # what Triton's launcher would do before its own function is to allocate these
            self._launch = run.launch
            self._head = (function, run.launch_cooperative_grid, run.launch_pdl, None, None, metadata, *(None,) * 3)
        else:
            self._launch, self._head = run, (function, metadata, *(None,) * 3)

    def __call__(self, grid: tuple[int, int], device: torch.device, values: list, constants: tuple) -> None:
        self._launch(*grid, 1, _stream(device), *self._head, *values, *constants)


# Variants that take seeds as numbers: (kernel, device, what it is found by, key).
unprepared: list[tuple[Kernel, torch.device, tuple, tuple]] = []


def prepare_captures() -> None:
    """Where seeds are drawn on the host, load for each variant that took one the variant that takes it from the device:
    there seeds are drawn while a CUDA graph is captured, when nothing can be loaded."""
    while unprepared and philox.draws_on_host() and not is_capturing(unprepared[-1][1]):
        kernel, device, short, key = unprepared.pop()
        with _on(device):
            kernel._prepare_capture(device, short, key)


_SIZES = {"u64": 8, "s64": 8, "b64": 8, "u32": 4, "s32": 4, "b32": 4, "f32": 4}  # of PTX


def _unknown_because(compiled: Any, run: Any, layout: Sequence[str | None]) -> str:
    """Why a launch of a compiled kernel is more than its function, a grid of blocks and these parameters, with two null
    pointers for scratch memory behind them; empty if it is not."""
    try:
        _, ctas, _ = compiled.packed_metadata
        ordinary = run.global_scratch_size, run.profile_scratch_size, run.launch_cooperative_grid, run.launch_pdl
        declared = re.findall(r"\.param\s+\.(\w+)", compiled.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0])
        found = [_SIZES[kind] for kind in declared]
    except Exception as error:
        return f"a kernel is not described as Triton 3.6 does it ({type(error).__name__}: {error})"
    if ctas != 1 or any(ordinary):
        return "a kernel takes clusters, scratch memory or a cooperative launch"
    if found != [struct.calcsize(kind) for kind in (*layout, "Q", "Q") if kind is not None]:
        return "a kernel takes other parameters than its signature says"
    return ""


_NVIDIA = torch.version.hip is None
_KNOWN = triton.__version__.startswith(tuple(f"{version}." for version in _DIRECT_VERSIONS))


def _direct(device: torch.device) -> bool:
    return _KNOWN and _NVIDIA and device.type == "cuda" and not INTERPRETED


def has_approximate_instructions(device: torch.device) -> bool:
    """Whether the fast transform may use NVIDIA's instructions for log, sqrt, sin and cos."""
    return _NVIDIA and device.type == "cuda" and not INTERPRETED


_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)  # of CUDA that is initialised


def is_current(device: torch.device) -> bool:
    """Whether a CUDA device is the current one."""
    return device.type != "cuda" or device.index == _current_device()


def are_recorded() -> bool:
    """Whether launches are collected (``launches``)."""
    return _records is not None


def _on(device: torch.device) -> Any:
    if device.type == "cuda" and device.index != _current_device():
        return torch.cuda.device(device)
    if device.type == "xpu" and device.index != torch.xpu.current_device():
        return torch.xpu.device(device)
    return contextlib.nullcontext()


def _unseen() -> Any:
    """The interpreter works on copies of tensors: no dispatch mode sees those, as none would on a GPU."""
    return _disable_current_modes() if INTERPRETED else contextlib.nullcontext()


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)


def current_stream(device: torch.device) -> int:
    """A number for the current stream of a device."""
    if device.type == "cuda":
        return _stream(device)
    return torch.xpu.current_stream(device).stream_id if device.type == "xpu" else 0
