"""Builds the stand-in for libcuda.so.1 (cuda.c), and reads what it has written down."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

_LONG = ctypes.c_long


class Written(ctypes.Structure):
    """A launch. ``values``: its parameters, as many as ``stand_in_parameters`` was told, each in the low bytes."""

    _fields_ = [
        ("function", _LONG), ("grid", _LONG * 2), ("threads", _LONG), ("shared", _LONG), ("stream", _LONG),
        ("device", _LONG), ("thread", _LONG), ("count", _LONG), ("values", ctypes.c_ulong * 96),
    ]  # fmt: skip


def build(folder: Path) -> ctypes.CDLL:
    """The stand-in, built in ``folder``. Whoever opens libcuda.so.1 from now on gets it."""
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library, source = folder / "libcuda.so.1", Path(__file__).resolve().with_name("cuda.c")
    command = ["cc", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}", "-o", str(library)]
    subprocess.run([*command, str(source), "-lpthread"], check=True)
    found = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    found.stand_in_here.argtypes = [_LONG] * 4
    found.stand_in_stream.restype = _LONG
    found.stand_in_parameters.argtypes = [ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int]
    found.stand_in_written.restype = ctypes.POINTER(Written)
    found.stand_in_table.argtypes, found.stand_in_table.restype = [ctypes.c_void_p], ctypes.c_void_p
    return found
