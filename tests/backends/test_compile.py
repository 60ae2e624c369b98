"""The operators that torch.compile sees: opcheck of each, and compiled training steps against eager ones."""

import math

import pytest
import torch
from asked import reference
from devices import in_turn
from torch._dynamo.testing import CompileCounterWithBackend

import fastdiff
from fastdiff.calls import Combination, ConvertCall, NoiseCall, PosteriorCall, RunCall
from fastdiff.ops import operators as compiled
from fastdiff.ops.operators import declaring
from fastdiff.philox import Window

OPS = torch.ops.fastdiff
SEED = torch.tensor([11])


def data(*shape, dtype=torch.float32, grad=False, channels_last=False):
    x = torch.randn(shape).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    return x.requires_grad_(grad)


def images():
    return torch.randint(0, 256, (3, 2, 4, 5), dtype=torch.uint8)


def rows(batch=3):
    return torch.rand(batch, 1, 1, 1) + 0.5


def given(*, grad=False, dtype=torch.float32):
    return (data(3, 2, 4, 5, grad=grad, dtype=dtype), None, 0, 0, None, 0.0, "exact")


UNPACKED = None, None
PACKED = torch.tensor([0, 40, 40, 120]), 0  # in data of [3, 2, 4, 5]: sequences of one, no and two tokens
SMOOTH = ("smooth_l1", [], "none", "sum")
COMBINED = [0.5, 0.0, 0.3, 0.2, 0.1, 0.4, math.nan]  # strengths and constants: that of pseudo-Huber is the row's
IDS = torch.tensor([7, 2**40, 7])
MADE, NONE = (None, SEED, 0, 5, None, 0.1, "exact"), (None, None, 0, 0, None, 0.0, "exact")
XI = (None, SEED, 2, 5, None, 0.0, "exact")
UNSHIFTED = (None, SEED, 0, 5, None, 0.0, "exact")
BY_ID = (None, SEED, 0, 0, IDS, 0.1, "exact")


def loss_arguments(
    n, *, weight=None, mask=None, how=("mse", "none", "mean"), dtype=torch.float32, grad=True, third=False, x0=None,
    packed=UNPACKED, parts=(),
):  # fmt: skip
    c = rows() if how[0] in ("pseudo_huber", "combined") else None
    weight = rows() if weight is None else weight
    prediction, x0 = data(3, 2, 4, 5, dtype=dtype, grad=grad), data(3, 2, 4, 5) if x0 is None else x0
    y, r = (data(3, 2, 4, 5), rows()) if third else (None, None)
    function, *how = how
    return (prediction, weight, x0, *n, rows(), rows(), None, c, mask, y, r, function, list(parts), *how, *packed)


def gaussian_arguments(n, *, learned=True, grad=True, how=(False, "mean"), dtype=torch.float32, channels_last=False):
    """Rows of each kind; the weights are those of a hybrid loss."""
    output = data(3, 4 if learned else 2, 4, 5, dtype=dtype, grad=grad, channels_last=channels_last)
    half_width = torch.tensor([-1.0, 0.0, 0.1]).view(3, 1, 1, 1)
    coefficients = rows(), rows(), rows(), rows(), rows() if learned else None, rows(), half_width, rows()
    return (output, rows(), data(3, 2, 4, 5), *n, *coefficients, *how)


PATCHES, TOKENS = (3, 2, 2, 2, 3, 2), [0, 2, 4, 1, 3, 5]


def as_tokens(x):
    """In the memory order of tokens."""
    return x.permute(TOKENS).contiguous().permute([TOKENS.index(d) for d in range(6)])


def patch_rows():
    return torch.rand(3, 1, 1, 1, 1, 1) + 0.5


def of_tokens(reduction="mean"):
    return patch_rows(), patch_rows(), *(None,) * 5, "mse", [], "none", reduction, *UNPACKED


