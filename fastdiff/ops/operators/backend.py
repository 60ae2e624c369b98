"""The operators as a backend: what runs while a program is traced."""

from __future__ import annotations

from ...backends import reference
from ...backends.interface import Backend
from ...calls import RunCall


class Operators(Backend):
    """The operations as operators of PyTorch. What gradients they do not give is traced through the reference."""

    name, package = "operators", __package__

    def __init__(self):
        self.otherwise = reference.Reference(self)
        self.modules  # noqa: B018  imported now: they define the operators

    def trajectory(self, call: RunCall) -> reference.Trajectory:
        return reference.Trajectory(self, call)
