"""fastdiff under the calling conventions of other libraries. Each module is imported when it is first used, and none
imports the library: objects are taken by their interfaces. There are three ways, by what a library leaves room for:

- Functions in place of lines of a training loop: ``training_scripts``, ``flow``, ``edm``.
- Processes of given numbers (``fastdiff.tabulated``): levels from a scheduler's own table, with its roundings, so that
  x_t has its bits. For tables of sigmas t is the index, so nothing is looked up by comparing floats.
- Fused methods of one object: ``method_swap`` for single objects, ``diffusers`` for its schedulers. A method is
  replaced only where it is known to compute the same, so an unknown release or a subclass keeps its own.
"""

import importlib
import pkgutil
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    modules = [module.name for module in pkgutil.iter_modules(__path__)]
    if name not in modules:
        raise AttributeError(f"fastdiff.integrations has no {name!r}; it has {', '.join(modules)}.")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(module.name for module in pkgutil.iter_modules(__path__))})
