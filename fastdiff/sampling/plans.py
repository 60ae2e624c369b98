"""The plans of samplers, which are kept: in a short run, making a plan takes most of the time."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

from ..prediction import Prediction
from ..process import Process
from ..samplers import Plan, Sampler

_FIXED = (bool, int, float, str, range, Prediction)
_kept: weakref.WeakKeyDictionary[Process, dict[Any, Plan]] = weakref.WeakKeyDictionary()


def planned(sampler: Sampler, process: Process, steps: int | None, prediction: Prediction) -> Plan:
    """The sampler's plan. The last few of each process are kept, but for a sampler with a field that may change under
    it, such as a tensor."""
    if not (
        dataclasses.is_dataclass(sampler)
        and sampler.__dataclass_params__.frozen
        and _never_change([getattr(sampler, field.name) for field in dataclasses.fields(sampler)])
    ):
        return sampler.plan(process, steps, prediction)
    # The process's numbers too: it is not frozen.
    numbers = tuple([value for value in vars(process).values() if isinstance(value, (int, float, str))])
    key = (sampler, steps, prediction, numbers)
    try:
        kept = _kept.setdefault(process, {})
        found = kept.get(key)
    except TypeError:  # made with a list
        return sampler.plan(process, steps, prediction)
    if found is None:
        if len(kept) >= 16:
            kept.clear()
        found = kept[key] = sampler.plan(process, steps, prediction)
    return found


def _never_change(values: Sequence[Any]) -> bool:
    """Whether each of ``values`` is a number, a string or the like, or a tuple of such."""
    return all(
        [
            value is None or isinstance(value, _FIXED) or (isinstance(value, tuple) and _never_change(value))
            for value in values
        ]
    )
