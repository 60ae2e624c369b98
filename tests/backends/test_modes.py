"""First use in any mode of PyTorch, derivatives of every kind, and buffers that are written into before the backward:
right, or an error."""

import copy
import pickle

import pytest
import torch
from torch.func import grad, jvp, vmap

import fastdiff
from fastdiff import losses, ops

SHAPE = (3, 2, 4, 4)
VP, FLOW = fastdiff.VariancePreserving("scaled_linear"), fastdiff.RectifiedFlow(shift=3.0)
OBJECTIVES = {
    "epsilon": lambda: fastdiff.Objective(VP, "epsilon", fastdiff.MinSNR(5.0)),
    "v, huber": lambda: fastdiff.Objective(VP, "v_prediction", loss="huber"),
    "flow": lambda: fastdiff.Objective(FLOW, "flow"),
    "flow, cosmap": lambda: fastdiff.Objective(FLOW, "flow", "cosmap", error_space="sample"),
    "flow, c of t": lambda: fastdiff.Objective(FLOW, "flow", loss=losses.PseudoHuber(0.2, schedule="snr")),
    "edm": lambda: fastdiff.Objective(fastdiff.EDM(), "edm", "edm"),
    "vpsde, score": lambda: fastdiff.Objective(fastdiff.VPSDE(), "score", fastdiff.weighting.Likelihood()),
}
PATHS = {
    "mean": {},
    "none": {"reduction": "none"},
    "mask": {"mask": torch.tensor([1, 0, 1, 1]).view(1, 1, 1, 4)},
    "weight": {"weight": torch.tensor([1.0, 0.5, 2.0])},
}


@pytest.fixture(params=OBJECTIVES)
def make(request):
    return OBJECTIVES[request.param]


def tensors(objective, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x0, n, p = (torch.randn(SHAPE, generator=g, dtype=torch.float64).to(dtype) for _ in range(3))
    t = torch.tensor([30, 500, 900])
    return x0, n, p, t if objective.process.discrete else t.double() / 1000


def right(make, options, dtype=torch.float32):
    """(loss, gradient) of a new objective, by the reference."""
    with fastdiff.use_backend("reference"):
        objective = make()
        x0, n, p, t = tensors(objective, dtype)
        p.requires_grad_()
        loss = objective.loss(p, objective.noise(x0, t, n), **options)
        loss.sum().backward()
    return loss.detach(), p.grad


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6 * float(expected.abs().max()))


# ------------------------------------------------------------------------------------------------------------ first use


def _plainly(objective, x0, n, p, t, options):
    objective.predict_x0(p, noised := objective.noise(x0, t, n))
    return objective.loss(p, noised, **options)


def _in_inference_mode(*arguments):
    with torch.inference_mode():
        _plainly(*arguments)


def _in_no_grad(*arguments):
    with torch.no_grad():
        _plainly(*arguments)


def _in_grad(objective, x0, n, p, t, options):
    grad(lambda p: _plainly(objective, x0, n, p, t, options).sum())(p)


def _in_vmap(objective, x0, n, p, t, options):
    def one(x0, n, p, t):
        return objective.loss(p[None], objective.noise(x0[None], t[None], n[None]))

    vmap(grad(one, argnums=2))(x0, n, p, t)


def _in_fake_mode(objective, x0, n, p, t, options):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        x0, n, p, t = (mode.from_tensor(tensor) for tensor in (x0, n, p, t))
        options = {name: mode.from_tensor(v) if torch.is_tensor(v) else v for name, v in options.items()}
        loss = _plainly(objective, x0, n, p, t, options)
        assert loss.shape == ((3,) if options.get("reduction") == "none" else ())


def _in_dual(objective, x0, n, p, t, options):
    with torch.autograd.forward_ad.dual_level():
        _plainly(objective, x0, n, torch.autograd.forward_ad.make_dual(p, n), t, options)


def _compiled(objective, x0, n, p, t, options):
    torch.compile(_plainly, backend="aot_eager")(objective, x0, n, p, t, options)


def _in_a_thread(*arguments):
    from threading import Thread

    thread = Thread(target=_in_inference_mode, args=arguments)
    thread.start()
    thread.join()


MODES = [_in_no_grad, _in_inference_mode, _in_grad, _in_vmap, _in_fake_mode, _in_dual, _compiled, _in_a_thread]


