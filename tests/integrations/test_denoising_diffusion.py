"""Objects of denoising-diffusion-pytorch, fused: the same losses, samples and draws.

They run twice: on stand-ins written here from the papers' formulas with the package's interface, and, where it is
installed, on the package itself (its image loading, torchvision, is not needed and is replaced by a stub).
"""

import copy
import importlib
import pickle
import random
import sys
import types

import libraries
import numpy as np
import pytest
import torch
from libraries import GaussianDiffusion, Net
from torch import nn

from fastdiff.integrations import denoising_diffusion as dd

F32 = 2.0**-24


# ----------------------------------------------------------------------------------------------------------- stand-ins


def installed_package():
    """denoising_diffusion_pytorch, without torchvision where that is not there; skips where it cannot be imported."""
    pytest.importorskip("einops")
    stubs = {}
    if importlib.util.find_spec("torchvision") is None:
        stubs = {
            name: types.ModuleType(name) for name in ("torchvision", "torchvision.transforms", "torchvision.utils")
        }
        stubs["torchvision"].transforms = stubs["torchvision.transforms"]
        stubs["torchvision"].utils = stubs["torchvision.utils"]
    before = set(sys.modules)
    sys.modules.update(stubs)
    try:
        return pytest.importorskip("denoising_diffusion_pytorch", exc_type=ImportError)
    finally:
        for name in set(stubs) - before:
            del sys.modules[name]


@pytest.fixture(params=["stand-in", "package"])
def package(request):
    return libraries if request.param == "stand-in" else installed_package()


def twice(make):
    """The same object plain and fused."""
    return make(), dd.fuse(make())


def seeded(function, *arguments, seed=5, **options):
    torch.manual_seed(seed)
    random.seed(seed)
    result = function(*arguments, **options)
    return result, torch.random.get_rng_state()


def assert_same_loss(plain, fused, *arguments, seed=5, **options):
    """The same draws; values, and gradients of the parameters, to 1e-5 of the largest: about 170 roundings.

    The largest of all parameters: the gradient of a learned schedule is a difference of terms that nearly cancel.
    """
    (a, after_a), (b, after_b) = (seeded(d, *arguments, seed=seed, **options) for d in (plain, fused))
    assert torch.equal(after_a, after_b), "draws"
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-7)
    a.sum().backward()
    b.sum().backward()
    pairs = [(p.grad, q.grad) for p, q in zip(plain.parameters(), fused.parameters()) if p.grad is not None]
    largest = max(float(p.abs().max()) for p, _ in pairs)
    for p, q in pairs:
        assert float((p - q).abs().max()) <= 1e-5 * largest


def gaussian(package, **options):
    net = Net(self_condition=options.pop("self_condition", False))
    return package.GaussianDiffusion(net, image_size=8, **{"timesteps": 200} | options)


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize(
    "options", [{}, {"min_snr_loss_weight": True}, {"offset_noise_strength": 0.1}, {"self_condition": True}], ids=str
)
def test_gaussian_loss(package, objective, options):
    plain, fused = twice(lambda: gaussian(package, objective=objective, **options))
    assert {"q_sample", "p_losses"} <= set(dd.fused_methods(fused))
    images = torch.rand(16, 1, 8, 8)
    for seed in range(4):  # both sides of the coin of self-conditioning
        assert_same_loss(plain, fused, images, seed=seed)
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 7, 100, 199])
    for how in ({}, {"offset_noise_strength": 0.4}):
        rows_a, rows_b = (seeded(d.p_losses, x, t, loss_reduction="none", **how)[0] for d in (plain, fused))
        assert rows_a.shape == rows_b.shape == (4,)
        torch.testing.assert_close(rows_b, rows_a, rtol=1e-5, atol=1e-7)


