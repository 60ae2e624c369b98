"""Sequences of launches that are repeated with other tensors and numbers of the same kind: what a fast call does.

A sequence is made once for a shape. Python can run it: it takes memory for what is made, and hands every launch to its
kernel. Where the compiled kernels are known well enough, C++ is told the sequence (``Kept.keep``): where in the packed
parameters of each kernel the values go that change. Then a call is one function of csrc/gpu_launch.cpp, which finds the
sequence by the kinds of its arguments. It declines while a CUDA graph is captured, on another device than the
sequence's, and for data that is not aligned; then Python makes the same launches.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...torch_access import _C, never
from ..devices import is_capturing
from .launch import Kernel, are_recorded, is_current

_MOST_KEPT = 256


class Value(NamedTuple):
    """Stands in a launch for what changes from call to call: an argument of the call, or what the sequence makes.

    Attributes:
        name: of the value.
        row: which row of a tensor it is, or None for all of it.
    """

    name: str
    row: int | None = None


class Launched:
    """A launch, as ``Kernel`` takes it, without the arguments that change; and those, by their place.

    Attributes:
        variant: the compiled kernel that it comes to for data that is aligned, once that was launched.
    """

    def __init__(self, kernel: Kernel, how: tuple[tuple[int, int], tuple, tuple], changing: dict[int, Value]):
        self.kernel, self.changing = kernel, changing
        self.variant: Any = None
        self.grid, arguments, self.constants = how
        self.arguments = [None if k in changing else a for k, a in enumerate(arguments)]
        self._values = [a.data_ptr() if isinstance(a, Tensor) else a for a in self.arguments]
        # Of what changes: the place, the name, bytes from the start of a tensor, and whether it is full-size data.
        self._places: list[tuple[int, str, int, bool]] = []

    def __call__(self, device: torch.device, values: dict[str, Any], directly: bool) -> Any:
        """Launch with these ``values``; returns the compiled kernel. ``directly``: if it is known, it may be called
        without the look at all arguments that ``Kernel`` takes. Their dtypes are those of the first launch."""
        if directly and self.variant is not None:
            given, bits = self._values.copy(), 0
            for k, name, offset, of_data in self._places:
                value = values[name]
                if isinstance(value, Tensor):
                    value = value.data_ptr() + offset
                    if of_data:
                        bits |= value
                given[k] = value
            if bits % 16 == 0:
                self.variant(self.grid, device, given, self.constants)
                return self.variant
        arguments = self.arguments.copy()
        for k, (name, row) in self.changing.items():
            arguments[k] = values[name] if row is None else values[name][row]
        variant = self.kernel(device, self.grid, tuple(arguments), self.constants)
        data = self.kernel.data
        if variant is not None and all(arguments[k] is None or arguments[k].data_ptr() % 16 == 0 for k in data):
            changing = self.changing.items()
            self._places = [(k, value.name, _offset(value, values), k in data) for k, value in changing]
            self.variant = variant  # last: other threads look at it
        return variant


class Shares(NamedTuple):
    """What a sequence uses beside its arguments: () -> (pointer, pointer, what holds them) for the "counters" and
    "partials" of the current stream; () -> (pointer, stream, the cell) for "assumed", or None if it uses no cell."""

    space: Callable[[], tuple[int, int, Any]]
    cell: Callable[[], tuple[int, int, Any]] | None


class Launches:
    """A sequence of launches on a device.

    Attributes:
        made: the tensors that are made, by name: the name of the argument that it is like, or for a small one its
            shape; and its dtype.
        launches: in order.
        returned: the names of the values that a call returns; None for None.
        shares: see ``Shares``; or None.
        packs: whether its values can be packed as C++ does it; until that is known, True.
    """

    def __init__(self, device: torch.device, returned: Sequence[str | None] = (), shares: Shares | None = None):
        self.device, self.returned, self.shares, self.packs = device, tuple(returned), shares, True
        self.made: dict[str, tuple[str | tuple[int, ...], torch.dtype]] = {}
        self.launches: list[Launched] = []

    def add(self, kernel: Kernel, how: tuple[tuple[int, int], tuple, tuple], changing: dict[str, Value]) -> None:
        """Add a launch like ``how``, (grid, arguments, constants), in which the arguments ``changing`` change."""
        # A launch must hold no data of the call that it was made for.
        assert all(how[1][k] is None or kernel.runtime[k] in changing for k in kernel.data)
        places = {kernel.runtime.index(name): value for name, value in changing.items()}
        self.launches.append(Launched(kernel, how, places))

    def make(self, name: str, values: dict[str, Any]) -> Tensor:
        """What is ``made`` by this name, put among ``values``."""
        like, dtype = self.made[name]
        if type(like) is str:
            values[name] = torch.empty_like(values[like], dtype=dtype)
        else:
            values[name] = torch.empty(like, dtype=dtype, device=self.device)
        return values[name]

    def run(self, values: dict[str, Any]) -> tuple[tuple, list]:
        """(what is returned, the compiled kernels that were launched). Adds what is made to ``values``."""
        for name in self.made:
            self.make(name, values)
        directly, variants = is_current(self.device) and not are_recorded(), []
        for launched in self.launches:
            variants.append(launched(self.device, values, directly))
        return tuple(map(values.get, self.returned)), variants  # there is no value None


class Kept:
    """The sequences that were made for a program, and the function of C++ that runs those that it was told.

    Attributes:
        run: called with the arguments of a call. It returns what the sequence returns, a tuple; None if it was told no
            sequence for such arguments; False if that is not for this call.
        declined: why C++ was not told a sequence; empty if nothing was in the way.
    """

    def __init__(self):
        self.run, self._told = never, None
        self.declined = ""
        self._sequences: dict[tuple, Launches] = {}

    def get(self, key: tuple, make: Callable[[], Launches | None]) -> Launches | None:
        """The sequence of a key, made by ``make`` if there is none; None if that gives none. With too many shapes all
        are made anew."""
        found = self._sequences.get(key)
        if found is None and (found := make()) is not None:
            if len(self._sequences) >= _MOST_KEPT:
                self._sequences.clear()
            self._sequences[key] = found
        return found

    def keep(self, sequence: Launches, names: Sequence[str], given: tuple, values: dict, variants: list) -> bool:
        """Tell C++ to run ``sequence`` for arguments like ``given``, called ``names``; it had these ``values``,
        and launched the kernels ``variants``, on the current device. Returns whether it was told."""
        if self.declined or not sequence.packs or not is_current(sequence.device) or is_capturing(sequence.device):
            return False
        if None in variants:
            self.declined = "C++ launches only what Triton 3.6 compiled for an NVIDIA GPU"
        else:
            self.declined = native_because() or next((v.unknown for v in variants if v.unknown), "")
        if self.declined:
            return False
        if self._told is None:
            self.run, self._told = _C.gpu_sequences()
        slots = {name: k for k, name in enumerate((*names, *sequence.made))}
        space, cell = sequence.shares or (None, None)
        if space is not None:
            for name in ("counters", "partials", "assumed"):
                slots.setdefault(name, len(slots))
        arguments, data = dict(zip(names, given)), []
        for launched in sequence.launches:
            data += [launched.changing[k] for k in launched.kernel.data if k in launched.changing]
        aligned = {slots[value.name] for value in data if value.name in arguments}
        if any(given[k].data_ptr() % 16 for k in aligned) or any(_offset(value, values) % 16 for value in data):
            return False  # other variants are for other data
        how = zip(sequence.launches, variants)
        packed = [_packed(launched, variant, slots, arguments, values) for launched, variant in how]
        sequence.packs = None not in packed
        if not sequence.packs:
            return False
        made = [
            (slots[like], None if values[like].dtype is dtype else dtype)
            if type(like) is str
            else (torch.empty_like(values[name]), None)
            for name, (like, dtype) in sequence.made.items()
        ]
        returned = [-1 if name is None else slots[name] for name in sequence.returned]
        held = variants, [launched.arguments for launched in sequence.launches]
        _C.gpu_keep(self._told, given, tuple(packed), tuple(made), sorted(aligned), returned, space, cell, held)
        return True


def _offset(value: Value, values: dict[str, Any]) -> int:
    """Bytes from the start of a tensor to the row that is meant."""
    if value.row is None:
        return 0
    tensor = values[value.name]
    return value.row * tensor.stride(0) * tensor.element_size()


_TAKEN = {"Q": (Tensor, tuple), "q": (int,), "f": (float,), "i": ()}  # of arguments, by what they are packed as


def _packed(launched: Launched, variant: Any, slots: dict, arguments: dict, values: dict) -> tuple | None:
    """A launch as ``gpu_keep`` takes it; None where a number is of a kind that its place does not take."""
    buffer, places, changes = bytearray(), [], []
    for k, (a, kind) in enumerate(zip((*launched.arguments, 0, 0), (*variant.layout, "Q", "Q"))):
        if kind is None:
            continue
        size = struct.calcsize(kind)
        buffer += bytes(-len(buffer) % size)
        places.append(len(buffer))
        if k in launched.changing:
            name = launched.changing[k].name
            if name in arguments and type(arguments[name]) not in _TAKEN[kind]:
                return None
            changes.append((len(buffer), slots[name], _offset(launched.changing[k], values), kind == "f"))
            a = 0
        buffer += struct.pack(kind, a.data_ptr() if isinstance(a, Tensor) else a)
    return (variant.function, *launched.grid, variant.threads, variant.shared, bytes(buffer), places, tuple(changes))


_opened: str | None = None


def native_because() -> str:
    """Why C++ does not launch kernels; empty if it does."""
    global _opened
    if _opened is None:
        if not hasattr(_C, "gpu_open"):
            _opened = "there is no native extension"
        else:
            try:
                _C.gpu_open(torch.empty_like)
                _opened = ""
            except RuntimeError as error:
                _opened = str(error)
    return _opened
