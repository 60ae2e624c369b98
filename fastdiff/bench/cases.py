"""What is measured: the cases, the presets that choose among them, and the tensors they work on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..tokens import Tokens
from . import BenchError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = ("epsilon", "v_prediction", "flow")
_OF_EACH_KIND = (
    "noising",
    "loss",
    "loss+gradient",
    "training step",
    "sampler step",
    "sampler step+noise",
    "row moments",
)
# Those of a network's output of twice the channels: ``Operands.output``.
OF_HALVES = ("hybrid loss", "latents", "divergence+gradient")
AT_ONCE = "loss and gradient"
OPERATIONS = (*_OF_EACH_KIND, *OF_HALVES, "noising images", "noising+loss of tokens", AT_ONCE)
PATCH = 2  # of tokens, which are packed as Flux packs them

LATENT = (1, 4, 32, 32)
LATENTS = (64, 4, 64, 64)
PIXELS = (16, 3, 256, 256)
LARGE = (16, 3, 512, 512)
VIDEO = (1, 16, 33, 60, 90)


@dataclass(frozen=True)
class Case:
    """One thing that is measured.

    Attributes:
        operation: one of ``OPERATIONS``. Noising, the losses and the sampler step are given their noise; a training
            step (t, noise, loss, gradient of the prediction) and "sampler step+noise" make it. The hybrid loss is that
            of a network that predicts epsilon and learns the variance, with its gradient. Latents are drawn from an
            autoencoder's moments and noised, both noises made; the divergence is that of these moments from N(0, 1),
            with its gradient. The moments of rows are those of x0 and the prediction. The images are of uint8. The
            tokens are those that the network sees and predicts: x_t is packed, and the loss, with its gradient, takes
            the prediction as it is; the noise is given. "loss and gradient" is the loss with its gradient, ours by
            ``Objective.loss_and_gradient``.
        kind: what the network predicts. The sampler is DDPM with a clamp; Euler for "flow".
        dtype: a key of ``DTYPES``.
        shape: [batch, ...].
    """

    operation: str
    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.operation} {self.kind} {self.dtype} {self.size}"

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one tensor of this case."""
        return self.elements * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Preset:
    """Which cases, and how long to take.

    Attributes:
        shapes, kinds, operations, dtypes: all their combinations are measured.
        extra: cases besides.
        seconds: the time the whole run should take on a machine with two cores, the compiler's aside.
        compile_seconds: torch.compile begins no further graph after so many; graphs it made before are in its cache.
    """

    shapes: tuple[tuple[int, ...], ...]
    kinds: tuple[str, ...] = KINDS
    operations: tuple[str, ...] = _OF_EACH_KIND
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    extra: tuple[Case, ...] = ()
    seconds: float = 60.0
    compile_seconds: float = 60.0


# Between one latent and a batch of them: where the host's time stops to matter.
_LADDER = tuple(Case("training step", "v_prediction", "fp32", (batch, 4, 64, 64)) for batch in (1, 4, 16))
_SHORT_LADDER = _LADDER[1:2]
# The largest size of one kind: a call of the others takes a tenth of a second and more.
_LARGE = tuple(
    Case(operation, "v_prediction", dtype, LARGE) for operation in _OF_EACH_KIND for dtype in ("fp32", "bf16")
)
_HALVES = tuple(Case(operation, "epsilon", dtype, LATENTS) for operation in OF_HALVES for dtype in ("fp32", "bf16"))
_OTHER_DATA = tuple(
    Case(operation, "flow", dtype, shape)
    for operation, shape in (("noising images", PIXELS), ("noising+loss of tokens", (4, 16, 128, 128)))
    for dtype in ("fp32", "bf16")
)

_AT_ONCE = tuple(
    Case(AT_ONCE, "v_prediction", dtype, shape) for shape in (LATENT, LATENTS) for dtype in ("fp32", "bf16")
)
# Chunks of actions that policies for robots predict: of 16 actions by a 1-D U-Net, of 50 by a transformer.
ACTIONS = ((64, 16, 7), (64, 16, 14), (256, 16, 14), (64, 50, 32), (1024, 16, 32))

