"""The names that a user types. Each thing has one name; another name is accepted where it can mean only one thing."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import ParamSpec, TypeVar

Thing = TypeVar("Thing")
P = ParamSpec("P")


def find(what: str, name: str, known: Mapping[str, Thing], synonyms: Mapping[str, str], otherwise: str = "") -> Thing:
    """The thing of that name, in any case, with hyphens or spaces for underscores and "++" for "pp".

    Args:
        what: what is looked for, for the message: "prediction".
        synonyms: other libraries' names of the same thing, and the name here.
        otherwise: what may be passed in place of a name, for the message; "" for nothing.

    Raises ValueError for an unknown name, with the one that is most like it.
    """
    plain = plainly(name)
    plain = synonyms.get(plain, plain)
    if plain in known:
        return known[plain]
    near = difflib.get_close_matches(plain, known, 1)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    otherwise = f", or {otherwise}" if otherwise else ""
    raise ValueError(f"unknown {what} {name!r}{guess}: use one of {', '.join(known)}{otherwise}.")


def plainly(name: str) -> str:
    """A name as it is looked up: "DPM++ 2M Karras" is "dpmpp_2m_karras"."""
    return name.strip().lower().replace("-", "_").replace(" ", "_").replace("++", "pp")


def answers_keywords(other_names: Mapping[str, str]) -> Callable[[Callable[P, Thing]], Callable[P, Thing]]:
    """Decorator: a keyword that the function does not have is answered by the one that it has for that.

    Args:
        other_names: other libraries' names of the keywords, and what to write here.

    The function then raises TypeError for an unknown keyword, with what to write, or with the keyword most like it.
    """

    def decorate(function: Callable[P, Thing]) -> Callable[P, Thing]:
        known = [name for name in inspect.signature(function).parameters if name != "self"]
        what = function.__qualname__.removesuffix(".__init__")

        @wraps(function)
        def answering(*arguments: P.args, **named: P.kwargs) -> Thing:
            for name in named:
                if name in known:
                    continue
                near = difflib.get_close_matches(name, known, 1)
                ours = other_names.get(name) or (near[0] + "=" if near else None)
                raise TypeError(
                    f"{what}() has no {name}=: " + (f"write {ours}." if ours else f"it has {', '.join(known)}.")
                )
            return function(*arguments, **named)

        return answering

    return decorate


# What other libraries call the arguments of ``Objective``.
OF_OBJECTIVE = {
    "scheduler": "process=, or fastdiff.Objective.from_scheduler(scheduler)",
    "noise_scheduler": "process=, or fastdiff.Objective.from_scheduler(scheduler)",
    "prediction_type": "prediction=",
    "parameterization": "prediction=",
    "objective": "prediction=",
    "snr_gamma": "weighting=fastdiff.MinSNR(gamma)",
    "min_snr_gamma": "weighting=fastdiff.MinSNR(gamma)",
    "weighting_scheme": "weighting=, and timesteps= for how t is drawn",
    "loss_weight": "weighting=",
    "loss_type": "loss=",
    "loss_fn": "loss=",
    "schedule_sampler": "timesteps=",
}