@pytest.mark.parametrize(
    ("path", "first"),  # of what takes a second, one path is enough
    [(path, first) for path in PATHS for first in MODES if first is not _compiled or path == "mask"],
)
def test_training_after_a_first_use(backend, make, path, first):
    objective = make()
    x0, n, p, t = tensors(objective)
    first(objective, x0, n, p.clone(), t, PATHS[path])
    for trained in (objective, copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        if make is OBJECTIVES["flow, cosmap"] or trained is objective:
            q = p.clone().requires_grad_()
            noised = trained.noise(x0, t, n)
            loss = trained.loss(q, noised, **PATHS[path])
            loss.sum().backward()
            trained.predict_x0(p, noised)
            expected = right(make, PATHS[path])
            close(loss.detach(), expected[0])
            close(q.grad, expected[1])


@pytest.mark.parametrize("path", PATHS)
def test_an_objective_made_in_inference_mode_trains(backend, make, path):
    with torch.inference_mode():
        objective = make()
        x0, n, p, t = tensors(objective)
        noised = objective.noise(x0, t, n)
    q = torch.empty(SHAPE).copy_(p).requires_grad_()
    options = dict(PATHS[path])
    for batch in (noised, objective.noise(x0, t, n)):
        q.grad = None
        loss = objective.loss(q, batch, **options)
        (3 * loss).sum().backward()
        expected = right(make, options)
        close(loss.detach(), expected[0])
        close(q.grad, 3 * expected[1])


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_a_fused_step_gives_gradients_after_inference_mode(name):
    diffusers = pytest.importorskip("diffusers")
    from fastdiff.integrations.diffusers import fuse

    x = torch.randn(SHAPE)
    scheduler = fuse(getattr(diffusers, name)())
    with torch.inference_mode():
        scheduler.set_timesteps(4)
        t = scheduler.timesteps[0]
        if "Euler" in name:
            scheduler.scale_model_input(x, t)
        scheduler.step(x.double() if name == "DDIMScheduler" else x, t, x)
        if "Euler" in name:
            scheduler._step_index = 0
    m = torch.randn(SHAPE, requires_grad=True)
    seen = scheduler.scale_model_input(m, t)
    scheduler.step(torch.sin(seen), t, m).prev_sample.sum().backward()
    assert m.grad.isfinite().all() and m.grad.abs().sum() > 0


# --------------------------------------------------------------------------------------------------------- derivatives


def test_forward_derivatives(backend, make):
    """Of the loss by the prediction, and of x_t by x0 and the noise: two ways to ask for them."""
    objective = make()
    x0, n, p, t = tensors(objective, torch.float64)
    noised = objective.noise(x0, t, n)

    def loss(p):
        return objective.loss(p, noised)

    gradient = right(make, {}, torch.float64)[1]
    expected = (gradient * n).sum()
    torch.testing.assert_close(jvp(loss, (p,), (n,))[1], expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(loss(dual(p, n))).tangent, expected)
        x_t = objective.noise(dual(x0, p), t, dual(n, x0)).x_t
        tangent = torch.autograd.forward_ad.unpack_dual(x_t).tangent
        x0_of = objective.convert(dual(p, n), noised, "sample")
        of_x0 = torch.autograd.forward_ad.unpack_dual(x0_of).tangent
    alpha, sigma = (row.view(3, 1, 1, 1) for row in (noised.alpha, noised.sigma))
    torch.testing.assert_close(tangent, alpha * p + sigma * x0)
    zero = objective.convert(torch.zeros_like(p), noised, "sample")
    torch.testing.assert_close(of_x0, objective.convert(n, noised, "sample") - zero)


@pytest.mark.parametrize("function", ["mse", "l1", "smooth_l1", "pseudo_huber", "log_cosh"])
def test_second_and_forward_derivatives_of_errors(function):
    g = torch.Generator().manual_seed(0)
    e = torch.randn(4, 5, dtype=torch.float64, generator=g, requires_grad=True)
    c = torch.tensor([0.3, 0.7, 1.0, 2.0], dtype=torch.float64).view(4, 1).requires_grad_()

    def loss(e, c):
        with fastdiff.use_backend("reference"):
            given = c if function in ("smooth_l1", "pseudo_huber") else None
            return ops.loss(e, None, None, function=function, c=given)

    assert torch.autograd.gradcheck(loss, (e, c), check_forward_ad=True)


@pytest.mark.parametrize("name", ["flow", "flow, cosmap", "flow, c of t", "edm", "vpsde, score"])
def test_gradients_of_t(backend, name):
    """A schedule that is learned: x_t and the loss depend on t."""
    objective = OBJECTIVES[name]()
    x0, n, p, t = tensors(objective, torch.float64)
    found = []
    for time in (t.clone().requires_grad_(), t + 1e-6, t - 1e-6):
        noised = objective.noise(x0, time, n)
        total = (noised.x_t * p).sum() + objective.loss(p, noised)
        found.append(total)
    found[0].backward()
    first = torch.autograd.grad(
        (objective.noise(x0, u := t.clone().requires_grad_(), n).x_t * p).sum(), u, retain_graph=True
    )[0]
    assert first.abs().min() > 0
    with fastdiff.use_backend("reference"):
        u = t.clone().requires_grad_()
        noised = objective.noise(x0, u, n)
        ((noised.x_t * p).sum() + objective.loss(p, noised)).backward()
    time = t.clone().requires_grad_()
    noised = objective.noise(x0, time, n)
    ((noised.x_t * p).sum() + objective.loss(p, noised)).backward()
    torch.testing.assert_close(time.grad, u.grad)
    difference = (found[1] - found[2]).item() / 2e-6
    assert time.grad.sum().item() == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "none", "elements"])
