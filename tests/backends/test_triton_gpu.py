"""What only a GPU can show of the Triton backend: bits across devices, races, synchronisation, CUDA graphs."""

import pytest
import torch
from asked import reference

import fastdiff
from fastdiff import ops, philox
from fastdiff.tensors import Gathered

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
from asked import triton

from fastdiff.backends.triton.launch import launches

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


def batch(shape, dtype=torch.float32):
    return torch.randn(shape, device=CUDA).to(dtype)


def test_exact_noise_has_the_bits_of_the_cpu():
    """42 million normals, with the tails: every one."""
    for seed in (1, -5, 2**62 + 7):
        got = triton.normal(seed, (14, 10**6), device=CUDA)
        assert torch.equal(got.cpu(), reference.normal(seed, (14, 10**6)))


def test_noising_has_the_bits_of_the_cpu():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x0, rows = batch((8, 4, 128, 128), dtype), torch.rand(2, 8, 1, 1, 1, device=CUDA)
        source = ops.Philox(3, offset=0.1)
        got, _ = triton.noise(x0, source, *rows, 0.1, ops.Philox(3, 0, 2), False)
        want, _ = reference.noise(x0.cpu(), source, *rows.cpu(), 0.1, ops.Philox(3, 0, 2), False)
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("shape", [(64, 4, 64, 64), (1, 2**24), (4096, 96), (3, 7, 1031)])
def test_the_reduction_gives_the_same_bits_always(shape):
    """10,000 launches on four streams at once: every loss has the bits of the first, and is right."""
    prediction, n = batch(shape), batch(shape)
    weight = torch.rand((shape[0],) + (1,) * (len(shape) - 1), device=CUDA)
    one = torch.ones_like(weight)
    arguments = prediction, None, n, None, one, None, weight, None, None, "mse", "none", "mean"
    first = triton.loss(*arguments)
    exact = (weight.double() * (prediction.double() - n.double()) ** 2).mean()
    torch.testing.assert_close(first.double(), exact, rtol=3e-7, atol=0)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    wrong = torch.zeros(4, dtype=torch.int64, device=CUDA)
    for _ in range(2500):
        for k, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                wrong[k] += triton.loss(*arguments) != first
    torch.cuda.synchronize()
    assert wrong.sum() == 0


def test_nothing_waits_for_the_device():
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", weighting=fastdiff.MinSNR(5.0))
    x0, model = batch((4, 3, 16, 16)), torch.nn.Conv2d(3, 3, 1).to(CUDA)
    for checked in (False, True):  # the first compiles, and copies tables
        torch.cuda.set_sync_debug_mode("error" if checked else "default")
        try:
            noised = objective.noise(x0, keep_noise=False)
            (objective.loss(model(noised.x_t), noised) / 4).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_is_three_kernels():
    """By the profiler: nothing of full size but the noising, the loss and its backward."""
    x0, table = batch((4, 4, 64, 64), torch.bfloat16), torch.rand(10, 4, device=CUDA)
    t, seed = torch.randint(0, 10, (4, 1, 1, 1), device=CUDA), torch.tensor([3], device=CUDA)
    alpha, sigma, p, w = (Gathered(column, t) for column in table.unbind(1))
    prediction, one = batch(x0.shape, torch.bfloat16).requires_grad_(), torch.ones((), device=CUDA)
    torch.use_deterministic_algorithms(False)  # which fills what is empty

    def step():
        prediction.grad = None
        triton.noise(x0, ops.Philox(seed), alpha, sigma, 0.0, None, False)
        how = p, alpha, None, w, None, None, "mse", "none", "mean"
        triton.loss(prediction, x0, ops.Philox(seed), *how).backward(one)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile, launches() as launched:
        step()
        torch.cuda.synchronize()
    assert launched == ["affine", "loss", "loss"]
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("emcpy" not in name for name in kernels) <= 3, kernels


def test_cuda_graph_of_a_training_step():
    """Fresh noise and fresh t at every replay; the numbers are those of the same step taken eagerly."""
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", weighting=fastdiff.MinSNR(5.0))
    x0 = batch((8, 3, 16, 16))

    def fresh():
        torch.manual_seed(7)
        model = torch.nn.Conv2d(3, 3, 3, padding=1).to(CUDA)
        return model, torch.optim.SGD(model.parameters(), lr=1e-2)

    def step(model, optimizer):
        optimizer.zero_grad(set_to_none=True)
        noised = objective.noise(x0, keep_noise=False)
        loss = objective.loss(model(noised.x_t), noised)
        (loss * 0.5).backward()
        optimizer.step()
        return loss, noised.t, noised.x_t

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm = fresh()
        for _ in range(3):
            step(*warm)
    torch.cuda.synchronize()
    model, optimizer = fresh()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(model, optimizer)
    torch.cuda.manual_seed(11)
    seen = []
    for _ in range(4):
        graph.replay()
        seen.append([value.clone() for value in captured])
    weights = [p.detach().clone() for p in model.parameters()]
    assert not torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[0][2], seen[1][2])
    model, optimizer = fresh()
    torch.cuda.manual_seed(11)
    for values in seen:
        for got, want in zip(values, step(model, optimizer)):
            torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-6)
    for got, want in zip(weights, model.parameters()):
        torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-6)