CASES = {
    "uniform": (OPS.uniform, lambda: (SEED, 5, 3, 0, None, None)),
    "uniform by id": (OPS.uniform, lambda: (SEED, 3, 3, 0, IDS, None)),
    "uniforms of a sample": (OPS.uniform, lambda: (SEED, 3, 3, 0, IDS, 5)),
    "normal": (OPS.normal, lambda: (SEED, [3, 2, 5], 0, 4, None, torch.float32, "exact", None, None, *UNPACKED)),
    "normal by id": (OPS.normal, lambda: (SEED, [3, 2, 5], 0, 0, IDS, torch.float32, "exact", None, None, *UNPACKED)),
    "normal of a slice": (
        OPS.normal,
        lambda: (SEED, [3, 2, 5], 0, 4, None, torch.float32, "exact", [4, 6], [1, 1], *UNPACKED),
    ),
    "noise given": (
        OPS.noise,
        lambda: (data(3, 2, 4, 5), *given(), rows(), rows(), 0.0, *NONE, True, None, None, *UNPACKED),
    ),
    "noise with gradients": (
        OPS.noise,
        lambda: (
            data(3, 2, 4, 5, grad=True),
            *given(grad=True),
            rows(),
            rows(),
            0.0,
            *NONE,
            True,
            None,
            None,
            *UNPACKED,
        ),
    ),
    "noise made": (
        OPS.noise,
        lambda: (data(3, 2, 4, 5, grad=True), *MADE, rows(), rows(), 0.1, *XI, True, None, None, *UNPACKED),
    ),
    "noise made by id": (
        OPS.noise,
        lambda: (data(3, 2, 4, 5, grad=True), *BY_ID, rows(), rows(), 0.1, *XI, True, None, None, *UNPACKED),
    ),
    "noise made, not kept": (
        OPS.noise,
        lambda: (
            data(3, 2, 4, 5, dtype=torch.bfloat16),
            *MADE,
            rows(),
            rows(),
            0.0,
            *NONE,
            False,
            None,
            None,
            *UNPACKED,
        ),
    ),
    "noise of channels_last": (
        OPS.noise,
        lambda: (
            data(3, 2, 4, 5, channels_last=True),
            *given(),
            rows(),
            rows(),
            0.0,
            *NONE,
            True,
            None,
            None,
            *UNPACKED,
        ),
    ),
    "noise of images": (
        OPS.noise,
        lambda: (images(), *given(grad=True), rows(), rows(), 0.0, *NONE, True, torch.bfloat16, None, *UNPACKED),
    ),
    "noise of tokens": (
        OPS.noise,
        lambda: (
            data(*PATCHES, grad=True),
            *MADE,
            patch_rows(),
            patch_rows(),
            0.0,
            *NONE,
            True,
            None,
            TOKENS,
            *UNPACKED,
        ),
    ),
    "loss of tokens": (
        OPS.loss,
        lambda: (as_tokens(data(*PATCHES)).requires_grad_(), patch_rows(), data(*PATCHES), *MADE, *of_tokens()),
    ),
    "gradient of tokens": (
        OPS.loss_gradient,
        lambda: (
            torch.tensor(2.0),
            as_tokens(data(*PATCHES)),
            patch_rows(),
            data(*PATCHES),
            *MADE,
            *of_tokens(),
        ),
    ),
    "loss of tokens by elements": (
        OPS.loss,
        lambda: (
            as_tokens(data(*PATCHES)).requires_grad_(),
            patch_rows(),
            data(*PATCHES),
            *MADE,
            *of_tokens("elements"),
        ),
    ),
    "gradient of tokens by elements": (
        OPS.loss_gradient,
        lambda: (
            as_tokens(data(*PATCHES)),
            as_tokens(data(*PATCHES)),
            patch_rows(),
            data(*PATCHES),
            *MADE,
            *of_tokens("elements"),
        ),
    ),
    "loss by elements": (
        OPS.loss,
        lambda: loss_arguments(
            MADE, mask=torch.rand(3, 1, 4, 5) > 0.5, how=("l1", "none", "elements"), dtype=torch.bfloat16
        ),
    ),
    "gradient by elements": (
        OPS.loss_gradient,
        lambda: (data(3, 2, 4, 5), *loss_arguments(given(), how=("mse", "none", "elements"), grad=False)),
    ),
    "loss combined": (
        OPS.loss,
        lambda: loss_arguments(
            given(), weight=rows().requires_grad_(), how=("combined", "none", "mean"), parts=COMBINED
        ),
    ),
    "loss combined, by elements": (
        OPS.loss,
        lambda: loss_arguments(given(), how=("combined", "none", "elements"), parts=COMBINED, packed=PACKED),
    ),
    "loss of images": (OPS.loss, lambda: loss_arguments(MADE, x0=images())),
    "loss": (OPS.loss, lambda: loss_arguments(given())),
    "loss with made noise": (OPS.loss, lambda: loss_arguments(MADE, dtype=torch.bfloat16)),
    "loss with noise made by id": (OPS.loss, lambda: loss_arguments(BY_ID)),
    "loss with a learned weight": (OPS.loss, lambda: loss_arguments(given(), weight=rows().requires_grad_())),
    "loss summed with a learned weight": (
        OPS.loss,
        lambda: loss_arguments(given(), weight=rows().requires_grad_(), how=("l1", "none", "sum")),
    ),
    "loss per row, masked": (
        OPS.loss,
        lambda: loss_arguments(
            given(),
            weight=rows().requires_grad_(),
            mask=torch.rand(3, 1, 4, 5) > 0.5,
            how=("pseudo_huber", "row", "none"),
        ),
    ),
    "loss with a global mask": (
        OPS.loss,
        lambda: loss_arguments(given(), mask=torch.rand(3, 2, 4, 5), how=("log_cosh", "global", "mean")),
    ),
    "loss with a scale": (
        OPS.loss,
        lambda: (
            data(3, 2, 4, 5, grad=True),
            rows(),
            None,
            *MADE,
            None,
            rows(),
            rows(),
            rows(),
            *(None,) * 3,
            *SMOOTH,
            *UNPACKED,
        ),
    ),
    "loss with a third operand": (OPS.loss, lambda: loss_arguments(MADE, third=True, weight=rows().requires_grad_())),
    "normal, packed": (
        OPS.normal,
        lambda: (SEED, [3, 2, 4, 5], 0, 0, IDS, torch.float32, "exact", None, None, *PACKED),
    ),
    "noise, packed": (
        OPS.noise,
        lambda: (data(3, 2, 4, 5, grad=True), *UNSHIFTED, rows(), rows(), 0.1, *XI, True, None, None, *PACKED),
    ),
    "loss, packed": (OPS.loss, lambda: loss_arguments(UNSHIFTED, weight=rows().requires_grad_(), packed=PACKED)),
    "loss, packed, summed": (
        OPS.loss,
        lambda: loss_arguments(given(), weight=rows().requires_grad_(), how=("l1", "none", "sum"), packed=PACKED),
    ),
    "loss, packed, by row": (
        OPS.loss,
        lambda: loss_arguments(given(), weight=rows().requires_grad_(), how=("mse", "row", "mean"), packed=PACKED),
    ),
    "loss, packed, per row, masked": (
        OPS.loss,
        lambda: loss_arguments(
            given(), mask=torch.rand(3, 1, 4, 5) > 0.5, how=("pseudo_huber", "row", "none"), packed=PACKED
        ),
    ),
    "gradient, packed": (
        OPS.loss_gradient,
        lambda: (torch.tensor(0.5), *loss_arguments(given(), grad=False, packed=PACKED)),
    ),
    "gradient": (OPS.loss_gradient, lambda: (torch.tensor(0.5), *loss_arguments(given(), grad=False))),
    "gradient along with the loss": (
        OPS.loss_and_gradient,
        lambda: (torch.tensor(0.5), *loss_arguments(given(), grad=False, dtype=torch.float16, third=True)),
    ),
    "gradient along with the means of rows, channels_last": (
        OPS.loss_and_gradient,
        lambda: (
            rows(),
            data(3, 2, 4, 5, channels_last=True),
            *loss_arguments(MADE, grad=False, how=("mse", "none", "none"))[1:],
        ),
    ),
    "gradient along with the loss, packed": (
        OPS.loss_and_gradient,
        lambda: (torch.tensor(0.5), *loss_arguments(given(), grad=False, packed=PACKED)),
    ),
    "gradient of channels_last": (
        OPS.loss_gradient,
        lambda: (
            torch.tensor(2.0),
            data(3, 2, 4, 5, channels_last=True),
            *loss_arguments(MADE, grad=False)[1:],
        ),
    ),
    "gaussian_kl": (OPS.gaussian_kl, lambda: gaussian_arguments(given())),
    "gaussian_kl with made noise": (OPS.gaussian_kl, lambda: gaussian_arguments(MADE, dtype=torch.bfloat16)),
    "gaussian_kl per row, of a frozen mean": (
        OPS.gaussian_kl,
        lambda: gaussian_arguments(given(), channels_last=True, how=(True, "none")),
    ),
    "gaussian_kl summed, of a variance that is not learned": (
        OPS.gaussian_kl,
        lambda: gaussian_arguments(given(), learned=False, how=(False, "sum")),
    ),
    "gradient of gaussian_kl": (
        OPS.gaussian_kl_gradient,
        lambda: (torch.tensor(0.5), *gaussian_arguments(MADE, grad=False)),
    ),
    "posterior": (
        OPS.posterior,
        lambda: posterior_arguments(XI, given(), data(3, 4, 4, 5, dtype=torch.bfloat16, grad=True)),
    ),
    "posterior with made noise, in another dtype": (
        OPS.posterior,
        lambda: posterior_arguments(given(), MADE, data(3, 4, 4, 5, grad=True), dtype=torch.bfloat16),
    ),
    "posterior's mean, of channels_last": (
        OPS.posterior,
        lambda: posterior_arguments(NONE, NONE, data(3, 4, 4, 5, channels_last=True, grad=True)),
    ),
    "gradient of posterior": (
        OPS.posterior_gradient,
        lambda: (data(3, 2, 4, 5), data(3, 2, 4, 5), *posterior_arguments(XI, MADE, data(3, 4, 4, 5))),
    ),
    "gradient of posterior by one result": (
        OPS.posterior_gradient,
        lambda: (
            data(3, 2, 4, 5),
            None,
            *posterior_arguments(XI, NONE, data(3, 4, 4, 5, dtype=torch.bfloat16, channels_last=True)),
        ),
    ),
    "kl_normal": (OPS.kl_normal, lambda: (data(3, 4, 4, 5, grad=True), rows(), -30.0, 20.0, "mean")),
    "kl_normal per row, channels_last": (
        OPS.kl_normal,
        lambda: (data(3, 4, 4, 5, channels_last=True, grad=True), torch.rand(3, 2, 1, 1), -1.0, 1.0, "none"),
    ),
    "gradient of kl_normal": (
        OPS.kl_normal_gradient,
        lambda: (torch.tensor(0.5), data(3, 4, 4, 5, dtype=torch.bfloat16), rows(), -30.0, 20.0, "sum"),
    ),
    "convert": (OPS.convert, lambda: (data(3, 2, 4, 5, grad=True), data(3, 2, 4, 5, grad=True), rows(), rows())),
    "moments": (OPS.row_moments, lambda: moments_arguments(data(3, 2, 4, 5, grad=True))),
    "moments of one, channels_last": (
        OPS.row_moments,
        lambda: (data(3, 2, 4, 5, channels_last=True, grad=True), None, (3, 1, 4, 1), (3, 1, 4, 1), torch.float32),
    ),
    "gradient of moments": (
        OPS.row_moments_gradient,
        lambda: (torch.rand(3), None, *torch.rand(5, 3), None, *moments_arguments(data(3, 2, 4, 5)), True, True),
    ),
    "gradient of moments by one of channels_last": (
        OPS.row_moments_gradient,
        lambda: (
            *(None, None, None, torch.rand(3), None, None, None, None),
            *moments_arguments(data(3, 2, 4, 5, dtype=torch.bfloat16, channels_last=True)),
            *(True, False),
        ),
    ),
    "step": (OPS.step, lambda: step_arguments(data(3, 2, 4, 5))),
    "step with everything": (
        OPS.step,
        lambda: step_arguments(
            data(3, 2, 4, 5, dtype=torch.bfloat16),
            table=torch.rand(3, len(fastdiff.ops.COLUMNS)),
            history=[data(3, 2, 4, 5), data(3, 2, 4, 5)],
            noise=XI,
            known_noise=given(),
            guided=True,
            wanted=(True, True),
        ),
    ),
}


