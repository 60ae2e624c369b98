"""``Objective.loss_and_gradient``: against its definition, finite differences, and ``loss`` with its backward."""

import numpy as np
import pytest
import torch
from accuracy import assert_rounded, assert_same, to_numpy
from asked import native
from devices import BACKENDS, in_turn
from torch._dynamo.testing import CompileCounterWithBackend

import fastdiff
from fastdiff import video
from fastdiff.backends.triton import interpreted
from fastdiff.distributed import Part

VP, FLOW = fastdiff.VariancePreserving(), fastdiff.RectifiedFlow()
OBJECTIVE = fastdiff.Objective(VP, "v_prediction", fastdiff.MinSNR(5.0))
SHAPE = (3, 4, 4, 6)
every_backend = pytest.mark.parametrize("backend", [*BACKENDS, "triton"], indirect=True)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def backend(request, monkeypatch):
    """As the fixture of conftest.py, and "triton": its kernels in the interpreter."""
    name = getattr(request, "param", "native")
    if name == "triton":
        pytest.importorskip("triton")
        if not interpreted():
            pytest.skip("on CPU tensors Triton's kernels run in its interpreter")
    elif name != "reference" and fastdiff.backends.native.backend.unavailable_because:
        pytest.skip("the extension is not built")
    if "," in name:
        monkeypatch.setattr(fastdiff.backends.native.backend, "fast", None)
    with fastdiff.use_backend(name.split(",")[0]):
        yield name


def normals(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def both(objective, prediction, noised, scale=1.0, **options):
    """What ``loss_and_gradient`` gives, which is seen to have the bits of ``loss`` and its backward, detached and laid
    out as the prediction."""
    m = prediction.detach().requires_grad_()
    expected = objective.loss(m, noised, **options)
    (wanted,) = torch.autograd.grad(expected, m, torch.as_tensor(scale, dtype=expected.dtype))
    for prediction in (m, m.detach()):  # it may require grad, or not
        loss, gradient = objective.loss_and_gradient(prediction, noised, scale, **options)
        assert not loss.requires_grad and not gradient.requires_grad
        assert gradient.stride() == torch.empty_like(m).stride()
        assert_same(loss, expected.detach())
        assert_same(gradient, wanted)
    return loss, gradient


@every_backend
@pytest.mark.parametrize("scale", [1.0, 0.0, -3.5])
def test_the_numbers_are_those_of_the_definition(backend, scale):
    """Without a weighting, of epsilon: the mean of (m - n)^2 and scale 2 (m - n) / count."""
    objective, m = fastdiff.Objective(VP, "epsilon"), normals(*SHAPE, seed=1)
    noised = objective.noise(normals(*SHAPE), torch.tensor([5, 500, 999]), normals(*SHAPE, seed=2))
    loss, gradient = objective.loss_and_gradient(m, noised, scale)
    m, n = to_numpy(m), to_numpy(noised.noise)
    np.testing.assert_allclose(float(loss), np.mean((m - n) ** 2), rtol=1e-6)
    assert_rounded(gradient, scale * 2 * (m - n) / m.size, abs(scale) * 2 * (np.abs(m) + np.abs(n)) / m.size)


OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "mask": {"mask": normals(3, 1, 4, 6, seed=3) > 0},
    "row": {"mask": normals(3, 1, 4, 6, seed=3).abs(), "mask_normalization": "row"},
    "global": {"mask": torch.tensor([1.0, 0.0, 0.5]), "mask_normalization": "global"},
    "sample": {"mask": normals(3, 1, 4, 6, seed=3) > 0, "mask_normalization": "sample"},
    "weight": {"weight": torch.tensor([0.5, 0.0, 2.0])},
    "weight of elements": {"weight": normals(3, 1, 4, 6, seed=3).abs()},
    "target": {"target": normals(*SHAPE, seed=4), "weight": 0.5},
    "third": {"y": normals(*SHAPE, seed=5), "r": torch.tensor([0.5, -1.0, 0.0])},
}
SCALES = [1, np.array(0.3), torch.tensor(1024.0), torch.tensor(0.125, dtype=torch.float64)]
# Triton's interpreter is slow: there each of the options has one of the dtypes.
CASES = [(name, key, dtype) for name in BACKENDS for key in OPTIONS for dtype in DTYPES]
CASES += [("triton", key, DTYPES[k % 4]) for k, key in enumerate(OPTIONS)]


