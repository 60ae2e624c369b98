"""The bytes that a launch moves, counted from its operands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..layout import stored_elements

_WRITTEN = {"out", "kept", "target", "gradient", "used", "result", "means", "y", "x0_out", "entry", "seen"} | {
    "errors",
    *("columns", "drawn", "d_u", "d_v", "z", "x_t"),
    *("sum_uu", "sum_uv", "sum_vv", "sum_ss", "sum_l1", "sum_v1", "sum_u", "sum_v"),
}
_BETWEEN = {"counters", "partials"}  # what programs of a launch leave for each other


class Launch(str):
    """A kernel that was launched: its name.

    Attributes:
        read, written: bytes of the tensors that it is given: each counts once, as what it stores; a table that is
            gathered from as what is gathered, and its index. What programs leave for each other is left out. The
            backward of a loss whose gradient was written ahead counts as the two numbers that it compares: if they
            differ it goes through all of it again, which only the device knows.
    """

    read: int
    written: int

    @classmethod
    def of(cls, name: str, values: Mapping[str, Any]) -> Launch:
        """``values``: the kernel's arguments and constants by their names."""
        launch = cls(name)
        launch.read = launch.written = 0
        if values.get("used") is not None and values["UPSTREAM"] != "none":
            launch.read = values["upstream"].element_size() + values["used"].element_size()
            return launch
        index = values.get("index")
        gathered = 0 if index is None else stored_elements(index)
        # What a mask divides by is made with the loss, and read in its backward.
        written = _WRITTEN | {"divisor"} if values.get("result") is not None else _WRITTEN
        for parameter, value in values.items():
            if isinstance(value, Tensor) and parameter not in _BETWEEN:
                by_index = values.get(f"{parameter.upper()}_KIND") == "gathered"
                moved = (gathered if by_index else stored_elements(value)) * value.element_size()
                if parameter in written:
                    launch.written += moved
                else:
                    launch.read += moved
        return launch

    @property
    def bytes(self) -> int:
        return self.read + self.written