PRESETS = {
    "quick": Preset(
        (LATENT, LATENTS),
        ("v_prediction",),
        ("noising", "loss+gradient", "training step", "sampler step"),
        extra=_SHORT_LADDER,
        seconds=10.0,
        compile_seconds=16.0,
    ),
    "full": Preset(
        (LATENT, LATENTS, VIDEO, PIXELS),
        extra=_LADDER + _LARGE + _HALVES + _OTHER_DATA + _AT_ONCE,
        seconds=60.0,
        compile_seconds=60.0,
    ),
    "sdxl": Preset(((1, 4, 128, 128), (4, 4, 128, 128), (16, 4, 128, 128)), ("epsilon", "v_prediction")),
    "flux": Preset(((1, 4096, 64), (8, 4096, 64)), ("flow",)),
    "video": Preset((VIDEO, (1, 16, 21, 60, 104)), ("v_prediction", "flow")),
    "pixel": Preset((PIXELS, LARGE), ("epsilon", "v_prediction")),
    "policy": Preset(ACTIONS, ("epsilon", "flow"), (*_OF_EACH_KIND, AT_ONCE)),
    "sampler": Preset((LATENT, (4, 4, 128, 128), LATENTS, PIXELS), operations=("sampler step", "sampler step+noise")),
}


_TORCH_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def choose(preset: str, dtypes: Iterable[str] | None = None) -> list[Case]:
    """The cases of a preset, small ones first. Raises BenchError for an unknown preset or dtype."""
    if preset not in PRESETS:
        raise BenchError(f"unknown preset {preset!r}: use one of {', '.join(PRESETS)}.")
    chosen = PRESETS[preset]
    dtypes = chosen.dtypes if dtypes is None else tuple(_TORCH_NAMES.get(dtype, dtype) for dtype in dtypes)
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise BenchError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}.")
    cases = [
        Case(operation, kind, dtype, shape)
        for shape in chosen.shapes
        for dtype in dtypes
        for operation in chosen.operations
        for kind in chosen.kinds
        if not _is_another(operation, kind, chosen.kinds)
    ]
    cases += [case for case in chosen.extra if case.dtype in dtypes]
    return sorted(dict.fromkeys(cases), key=lambda case: (case.elements, case.shape))


def _is_another(operation: str, kind: str, kinds: tuple[str, ...]) -> bool:
    """Whether a combination is measured as another one, or is none: noising is the same for epsilon and v, row moments
    for all kinds, and Euler's method draws no noise."""
    if operation == "row moments":
        return kind != kinds[0]
    if operation == "noising":
        return kind == "v_prediction" and "epsilon" in kinds
    return operation == "sampler step+noise" and (kind == "flow" or (kind == "v_prediction" and "epsilon" in kinds))


@dataclass
class Operands:
    """The tensors of a case, of one shape and dtype.

    Attributes:
        x0: data; the sample x_t of a sampler step.
        noise: noise where it is given.
        prediction: the network's output, a leaf that requires grad.
        t: integers below 1000, [batch].
        time: the same as a flow's time in (0, 1), float32 [batch].
    """

    x0: Tensor
    noise: Tensor
    prediction: Tensor
    t: Tensor
    time: Tensor

    @cached_property
    def output(self) -> Tensor:
        """The output of a network that learns the variance too, [batch, 2 channels, ...]: the prediction, and what it
        says of the variance; or an autoencoder's moments. A leaf that requires grad, made at its first use."""
        return torch.cat([self.prediction.detach(), 0.1 * self.prediction.detach()], 1).requires_grad_()

    @cached_property
    def images(self) -> Tensor:
        """uint8 images, made of x0 at their first use."""
        return ((self.x0.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    @cached_property
    def tokens(self) -> Tensor:
        """The prediction as packed tokens. A leaf that requires grad, made at its first use."""
        return Tokens(PATCH).pack(self.prediction.detach()).requires_grad_()


def operands(shape: tuple[int, ...], dtype: str, device: torch.device, seed: int = 0) -> Operands:
    """Fresh operands."""
    generator = torch.Generator(device).manual_seed(seed)
    x0, noise, prediction = (torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype]) for _ in range(3))
    t = torch.randint(0, 1000, shape[:1], generator=generator, device=device)
    return Operands(x0, noise, prediction.requires_grad_(), t, (t + 0.5) / 1000)


def operand_bytes(case: Case) -> int:
    """Bytes of one set of operands, gradients among them."""
    more = dict.fromkeys(OF_HALVES, 4) | {"noising images": 1, "noising+loss of tokens": 2}
    return (4 + more.get(case.operation, 0)) * case.tensor_bytes