def test_q_sample_has_the_same_bits(package):
    plain, fused = twice(lambda: gaussian(package))
    x, n, t = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.tensor([0, 7, 100, 199])
    assert torch.equal(fused.q_sample(x, t, n), plain.q_sample(x, t, n))
    assert torch.equal(seeded(fused.q_sample, x, t)[0], seeded(plain.q_sample, x, t)[0])


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_p_sample(package, objective):
    plain, fused = twice(lambda: gaussian(package, objective=objective))
    assert "p_sample" in dd.fused_methods(fused)
    x = torch.randn(3, 1, 8, 8)
    for t in (199, 60, 1, 0):
        (a, after_a), (b, after_b) = (seeded(d.p_sample, x, t) for d in (plain, fused))
        assert torch.equal(after_a, after_b)
        for mine, other in zip(b, a):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5 * float(x.abs().max()))


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_sample(package, objective, eta):
    """A whole run from noise: images in [0, 1]."""
    plain, fused = twice(lambda: gaussian(package, objective=objective, sampling_timesteps=20, ddim_sampling_eta=eta))
    assert "ddim_sample" in dd.fused_methods(fused)
    for every in (False, True):
        (a, after_a), (b, after_b) = (
            seeded(d.ddim_sample, (2, 1, 8, 8), return_all_timesteps=every) for d in (plain, fused)
        )
        assert torch.equal(after_a, after_b)
        torch.testing.assert_close(b, a, rtol=0, atol=1e-5 * float(a.abs().max()))


def test_self_conditioned_sampling(package):
    plain, fused = twice(lambda: gaussian(package, self_condition=True, sampling_timesteps=10))
    a, b = (seeded(d.ddim_sample, (2, 1, 8, 8))[0] for d in (plain, fused))
    torch.testing.assert_close(b, a, rtol=0, atol=1e-5)


def test_immiscible(package):
    """Upstream permutes the noise of x_t alone: kept with "as_upstream", repaired with "both"."""
    pytest.importorskip("scipy")
    make = lambda: gaussian(package, objective="pred_noise", immiscible=True)  # noqa: E731
    with pytest.raises(ValueError, match="as_upstream"):
        dd.fuse(make())
    plain, fused = make(), dd.fuse(make(), immiscible="as_upstream")
    assert_same_loss(plain, fused, torch.rand(8, 1, 8, 8))
    both = dd.fuse(make(), immiscible="both")
    seen = {}
    both.model.forward = lambda x, t, c=None: seen.setdefault("x", x)
    x, n, t = torch.randn(8, 1, 8, 8), torch.randn(8, 1, 8, 8), torch.full((8,), 100)
    loss = both.p_losses(x, t, n)
    a, s = both.sqrt_alphas_cumprod[100], both.sqrt_one_minus_alphas_cumprod[100]
    target = (seen["x"] - a * x) / s
    torch.testing.assert_close(loss, ((seen["x"] - target) ** 2).mean(), rtol=1e-5, atol=0)
    order = both.noise_assignment(x, n)
    assert sorted(order.tolist()) == list(range(8)) and order.tolist() != list(range(8))
    torch.testing.assert_close(target, n[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "learned"])
@pytest.mark.parametrize("min_snr", [False, True])
def test_continuous_time(package, schedule, min_snr):
    def make():
        torch.manual_seed(0)
        return package.ContinuousTimeGaussianDiffusion(
            Net(continuous=True), image_size=8, channels=1, noise_schedule=schedule, min_snr_loss_weight=min_snr
        )

    plain, fused = twice(make)
    assert set(dd.fused_methods(fused)) == {"q_sample", "p_losses"}
    images = torch.rand(8, 1, 8, 8)
    assert_same_loss(plain, fused, images)
    if schedule == "learned":
        schedule_gradients = [p.grad for name, p in fused.named_parameters() if not name.startswith("model.")]
        assert schedule_gradients and any(bool(g.any()) for g in schedule_gradients if g is not None)
    else:
        x, n, t = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9])
        assert torch.equal(fused.q_sample(x, t, n)[0], plain.q_sample(x, t, n)[0])


def test_v_parameterisation(package):
    plain, fused = twice(
        lambda: package.VParamContinuousTimeGaussianDiffusion(Net(continuous=True), image_size=8, channels=1)
    )
    assert_same_loss(plain, fused, torch.rand(8, 1, 8, 8))
    x, n, t = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    for mine, other in zip(fused.q_sample(x, t, n), plain.q_sample(x, t, n)):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("self_condition", [False, True])
def test_elucidated(package, self_condition):
    plain, fused = twice(
        lambda: package.ElucidatedDiffusion(
            Net(self_condition=self_condition, continuous=True), image_size=8, channels=1
        )
    )
    assert dd.fused_methods(fused) == ("forward",)
    images = torch.rand(8, 1, 8, 8)
    for seed in range(4):
        assert_same_loss(plain, fused, images, seed=seed)
    a, b = (seeded(d, images, sigma=torch.full((8,), 0.3), loss_reduction="none")[0] for d in (plain, fused))
    torch.testing.assert_close(b, a, rtol=1e-5, atol=0)
    with pytest.raises(AssertionError):
        fused(torch.rand(8, 1, 9, 8))


