"""Whether Triton's interpreter runs the kernels."""

import os


def interpreted() -> bool:
    """Whether kernels are run by Triton's interpreter. Triton looks when they are imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")
