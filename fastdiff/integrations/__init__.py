"""fastdiff under the calling conventions of other libraries. Each module is imported when it is first used."""

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
