"""Which tests run where."""

import pytest

BACKENDS = ["reference", "native", "native, no whole calls"]
# For a test that takes a ``device`` too: on a GPU, once, with what is chosen there.
on_every_device = pytest.mark.parametrize(
    "backend", [*BACKENDS, pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


def why_skipped(file, keywords, chosen, gpu):
    """Why a test with these keywords is skipped; None if it is run. ``chosen``: what was given as -m."""
    if "large" in keywords and "large" not in chosen:
        return "needs 14 GiB: run with -m large"
    if not gpu:
        return "needs a CUDA device" if "gpu" in keywords else None
    if "compiles" in keywords and "compiles" not in chosen:
        return "compiles for minutes, and needs no GPU: run with -m compiles"
    if file == "test_triton_operations.py" and "gpu_variants" not in keywords and "gpu_variants" not in chosen:
        return "a GPU would compile its kernel variants, minutes of them all: the interpreter runs it"
    return None
