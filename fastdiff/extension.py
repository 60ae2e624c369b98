"""``fastdiff._C``: which sources it is built of, and whether the module that is found was built of them.

``setup.py`` runs this file too, so it needs the standard library alone.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import warnings
from pathlib import Path
from typing import Any

_SUFFIXES = (".h", ".cpp", ".cu")


def digest(root: Path) -> str:
    """Of CMakeLists.txt and csrc/ in ``root``: 16 hexadecimal digits. CMakeLists.txt computes the same."""
    files = [path for path in (root / "csrc").rglob("*") if path.suffix in _SUFFIXES]
    names = sorted(path.relative_to(root).as_posix() for path in [root / "CMakeLists.txt", *files])
    lines = (f"{name} {hashlib.sha256((root / name).read_bytes()).hexdigest()}\n" for name in names)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


@functools.cache
def load() -> tuple[Any, str]:
    """(the module or None, why there is none). It warns where there is none and one was wanted: FASTDIFF_BUILD=0 does
    without, when the package is installed and when it is imported."""
    if os.environ.get("FASTDIFF_BUILD") == "0":
        return None, "FASTDIFF_BUILD=0 is set"
    # Written when the package is built: what it was built of, and why the extension was not. Where the package is used
    # as it lies in its source tree there is none, and the sources are there to be looked at.
    try:
        built: Any = importlib.import_module("fastdiff._built")
    except ImportError:
        built = None
    try:
        module = importlib.import_module("fastdiff._C")
    except ImportError as error:
        because = (built is not None and built.MISSING) or str(error)
        wanted = because != NOT_WANTED
    else:
        because, wanted = _unfit_because(module, built), True
        if not because:
            return module, ""
    if wanted:
        warnings.warn(
            f"fastdiff runs without its native extension, on a CPU in plain PyTorch: {because}. Install fastdiff again "
            "where there is a C++ compiler, or set FASTDIFF_BUILD=0 to do without.",
            stacklevel=2,
        )
    return None, because


NOT_WANTED = "it was installed with FASTDIFF_BUILD=0"


def _unfit_because(module: Any, built: Any) -> str:
    root = Path(__file__).resolve().parent.parent
    if built is not None:
        wanted = built.SOURCES
    elif (root / "csrc").is_dir():
        wanted = digest(root)
    else:
        return ""
    found = getattr(module, "sources", "unknown")
    return "" if found == wanted else f"{module.__file__} was built of other sources ({found}) than these ({wanted})"