@pytest.mark.parametrize("backend, key, dtype", CASES, indirect=["backend"], ids=str)
def test_they_have_the_bits_of_the_loss_and_its_backward(backend, key, dtype):
    options = {k: v.to(dtype) if k in ("y", "target") else v for k, v in OPTIONS[key].items()}
    noised = OBJECTIVE.noise(normals(*SHAPE, dtype=dtype), seed=3)
    for scale in SCALES[1:2] if backend == "triton" else SCALES:
        both(OBJECTIVE, normals(*SHAPE, seed=1, dtype=dtype), noised, scale, **options)


def tokens():
    objective = fastdiff.Objective(FLOW, "flow")
    noised = objective.noise(normals(2, 3, 4, 6), seed=1, tokens=fastdiff.Tokens(2))
    return objective, normals(*noised.x_t.shape, seed=1), noised, {"mask": normals(2, 1, 4, 6, seed=2) > 0}


def packed(**how):
    objective = fastdiff.Objective(FLOW, "flow")
    noised = objective.noise(normals(7, 4), seed=1, lengths=[3, 0, 4], **how)
    return objective, normals(7, 4, seed=1), noised, {}


def frames(**options):
    noised = OBJECTIVE.noise(normals(2, 3, 2, 4), torch.tensor([[3, 500, 7], [1, 2, 999]]), seed=1)
    return OBJECTIVE, normals(2, 3, 2, 4, seed=1), noised, options


def clean():
    objective = video.RFLoss(per="frame", frame_dim=1)
    noised = objective.noise(normals(2, 3, 2, 4, 4), seed=1, clean=1)
    m = normals(2, 3, 2, 4, 4, seed=1)
    m[:, 0] = torch.nan  # what is kept clean reaches nothing
    return objective, m, noised, {}


def images():
    objective = fastdiff.Objective(VP, "sample", loss="huber")
    x0 = (normals(*SHAPE).sigmoid() * 255).to(torch.uint8)
    return objective, normals(*SHAPE, seed=1), objective.noise(x0, seed=1, dtype=torch.float32), {}


LAID = {
    "tokens": tokens,
    "packed": packed,
    "packed, a time a token": lambda: packed(t=torch.linspace(0.1, 0.9, 7)),
    "packed, samples": lambda: (
        *packed(t=torch.linspace(0.1, 0.9, 7))[:3],
        {"mask_normalization": "sample", "mask": normals(7, 1, seed=4) > 0},
    ),
    "frames": frames,
    "frames, samples": lambda: frames(mask_normalization="sample", mask=normals(2, 3, seed=4) > 0),
    "clean frames": clean,
    "images": images,
    "channels_last": lambda: (
        OBJECTIVE, normals(*SHAPE, seed=1).to(memory_format=torch.channels_last), OBJECTIVE.noise(normals(*SHAPE)), {},
    ),
    "gaps": lambda: (OBJECTIVE, normals(3, 8, 4, 6, seed=1)[:, ::2], OBJECTIVE.noise(normals(*SHAPE)), {}),
    "no samples": lambda: (OBJECTIVE, normals(0, 4, 4, 6), OBJECTIVE.noise(normals(0, 4, 4, 6)), {"reduction": "sum"}),
}  # fmt: skip


@every_backend
@pytest.mark.parametrize("laid", LAID)
def test_data_of_every_layout(laid, backend):
    objective, m, noised, options = LAID[laid]()
    _, gradient = both(objective, m, noised, 0.3, **options)
    if laid == "clean frames":
        assert not gradient[:, 0].any() and gradient[:, 1:].isfinite().all()