def posterior_arguments(xi, n, moments, dtype=None) -> tuple:
    noised = n is not NONE
    factors = (rows(), rows()) if noised else (None, None)
    shift, scale = torch.rand(1, 2, 1, 1) if noised else None, torch.rand(1, 2, 1, 1)
    return (moments, *xi, shift, scale, *n, *factors, -30.0, 20.0, dtype or moments.dtype, noised)


def moments_arguments(a) -> tuple:
    return a, data(3, 2, 4, 5, grad=a.requires_grad), (3, 1, 1, 1), (3,), torch.float32


def step_arguments(
    x, *, table=None, history=(), noise=NONE, known_noise=NONE, guided=False, wanted=(False, False)
) -> tuple:
    row = torch.rand(len(fastdiff.ops.COLUMNS)) if table is None else table
    more = guided and wanted[0]
    return (
        *(x, torch.randn_like(x), row, list(history), *noise, *known_noise),
        *(torch.randn_like(x) if guided else None, None, 3.0, 1.0),
        *(torch.randn_like(x) if more else None, rows() if more else None),
        *(torch.rand(3, 1, 4, 5) if more else None, torch.randn_like(x) if more else None),
        *wanted,
        2 * len(x) if guided else 0,
    )


@pytest.mark.parametrize("backend", ["reference", "native"], indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case, backend):
    operator, arguments = CASES[case]
    torch.library.opcheck(operator, arguments())


