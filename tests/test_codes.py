"""What kernels and Python call by the same number is the same number everywhere."""

import os
import subprocess
import sys

import pytest
import torch
from asked import native

from fastdiff import codes, losses, ops
from fastdiff.backends.native.launch import FUNCTIONS, NORMALIZATIONS, REDUCTIONS
from fastdiff.philox import Stream

SHORT = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16", torch.int64: "i64"}


def test_cpp_has_the_numbers_of_python():
    if not native.available:
        pytest.skip("there is no extension")
    from fastdiff import _C

    told = {name: tuple(value) if isinstance(value, list) else value for name, value in _C.codes.items()}
    assert told["columns"] == codes.COLUMNS == ops.COLUMNS
    assert told["functions"] == losses.FUNCTIONS == tuple(FUNCTIONS)
    assert told["reductions"] == codes.REDUCTIONS == tuple(REDUCTIONS)
    assert told["normalizations"] == codes.NORMALIZATIONS == tuple(NORMALIZATIONS)
    assert told["moments"] == codes.MOMENTS
    assert told["need_c"] == losses.NEED_C
    assert told["offset_stream"] == codes.OFFSET_STREAM == Stream.OFFSET
    assert told["kept_steps"] == codes.KEPT_STEPS == sum(name.startswith("c_h") for name in codes.COLUMNS)
    names = SHORT | {torch.uint8: "u8", torch.bool: "u8"}
    assert {dtype: told["dtypes"].index(names[dtype]) for dtype in codes.DTYPES} == codes.DTYPES


def test_triton_has_the_numbers_of_python():
    pytest.importorskip("triton")
    from fastdiff.backends.triton import programs, step
    from fastdiff.program import OPERATIONS

    assert tuple(getattr(step, name.upper()).value for name in codes.COLUMNS) == tuple(range(len(codes.COLUMNS)))
    assert tuple(getattr(programs, name.upper()).value for name in OPERATIONS) == tuple(range(len(OPERATIONS)))


def test_triton_finds_compiled_kernels_again():
    """Its hash of a kernel does not depend on which was looked at first."""
    pytest.importorskip("triton")
    code = (
        "import sys; from fastdiff.backends.triton import affine, kl_normal, loss, posterior, programs, "
        "row_moments, step;"
        "of = {'affine': affine, 'coefficients': programs, 'loss': loss, 'step': step};"
        "of |= {'row_moments': row_moments, 'row_moments_gradient': row_moments};"
        "of |= {'kl_normal': kl_normal, 'posterior': posterior, 'posterior_gradient': posterior};"
        "print(*sorted((name, getattr(of[name], name).function.cache_key) for name in sys.argv[1:]))"
    )
    names = ["affine", "coefficients", "kl_normal", "loss", "posterior", "posterior_gradient", "row_moments"]
    names += ["row_moments_gradient", "step"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    found = {
        subprocess.run(
            [sys.executable, "-c", code, *order], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for order in (names, names[::-1])
    }
    assert len(found) == 1


def test_every_error_function_is_a_loss_that_knows_its_constant():
    made = [losses.get(name) for name in losses.error_functions._NAMES]
    assert {loss.function for loss in made} == set(losses.FUNCTIONS)
    assert all(loss.uses_c == (loss.function in losses.NEED_C) for loss in made)


def test_streams_are_never_renumbered():
    """They are part of what the noise of a seed is."""
    found = {name: number for name, number in vars(Stream).items() if name.isupper()}
    first = {"NOISE": 0, "OFFSET": 1, "PERTURBATION": 2, "TIMESTEP": 3, "INITIAL": 4, "PROBE": 5, "PYRAMID": 6}
    assert found == first | {"POSTERIOR": 7, "DROPOUT": 8, "FRAMES": 9, "STEP": 16}


def test_what_a_row_is_told_are_bits_of_their_own():
    """csrc/step_table.cpp: drawing in float32 is drawing too."""
    from fastdiff.ops import step_table as table

    bits = table.X0, table.ENTRY, table.MODEL_DTYPE, table.ONE_DTYPE, table.DRAW
    assert bits == (1, 2, 4, 8, 16) and table.DRAW_FLOAT == 48
