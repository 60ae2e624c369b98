"""The records of the operations: each holds what one operation is asked. ``fastdiff.ops`` checks the arguments and
makes the record, a backend runs it.

``operation`` of a record is the name of the module that runs it, in the package of each backend.

The tensors of a record are on one device and have the shape [batch, ...]. Coefficients are *placed*: they have as many
dimensions as the data, of size 1 where elements share them ([B, 1, 1, 1], or [B, 1, F, 1, 1]). They are float32, or
float64 where the data is float64; None leaves the term out of the formula. Noise is a tensor, or the ``Philox`` to make
it from.

Where a record has ``packed``, the data is sequences one after another instead, [tokens, ...] or [1, tokens, ...]. Then
a sample, and a row, is a sequence: coefficients are [sequences, 1, ...], or of one element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .philox import Philox, Window
from .tensors import Gathered, as_tensor

Noise = Tensor | Philox | None


class Packed(NamedTuple):
    """Where sequences of different lengths lie, one after another in one dimension of the data."""

    starts: Tensor  # int64 [sequences + 1], on the CPU: the first element of each, and how many elements there are
    dim: int  # the dimension: 0, or 1 behind a batch of one

    @property
    def sequences(self) -> int:
        return self.starts.shape[0] - 1

    @property
    def sizes(self) -> Tensor:
        """How many elements each sequence has: int64, on the CPU."""
        return self.starts.diff()

    def lengths(self, shape: Sequence[int]) -> Tensor:
        """How many tokens each sequence of data of ``shape`` has: int64, on the CPU."""
        return self.sizes // math.prod(shape[self.dim + 1 :])

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The sequences, as views."""
        return tensor.split(self.lengths(tensor.shape).tolist(), self.dim)

    def sums(self, values: Tensor) -> Tensor:
        """The sum of each sequence of full-size ``values``: [sequences], in their dtype."""
        sums = [sequence.sum() for sequence in self.split(values)]
        return torch.stack(sums) if sums else values.flatten()

    def rows(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of placed coefficients, one a sequence."""
        return (self.sequences, *(1,) * (len(shape) - 1))

    def spread(self, row: Tensor | Gathered | None, shape: Sequence[int]) -> Tensor | None:
        """A placed coefficient so that it broadcasts to data of ``shape``: each token has that of its sequence."""
        row = as_tensor(row)
        if row is None or row.numel() == 1:
            return row
        lengths = self.lengths(shape).to(row.device, non_blocking=True)
        tokens = row.flatten().repeat_interleave(lengths, output_size=shape[self.dim])
        return tokens.view(*(size if d == self.dim else 1 for d, size in enumerate(shape)))


class UniformCall(NamedTuple):
    """Uniforms in the open interval (0, 1), of 52 random bits each: float64, one a sample [samples], or several
    [samples, count]. Uniform k of a sample is the same for every count."""

    seed: int | Tensor
    samples: int
    stream: int
    sample_offset: int | Tensor = 0  # or ids, int64 [samples]
    device: Any = None
    count: int | None = None

    operation = "uniform"

    @property
    def shape(self) -> tuple[int, ...]:
        """[samples], or [samples, count]."""
        return (self.samples,) if self.count is None else (self.samples, self.count)


class NormalCall(NamedTuple):
    """Standard normals of ``shape``, in ``dtype``; ``rng`` as in ``Philox``. With a ``window`` they are those of a
    slice of each sample."""

    seed: int | Tensor
    shape: tuple[int, ...]
    stream: int = 0
    sample_offset: int | Tensor = 0  # or ids, int64 [samples]
    dtype: torch.dtype = torch.float32
    device: Any = None
    rng: str = "exact"
    window: Window | None = None
    packed: Packed | None = None

    operation = "normal"


class NoiseCall(NamedTuple):
    """x_t = alpha x0 + sigma (n + perturbation xi).

    Its result is (x_t, n): x_t in ``dtype``; n as a tensor of the compute dtype, or as it came if ``keep_noise`` is
    False."""

    x0: Tensor  # [batch, ...]; uint8: images, which stand for x0 / 127.5 - 1
    n: Tensor | Philox  # [batch, ...]
    alpha: Any  # placed
    sigma: Any  # placed
    perturbation: float = 0.0
    xi: Noise = None  # [batch, ...]
    keep_noise: bool = True
    dtype: torch.dtype | None = None  # of x_t; None: that of x0, which then is no image
    order: tuple[int, ...] | None = None  # in which the dimensions of x_t lie in memory; None: as x0
    packed: Packed | None = None

    operation = "noise"

    @property
    def stored(self) -> torch.dtype:
        """The dtype of x_t."""
        return self.x0.dtype if self.dtype is None else self.dtype


class Combination(NamedTuple):
    """A weighted sum of error functions: the strength of each, in the order of ``fastdiff.losses.FUNCTIONS``, and the
    constants of those that have one. One of strength 0 is left out."""

    mse: float = 0.0
    l1: float = 0.0
    smooth_l1: float = 0.0
    pseudo_huber: float = 0.0
    log_cosh: float = 0.0
    c_smooth_l1: float | None = 1.0  # None: the row's c
    c_pseudo_huber: float | None = 1.0

    @property
    def uses_c(self) -> bool:
        """Whether a function takes the row's c."""
        of_row = (self.smooth_l1, self.c_smooth_l1), (self.pseudo_huber, self.c_pseudo_huber)
        return any(strength != 0 and c is None for strength, c in of_row)


class LossCall(NamedTuple):
    """weight * mask * rho(scale * (prediction - (p x0 + q n + r y)); c), summed row by row in float64, then reduced.

    The shape of ``weight`` says what a row is. The result has the compute dtype: that shape for reduction "none", a
    scalar for "mean" and "sum", that of the prediction for "elements", which sums nothing up. An element under a mask
    of 0, and a row of weight 0, add 0, whatever they hold. An error in another error space is the same operation with
    another ``scale``. The prediction may lie in memory in another order than x0; its gradient lies as it does."""

    prediction: Tensor  # [batch, ...]
    x0: Tensor | None  # [batch, ...]; uint8: images, as in NoiseCall
    n: Noise  # [batch, ...]
    p: Any  # placed
    q: Any  # placed
    scale: Any  # placed
    weight: Any  # placed
    c: Any = None  # placed
    mask: Tensor | None = None  # broadcasts to the prediction
    y: Tensor | None = None  # [batch, ...]
    r: Any = None  # placed
    function: str | Combination = "mse"
    mask_normalization: str = "none"
    reduction: str = "mean"
    packed: Packed | None = None

    operation = "loss"


class GaussianCall(NamedTuple):
    """weight * rho + simple_weight * e^2, summed row by row in float64, then reduced: a term of the variational bound.

    e = prediction - (p x0 + q n), the means differ by d = scale e, and the model's log-variance is L = l_0 + l_v v.
    rho, in nats, is chosen by ``half_width``: see ``fastdiff.ops.gaussian_kl``. The shape of ``weight`` says what a row
    is. The result has the compute dtype: that shape for reduction "none", a scalar for "mean" and "sum". A term of
    weight 0 adds 0, whatever the row holds."""

    output: Tensor  # [batch, channels, ...]; with l_v [batch, 2 channels, ...]: the prediction, and v behind it
    x0: Tensor | None  # [batch, channels, ...]
    n: Noise  # [batch, channels, ...]
    p: Any  # placed
    q: Any  # placed
    scale: Any  # placed
    l_0: Any  # placed
    l_v: Any  # placed
    l_q: Any  # placed
    half_width: Any  # placed; negative, or None: KL divergence. 0: density. Positive: bin
    weight: Any  # placed
    simple_weight: Any = None  # placed
    freeze_mean: bool = False
    reduction: str = "mean"

    operation = "gaussian_kl"

    @property
    def halves(self) -> tuple[Tensor, Tensor | None]:
        """(the prediction, v), views of ``output``; v is None without l_v."""
        return halves_of(self.output) if self.l_v is not None else (self.output, None)

    @property
    def shape(self) -> torch.Size:
        """The shape of the prediction."""
        return self.halves[0].shape


class PosteriorCall(NamedTuple):
    """Latents of an autoencoder's moments, and their noising: z = (mean + exp(log-variance / 2) xi - shift) scale and
    x_t = alpha z + sigma n, of z as it is stored.

    The log-variance is clamped to [least, most]; where it is, its gradient is 0. Its result is (z, x_t, n): z and x_t
    in ``dtype``, x_t None without noise; n as a tensor of the compute dtype, or as it came if ``keep_noise`` is
    False."""

    moments: Tensor  # [batch, 2 channels, ...]: the means, and the log-variances behind them
    xi: Noise  # [batch, channels, ...]; None: z is made of the mean
    shift: Any  # placed
    scale: Any  # placed; never None
    n: Noise = None  # [batch, channels, ...]; None: no x_t
    alpha: Any = None  # placed
    sigma: Any = None  # placed
    least: float = -30.0
    most: float = 20.0
    dtype: torch.dtype = torch.float32
    keep_noise: bool = True

    operation = "posterior"

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        """(the means, the log-variances), views of ``moments``."""
        return halves_of(self.moments)

    @property
    def shape(self) -> torch.Size:
        """The shape of z."""
        return self.halves[0].shape


class KLNormalCall(NamedTuple):
    """weight * KL(N(mean, exp(log-variance)) || N(0, 1)), summed row by row in float64, then reduced.

    The log-variance is clamped to [least, most]; where it is, its gradient is 0. The shape of ``weight`` says what a
    row is. The result has the compute dtype: that shape for reduction "none", a scalar for "mean" and "sum". A row of
    weight 0 adds 0, whatever it holds."""

    moments: Tensor  # [batch, 2 channels, ...]: the means, and the log-variances behind them
    weight: Any  # placed
    least: float = -30.0
    most: float = 20.0
    reduction: str = "mean"

    operation = "kl_normal"

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        """(the means, the log-variances), views of ``moments``."""
        return halves_of(self.moments)

    @property
    def shape(self) -> torch.Size:
        """The shape of the means."""
        return self.halves[0].shape


class ConvertCall(NamedTuple):
    """k_x x_t + k_m m, in the dtype of m."""

    m: Tensor  # [batch, ...]
    x_t: Tensor  # [batch, ...]
    k_x: Any  # placed
    k_m: Any  # placed

    operation = "convert"


class RowMomentsCall(NamedTuple):
    """Sums over the elements of each row, in float64 on the CPU: see ``fastdiff.ops.row_moments``.

    The result is a tuple in the order of ``fastdiff.codes.MOMENTS``: tensors of ``row_shape`` in ``dtype``, None for
    the moments that need the absent b."""

    a: Tensor  # [batch, ...]
    b: Tensor | None  # [batch, ...]
    rows: tuple[int, ...]  # the shape of the rows as placed
    row_shape: tuple[int, ...]  # the same, as the results have it
    dtype: torch.dtype  # the compute dtype

    operation = "row_moments"


class StepCall(NamedTuple):
    """One sampler step: see ``fastdiff.ops.step``. Its result is (y, x0 estimate, history entry); the last two are None
    where they are not wanted."""

    x: Tensor  # [batch, ...]
    m: Tensor  # [batch, ...]
    row: Tensor  # [columns], or one a sample [batch, columns]: fastdiff.codes.COLUMNS
    uncond: Tensor | None = None  # [batch, ...]
    guidance: Tensor | float = 1.0  # placed
    clip: float | None = None
    history: tuple[Tensor, ...] = ()  # [batch, ...] each, the latest first
    noise: Noise = None  # [batch, ...]
    log_variance: Tensor | None = None  # [batch, ...]
    dtype: torch.dtype | None = None  # the dtype of y and x0; None: the dtype of x
    want_x0: bool = True
    want_entry: bool = True
    threshold: Tensor | None = None  # placed
    mask: Tensor | None = None  # broadcasts to x
    known: Tensor | None = None  # [batch, ...]
    known_noise: Noise = None  # [batch, ...]
    model_input: Tensor | None = None  # [batch, ...] or [2 batch, ...]; it is overwritten with c_in y

    operation = "step"

    @property
    def data(self) -> tuple[Any, ...]:
        """The operands of the size of x, without the mask and ``model_input``."""
        more = (self.noise, self.log_variance, self.known, self.known_noise)
        return (self.x, self.m, self.uncond, *self.history, *more)


class RunCall(NamedTuple):
    """A run of sampler steps: see ``fastdiff.ops.trajectory``."""

    x: Tensor  # [batch, ...]
    steps: Any  # fastdiff.ops.PreparedSteps
    guidance: Tensor | float = 1.0
    clip: float | None = None
    mask: Tensor | None = None
    known: Tensor | None = None
    known_noise: Noise = None
    philox: Philox | None = None
    reuse: bool = False


Call = (
    UniformCall
    | NormalCall
    | NoiseCall
    | LossCall
    | GaussianCall
    | PosteriorCall
    | KLNormalCall
    | ConvertCall
    | RowMomentsCall
    | StepCall
)


def halves_of(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the two halves of dimension 1."""
    half = tensor.shape[1] // 2
    return tensor.narrow(1, 0, half), tensor.narrow(1, half, half)


def made_from(noise: Noise) -> tuple[Any, ...]:
    """The seed of noise that is made from one, and which samples it is of; () for a tensor."""
    return noise.made_from if isinstance(noise, Philox) else ()