def test_every_operator_is_checked():
    assert {operator._qualified_op_name for operator, _ in CASES.values()} == {
        f"fastdiff::{name}" for name in declaring.NAMES
    }


@pytest.mark.parametrize("case", [case for case in CASES if "gradient" not in case])
def test_operators_equal_the_reference(case, backend):
    """Values and gradients of an operator against autograd through the reference, which opcheck does not compare."""
    operator, make = CASES[case]
    arguments = make()
    results = operator(*arguments)
    with fastdiff.use_backend("reference"):
        expected = _reference(operator, *arguments)
    for result, truth in zip(results if isinstance(results, tuple) else (results,), expected):
        torch.testing.assert_close(result, truth)
    inputs = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    if inputs:
        first = results[0] if isinstance(results, tuple) else results
        upstream = torch.rand_like(first)
        unused = {"allow_unused": True, "materialize_grads": True}
        found = torch.autograd.grad(first, inputs, upstream, **unused)
        for gradient, truth in zip(found, torch.autograd.grad(expected[0], inputs, upstream, **unused)):
            torch.testing.assert_close(gradient, truth)


def _reference(operator, *arguments):
    from asked import reference

    name, source = operator._qualified_op_name.split("::")[1], declaring.source
    if name == "uniform":
        *how, sample_offset, ids, count = arguments
        return (reference.uniform(*how, sample_offset if ids is None else ids, None, count),)
    if name == "normal":
        *how, sample_offset, ids, dtype, _, whole, start, starts, dim = arguments
        packed, window = declaring.packed_of(starts, dim), whole and Window(tuple(whole), tuple(start))
        samples = sample_offset if ids is None else ids
        return (reference.normal(*how, samples, dtype, packed=packed, window=window),)
    if name == "convert":
        return (reference.convert(*arguments),)
    if name == "row_moments":
        return tuple(torch.empty(0) if s is None else s for s in reference.row_moments(*arguments))
    if name == "noise":
        n, how = source(arguments[1:])
        xi, (*others, starts, dim) = source(how[3:])
        x_t, kept = reference.noise(arguments[0], n, *how[:3], xi, *others, declaring.packed_of(starts, dim))
        return x_t, kept if isinstance(kept, torch.Tensor) and kept is not n else torch.empty(0)
    if name == "step":
        x, m, row, history = arguments[:4]
        noise, others = source(arguments[4:])
        known_noise, others = source(others)
        uncond, guidance, scale, clip, log_variance, threshold, mask, known, *wanted, copies = others
        seen = torch.empty((copies, *x.shape[1:]), dtype=x.dtype)
        y, x0, entry = reference.step(
            x, m, uncond, scale, row, clip, tuple(history), noise, log_variance, x.dtype, wanted,
            threshold=threshold, mask=mask, known=known, known_noise=known_noise,
            model_input=seen if copies else None,
        )  # fmt: skip
        return y, *(torch.empty(0, dtype=x.dtype) if tensor is None else tensor for tensor in (x0, entry)), seen
    if name == "posterior":
        xi, (shift, scale, *others) = source(arguments[1:])
        n, others = source(others)
        z, x_t, kept = reference.posterior(arguments[0], xi, shift, scale, n, *others)
        kept = kept if isinstance(kept, torch.Tensor) and kept is not n else torch.empty(0)
        return z, torch.empty(0, dtype=z.dtype) if x_t is None else x_t, kept
    if name == "kl_normal":
        return (reference.kl_normal(*arguments),)
    if name == "gaussian_kl":
        output, weight, x0 = arguments[:3]
        n, others = source(arguments[3:])
        return (reference.gaussian_kl(output, x0, n, *others[:7], weight, *others[7:]),)
    prediction, weight, x0 = arguments[:3]
    n, (p, q, scale, c, mask, y, r, function, parts, *how, starts, dim) = source(arguments[3:])
    if parts:
        function = Combination(*(None if math.isnan(number) else number for number in parts))
    how = [function, *how]
    how.append(declaring.packed_of(starts, dim))
    return (reference.loss(prediction, x0, n, p, q, scale, weight, c, mask, *how, y=y, r=r),)


