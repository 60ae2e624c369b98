"""The methods of diffusers that the fused ones were made for, by their ``digest``: those of 0.42.1,
and of versions back to 0.34 where they differ in line breaks, in what is moved to which device, or (FlowMatchEuler) in
how the noise of stochastic sampling is drawn."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from functools import cache
from typing import Any

# diffusers.utils.torch_utils.randn_tensor, by which its schedulers draw.
RANDN_TENSOR = ("a5da31ee40e1", "6ae270e9653d")

KNOWN: dict[str, tuple[str, ...]] = {
    "DDIMParallelScheduler._get_variance": ("cb6106ca23d1",),
    "DDIMParallelScheduler._threshold_sample": ("35d85792db7a",),
    "DDIMParallelScheduler.add_noise": ("9abf10ec89df",),
    "DDIMParallelScheduler.get_velocity": ("98be1a15e178",),
    "DDIMParallelScheduler.step": ("b89557667cec",),
    "DDIMScheduler._get_variance": ("12b62c5b2eed",),
    "DDIMScheduler._threshold_sample": ("35d85792db7a",),
    "DDIMScheduler.add_noise": ("9abf10ec89df",),
    "DDIMScheduler.get_velocity": ("98be1a15e178",),
    "DDIMScheduler.step": ("669840d65e5a",),
    "DDPMParallelScheduler._get_variance": ("9ec98c58c49b",),
    "DDPMParallelScheduler._threshold_sample": ("35d85792db7a",),
    "DDPMParallelScheduler.add_noise": ("9abf10ec89df",),
    "DDPMParallelScheduler.get_velocity": ("98be1a15e178",),
    "DDPMParallelScheduler.previous_timestep": ("158de1e77bfc",),
    "DDPMParallelScheduler.step": ("4eac4a707d4d",),
    "DDPMScheduler._get_variance": ("9ec98c58c49b",),
    "DDPMScheduler._threshold_sample": ("35d85792db7a",),
    "DDPMScheduler.add_noise": ("9abf10ec89df",),
    "DDPMScheduler.get_velocity": ("98be1a15e178",),
    "DDPMScheduler.previous_timestep": ("158de1e77bfc",),
    "DDPMScheduler.step": ("569e5beb30c0",),
    "DPMSolverMultistepScheduler._sigma_to_alpha_sigma_t": ("ca225146b46d",),
    "DPMSolverMultistepScheduler._threshold_sample": ("35d85792db7a",),
    "DPMSolverMultistepScheduler.add_noise": ("88e2ca9a240a",),
    "DPMSolverMultistepScheduler.convert_model_output": ("deeca38ecb21",),
    "DPMSolverMultistepScheduler.dpm_solver_first_order_update": ("a18fea4d2211", "a04a75c17fc6"),
    "DPMSolverMultistepScheduler.index_for_timestep": ("ce5bc48edb6c",),
    "DPMSolverMultistepScheduler.multistep_dpm_solver_second_order_update": ("ef45ec00abc5",),
    "DPMSolverMultistepScheduler.multistep_dpm_solver_third_order_update": ("7b6b4ab8c52e",),
    "DPMSolverMultistepScheduler.step": ("ceaaa7ea9876",),
    "EDMEulerScheduler.add_noise": ("1e111a957217",),
    "EDMEulerScheduler.index_for_timestep": ("5edad51bfd3b",),
    "EDMEulerScheduler.precondition_inputs": ("84e04abd7f6a",),
    "EDMEulerScheduler.precondition_outputs": ("f8954555e142",),
    "EDMEulerScheduler.scale_model_input": ("76ed6a511441",),
    "EDMEulerScheduler.step": ("b8e77a2e9722",),
    "EulerAncestralDiscreteScheduler.add_noise": ("1e111a957217",),
    "EulerAncestralDiscreteScheduler.index_for_timestep": ("5edad51bfd3b",),
    "EulerAncestralDiscreteScheduler.scale_model_input": ("a300109eae99",),
    "EulerAncestralDiscreteScheduler.step": ("5d0e28661221",),
    "EulerDiscreteScheduler.add_noise": ("1e111a957217",),
    "EulerDiscreteScheduler.get_velocity": ("9f206bf8fc42",),
    "EulerDiscreteScheduler.index_for_timestep": ("5edad51bfd3b",),
    "EulerDiscreteScheduler.scale_model_input": ("a300109eae99",),
    "EulerDiscreteScheduler.step": ("519481d6c0bb",),
    "FlowMatchEulerDiscreteScheduler.index_for_timestep": ("5edad51bfd3b",),
    "FlowMatchEulerDiscreteScheduler.scale_noise": ("a05661286bd2",),
    "FlowMatchEulerDiscreteScheduler.step": ("cf84927864b1", "2ec66272ad73"),
    "FlowMatchHeunDiscreteScheduler.scale_noise": ("9e48ee4f0e78",),
    "FlowMatchHeunDiscreteScheduler.state_in_first_order": ("fceeb10fd52d",),
    "FlowMatchHeunDiscreteScheduler.step": ("0f19d583856a",),
    "HeunDiscreteScheduler.add_noise": ("1e111a957217",),
    "HeunDiscreteScheduler.index_for_timestep": ("5edad51bfd3b",),
    "HeunDiscreteScheduler.scale_model_input": ("975bb1a2613e",),
    "HeunDiscreteScheduler.state_in_first_order": ("fceeb10fd52d",),
    "HeunDiscreteScheduler.step": ("88b1aff5cff9",),
    "LCMScheduler._threshold_sample": ("35d85792db7a",),
    "LCMScheduler.add_noise": ("9abf10ec89df",),
    "LCMScheduler.get_scalings_for_boundary_condition_discrete": ("95f54a1a1920",),
    "LCMScheduler.get_velocity": ("98be1a15e178",),
    "LCMScheduler.step": ("e3fe8fc4925e",),
    "UniPCMultistepScheduler._sigma_to_alpha_sigma_t": ("ca225146b46d",),
    "UniPCMultistepScheduler._threshold_sample": ("35d85792db7a",),
    "UniPCMultistepScheduler.add_noise": ("88e2ca9a240a",),
    "UniPCMultistepScheduler.convert_model_output": ("7c92cbf3aa30",),
    "UniPCMultistepScheduler.index_for_timestep": ("ce5bc48edb6c",),
    "UniPCMultistepScheduler.multistep_uni_c_bh_update": ("fd518a3a9296", "8a443b86a02b"),
    "UniPCMultistepScheduler.multistep_uni_p_bh_update": ("ae1aff0f90b4", "965a4db715fb"),
    "UniPCMultistepScheduler.step": ("3da66493da24",),
}


def digest(source: str) -> str:
    """A digest of what a function does, from its source: its parameters, and its code without comments, docstring,
    annotations and line breaks."""
    text = textwrap.dedent(source)
    function = ast.parse(text).body[0]
    if not isinstance(function, ast.FunctionDef):
        raise SyntaxError("not the definition of a function")
    body, arguments = function.body, function.args
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    names = [argument.arg for argument in arguments.args + arguments.kwonlyargs]
    defaults = [ast.get_source_segment(text, default) for default in arguments.defaults]
    lines = text.splitlines()[body[0].lineno - 1 :] if body else []
    code = "".join(line for line in map(_code, lines) if line).replace(" ", "").replace(",)", ")").replace(",]", "]")
    return hashlib.sha256(f"{names}{defaults}{code}".encode()).hexdigest()[:12]


def _code(line: str) -> str:
    line = line.split("  # ")[0].strip()
    return "" if line.startswith("#") else line


@cache
def fingerprint(function: Any) -> str | None:
    """``digest`` of a method or property, from its own code; None if the source is not there."""
    function = function.fget if isinstance(function, property) else function
    try:
        return digest(inspect.getsource(function.__code__))
    except (AttributeError, OSError, SyntaxError):
        return None
