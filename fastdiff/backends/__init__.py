"""The backends: a folder for each. ``interface`` is their contract; ``registry`` chooses among them, and says why."""

from .registry import choose, status, use_backend

__all__ = ["choose", "status", "use_backend"]