# While a program is traced no fast call is made: the two kinds of the native backend are one.
both_backends = pytest.mark.parametrize("backend", ["reference", "native"], indirect=True)


@both_backends
@in_turn(kind=["epsilon", "v_prediction", "flow"], compiler=["aot_eager", "inductor"])
def test_a_training_step_compiles_whole_and_once(kind, compiler, backend):
    """fullgraph=True, no recompilation across t, seeds and scales, and the eager bits, gradient included."""
    process = fastdiff.RectifiedFlow() if kind == "flow" else fastdiff.VariancePreserving()
    objective = fastdiff.Objective(process, kind, None if kind == "flow" else fastdiff.MinSNR(5.0))
    layer = torch.nn.Conv2d(3, 3, 3, padding=1)

    def step(x0, t, seed, scale):
        noised = objective.noise(x0, t, seed=seed)
        return objective.loss(layer(noised.x_t), noised) * scale

    def run(call, *arguments):
        layer.weight.grad = None
        loss = call(*arguments)
        loss.backward()
        return loss.detach(), layer.weight.grad

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    whole = torch.compile(step, fullgraph=True, backend=counter)
    for k in range(3):
        t = torch.rand(4, dtype=torch.float64) if kind == "flow" else torch.randint(0, 1000, (4,))
        arguments = torch.randn(4, 3, 8, 8), t, torch.tensor([k]), torch.tensor(1.0 + k)
        expected, found = run(step, *arguments), run(whole, *arguments)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert counter.frame_count == 1