@pytest.mark.parametrize("learned", [False, True])
def test_several_gradients_at_once(backend, make, reduction, learned):
    objective = make()
    x0, n, p, t = tensors(objective)
    p.requires_grad_()
    weight = torch.tensor([1.0, 0.5, 2.0], requires_grad=learned)
    options = {"reduction": reduction} | ({"weight": weight} if learned else {})
    loss = objective.loss(p, objective.noise(x0, t, n), **options)
    wanted = (p, weight) if learned else (p,)
    upstream = torch.randn(4, *loss.shape)
    several = torch.autograd.grad(loss, wanted, upstream, is_grads_batched=True, retain_graph=True)
    for k in range(4):
        with fastdiff.use_backend("reference"):
            other = objective.loss(p, objective.noise(x0, t, n), **options)
            one = torch.autograd.grad(other, wanted, upstream[k])
        for a, b in zip(several, one):
            close(a[k], b)


def test_vectorized_jacobian(backend, make):
    objective = make()
    x0, n, p, t = tensors(objective)

    def rows(p):
        return objective.loss(p, objective.noise(x0, t, n), reduction="none")

    def noised(x0):
        return objective.noise(x0, t, n).x_t

    for function, at in ((rows, p), (noised, x0)):
        one_by_one = torch.autograd.functional.jacobian(function, at)
        close(torch.autograd.functional.jacobian(function, at, vectorize=True), one_by_one)
        close(torch.autograd.functional.jacobian(function, at, vectorize=True, strategy="forward-mode"), one_by_one)


def test_vmap_over_times(backend, make):
    objective = make()
    x0, n, p, t = tensors(objective)
    gradient = vmap(grad(lambda p, x0, n, t: objective.loss(p[None], objective.noise(x0[None], t[None], n[None]))))
    found = gradient(p, x0, n, t)
    close(found, 3 * right(make, {})[1])
    many = vmap(lambda t: objective.noise(x0, t, n).x_t)(torch.stack([t, t.flip(0)]))
    close(many[1], objective.noise(x0, t.flip(0), n).x_t)


def test_the_negative_bit():
    """A lazy negation, as the imaginary part of a conjugate is: its memory holds the other sign."""
    objective = OBJECTIVES["epsilon"]()
    x0, n, p, t = tensors(objective)
    negative = torch.complex(torch.zeros(SHAPE), n).conj().imag
    assert negative.is_neg()
    expected = objective.noise(x0, t, -n)
    for found in (objective.noise(x0, t, negative), objective.noise(-negative, t, -x0)):
        assert found.x_t.isfinite().all()
    assert torch.equal(objective.noise(x0, t, negative).x_t, expected.x_t)
    assert torch.equal(objective.loss(negative, expected), objective.loss(-n, expected))
    assert torch.equal(objective.convert(negative, expected, "sample"), objective.convert(-n, expected, "sample"))


# ------------------------------------------------------------------------------- buffers that are written into again