def test_elucidated_with_a_weight_of_its_own():
    """The published one cancels c_out; another does not."""

    class Reweighted(libraries.ElucidatedDiffusion):
        def loss_weight(self, sigma):
            return 1 / sigma

    plain, fused = twice(lambda: Reweighted(Net(), image_size=8, channels=1))
    assert "forward" in dd.fused_methods(fused)
    assert_same_loss(plain, fused, torch.rand(16, 1, 8, 8))


def train(diffusion, images, steps):
    """The package's training loop: shuffled batches, two accumulated, clipped gradients, Adam."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=3e-4, betas=(0.9, 0.99))
    losses = []
    for _ in range(steps):
        total = 0.0
        for _ in range(2):
            loss = diffusion(images[torch.randint(0, len(images), (32,))]) / 2
            total += loss.item()
            loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def test_training_on_digits_gives_the_same_losses(package):
    """50 steps of the training loop on handwritten digits, plain and fused: 1e-5 at every step."""
    images = torch.from_numpy(pytest.importorskip("sklearn.datasets").load_digits().images).float()[:, None] / 16
    plain, fused = twice(lambda: gaussian(package, timesteps=1000, min_snr_loss_weight=True, offset_noise_strength=0.1))
    a, b = train(plain, images, 50), train(fused, images, 50)
    np.testing.assert_allclose(b, a, rtol=1e-5, atol=0)
    assert np.mean(a[-10:]) < np.mean(a[:10]), "it learns"


def test_the_trainer_itself(monkeypatch, tmp_path):
    """The package's Trainer, with its data loader, accelerator and EMA, on digits saved as images."""
    package = installed_package()
    pytest.importorskip("ema_pytorch")
    module = importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
    digits = torch.from_numpy(pytest.importorskip("sklearn.datasets").load_digits().images).float()[:, None] / 16

    class Digits(torch.utils.data.Dataset):
        def __init__(self, *arguments, **options): ...
        def __len__(self):
            return 512

        def __getitem__(self, index):
            return digits[index]

    seen = []
    monkeypatch.setattr(module, "Dataset", Digits)
    monkeypatch.setattr(module, "cpu_count", lambda: 0)
    real = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda t: seen.append(real(t)) or seen[-1])

    def run(fuse):
        torch.manual_seed(0)
        diffusion = gaussian(package, timesteps=100)
        if fuse:
            dd.fuse(diffusion)
        trainer = module.Trainer(
            diffusion, str(tmp_path), train_batch_size=16, train_num_steps=5, calculate_fid=False,
            results_folder=str(tmp_path), num_samples=1, save_and_sample_every=100, train_lr=1e-3,
        )  # fmt: skip
        seen.clear()
        torch.manual_seed(1)
        trainer.train()
        assert bool(dd.fused_methods(trainer.ema.ema_model)) == fuse, "the EMA's copy is what the original is"
        return list(seen)

    a, b = run(False), run(True)
    assert len(a) >= 5
    np.testing.assert_allclose(b, a, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ fusing as such


def test_fusing_twice_and_undoing(package):
    plain, fused = twice(lambda: gaussian(package))
    assert dd.fuse(fused) is fused and isinstance(fused, package.GaussianDiffusion)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert dd.unfuse(fused) is fused and type(fused) is package.GaussianDiffusion
    assert dd.fused_methods(fused) == () and "_fastdiff" not in vars(fused)
    assert dd.unfuse(fused) is fused, "and again"


def test_fusing_leaves_no_trace_in_the_generators(package):
    diffusion = gaussian(package)
    torch.manual_seed(3)
    random.seed(3)
    dd.fuse(diffusion)
    expected = (torch.Generator().manual_seed(3).get_state(), random.Random(3).getstate())
    assert torch.equal(torch.random.get_rng_state(), expected[0]) and random.getstate() == expected[1]
    assert all(p.grad is None for p in diffusion.parameters())


def test_copies_and_pickles_stay_fused():
    fused = dd.fuse(gaussian(sys.modules[__name__]))
    x = torch.randn(2, 1, 8, 8)
    expected = seeded(fused.p_sample, x, 100)[0][0]
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert dd.fused_methods(other) == dd.fused_methods(fused) and other is not fused
        assert other.model is not fused.model
        assert torch.equal(seeded(other.p_sample, x, 100)[0][0], expected)
        assert type(dd.unfuse(other)) is GaussianDiffusion


def test_a_loaded_schedule_is_seen():
    """Sampling tables are kept; loading other buffers makes them again."""
    here = sys.modules[__name__]
    fused, other = dd.fuse(gaussian(here, timesteps=200)), gaussian(here, timesteps=200)
    other.betas.mul_(0.5)
    other.posterior_mean_coef1.mul_(0.5)
    x = torch.randn(2, 1, 8, 8)
    before = fused.p_sample(x, 0)[0]
    fused.load_state_dict(other.state_dict())
    torch.testing.assert_close(fused.p_sample(x, 0)[0], other.p_sample(x, 0)[0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(before, fused.p_sample(x, 0)[0])


class ClampedGaussian(GaussianDiffusion):
    """A user's subclass with a loss of its own."""

    def p_losses(self, x_start, t, noise=None, offset_noise_strength=None, loss_reduction="mean"):
        return super().p_losses(x_start, t, noise, offset_noise_strength, loss_reduction).clamp(max=0.1)


class NewArguments(GaussianDiffusion):
    def p_losses(self, x_start, t, noise=None, offset_noise_strength=None, loss_reduction="mean", temperature=1.0):
        return super().p_losses(x_start, t, noise, offset_noise_strength, loss_reduction) * temperature


class MoreDraws(GaussianDiffusion):
    def p_losses(self, x_start, t, noise=None, offset_noise_strength=None, loss_reduction="mean"):
        loss = super().p_losses(x_start, t, noise, offset_noise_strength, loss_reduction)
        torch.rand(1)
        return loss


@pytest.mark.parametrize(
    ("cls", "reason"),
    [(ClampedGaussian, "something else"), (NewArguments, "temperature"), (MoreDraws, "other random numbers")],
)
def test_a_subclass_keeps_what_it_changed(cls, reason):
    make = lambda: cls(Net(), image_size=8, timesteps=200)  # noqa: E731
    plain, fused = twice(make)
    assert "p_losses" not in dd.fused_methods(fused) and "q_sample" in dd.fused_methods(fused)
    assert reason in dd.left_alone(fused)["p_losses"]
    assert_same_loss(plain, fused, torch.rand(8, 1, 8, 8))


@pytest.mark.parametrize("how", [{"immiscible": False}, {"immiscible": True}])
def test_a_subclass_is_tried_whatever_is_said_of_immiscible_noise(how):
    """But for the loss of an immiscible object that is to differ."""
    make = lambda: ClampedGaussian(Net(), image_size=8, timesteps=200, **how)  # noqa: E731
    for choice in ("as_upstream", "both"):
        tried = not (how["immiscible"] and choice == "both")
        assert ("p_losses" in dd.left_alone(dd.fuse(make(), immiscible=choice))) == tried


def test_a_subclass_that_changes_nothing_is_fused_whole():
    class Named(GaussianDiffusion):
        title = "mine"

    assert len(dd.fused_methods(dd.fuse(Named(Net(), image_size=8, timesteps=50)))) == 4


def test_given_noise_is_not_written_to():
    fused = dd.fuse(gaussian(sys.modules[__name__], offset_noise_strength=0.5))
    n = torch.randn(2, 1, 8, 8)
    kept = n.clone()
    fused.p_losses(torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), n)
    assert torch.equal(n, kept)


def test_what_is_no_diffusion_is_refused():
    with pytest.raises(TypeError, match="denoising-diffusion-pytorch"):
        dd.fuse(nn.Linear(2, 2))

    class Other(GaussianDiffusion):
        def q_sample(self, x, steps): ...
        def p_losses(self, x, steps): ...
        def p_sample(self, x, steps): ...
        def ddim_sample(self, steps): ...

    with pytest.raises(TypeError, match="nothing of Other"):
        dd.fuse(Other(Net(), image_size=8, timesteps=50))


def test_learned_variance_of_the_package_is_left_alone():
    """Its loss is another one: the probe finds out."""
    package = installed_package()
    net = Net()
    net.out_dim = 2
    diffusion = package.LearnedGaussianDiffusion(net, image_size=8, timesteps=50)
    dd.fuse(diffusion)
    assert "p_losses" in dd.left_alone(diffusion) and "q_sample" in dd.fused_methods(diffusion)