@both_backends
@in_turn(kind=["v_prediction", "flow"], compiler=["aot_eager", "inductor"], data=["images", "tokens", "both"])
def test_images_and_tokens_compile_whole_and_once(kind, compiler, data, backend):
    process = fastdiff.RectifiedFlow() if kind == "flow" else fastdiff.VariancePreserving()
    objective, layer = fastdiff.Objective(process, kind), torch.nn.Linear(8, 8)
    how = {"tokens": fastdiff.Tokens(2)} if data != "images" else {}
    how |= {"dtype": torch.float32} if data != "tokens" else {}

    def step(x0, t, seed):
        noised = objective.noise(x0, t, seed=seed, **how)
        return noised.x_t, objective.loss(layer(noised.x_t), noised)

    def run(call, *arguments):
        layer.weight.grad = None
        x_t, loss = call(*arguments)
        loss.backward()
        return x_t, loss.detach(), layer.weight.grad

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    whole, shape = torch.compile(step, fullgraph=True, backend=counter), (4, 2, 8, 8)
    for k in range(3):
        t = torch.rand(4, dtype=torch.float64) if kind == "flow" else torch.randint(0, 1000, (4,))
        x0 = torch.randn(shape) if data == "tokens" else torch.randint(0, 256, shape, dtype=torch.uint8)
        arguments = x0, t, torch.tensor([k])
        for found, expected in zip(run(whole, *arguments), run(step, *arguments)):
            assert torch.equal(found, expected)
    assert counter.frame_count == 1


