"""The code of diffusers that a fused method was made for is known by a digest of its source.

The digests in the records are of diffusers 0.42.1, and of versions back to 0.34 where those differ: in line breaks, in
what is moved to which device, or (FlowMatchEuler) in how the noise of stochastic sampling is drawn.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

# diffusers.utils.torch_utils.randn_tensor, by which its schedulers draw.
RANDN_TENSOR = ("a5da31ee40e1", "6ae270e9653d")


@dataclass(frozen=True)
class Method:
    """A method of a diffusers scheduler and what takes its place.

    Args:
        fused: (the method, the name under which its calls are counted, a ``Cache``) -> the fused method.
        coefficients: the class of ``Coefficients`` that the cache gives.
        digests: by name, the ``digest`` of the method, and of the scheduler's other methods that it calls and the fused
            one does not; several where versions of diffusers differ. Where one of them has other code, or is overridden
            in a subclass, the method is not fused.
    """

    fused: Callable
    coefficients: type
    digests: dict[str, tuple[str, ...]]


def digest(source: str) -> str:
    """A digest of what a function does, from its source: its parameters, and its code without comments, docstring,
    annotations and line breaks."""
    text = textwrap.dedent(source)
    function = ast.parse(text).body[0]
    if not isinstance(function, ast.FunctionDef):
        raise SyntaxError("not the definition of a function")
    body, arguments = function.body, function.args
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    names = [argument.arg for argument in arguments.args + arguments.kwonlyargs]
    defaults = [ast.get_source_segment(text, default) for default in arguments.defaults]
    lines = text.splitlines()[body[0].lineno - 1 :] if body else []
    code = "".join(line for line in map(_code, lines) if line).replace(" ", "").replace(",)", ")").replace(",]", "]")
    return hashlib.sha256(f"{names}{defaults}{code}".encode()).hexdigest()[:12]


def _code(line: str) -> str:
    line = line.split("  # ")[0].strip()
    return "" if line.startswith("#") else line


@cache
def fingerprint(function: Any) -> str | None:
    """``digest`` of a method or property, from its own code; None if the source is not there."""
    function = function.fget if isinstance(function, property) else function
    try:
        return digest(inspect.getsource(function.__code__))
    except (AttributeError, OSError, SyntaxError):
        return None