def test_replays_of_a_scaled_loss_find_their_gradient():
    """From the second on. The forward and the backward are graphs of their own, so that what is written ahead can be
    overwritten between them: it comes out where the backward leaves it as it is."""
    prediction, n, one = batch((8, 3, 16, 16)).requires_grad_(), batch((8, 3, 16, 16)), torch.ones(8, 1, 1, 1).to(CUDA)
    how = None, one, None, one, None, None, "mse", "none", "mean"
    for _ in range(2):  # compiles
        torch.autograd.grad(triton.loss(prediction, None, n, *how) * 0.5, prediction)
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward):
        loss = triton.loss(prediction, None, n, *how)
        written = loss.grad_fn.written[0]
    with torch.cuda.graph(backward, pool=forward.pool()):
        (gradient,) = torch.autograd.grad(loss * 0.5, prediction)
    exact = (prediction - n).detach() / prediction.numel()
    found = []
    for poisoned in (True, True, True, False):
        forward.replay()
        if poisoned:
            written.fill_(77.0)
        backward.replay()
        found.append(bool((gradient == 77.0).all()))
        if not found[-1]:
            torch.testing.assert_close(gradient, exact, rtol=1e-6, atol=0)
    assert found == [False, True, True, False]


def test_streams_assume_their_own_upstream_gradients():
    """Losses with other factors on four streams at once, and factors that change: every gradient is right."""
    prediction, n, one = (
        batch((64, 4, 32, 32)).requires_grad_(),
        batch((64, 4, 32, 32)),
        torch.ones(64, 1, 1, 1).to(CUDA),
    )
    exact = 2 * (prediction - n).detach() / prediction.numel()
    streams = [torch.cuda.Stream() for _ in range(4)]
    wrong = torch.zeros(4, dtype=torch.int64, device=CUDA)
    torch.cuda.synchronize()
    for turn in range(500):
        for k, stream in enumerate(streams):
            factor = 2.0 ** ((k + turn // 50) % 7)
            with torch.cuda.stream(stream):
                loss = triton.loss(prediction, None, n, None, one, None, one, None, None, "mse", "none", "mean")
                (gradient,) = torch.autograd.grad(loss * factor, prediction)
                wrong[k] += ((gradient - factor * exact).abs() > 1e-6 * (factor * exact).abs()).any()
    torch.cuda.synchronize()
    assert wrong.sum() == 0


def test_checkpointing_leaves_the_numbers():
    from torch.utils.checkpoint import checkpoint

    objective = fastdiff.Objective(fastdiff.VariancePreserving())
    x0, model = batch((4, 3, 16, 16)), torch.nn.Conv2d(3, 3, 1).to(CUDA)

    def loss():
        noised = objective.noise(x0, seed=3, keep_noise=False)
        return objective.loss(model(noised.x_t), noised)

    plain = torch.autograd.grad(loss(), list(model.parameters()))
    again = torch.autograd.grad(checkpoint(loss, use_reentrant=False), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


def test_more_than_2_to_the_31_elements():
    shape = (2**16 + 1, 2**15)
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB")
    x0 = torch.ones(shape, dtype=torch.bfloat16, device=CUDA)
    rows = torch.rand(shape[0], 1, device=CUDA)
    x_t, _ = triton.noise(x0, ops.Philox(3), rows, rows, 0.0, None, False)
    last, _ = triton.noise(x0[-1:], ops.Philox(3, shape[0] - 1), rows[-1:], rows[-1:], 0.0, None, False)
    assert torch.equal(x_t[-1:], last)
    loss = triton.loss(x_t, None, x0, None, rows * 0, None, rows * 0 + 1, None, None, "mse", "none", "none")
    torch.testing.assert_close(loss[-1], (last.float() ** 2).mean(1, keepdim=True)[0], rtol=1e-6, atol=0)


def test_seeds_are_those_that_the_gpu_draws():
    """On the host: the numbers of torch.randint, which leave the generator where that does."""
    between = -(2**63), 2**63 - 1, (1,)
    for seed in (0, 7, 2**63 - 1):
        generators = [torch.Generator(CUDA).manual_seed(seed) for _ in range(2)]
        for generator in generators:
            torch.rand(1000, device=CUDA, generator=generator)
        for _ in range(100):
            on_host, samples = philox.seeded(None, generators[0], None, None, 2, CUDA)
            assert type(on_host) is int and samples == 0
            assert on_host == torch.randint(*between, device=CUDA, generator=generators[1]).item()
        assert torch.equal(*(torch.rand(100, device=CUDA, generator=generator) for generator in generators))


def test_a_graph_of_a_step_that_was_warmed_up_draws_anew():
    """Seeds are drawn on the host before, and on the GPU while the step is captured."""
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", fastdiff.MinSNR(5.0))
    x0, prediction = batch((4, 4, 24, 24)), batch((4, 4, 24, 24)).requires_grad_()

    def step():
        prediction.grad = None
        noised = objective.noise(x0)
        objective.loss(prediction, noised).backward()
        return noised

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        noised = step()
    found = []
    for _ in range(3):
        graph.replay()
        found.append((noised.x_t.clone(), prediction.grad.clone()))
        again = objective.noise(x0, noised.t, seed=int(noised.noise_source.seed))
        assert torch.equal(again.x_t, noised.x_t)
    assert len({x_t.sum().item() for x_t, _ in found}) == len({d.sum().item() for _, d in found}) == 3