@both_backends
def test_a_combined_loss_by_elements_compiles_whole_and_once(backend):
    """As one operator each way, with the eager bits."""
    loss = fastdiff.losses.Combined(
        (0.5, "mse"), (0.3, "huber"), (0.2, fastdiff.losses.PseudoHuber(0.1, schedule="snr"))
    )
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", loss=loss)

    def step(x0, m, t, seed, weights):
        noised = objective.noise(x0, t, seed=seed)
        elements = objective.loss(m, noised, reduction="elements")
        return elements.detach(), (elements.mean((1, 2, 3)) * weights).sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    whole = torch.compile(step, fullgraph=True, backend=counter)
    for k in range(3):
        x0, m = torch.randn(2, 4, 3, 8, 8)
        arguments = x0, m.requires_grad_(), torch.randint(0, 1000, (4,)), torch.tensor([k]), torch.rand(4)
        (expected, mean), (found, total) = step(*arguments), whole(*arguments)
        assert torch.equal(found, expected) and torch.equal(total, mean)
        gradients = [torch.autograd.grad(loss, arguments[1])[0] for loss in (mean, total)]
        assert torch.equal(*gradients)
    assert counter.frame_count == 1
    called = {
        str(node.target) for graph in counter.graphs for node in graph.graph.nodes if "fastdiff" in str(node.target)
    }
    assert "fastdiff.loss" in called or "fastdiff.loss.default" in called


