"""Noise by sample ids: what a sample gets depends on (seed, its id, element) alone, wherever it stands."""

import pickle

import numpy as np
import oracle
import pytest
import torch
from devices import on_every_device

import fastdiff
from fastdiff import ops, samplers

SEED = 7
IDS = torch.tensor([4, 1, 2**40 + 3, 0, 0, -2])
X0 = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(0))


def normals(shape, ids=IDS, stream=0):
    """The noise of each id by itself, by the definition."""
    return torch.from_numpy(np.concatenate([oracle.normal(SEED, (1, *shape[1:]), stream, int(id)) for id in ids]))


def uniforms(ids=IDS):
    return torch.from_numpy(np.concatenate([oracle.uniform(SEED, 1, 3, int(id)) for id in ids]))


def objective(**options):
    return fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", **options)


@on_every_device
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
@pytest.mark.parametrize("keep", [True, False])
def test_time_and_noise_are_those_of_the_id(backend, device, kind, keep):
    ids = IDS.clamp(max=9).to(kind)
    noised = objective().noise(X0.to(device), seed=SEED, ids=ids.to(device), keep_noise=keep)
    t, n = uniforms(ids), normals(X0.shape, ids)
    torch.testing.assert_close(noised.t.cpu(), t, rtol=1e-12, atol=0)
    assert torch.equal(noised.noise.cpu(), n)
    view = noised.t.cpu().float().view(-1, 1, 1, 1)
    torch.testing.assert_close(noised.x_t.cpu(), (1 - view) * X0 + view * n, rtol=1e-6, atol=1e-6)
    prediction = torch.randn_like(X0).to(device).requires_grad_()
    loss = objective().loss(prediction, noised)
    torch.testing.assert_close(loss.cpu(), (prediction.cpu() - (n - X0)).square().mean(), rtol=1e-5, atol=0)
    (slope,) = torch.autograd.grad(loss, prediction)
    expected = 2 * (prediction.cpu() - (n - X0)) / X0.numel()
    torch.testing.assert_close(slope.cpu(), expected.detach(), rtol=1e-4, atol=1e-8)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("process", [fastdiff.VariancePreserving(), fastdiff.RectifiedFlow()])
@pytest.mark.parametrize("options", [{}, {"noise_offset": 0.1}, {"input_perturbation": 0.1}, {"noise_offset_dim": 2}])
def test_a_shuffled_batch_is_the_batch_shuffled(process, options):
    """A sample's index is its id: with the batch in another order, or in parts, its t and noise go with it."""
    options = {"noise_offset": 0.2, **options} if "noise_offset_dim" in options else options
    made = fastdiff.Objective(process, "v_prediction" if process.discrete else "flow", **options)
    whole = made.noise(X0, seed=SEED, sample_offset=10)
    order = torch.tensor([3, 0, 5, 1])
    part = made.noise(X0[order], seed=SEED, ids=order + 10)
    for name in ("x_t", "t", "noise", "target", "weight"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[order]), name
    m = torch.randn_like(X0)
    rows = made.loss(m, whole, reduction="none")[order]
    assert torch.equal(made.loss(m[order], part, reduction="none"), rows)


@pytest.mark.usefixtures("backend")
def test_pairs_share_time_and_noise():
    noised = objective().noise(X0, seed=SEED, ids=torch.arange(3).repeat(2))
    assert torch.equal(noised.t[:3], noised.t[3:]) and torch.equal(noised.noise[:3], noised.noise[3:])
    assert len(set(noised.t.tolist())) == 3