@pytest.mark.parametrize("upstream", [1.0, 0.5])
@pytest.mark.parametrize("path", PATHS)
def test_a_refilled_buffer_of_times(backend, make, path, upstream):
    """The gradient is that of the times of the forward, or PyTorch says that they have changed."""
    objective = make()
    x0, n, p, t = tensors(objective)
    p.requires_grad_()
    loss = objective.loss(p, objective.noise(x0, t, n), **PATHS[path])
    t.copy_(t.flip(0))
    try:
        (upstream * loss).sum().backward()
    except RuntimeError as problem:
        assert "modified by an inplace operation" in str(problem)
    else:
        close(p.grad, upstream * right(make, PATHS[path])[1])


def test_times_refilled_between_noise_and_loss(backend, make):
    objective = make()
    x0, n, p, t = tensors(objective)
    noised = objective.noise(x0, t, n)
    objective.loss(p, noised)
    t.copy_(t.flip(0))
    with pytest.raises(RuntimeError, match="t was changed in place after the batch was noised"):
        objective.loss(p, noised)
    with pytest.raises(RuntimeError, match="t was changed in place"):
        objective.predict_x0(p, noised)


@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_a_seed_that_is_advanced(backend, make, upstream):
    """Before the loss that is an error: the noise would be another. After it PyTorch's, if the seed is read again."""
    objective, seed = make(), torch.tensor([7])
    x0, _, p, t = tensors(objective)
    with fastdiff.use_backend("reference"):
        n = objective.noise(x0, t, seed=7).noise
        q = p.clone().requires_grad_()
        objective.loss(q, objective.noise(x0, t, n)).backward()
    p.requires_grad_()
    noised = objective.noise(x0, t, seed=seed, keep_noise=False)
    loss = objective.loss(p, noised)
    seed += 1
    try:
        (upstream * loss).backward()
    except RuntimeError as problem:
        assert "modified by an inplace operation" in str(problem)
    else:
        close(p.grad, upstream * q.grad)
    with pytest.raises(RuntimeError, match="the seed was changed in place after the batch was noised"):
        objective.loss(p, noised)
    with pytest.raises(RuntimeError, match="the seed was changed in place"):
        noised.noise  # noqa: B018


def test_gradients_of_x0_keep_their_times(backend):
    for name in ("epsilon", "flow"):
        objective = OBJECTIVES[name]()
        x0, n, p, t = tensors(objective)
        x0.requires_grad_()
        noised = objective.noise(x0, t, n)
        alpha = noised.alpha.clone().view(3, 1, 1, 1)
        t.copy_(t.flip(0))
        try:
            (noised.x_t * p).sum().backward()
        except RuntimeError as problem:
            assert "modified by an inplace operation" in str(problem)
        else:
            close(x0.grad, alpha * p)


@pytest.mark.parametrize("name", ["epsilon", "flow, cosmap"])
def test_the_same_with_triton(name):
    """In its interpreter: first use in a mode, inference tensors, several gradients, forward derivatives, buffers."""
    make = OBJECTIVES[name]
    expected = {path: right(make, PATHS[path]) for path in PATHS}
    with fastdiff.use_backend("triton"):
        for first in (_in_inference_mode, _in_grad):
            objective = make()
            x0, n, p, t = tensors(objective)
            first(objective, x0, n, p, t, {})
            with torch.inference_mode():
                kept = x0.clone()
            for path in ("none", "weight"):
                q = p.clone().requires_grad_()
                loss = objective.loss(q, objective.noise(kept, t, n), **PATHS[path])
                loss.sum().backward()
                close(loss.detach(), expected[path][0])
                close(q.grad, expected[path][1])
        noised = objective.noise(x0, t, n)
        many = torch.randn(2, 3)
        rows = objective.loss(q, noised, reduction="none")
        several = torch.autograd.grad(rows, q, many, is_grads_batched=True, retain_graph=True)[0]
        for k in range(2):
            close(several[k], torch.autograd.grad(rows, q, many[k], retain_graph=True)[0])
        tangent = jvp(lambda p: objective.loss(p, noised), (p,), (n,))[1]
        torch.testing.assert_close(tangent, (expected["mean"][1] * n).sum(), rtol=1e-5, atol=0)
        seed = torch.tensor([3])
        loss = objective.loss(q, objective.noise(x0, t, seed=seed, keep_noise=False))
        seed += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (0.5 * loss).backward()
        loss = objective.loss(q, noised)
        t.copy_(t.flip(0))
        if objective.process.discrete:  # else the rows are numbers by now
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                (0.5 * loss).backward()
