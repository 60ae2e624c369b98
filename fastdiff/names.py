"""The names that a user types: each thing has one; others that mean the same without doubt are taken for it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

Thing = TypeVar("Thing")


def find(what: str, name: str, known: Mapping[str, Thing], synonyms: Mapping[str, str], otherwise: str) -> Thing:
    """The thing of that name, in any case and with hyphens or spaces for underscores.

    Args:
        what: what is looked for, for the message: "prediction".
        synonyms: other libraries' names of the same thing, and the name here.
        otherwise: what may be passed in place of a name, for the message.

    Raises ValueError for an unknown name, with the one that is most like it.
    """
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")
    plain = synonyms.get(plain, plain)
    if plain in known:
        return known[plain]
    near = difflib.get_close_matches(plain, known, 1)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"unknown {what} {name!r}{guess}: use one of {', '.join(known)}, or {otherwise}.")