@pytest.mark.usefixtures("backend")
def test_operations_of_noise():
    shape = (6, 4, 9)
    made = ops.Philox(SEED, IDS, 5, 0.5)
    expected = normals(shape, stream=5) + 0.5 * normals(shape[:2], stream=1).unsqueeze(-1)
    assert torch.equal(ops.materialize(made, shape, "cpu"), expected)
    x_t, kept = ops.noise(torch.zeros(shape), 1.0, 1.0, made)
    assert torch.equal(x_t, expected) and torch.equal(kept, expected)
    x, m = torch.randn(2, *shape)
    row = torch.zeros(18)
    row[fastdiff.codes.COLUMNS.index("c_m")], row[fastdiff.codes.COLUMNS.index("c_noise")] = 1.0, 2.0
    y, *_ = ops.step(x, m, row, noise=made)
    torch.testing.assert_close(y, m + 2 * expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("backend")
def test_samples_by_id():
    """Start and steps of a run; and what else makes noise from a seed."""
    how = {"seed": SEED, "dtype": torch.float64, "progress": False, "steps": 4}
    sampler = samplers.DDPM()
    network = lambda x, t: 0.1 * x  # noqa: E731
    process = fastdiff.VariancePreserving()
    whole = fastdiff.sample(network, (8, 3, 2), process, sampler, prediction="epsilon", **how)
    order = torch.tensor([6, 0, 7, 0])
    part = fastdiff.sample(network, (4, 3, 2), process, sampler, prediction="epsilon", ids=order, **how)
    assert torch.equal(part, whole[order])

    x0 = torch.randn(8, 2, 8, 8)
    whole = fastdiff.pyramid_noise(x0, seed=SEED)
    assert torch.equal(fastdiff.pyramid_noise(x0[order], seed=SEED, ids=order), whole[order])

    flow = fastdiff.RectifiedFlow()
    model = lambda x, t: x * x.sum(-1, keepdim=True)  # noqa: E731
    x0 = torch.randn(8, 3)
    whole = fastdiff.log_likelihood(model, x0, flow, "flow", seed=SEED, steps=3)
    part = fastdiff.log_likelihood(model, x0[order], flow, "flow", seed=SEED, steps=3, ids=order)
    assert torch.equal(part, whole[order])


@pytest.mark.parametrize("keep", [True, False])
def test_compiled(keep):
    """One graph for all ids, the same bits."""
    made = objective(noise_offset=0.1)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def step(x0, prediction, ids):
        noised = made.noise(x0, seed=SEED, ids=ids, keep_noise=keep)
        return noised.x_t, noised.t, made.loss(prediction, noised)

    prediction = torch.randn_like(X0)
    for ids in (IDS, IDS.flip(0)):
        noised = made.noise(X0, seed=SEED, ids=ids, keep_noise=keep)
        for ours, expected in zip(step(X0, prediction, ids), (noised.x_t, noised.t, made.loss(prediction, noised))):
            assert torch.equal(ours, expected)
    assert len(graphs) == 1


def test_ids_that_are_written_into_are_noticed(backend):
    """Noise that is made again from ids that were changed would be of other samples."""
    ids = IDS.clone()
    noised = objective().noise(X0, seed=SEED, ids=ids, keep_noise=False)
    prediction = torch.randn_like(X0, requires_grad=True)
    loss = objective().loss(prediction, noised)
    ids += 1
    with pytest.raises(RuntimeError, match="the tensor of ids was changed in place"):
        objective().loss(prediction, noised)
    if backend == "reference":  # it keeps the noise for the gradient
        (3 * loss).backward()
        expected = 6 * (prediction - (normals(X0.shape) - X0)) / X0.numel()
        torch.testing.assert_close(prediction.grad, expected.detach(), rtol=1e-4, atol=1e-8)
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (3 * loss).backward()  # the gradient for 1 is there


def test_a_batch_goes_from_process_to_process():
    noised = objective().noise(X0, seed=SEED, ids=IDS, keep_noise=False)
    again = pickle.loads(pickle.dumps(noised))
    assert torch.equal(again.noise, noised.noise)
    assert torch.equal(objective().loss(X0, again), objective().loss(X0, noised))


def test_strided_ids_and_none():
    strided = torch.stack([IDS, IDS], 1)[:, 0]
    assert torch.equal(objective().noise(X0, seed=SEED, ids=strided).noise, normals(X0.shape))
    assert objective().noise(X0[:0], seed=SEED, ids=IDS[:0]).x_t.shape == (0, 4, 3, 5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "ids, error, match",
    [
        ([1, 2, 3, 4, 5, 6], TypeError, "ids must be a tensor of integers, one a sample"),
        (torch.rand(6), TypeError, "ids must be a tensor of integers"),
        (torch.arange(5), ValueError, r"ids must be \[6\], one a sample; got \(5,\)"),
        (torch.arange(6).view(6, 1), ValueError, r"ids must be \[6\]"),
        (torch.ones(6, dtype=torch.bool), TypeError, "ids must be a tensor of integers"),
    ],
)
def test_wrong_ids(ids, error, match):
    for call in (
        lambda: objective().noise(X0, seed=SEED, ids=ids),
        lambda: fastdiff.sample(lambda x, t: x, X0.shape, objective(), seed=SEED, ids=ids, progress=False),
        lambda: fastdiff.pyramid_noise(X0, seed=SEED, ids=ids),
    ):
        with pytest.raises(error, match=match):
            call()


def test_wrong_ids_of_noise():
    with pytest.raises(ValueError, match="both say which samples"):
        objective().noise(X0, seed=SEED, ids=IDS, sample_offset=3)
    with pytest.raises(TypeError, match=r"sample ids must be int64 \[batch\]"):
        ops.Philox(1, IDS.int())
    with pytest.raises(TypeError, match=r"sample ids must be int64 \[batch\]"):
        ops.Philox(1, IDS.view(2, 3))
    with pytest.raises(ValueError, match="5 sample ids for the 6 samples"):
        ops.noise(X0, 1.0, 1.0, ops.Philox(1, IDS[:5]))
    with pytest.raises(ValueError, match="5 sample ids for the 6 samples"):
        ops.materialize(ops.Philox(1, IDS[:5]), X0.shape, "cpu")


@pytest.mark.parametrize(
    "how, match",
    [
        (
            {"generator": [torch.Generator() for _ in range(6)]},
            "generators .*: leave ids out, .* generators of one seed",
        ),
        ({"noise": lambda step, shape: torch.zeros(shape)}, "noise= .*: leave ids out, and give equal noise"),
    ],
    ids=["generators", "noise"],
)
def test_ids_where_the_noise_is_not_made_from_the_seed(how, match):
    """They would be ignored."""
    with pytest.raises(ValueError, match=match):
        fastdiff.sample(lambda x, t: x, X0.shape, objective(), ids=IDS, progress=False, **how)