def test_the_graph_holds_operators(backend):
    """What a compiler sees of a step: one operator for the noise and one for the loss."""
    objective, seen = fastdiff.Objective(fastdiff.VariancePreserving()), []

    def look(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def step(x0, t, seed, prediction):
        return objective.loss(prediction, objective.noise(x0, t, seed=seed))

    torch._dynamo.reset()
    x0 = torch.randn(2, 3, 4)
    torch.compile(step, fullgraph=True, backend=look)(x0, torch.tensor([1, 5]), SEED, torch.randn(2, 3, 4))
    operators = [name for name in seen if name.startswith("fastdiff.")]
    assert [name.removesuffix(".default") for name in operators] == ["fastdiff.noise", "fastdiff.loss"]


def test_a_sampler_step_compiles(backend):
    row = torch.rand(len(fastdiff.ops.COLUMNS))

    def step(x, m, seed):
        seen = torch.empty(4, 3, 4)
        y, x0, _ = fastdiff.ops.step(x, m, row, clip=1.0, noise=fastdiff.ops.Philox(seed), model_input=seen)
        return y, x0, seen

    torch._dynamo.reset()
    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in (SEED, SEED + 1):
        x, m = data(2, 3, 4), data(2, 3, 4)
        for found, expected in zip(whole(x, m, seed), step(x, m, seed)):
            torch.testing.assert_close(found, expected)


def test_export_keeps_the_operators():
    if fastdiff.backends.native.backend.unavailable_because:
        pytest.skip("needs the native backend")
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction")

    class Step(torch.nn.Module):
        def forward(self, x0, t, n, prediction):
            return objective.loss(prediction, objective.noise(x0, t, n))

    arguments = torch.randn(2, 3, 4), torch.tensor([1, 5]), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    program = torch.export.export(Step(), arguments)
    assert torch.equal(program.module()(*arguments), Step()(*arguments))
    assert "fastdiff.loss" in program.graph_module.code


def test_a_guided_step_and_noise_of_any_stream_are_the_same_compiled():
    x, m, uncond = data(3, 3, 4, 5)
    row, scale = torch.rand(len(fastdiff.ops.COLUMNS)), torch.tensor([1.0, 2.0, 3.0])
    philox = fastdiff.ops.Philox(3, 5, 2, offset=0.1)

    def both(x, m, uncond, scale):
        y, x0, entry = fastdiff.ops.step(x, m, row, uncond=uncond, guidance=scale)
        return y, x0, entry, fastdiff.ops.materialize(philox, (3, 2, 4), x.device)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, m, uncond, scale), both(x, m, uncond, scale)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("keep", [True, False])
def test_noise_that_is_made_is_a_tensor_where_it_is_kept(keep):
    n, x = fastdiff.ops.Philox(3, 5), data(3, 2, 4, 5)
    noising = NoiseCall(x, n, rows(), rows(), 0.0, None, keep)
    latents = PosteriorCall(torch.cat([x, x], 1), None, rows(), rows(), n, rows(), rows(), keep_noise=keep)
    for call in (noising, latents):
        found = compiled.operators.run(call)[-1]
        assert torch.equal(found, fastdiff.ops.materialize(n, x.shape, x.device)) if keep else found is n


def test_a_run_of_steps_is_one_of_operators():
    plan = fastdiff.samplers.DPMSolverPP().plan(fastdiff.VariancePreserving(), 4, "epsilon")
    call, states = RunCall(data(2, 3, 4), fastdiff.ops.PreparedSteps(plan.table)), []
    for backend in (compiled.operators, reference):
        run = backend.trajectory(call)
        run.begin(1.0, 1)
        for k in range(4):
            run.step(k, run.seen.tanh())
        states.append(run.x)
    assert torch.equal(*states)


def test_gradients_of_operators_are_rounded_once():
    """The coefficients stay float32 beside a bfloat16 gradient."""
    g = torch.Generator().manual_seed(3)
    a, b = torch.rand(2, 4, 1, generator=g) + 0.1
    x, m, up = (torch.randn(4, 64, generator=g).bfloat16().requires_grad_() for _ in range(3))
    noised, _ = compiled.operators.run(NoiseCall(x, m, a, b, 0.0, None, True))
    for result in (noised, compiled.operators.run(ConvertCall(m, x, a, b))):
        for gradient, row in zip(torch.autograd.grad(result, (x, m), up.detach()), (a, b)):
            assert torch.equal(gradient, (row * up.detach().float()).bfloat16())
