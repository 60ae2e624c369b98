"""The packages that only the demo needs, imported when it runs."""

from __future__ import annotations

import importlib

from . import DemoError

PACKAGES = {"numpy": "numpy", "sklearn": "scikit-learn", "matplotlib": "matplotlib", "PIL": "pillow", "tqdm": "tqdm"}


def require(*modules: str) -> None:
    """Import the modules. Raises DemoError, saying what to install, if some are missing."""
    missing = []
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(PACKAGES[module])
    if missing:
        raise DemoError(f'this needs {", ".join(missing)}: run  pip install "fastdiff[demo]"')