@every_backend
def test_another_objective_and_a_changed_process(backend):
    noised = OBJECTIVE.noise(normals(*SHAPE), seed=3)
    other = fastdiff.Objective(VP, "epsilon", loss="log_cosh", error_space="sample")
    both(other, normals(*SHAPE, seed=1), noised, 2.0)


@pytest.mark.parametrize("backend", BACKENDS[:2], indirect=True)
@pytest.mark.parametrize("key", OPTIONS)
def test_the_gradient_is_the_slope(key, backend):
    """Central differences of the loss in float64, in directions of their own."""
    options = {k: v.double() if k in ("y", "target") else v for k, v in OPTIONS[key].items()}
    objective = fastdiff.Objective(VP, "v_prediction", fastdiff.MinSNR(5.0), loss="pseudo_huber")
    noised, m = objective.noise(normals(*SHAPE, dtype=torch.float64), seed=3), normals(*SHAPE, dtype=torch.float64)
    _, gradient = objective.loss_and_gradient(m, noised, 7.0, **options)
    for seed in range(3):
        along, h = normals(*SHAPE, seed=seed, dtype=torch.float64), 1e-5
        ahead, behind = (objective.loss(m + step * along, noised, **options) for step in (h, -h))
        torch.testing.assert_close((gradient * along).sum(), 7.0 * (ahead - behind) / (2 * h), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("key", ["plain", "mask", "row", "global", "sample", "weight"])
def test_a_part_that_is_all_of_the_batch(key, averaged):
    noised = OBJECTIVE.noise(normals(*SHAPE), seed=3, part=Part(SHAPE, (0,) * 4, averaged=averaged))
    loss, gradient = both(OBJECTIVE, normals(*SHAPE, seed=1), noised, 0.3, **OPTIONS[key])
    whole = OBJECTIVE.noise(normals(*SHAPE), seed=3)
    expected = OBJECTIVE.loss_and_gradient(normals(*SHAPE, seed=1), whole, 0.3, **OPTIONS[key])
    torch.testing.assert_close((loss, gradient), expected)


@pytest.mark.parametrize("backend", ["reference", "native", "triton"], indirect=True)
def test_a_scaled_float16_loss_does_not_underflow(backend):
    """A gradient of 2^-26 is 0 in float16; scaled by 2^16 it is not."""
    objective, shape = fastdiff.Objective(VP, "epsilon"), (1, 4, 64, 64)
    noised = objective.noise(torch.zeros(shape).half(), noise=torch.zeros(shape).half())
    m = torch.full(shape, 2.0**-13).half()
    assert not objective.loss_and_gradient(m, noised)[1].any()
    _, gradient = objective.loss_and_gradient(m, noised, torch.tensor(2.0**16))
    assert (gradient == 2.0**16 * 2 * 2.0**-13 / m.numel()).all()


def trained(step, steps=4):
    """The parameters after a loop with a GradScaler and accumulated gradients, and the losses. The first scale makes a
    gradient infinite, so that a step is left out."""
    torch.manual_seed(0)
    network = torch.nn.Conv2d(4, 4, 3, padding=1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler, losses = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=2), []
    for k in range(steps):
        for part in range(2):
            noised = OBJECTIVE.noise(normals(*SHAPE, seed=k), seed=2 * k + part)
            losses.append(step(network(noised.x_t).half(), noised, scaler).detach())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [*losses, *(p.detach() for p in network.parameters()), torch.tensor(scaler.get_scale())]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_the_loop_of_a_grad_scaler(backend):
    def usual(prediction, noised, scaler):
        loss = OBJECTIVE.loss(prediction, noised)
        scaler.scale(loss / 2).backward()
        return loss

    def short(prediction, noised, scaler):
        loss, gradient = OBJECTIVE.loss_and_gradient(prediction, noised, scaler.scale(torch.tensor(0.5)))
        prediction.backward(gradient)
        return loss

    found, expected = trained(short), trained(usual)
    assert float(found[-1]) not in (2.0**24, 0.0)  # a step was left out
    for got, want in zip(found, expected):
        assert_same(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("way", ["fast", "general"])
def test_one_launch_reads_and_writes_once(way, dtype, monkeypatch):
    """Whatever the scale is; ``loss`` and its backward take two launches."""
    triton = pytest.importorskip("fastdiff.backends.triton")
    from fastdiff.backends.triton.launch import launches

    if not interpreted():
        pytest.skip("on CPU tensors Triton's kernels run in its interpreter")
    if way == "general":
        monkeypatch.setattr(triton.backend, "fast", None)
    full, rows = 3 * 96 * dtype.itemsize, 3 * 8 + 3 * 3 * 4  # t, and p, q and the weight at it
    with fastdiff.use_backend("triton"):
        noised, m = OBJECTIVE.noise(normals(*SHAPE, dtype=dtype), seed=3), normals(*SHAPE, seed=1, dtype=dtype)
        for scale in (torch.tensor(512.0), 0.25, 0.5):
            with launches() as records:
                OBJECTIVE.loss_and_gradient(m, noised, scale)
            moved = [(str(record), record.read, record.written) for record in records]
            assert moved == [("loss", 2 * full + rows + 4, full + 4)]  # prediction, x0, the scale; gradient, loss
        with launches() as records:
            OBJECTIVE.loss(m.requires_grad_(), noised).backward()
        assert len(records) == 2


@pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)
@pytest.mark.parametrize("options", ["plain", "mask", "row", "sample", "third"])
def test_one_pass_on_a_cpu(options, backend, monkeypatch):
    """One call of the extension, which gives both; and no node of autograd."""
    from fastdiff.backends.native import fast, loss

    calls = []

    class Counting:
        def __getattr__(self, name):
            function = getattr(fastdiff._C, name)
            if name not in ("loss", "fast_loss"):
                return function
            return lambda *arguments: (result := function(*arguments), calls.append((name, result)))[0]

    noised = OBJECTIVE.noise(normals(*SHAPE), seed=3)
    for module in (fast, loss):
        monkeypatch.setattr(module, "_C", Counting())
    m = normals(*SHAPE, seed=1).requires_grad_()
    OBJECTIVE.loss_and_gradient(m, noised, 0.3, **OPTIONS[options])
    done = [name for name, result in calls if name == "loss" or result is not None]
    assert len(done) == 1, calls


def test_under_no_grad_and_in_inference_mode():
    m = normals(*SHAPE, seed=1)
    expected = OBJECTIVE.loss_and_gradient(m, OBJECTIVE.noise(normals(*SHAPE), seed=3), 0.3)
    for name in ("reference", "native") if native.available else ("reference",):
        for mode in (torch.no_grad, torch.inference_mode):
            with fastdiff.use_backend(name), mode():
                noised = OBJECTIVE.noise(normals(*SHAPE), seed=3)
                torch.testing.assert_close(OBJECTIVE.loss_and_gradient(m, noised, 0.3), expected)


def test_under_vmap():
    """Several predictions at once, each with its own scale."""
    noised, m, scales = OBJECTIVE.noise(normals(*SHAPE), seed=3), normals(2, *SHAPE, seed=1), torch.tensor([1.0, 0.3])
    found = torch.vmap(lambda m, scale: OBJECTIVE.loss_and_gradient(m, noised, scale))(m, scales)
    for k in range(2):
        expected = OBJECTIVE.loss_and_gradient(m[k], noised, scales[k])
        torch.testing.assert_close((found[0][k], found[1][k]), expected)


@pytest.mark.parametrize("backend", ["reference", "native"], indirect=True)
@in_turn(key=["plain", "sample"], numbers=[False, True])
def test_it_compiles_whole_and_once_for_all_scales(key, numbers, backend):
    """With the eager bits; numbers that differ are found out by the second."""
    seen = []

    def step(m, x0, t, seed, scale):
        noised = OBJECTIVE.noise(x0, t, seed=seed)
        return OBJECTIVE.loss_and_gradient(m, noised, scale, **OPTIONS[key])

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    whole = torch.compile(step, fullgraph=True, backend=counter)
    for k in range(4):
        scale = 0.5 + k if numbers else torch.tensor(0.5 + k)
        how = normals(*SHAPE), torch.randint(0, 1000, (3,)), torch.tensor([k]), scale
        seen.append(normals(*SHAPE, seed=k))
        for got, want in zip(whole(seen[-1], *how), step(seen[-1], *how)):
            assert_same(got, want)
    assert counter.frame_count == 1 + numbers


BAD = {
    "text": ({"scale": "2"}, TypeError, "scale must be a number; got '2'"),
    "several": ({"scale": torch.ones(3)}, ValueError, r"one number, a tensor of shape \(\); got \(3,\).*weight="),
    "one in a list": ({"scale": torch.ones(1)}, ValueError, r"a tensor of shape \(\); got \(1,\)"),
    "whole": ({"scale": torch.tensor(2)}, TypeError, "floating-point tensor; got one of torch.int64"),
    "elsewhere": ({"scale": torch.ones((), device="meta")}, ValueError, "scale is on meta, but prediction on cpu"),
    "rows": ({"reduction": "none"}, ValueError, "must be 'mean' or 'sum'; got 'none'. For the losses of rows"),
    "unknown": ({"reduction": "median"}, ValueError, "must be 'mean' or 'sum'; got 'median'"),
    "shape": ({"prediction": normals(3, 4, 4, 5)}, ValueError, r"\(3, 4, 4, 5\)"),
    "kind": ({"prediction": torch.ones(SHAPE, dtype=torch.int32)}, TypeError, "prediction must be floating point"),
    "no tensor": ({"prediction": [1.0]}, TypeError, "prediction must be a tensor; got list"),
    "swapped": ({"noised": normals(*SHAPE)}, TypeError, "noised must be what objective.noise returned"),
    "mask": ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, "mask has shape"),
    "r alone": ({"r": 2.0}, ValueError, "r is the factor of y"),
}


