"""What runs the operations: a folder for each backend. ``registry`` says which of them runs where, and why."""

from .registry import choose, status, use_backend

__all__ = ["choose", "status", "use_backend"]
