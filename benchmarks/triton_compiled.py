"""What the Triton kernels compile to, for GPUs that need not be there: instructions, registers, widths of loads.

    python benchmarks/triton_compiled.py              writes results/triton_compiled.md
    python benchmarks/triton_compiled.py --json FILE  the same as JSON, for the tests

The kernels are asked for as in training, on tensors without memory, and compiled instead of launched. Instructions are
those of the machine code up to the first atomic operation (all of it where there is none), so the reduction in a tile
counts, and what only the last program does counts not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from asked import triton as operations
from roofline import GPUS, share_of_copy, warps
from triton.backends.compiler import GPUTarget

import fastdiff
from fastdiff import ops
from fastdiff.backends.interface import run
from fastdiff.backends.triton import arguments as taken
from fastdiff.backends.triton import launch, normal
from fastdiff.backends.triton.programs import coefficients, flat
from fastdiff.backends.triton.times import coefficients_launch
from fastdiff.backends.triton.traffic import Launch
from fastdiff.calls import Combination, LossCall, NoiseCall, NormalCall, Packed
from fastdiff.program import OPERATIONS, Program
from fastdiff.tensors import Gathered

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 89, 90, 100)} | {
    "gfx942": GPUTarget("hip", "gfx942", 64)
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Every case is compiled for sm_90, these for all.
EVERYWHERE = {
    *("noising, fast, bf16", "noising, exact, bf16", "noising, given, bf16", "noising, given, fp32"),
    *("loss v, fast, bf16", "loss v, exact, bf16", "loss v, given, bf16", "loss v, given, fp32"),
    *("hybrid loss, fast, bf16", "hybrid loss with bins, exact, bf16", "hybrid loss with bins, given, fp32"),
    *("latents and noising, exact, bf16", "latents and noising, given, fp32", "divergence from N(0, 1), bf16"),
    *("moments, bf16", "loss, mask's mean, given, bf16", "step, exact, bf16", "uniforms", "rows of a flow"),
    "normals of a slice",
    "loss combined, given, bf16",
    "loss by elements, given, bf16",
    *("noising images, exact, bf16", "noising into tokens, exact, bf16", "loss flow of tokens, exact, bf16"),
    *("coefficients of SD3, drawn", "coefficients of EDM, drawn", "coefficients of VPSDE, drawn"),
    *("operations of angles", "all other operations"),
}
ANGLES = ("sin", "cos", "tan")
# The GPUs whose share of the copy ceiling is predicted, by what they run.
PREDICTED = {"sm_90": ("H100", "H200"), "sm_100": ("B200",)}
SHAPE = (64, 4, 128, 128)
THREADS = 128


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def captured(call: Any, approximate: bool) -> list[tuple[launch.Kernel, tuple, float]]:
    """(kernel, key, bytes an element) of every launch of ``call``, none of which happens."""
    found: list[tuple[launch.Kernel, tuple, float]] = []
    before = launch.Kernel.__call__, taken.runs_on, launch.has_approximate_instructions
    launch.Kernel.__call__ = lambda self, device, grid, arguments, constants: found.append(
        (self, self.key(arguments, constants, None), element_bytes(self, arguments, constants))
    )
    taken.runs_on = lambda device: True
    launch.has_approximate_instructions = lambda device: approximate
    try:
        call()
    finally:
        launch.Kernel.__call__, taken.runs_on, launch.has_approximate_instructions = before
    return found


def element_bytes(kernel: launch.Kernel, arguments: tuple, constants: tuple) -> float:
    """Bytes that a launch moves for an element of its data. (A network's output, or moments, may hold two of each.)"""
    values = dict(zip((*kernel.runtime, *kernel.constants), (*arguments, *constants)))
    elements = max(t.numel() for t in arguments if isinstance(t, torch.Tensor))
    if values.get("units"):
        elements = values["units"] * values["UNIT"] * values["runs"]
    return Launch.of(kernel.name, values).bytes / elements


def cases() -> dict[str, Any]:
    """Name -> a call that launches."""
    found: dict[str, Any] = {}
    rows = SHAPE[0], 1, 1, 1
    index, table = meta(*rows, dtype=torch.int64), meta(1000, 8)
    column, plain = [Gathered(table[:, k], index) for k in range(8)], [meta(*rows) for _ in range(8)]
    seed = meta(1, dtype=torch.int64)

    def noise(shape, dtype, n, kept=False):
        alpha, sigma = column[:2] if shape == SHAPE else (meta(shape[0], 1, 1, 1), meta(shape[0], 1, 1, 1))
        return lambda: operations.noise(meta(*shape, dtype=dtype), n, alpha, sigma, 0.0, None, kept)

    def loss(dtype, n, p, function="mse", mask=None, normalization="none", gradient=True, rows=column, x0=None,
             reduction="mean"):  # fmt: skip
        """``p``: the target has x0 in it. v takes its rows from a table; those of a flow, a continuous process, are
        numbers a sample."""

        def call():
            prediction = meta(*SHAPE, dtype=dtype).requires_grad_(gradient)
            c = rows[3] if function in ("smooth_l1", "pseudo_huber") or getattr(function, "uses_c", False) else None
            data = None if not p else meta(*SHAPE, dtype=dtype) if x0 is None else x0
            how = function, normalization, reduction
            out = operations.loss(prediction, data, n, rows[0] if p else None, rows[1], None, rows[2], c, mask, *how)
            if gradient:
                out.backward(meta(*out.shape))

        return call

    def at_once(dtype, n, scale):
        """The loss of v along with its gradient for a scale that is given."""
        prediction, x0 = meta(*SHAPE, dtype=dtype), meta(*SHAPE, dtype=dtype)
        call = LossCall(prediction, x0, n, column[0], column[1], None, column[2])
        return lambda: operations.backend.value_and_gradient(scale, call)

    def hybrid(dtype, n, bins, frozen=True):
        """Of epsilon: simple_weight e^2, and the bound of a variance that is learned. ``bins``: rows may be of bins."""

        def call():
            output = meta(SHAPE[0], 2 * SHAPE[1], *SHAPE[2:], dtype=dtype).requires_grad_()
            x0 = meta(*SHAPE, dtype=dtype) if bins else None
            q, scale, l_0, l_v, l_q, half_width, weight = column[1:]
            how = half_width if bins else None, plain[0], weight, frozen, "mean"
            operations.gaussian_kl(output, x0, n, None, q, scale, l_0, l_v, l_q, *how).backward()

        return call

    def latents(dtype, xi, n, kept=False, shape=SHAPE, gradient=True):
        """With a shift and a scale, and the gradient for those of both results."""

        def call():
            moments = meta(shape[0], 2 * shape[1], *shape[2:], dtype=dtype).requires_grad_(gradient)
            one, (alpha, sigma) = (
                meta(*(1,) * len(shape)),
                column[:2] if shape == SHAPE else (meta(shape[0], 1, 1, 1),) * 2,
            )
            factors = (None, None) if n is None else (alpha, sigma)
            z, x_t, _ = operations.posterior(moments, xi, one, one, n, *factors, -30.0, 20.0, dtype, kept)
            if gradient:
                sum(out.sum() for out in (z, x_t) if out is not None).backward()

        return call

    def divergence(dtype, shape=SHAPE, rows=None, reduction="mean"):
        def call():
            moments = meta(shape[0], 2 * shape[1], *shape[2:], dtype=dtype).requires_grad_()
            weight = meta(*(rows or (shape[0], *(1,) * (len(shape) - 1))))
            out = operations.kl_normal(moments, weight, -30.0, 20.0, reduction)
            out.backward(meta(*out.shape))

        return call

    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        given = meta(*SHAPE, dtype=dtype)
        found[f"latents and noising, given, {name}"] = latents(dtype, given, given)
        for rng in ("fast", "exact"):
            made = ops.Philox(seed, 0, 7, rng=rng), ops.Philox(seed, rng=rng)
            found[f"latents, {rng}, {name}"] = latents(dtype, made[0], None)
            found[f"latents and noising, {rng}, {name}"] = latents(dtype, *made)
        found[f"divergence from N(0, 1), {name}"] = divergence(dtype)
        for rng in ("fast", "exact", "given"):
            source = given if rng == "given" else ops.Philox(seed, rng=rng)
            found[f"hybrid loss, {rng}, {name}"] = hybrid(dtype, source, False)
            found[f"hybrid loss with bins, {rng}, {name}"] = hybrid(dtype, source, True)
            found[f"bound, mean learned too, {rng}, {name}"] = hybrid(dtype, source, False, frozen=False)
        for rng in ("fast", "exact"):
            made = ops.Philox(seed, rng=rng)
            found[f"noising, {rng}, {name}"] = noise(SHAPE, dtype, made)
            for kind in ("epsilon", "v"):
                found[f"loss {kind}, {rng}, {name}"] = loss(dtype, made, kind == "v")
            found[f"loss v at once, {rng}, {name}"] = at_once(dtype, made, meta())
            found[f"loss flow, {rng}, {name}"] = loss(dtype, made, True, rows=plain)
        found[f"noising, given, {name}"] = noise(SHAPE, dtype, given)
        for kind in ("epsilon", "v"):
            found[f"loss {kind}, given, {name}"] = loss(dtype, given, kind == "v")
        found[f"loss flow, given, {name}"] = loss(dtype, given, True, rows=plain)
    bf16 = torch.bfloat16
    made, given = ops.Philox(seed), meta(*SHAPE, dtype=bf16)
    found["noising, kept, bf16"] = noise(SHAPE, bf16, made, True)
    for rng in ("fast", "exact", "given"):
        source = given if rng == "given" else ops.Philox(seed, rng=rng)
        arguments = meta(*SHAPE, dtype=bf16), source, *column[:2], 0.0, None, False, *column[2:4]
        found[f"noising with target, {rng}, bf16"] = partial(operations.noise_and_target, *arguments)
    images = meta(*SHAPE, dtype=torch.uint8)
    for rng in ("fast", "exact", "given"):
        source = given if rng == "given" else ops.Philox(seed, rng=rng)
        found[f"noising images, {rng}, bf16"] = partial(
            operations.noise, images, source, *column[:2], 0.0, None, False, bf16
        )
        found[f"loss v of images, {rng}, bf16"] = loss(bf16, source, True, x0=images)
    found["noising, exact, 1 x 28 x 28, bf16"] = noise((64, 1, 28, 28), bf16, made)
    found["noising, exact, 3 x 31 x 31, bf16"] = noise((64, 3, 31, 31), bf16, made)
    found["noising, channel offsets, bf16"] = noise(SHAPE, bf16, ops.Philox(seed, offset=0.1))
    patches, order = (64, 16, 64, 2, 64, 2), (0, 2, 4, 1, 3, 5)
    for rng in ("fast", "exact", "given"):
        source = meta(*patches, dtype=bf16) if rng == "given" else ops.Philox(seed, rng=rng)
        found[f"noising into tokens, {rng}, bf16"] = of_tokens(patches, order, source, noising=True)
        for x0 in (False, True):
            name = f"loss {'flow' if x0 else 'epsilon'} of tokens, {rng}, bf16"
            found[name] = of_tokens(patches, order, source, x0)
        name = f"loss by elements of tokens, {rng}, bf16"
        found[name] = of_tokens(patches, order, source, reduction="elements")
    for function in ("l1", "smooth_l1", "pseudo_huber", "log_cosh"):
        found[f"loss {function}, given, bf16"] = loss(bf16, given, False, function)
    for name, c in (("", 0.1), (" with a row's c", None)):
        combined = Combination(0.5, 0.4, 0.3, 0.2, 0.1, 0.1, c)
        found[f"loss combined{name}, given, bf16"] = loss(bf16, given, False, combined)
    mask = meta(SHAPE[0], 1, *SHAPE[2:], dtype=torch.bool)
    for dtype, name in ((bf16, "bf16"), (torch.float32, "fp32")):
        found[f"loss by elements, given, {name}"] = loss(dtype, meta(*SHAPE, dtype=dtype), False, reduction="elements")
    found["loss by elements, mask, combined, given, bf16"] = loss(
        bf16, given, False, combined, mask=mask, reduction="elements"
    )
    found["loss, mask, given, bf16"] = loss(bf16, given, False, mask=mask)
    found["loss, mask's mean, given, bf16"] = loss(bf16, given, False, mask=mask, normalization="row")
    found["loss v, exact, fp16"] = loss(torch.float16, made, True)
    found["latents and noising, kept, bf16"] = latents(bf16, ops.Philox(seed, 0, 7), made, True)
    found["latents, the mean, bf16"] = latents(bf16, None, None)
    found["latents and noising, 3 x 31 x 31, bf16"] = latents(bf16, ops.Philox(5, 0, 7), made, False, (64, 3, 31, 31))
    found["divergence from N(0, 1), a row a channel, bf16"] = divergence(
        bf16, rows=(1, SHAPE[1], 1, 1), reduction="none"
    )
    found["divergence from N(0, 1), 16 x 2 x 2"] = divergence(bf16, (64, 16, 2, 2), reduction="sum")
    x, table = meta(*SHAPE, dtype=bf16), meta(18)
    entries = tuple(meta(*SHAPE) for _ in range(4))
    found["step, exact, bf16"] = lambda: operations.step(
        x, given, given, 5.0, table, 1.0, entries, made, given, bf16, (True, True)
    )
    for name, both in (("moments", True), ("moments of one", False)):
        found[f"{name}, bf16"] = partial(moments, SHAPE, (SHAPE[0], 1, 1, 1), both)
    found["moments, frames"] = partial(moments, (2, 3, 4, 5, 6), (2, 1, 4, 1, 1), True)
    found["moments, a row an element"] = partial(moments, (64, 2), (64, 2), True)
    found["moments, 2^32 elements"] = partial(moments, (2**12, 2**20), (2**12, 1), True)
    found["convert, bf16"] = lambda: operations.convert(given, x, *column[:2])

    def shaped(shape, rows, normalization, reduction, n=None, mask=None, x0=False):
        def call():
            prediction, weight = meta(*shape, dtype=bf16).requires_grad_(), meta(*rows).requires_grad_(not x0)
            row, data = meta(*rows), meta(*shape, dtype=bf16) if x0 else None
            how = row if x0 else None, row, None if x0 else row, weight, None, mask, "mse", normalization, reduction
            out = operations.loss(prediction, data, meta(*shape) if n is None else n, *how)
            out.backward(meta(*out.shape))

        return call

    frames = (1, 16, 33, 60, 90), (1, 1, 33, 1, 1)
    for rng in ("fast", "exact", "given"):
        video = meta(*frames[0], dtype=bf16) if rng == "given" else ops.Philox(seed, rng=rng)
        found[f"noising, {rng}, frames of a video, bf16"] = noise_by_rows(
            meta(*frames[0], dtype=bf16), frames[1], video
        )
        found[f"loss v, {rng}, frames of a video, bf16"] = shaped(*frames, "none", "mean", video, x0=True)

    for rng in ("fast", "exact", "given"):
        found[f"noising packed sequences, {rng}, bf16"] = of_sequences(rng, noising=True)
        found[f"loss flow of packed sequences, {rng}, bf16"] = of_sequences(rng)
    for normalization, reduction in (("row", "mean"), ("row", "none"), ("global", "mean"), ("none", "none")):
        for mask in (False, True):
            name = f"loss of packed sequences, {normalization} {reduction}{', mask' if mask else ''}"
            found[name] = of_sequences("exact", normalization=normalization, reduction=reduction, mask=mask)

    # Every way in which rows, samples and tiles can lie, in small data.
    found["loss, 1 x 28 x 28, rows' means"] = shaped((64, 1, 28, 28), (64, 1, 1, 1), "none", "none")
    found["loss, tokens, mask's mean of all"] = shaped((8, 16, 40), (8, 16, 1), "global", "none", mask=meta(8, 16, 1))
    found["loss, tokens, masks' means"] = shaped((8, 16, 40), (8, 16, 1), "row", "mean", mask=meta(8, 16, 1))
    found["loss, a row an element"] = shaped((64, 2), (64, 2), "none", "mean")
    found["loss, frames"] = shaped((2, 3, 4, 5, 6), (2, 1, 4, 1, 1), "none", "mean", ops.Philox(seed, offset=0.1))
    found["loss, one row"] = shaped((8, 64), (1, 1), "none", "sum", ops.Philox(5))
    found["loss, 2^32 elements"] = shaped((2**12, 2**20), (2**12, 1), "none", "mean", made)
    found["noising, 2^32 elements"] = noise_of_two(meta(2**12, 2**20, dtype=bf16), meta(2**12, 1), made)
    found["noising, a row an element"] = noise_of_two(meta(64, 2), meta(64, 2), ops.Philox(5))
    for name, of in (("normals of a slice", (0, 8, 16)), ("normals of a slice, unaligned", (0, 8, 17))):
        slices = NormalCall(seed, (64, 4, 48, 32), device=seed.device, window=ops.Window((4, 64, 64), of))
        found[name] = partial(normal.run, slices, None)
    found["uniforms"] = lambda: operations.uniform(seed, 64, 3, 0, seed.device)
    for name, objective in programs().items():
        program, draw = objective._coefficients.program(), objective._times().program()
        both = program.after(draw)
        found[f"coefficients of {name}, drawn"] = partial(launch_program, both, seed)
    flow = programs()["SD3"]._coefficients.program()
    found["rows of a flow"] = lambda: operations.evaluate(flow, meta(64), torch.float32)
    found["operations of angles"] = lambda: operations.evaluate(program_of(*ANGLES), meta(64), torch.float32)
    others = [name for name, meaning in OPERATIONS.items() if meaning is not None and name not in ANGLES]
    found["all other operations"] = lambda: operations.evaluate(program_of(*others), meta(64), torch.float32)
    return found


def moments(shape: tuple[int, ...], rows: tuple[int, ...], both: bool) -> None:
    """The sums of one or two tensors, and the gradient by each for upstream gradients of all."""
    bf16 = torch.bfloat16
    a, b = meta(*shape, dtype=bf16), meta(*shape, dtype=bf16) if both else None
    of = (*(meta(*rows) if both or k in (0, 4, 6) else None for k in range(8)),)
    operations.row_moments(a, b, rows, rows, torch.float32)
    operations.moments_gradient(of, a, b, rows, rows, torch.float32, True, both)


def programs() -> dict[str, fastdiff.Objective]:
    """Objectives whose coefficients are functions of a continuous time."""
    flow = fastdiff.RectifiedFlow(3.0)
    return {
        "SD3": fastdiff.Objective(flow, "flow", "cosmap", timesteps="logit_normal", error_space="sample"),
        "EDM": fastdiff.Objective(fastdiff.EDM(), "edm", "edm"),
        "VPSDE": fastdiff.Objective(fastdiff.VPSDE(), "v_prediction", "likelihood"),
    }


def launch_program(program: Program, seed: torch.Tensor) -> None:
    """The launch that draws 64 times and computes the coefficients at them."""
    columns, t = meta(len(program.outputs) - 1, 64), meta(64, dtype=torch.float64)
    constants = meta(len(program.numbers), dtype=torch.float64)
    how = coefficients_launch(columns, t, None, seed, constants, 3, 0, 64, flat(program.code), program.outputs)
    coefficients(seed.device, *how)


def program_of(*names: str) -> Program:
    """A program that computes each of these operations of its input and of a constant."""
    places = list(OPERATIONS)
    code: list[tuple] = [("input",), ("number", 0)]
    for name in names:
        one = places.index(name) < places.index("add")
        code.append((name, 0) if one else (name, 0, 1, 0) if name == "where" else (name, 0, 1))
    return Program(tuple(code), (0.5,), names, tuple(range(2, len(code))))


def of_tokens(
    shape: tuple[int, ...], order: tuple[int, ...], source: Any, x0=True, noising=False, reduction="mean"
) -> Any:
    """Noising, or the loss and its gradient, where x_t and the prediction lie in another order than x0."""
    row, data = meta(shape[0], *(1,) * (len(shape) - 1)), meta(*shape, dtype=torch.bfloat16)
    if noising:
        return lambda: operations.noise(data, source, row, row, 0.0, None, False, None, order)

    def call():
        prediction = data.permute(order).contiguous().permute([order.index(d) for d in range(6)]).requires_grad_()
        how = row if x0 else None, row, None, row, None, None, "mse", "none", reduction
        out = operations.loss(prediction, data if x0 else None, source, *how)
        out.backward(torch.empty_like(out))

    return call


def of_sequences(
    rng: str, noising: bool = False, normalization: str = "none", reduction: str = "mean", mask: bool = False
) -> Any:
    """Noising, or the loss and its gradient, of sequences of different lengths, packed."""
    lengths, size, bf16 = (2900, 0, 6100, 4000), 64, torch.bfloat16
    starts = torch.tensor((0, *lengths)).cumsum(0) * size
    packed, tokens, row = Packed(starts, 0), sum(lengths), meta(len(lengths), 1)
    data = meta(tokens, size, dtype=bf16)
    source = data if rng == "given" else ops.Philox(meta(1, dtype=torch.int64), rng=rng)
    if noising:
        return lambda: run(operations.backend, NoiseCall(data, source, row, row, packed=packed, keep_noise=False))

    def call():
        kept = meta(tokens, 1, dtype=torch.bool) if mask else None
        weight = meta(len(lengths), 1).requires_grad_(reduction == "none")
        how = {"mask": kept, "mask_normalization": normalization, "reduction": reduction, "packed": packed}
        prediction = meta(tokens, size, dtype=bf16).requires_grad_()
        out = run(operations.backend, LossCall(prediction, data, source, row, row, None, weight, **how))
        out.backward(meta(*out.shape))

    return call


def noise_by_rows(x0: torch.Tensor, rows: tuple[int, ...], source: Any) -> Any:
    return lambda: operations.noise(x0, source, meta(*rows), meta(*rows), 0.0, None, False)


def noise_of_two(x0: torch.Tensor, rows: torch.Tensor, source: ops.Philox) -> Any:
    """Noising with input perturbation, the noise kept."""
    return lambda: operations.noise(x0, source, rows, rows, 0.1, ops.Philox(source.seed, 0, 2), True)


def machine_code(compiled: Any) -> dict[str, Any]:
    """What can be read off a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = _tool("nvdisasm", "-c", file.name)
        usage = _tool("cuobjdump", "-res-usage", file.name)
    code = []
    for line in text.splitlines():
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
        if found and found[1] != "NOP":
            code.append(found[1])
    while code and code[-1] == "BRA":  # to itself, behind the end
        code.pop()
    first = next((k for k, name in enumerate(code) if name.startswith("ATOM")), len(code))
    return {
        "instructions": first,
        "all": len(code),
        "prefetches": [k for k, name in enumerate(code) if name.startswith("CCTL") and "PF2" in name],
        "wide_loads": sum(name.startswith("LDG.E.128") for name in code),
        "wide_stores": sum(name.startswith("STG.E.128") for name in code),
        "float64": sorted({name for name in code if re.match(r"(D(ADD|MUL|FMA|SETP|MNMX)|.*F64)", name)}),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        # Loads and stores of local memory. (A stack may be set aside and not be used.)
        "spills": sum(name.startswith(("LDL", "STL")) for name in code),
    }


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def amd_code(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "wide_loads": len(re.findall(r"_load_dwordx4", text)),
        "wide_stores": len(re.findall(r"_store_dwordx4", text)),
        "float64": sorted(set(re.findall(r"v_(?:add|mul|fma)_f64", text))),
    }


def measured(targets: list[str]) -> list[dict[str, Any]]:
    results = []
    for name, call in cases().items():
        for target in targets:
            if target != "sm_90" and name not in EVERYWHERE:
                continue
            nvidia = TARGETS[target].backend == "cuda"
            for stage, (kernel, key, moved) in enumerate(captured(call, nvidia)):
                compiled = kernel.compile(key, TARGETS[target])
                constants = dict(zip(kernel.constants, key[2]))
                found = machine_code(compiled) if nvidia else amd_code(compiled)
                elements = constants.get("R", 1) * constants.get("C", THREADS) / THREADS
                results.append({
                    "case": name + (", backward" if stage else ""), "kernel": kernel.name, "target": target,
                    "elements": elements, "bytes": moved, **found,
                })  # fmt: skip
    return results


def shares(result: dict[str, Any]) -> dict[str, float]:
    """GPU -> the share of the copy ceiling that is predicted, of kernels that fill their threads with full-size data.
    Not of a backward: it finds its gradient written, and moves next to nothing."""
    names = PREDICTED.get(result["target"], ())
    if not names or result["elements"] < 16 or "backward" in result["case"]:
        return {}
    each = result["instructions"] / result["elements"]
    return {name: share_of_copy(each, result["bytes"], GPUS[name], result["registers"]) for name in names}


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "# What the Triton kernels compile to",
        "",
        f"Triton {triton.__version__}; shape {' x '.join(map(str, SHAPE))} where none is given, coefficients gathered "
        "from a table (of a flow: one a sample), seed on the device.",
        "Instructions of the machine code per element, up to the first atomic operation: what only the last program of",
        "a reduction does comes behind it. 'backward' looks at the upstream gradient, and returns or writes another.",
        "Frames of a video: 1 x 16 x 33 x 60 x 90, a row a frame; 12% of its tiles hang over the ends of frames and",
        "are not in the count. Where a thread has less than 8 elements the data is tiny, there for its layout: what is",
        "counted is the fixed part of a program, with most of its threads idle. Warps: that fit on a multiprocessor.",
        "Of copy: the share of a copy's bandwidth that `benchmarks/roofline.py` predicts from these numbers.",
        "No GPU was used; nothing here is a time. Made by `python benchmarks/triton_compiled.py`.",
        "",
    ]
    for target in TARGETS:
        rows = [r for r in results if r["target"] == target]
        if not rows:
            continue
        nvidia, gpus = "instructions" in rows[0], PREDICTED.get(target, ())
        heads = ["Kernel", *(["elements a thread", "instructions per element"] if nvidia else []), "registers"]
        heads += [*(["warps"] if nvidia else []), "128-bit loads, stores", "spills", *(f"{g}, of copy" for g in gpus)]
        lines += [f"## {target}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for r in rows:
            cells = [r["case"]]
            if nvidia:
                cells += [f"{r['elements']:g}", f"{r['instructions'] / r['elements']:.1f}"]
            cells += [r["registers"], *([warps(r["registers"])] if nvidia else [])]
            cells += [f"{r['wide_loads']}, {r['wide_stores']}", r["spills"]]
            found = shares(r)
            cells += [f"{100 * found[g]:.0f}%" if g in found else "" for g in gpus]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write JSON here instead of the table")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    options = parser.parse_args()
    results = measured(options.targets)
    if options.json:
        options.json.write_text(json.dumps(results))
    else:
        out = Path(__file__).parent / "results" / "triton_compiled.md"
        out.write_text(table(results))
        print(out, file=sys.stderr)


if __name__ == "__main__":
    main()