@pytest.mark.parametrize("key", BAD)
def test_unfit_input(key, backend):
    given, kind, message = BAD[key]
    noised = OBJECTIVE.noise(normals(*SHAPE), seed=3)
    arguments = {"prediction": normals(*SHAPE), "noised": noised} | given
    with pytest.raises(kind, match=message):
        OBJECTIVE.loss_and_gradient(**arguments)


def with_grad(tensor):
    return tensor.clone().requires_grad_()


@pytest.mark.parametrize("part", [None, Part(SHAPE, (0,) * 4)], ids=["whole", "part"])
@pytest.mark.parametrize("what", ["x0", "noise", "target", "y", "weight", "r"])
def test_what_would_get_no_gradient_is_refused(what, part, backend):
    x0, n, options = normals(*SHAPE), normals(*SHAPE, seed=2), {}
    if what in ("x0", "noise"):
        x0, n = (with_grad(x0), n) if what == "x0" else (x0, with_grad(n))
    elif what == "r":
        options = {"y": n, "r": with_grad(torch.ones(3))}
    else:
        options = {what: with_grad(torch.ones(3) if what == "weight" else n)}
    noised, m = OBJECTIVE.noise(x0, torch.tensor([1, 5, 7]), n, part=part), normals(*SHAPE, seed=1)
    with pytest.raises(ValueError, match=f"{what} requires grad, and would get none.*loss.*backward"):
        OBJECTIVE.loss_and_gradient(m, noised, **options)
    with torch.no_grad():  # where nothing would get any
        assert OBJECTIVE.loss_and_gradient(m, noised, **options)[1].isfinite().all()
