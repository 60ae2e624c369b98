"""The options of other libraries' calling conventions, as in test_options.py: each at two values, with diffusers' own
numbers, a library's formulas written out, or a generator's draws."""

import copy

import numpy as np
import oracle
import oracle_samplers as truth
import pytest
import torch
from options import MASK, WEIGHT, X0, Asked, M, N, T, check, generator, m, mask, n, rows, seed_of, t, weight, x0
from oracle import LD, assert_close
from tiny_run import SHAPE, START, at, clean

import fastdiff
from fastdiff import losses
from fastdiff import tabulated as tables
from fastdiff.integrations import edm, flow, k_diffusion, method_swap, training_scripts

diffusers = pytest.importorskip("diffusers")
from diffusers import training_utils  # noqa: E402

# ------------------------------------------------------------------------------------------------------ from_scheduler


def weights_from(**options):
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    objective = fastdiff.Objective.from_scheduler(scheduler, **options)
    return objective.noise(x0, t, n).weight, scheduler.alphas_cumprod.double().numpy()[T]


def min_snr(abar, gamma=5.0, form="paper"):
    return oracle.weight_min_snr("v_prediction", np.sqrt(abar), np.sqrt(1 - abar), gamma, form)


FROM_SCHEDULER = {
    "snr_gamma": ((5.0, 1.0), lambda abar, v: min_snr(abar, gamma=v), {}),
    "snr_form": (("paper", "plus_one"), lambda abar, v: min_snr(abar, form=v), {"snr_gamma": 5.0}),
    "snr_form, shifted": (("plus_one", "shifted"), lambda abar, v: min_snr(abar, form=v), {"snr_gamma": 5.0}),
    "weighting": (("uniform", "snr"), lambda abar, v: abar / (1 - abar) if v == "snr" else 1 + 0 * abar, {}),
}


@pytest.mark.parametrize("name", list(FROM_SCHEDULER))
def test_weights_from_a_scheduler(name):
    """1e-4: the SNR of a schedule in float32, whose 1 - alpha_bar at t = 0 has 2^-24 / 1e-4 of error."""
    values, formula, others = FROM_SCHEDULER[name]
    option = name.split(",")[0]
    for value in values:
        got, abar = weights_from(**{option: value}, **others)
        assert_close(got, formula(abar, value), rel=2e-3, label=f"{name} {value}")
    assert np.abs(formula(abar, values[0]) - formula(abar, values[1])).max() > 0.1


def test_what_an_objective_from_a_scheduler_is_given_besides():
    scheduler = diffusers.DDPMScheduler()
    objective = fastdiff.Objective.from_scheduler(
        scheduler, prediction="sample", loss="l1", timesteps="mode", error_space="epsilon", noise_offset=0.2,
        input_perturbation=0.3,
    )  # fmt: skip
    assert [objective.prediction.name, objective.error_space.name] == ["sample", "epsilon"]
    assert [objective.noise_offset, objective.input_perturbation] == [0.2, 0.3]
    assert objective.loss_function == losses.L1() and objective.timesteps == fastdiff.timesteps.Mode(1.29)


# ------------------------------------------------------------------------------------------------ EDM's loss objects

IMAGES = torch.zeros(5, 3, 2, 2)


def drawn(distribution, formula):
    """What ``formula`` makes of one draw a sample from PyTorch's generator."""

    def expected(value):
        torch.manual_seed(3)
        return formula(value, distribution(5, 1, 1, 1).double().numpy())

    return expected


def sigma_of(make):
    def call(value):
        torch.manual_seed(3)
        return make(value).sigma(IMAGES).double()

    return call


def vp_sigma(u, beta_d=19.9, beta_min=0.1, epsilon_t=1e-5):
    time = 1 + u * (epsilon_t - 1)
    return np.sqrt(np.expm1(0.5 * beta_d * time**2 + beta_min * time))


# name: (values, make(value), distribution, sigma(value, draws)); sigma is float32, of an exponential of up to 10
OF_EDM = {
    "EDMLoss P_mean": ((-1.2, 0.3), lambda v: edm.EDMLoss(P_mean=v), torch.randn, lambda v, z: np.exp(1.2 * z + v)),
    "EDMLoss P_std": ((1.2, 0.5), lambda v: edm.EDMLoss(P_std=v), torch.randn, lambda v, z: np.exp(v * z - 1.2)),
    "EDM2Loss P_mean": ((-0.4, 0.3), lambda v: edm.EDM2Loss(P_mean=v), torch.randn, lambda v, z: np.exp(z + v)),
    "EDM2Loss P_std": ((1.0, 0.5), lambda v: edm.EDM2Loss(P_std=v), torch.randn, lambda v, z: np.exp(v * z - 0.4)),
    "VPLoss beta_d": ((19.9, 5.0), lambda v: edm.VPLoss(beta_d=v), torch.rand, lambda v, u: vp_sigma(u, beta_d=v)),
    "VPLoss beta_min": ((0.1, 2.0), lambda v: edm.VPLoss(beta_min=v), torch.rand, lambda v, u: vp_sigma(u, beta_min=v)),
    "VPLoss epsilon_t": (
        (1e-5, 0.3), lambda v: edm.VPLoss(epsilon_t=v), torch.rand, lambda v, u: vp_sigma(u, epsilon_t=v)),
    "VELoss sigma_min": (
        (0.02, 0.5), lambda v: edm.VELoss(sigma_min=v), torch.rand, lambda v, u: v * (100 / v) ** u),
    "VELoss sigma_max": (
        (100.0, 7.0), lambda v: edm.VELoss(sigma_max=v), torch.rand, lambda v, u: 0.02 * (v / 0.02) ** u),
}  # fmt: skip


@pytest.mark.parametrize("name", list(OF_EDM))
def test_sigmas_of_edm_losses(name):
    values, make, distribution, formula = OF_EDM[name]
    call, expected = sigma_of(make), drawn(distribution, formula)
    for value in values:
        assert_close(call(value), expected(value), rel=1e-5, label=name)
    assert np.abs(expected(values[0]) / expected(values[1]) - 1).max() > 0.05


@pytest.mark.parametrize("make", [edm.EDMLoss, edm.EDM2Loss])
def test_sigma_data_of_edm_losses(make):
    """Karras et al. 2022, table 1: (sigma^2 + d^2) / (sigma d)^2."""
    sigma = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)
    for d in (0.5, 2.0):
        assert_close(make(sigma_data=d).weight(sigma), (sigma.numpy() ** 2 + d**2) / (sigma.numpy() * d) ** 2)


# --------------------------------------------------------------------------------------------------- training scripts

LATENTS = torch.zeros(64, 1, 2, 2)


def script_times(script):
    """The timesteps that a script draws, after its noise."""
    torch.manual_seed(3)
    return script.noise(LATENTS).t


def upstream_times(**density):
    torch.manual_seed(3)
    torch.randn_like(LATENTS)
    options = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29} | density
    u = training_utils.compute_density_for_timestep_sampling(batch_size=64, **options)
    return (u * 1000).long()


@pytest.mark.parametrize("make", [training_scripts.sd3, training_scripts.flux])
@pytest.mark.parametrize(
    "scheme, name, values",
    [
        ("logit_normal", "logit_mean", (0.0, 0.7)), ("logit_normal", "logit_std", (1.0, 0.3)),
        ("mode", "mode_scale", (1.29, 0.4)),
    ],
)  # fmt: skip
def test_densities_of_the_scripts(make, scheme, name, values):
    seen = []
    for value in values:
        script = make(diffusers.FlowMatchEulerDiscreteScheduler(), weighting_scheme=scheme, **{name: value})
        seen.append(script_times(script))
        assert torch.equal(seen[-1], upstream_times(weighting_scheme=scheme, **{name: value}))
    assert not torch.equal(*seen)


def ddpm(**options):
    return diffusers.DDPMScheduler(prediction_type="v_prediction", **options)


def flow_scheduler():
    return diffusers.FlowMatchEulerDiscreteScheduler()


SCRIPTS = {
    "text_to_image": (training_scripts.text_to_image, ddpm, {}),
    "text_to_image_sdxl": (training_scripts.text_to_image_sdxl, ddpm, {}),
    "unconditional": (training_scripts.unconditional, diffusers.DDPMScheduler, {}),
    "dreambooth": (training_scripts.dreambooth, ddpm, {}),
    "dreambooth_sdxl": (training_scripts.dreambooth_sdxl, ddpm, {}),
    "dreambooth_sdxl edm": (training_scripts.dreambooth_sdxl, diffusers.EDMEulerScheduler, {"edm_style": True}),
    "sd3": (training_scripts.sd3, flow_scheduler, {}),
    "flux": (training_scripts.flux, flow_scheduler, {}),
    "cogvideox": (training_scripts.cogvideox, ddpm, {}),
}


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_own_noise_of_the_scripts(name):
    """t is drawn as without it; then the noise is made from one seed of the same generator."""
    make, scheduler, options = SCRIPTS[name]
    latents = torch.zeros(64, 1, 1, 2, 2)
    own = make(scheduler(), own_noise=True, **options).noise(latents, generator=generator(3))
    g = generator(3)
    script = make(scheduler(), **options)
    t = script.draw_times(64, torch.device("cpu"), g)
    assert torch.equal(own.t, t) and len(t.unique()) > 32
    np.testing.assert_array_equal(own.noise.numpy(), oracle.normal(seed_of(g), tuple(latents.shape)))
    drawn = script.noise(latents, generator=generator(3))
    assert torch.equal(drawn.noise, torch.randn(latents.shape, generator=generator(3)))


@pytest.mark.parametrize(
    "name",
    [name for name in SCRIPTS if name not in ("text_to_image", "text_to_image_sdxl", "unconditional", "cogvideox")],
)
def test_prior_loss_weight_of_the_scripts(name):
    """(mean of the first half) + w (mean of the second): what is left of a loss when the first half is right is w."""
    make, scheduler, options = SCRIPTS[name]
    noised = make(scheduler(), **options).noise(
        torch.randn(4, 1, 2, 2, generator=generator(1)), torch.tensor([9, 99, 500, 900])
    )
    wrong = noised.target.clone()
    wrong[2:] += 1
    means = []
    for value in (1.0, 0.3):
        script = make(scheduler(), prior_loss_weight=value, **options)
        means.append(float(script.loss(wrong, noised)))
    plain = float(make(scheduler(), **options).loss(wrong, noised))
    np.testing.assert_allclose(means, [2 * plain, 2 * 0.3 * plain], rtol=1e-6)


def test_offset_noise_of_the_scripts_is_of_the_generator():
    """Drawn after the noise, from the generator that is given; the default one stays where it is."""
    latents, before = torch.zeros(3, 2, 4, 4), torch.random.get_rng_state()
    for make, options, strength in (
        (training_scripts.text_to_image, {"noise_offset": 0.3}, 0.3),
        (training_scripts.text_to_image_sdxl, {"noise_offset": 0.05}, 0.05),
        (training_scripts.dreambooth, {"offset_noise": True}, 0.1),
        (training_scripts.dreambooth, {"offset_noise": False}, 0.0),
    ):
        g = generator(8)
        expected = torch.randn(latents.shape, generator=g)
        if strength:
            expected = expected + strength * torch.randn(3, 2, 1, 1, generator=g)
        noised = make(ddpm(), **options).noise(latents, generator=generator(8))
        assert torch.equal(noised.noise, expected)
        assert torch.equal(noised.t, torch.randint(0, 1000, (3,), generator=g))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_input_perturbation_of_the_scripts_is_of_the_generator():
    latents, before = torch.zeros(3, 2, 4, 4), torch.random.get_rng_state()
    scheduler = ddpm()
    for strength in (0.1, 0.6):
        g = generator(8)
        noise, xi = torch.randn(2, *latents.shape, generator=g)
        t = torch.randint(0, 1000, (3,), generator=g)
        noised = training_scripts.text_to_image(ddpm(), input_perturbation=strength).noise(
            latents, generator=generator(8)
        )
        torch.testing.assert_close(
            noised.x_t, scheduler.add_noise(latents, noise + strength * xi, t), rtol=1e-6, atol=1e-6
        )
        assert torch.equal(noised.noise, noise) and torch.equal(noised.t, t)
    assert torch.equal(torch.random.get_rng_state(), before)


def weights_of_script(make, **options):
    script = make(ddpm(), **options)
    return script.objective.noise(torch.zeros(4, 1, 1), t, torch.zeros(4, 1, 1)).weight


@pytest.mark.parametrize("make", [training_scripts.text_to_image, training_scripts.text_to_image_sdxl])
def test_weights_of_the_scripts(make):
    abar = ddpm().alphas_cumprod.double().numpy()[T]
    for options, expected in (
        ({}, np.ones(4)),
        ({"snr_gamma": 5.0}, min_snr(abar)),
        ({"snr_gamma": 1.0}, min_snr(abar, gamma=1.0)),
        ({"snr_gamma": 5.0, "snr_form": "plus_one"}, min_snr(abar, form="plus_one")),
        ({"snr_gamma": 5.0, "snr_form": "shifted"}, min_snr(abar, form="shifted")),
    ):
        assert_close(weights_of_script(make, **options), expected, rel=2e-3, label=str(options))
    for loss in ("l1", losses.Huber(0.3)):
        assert make(ddpm(), loss=loss).objective.loss_function == losses.get(loss)
    assert make(ddpm(), prediction_type="epsilon").objective.prediction.name == "epsilon"


# ---------------------------------------------------------------------------------------- k-diffusion and flow matching


def denoiser(x, sigma):
    return torch.from_numpy(clean(x.numpy()))


def k_sample(name, **options):
    torch.manual_seed(5)
    return getattr(k_diffusion, f"sample_{name}")(
        denoiser,
        3 * torch.from_numpy(START[0]),
        torch.tensor([3.0, 1.0, 0.4, 0.0], dtype=torch.float64),
        disable=True,
        **options,
    )


def k_truth(name, eta=1.0, s_noise=1.0):
    levels, x = [(LD(1), LD(s)) for s in (3.0, 1.0, 0.4, 0.0)], 3 * START[0]
    torch.manual_seed(5)
    zs = [s_noise * torch.randn(SHAPE, dtype=torch.float64).numpy() for _ in range(3)]
    if name == "euler_ancestral":
        return truth.euler_ancestral(x, levels, lambda u, s: clean(u), lambda i: zs[i], eta)[-1]
    order = 3 if "3m" in name else 2
    kind = "heun" if order == 3 else "midpoint"
    return truth.dpmpp(x, levels, at, order, truth.multistep_orders(order, 3, lower=False), eta, kind, lambda i: zs[i])[
        -1
    ]


@pytest.mark.parametrize("option, values", [("eta", (1.0, 0.4)), ("s_noise", (1.0, 0.7))])
@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_option_of_k_diffusions_samplers(name, option, values):
    check(Asked(values, lambda v: k_sample(name, **{option: v}), lambda v: k_truth(name, **{option: v})))


def test_rho_of_k_diffusions_sigmas():
    for rho in (7.0, 2.0):
        sigmas = k_diffusion.get_sigmas_karras(5, 0.1, 10.0, rho=rho)
        assert_close(sigmas, [*truth.karras(5, 0.1, 10.0, rho), 0], rel=2.0**-24)


class Path:
    """flow_matching's CondOT path."""

    @staticmethod
    def scheduler(t):
        one = torch.ones_like(t)
        return type("At", (), {"alpha_t": t, "sigma_t": 1 - t, "d_alpha_t": one, "d_sigma_t": -one})


def test_options_of_a_flow_loss():
    """v = x_1 - x_0, and an error that is weighted, masked and reduced as it says."""
    noised = flow.noise(Path(), x0, n, torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64))
    error = M - (oracle.ld(X0) - N)
    for options, expected in (
        ({}, (error**2).mean()),
        ({"reduction": "none"}, (error**2).mean((1, 2))),
        ({"reduction": "sum"}, (error**2).sum()),
        ({"mask": mask}, (error**2 * MASK).mean()),
        ({"weight": weight}, (error**2 * rows(WEIGHT)).mean()),
        ({"weight": 0.3}, (0.3 * error**2).mean()),
        ({"function": "l1"}, np.abs(error).mean()),
        ({"function": "log_cosh", "mask": mask, "reduction": "none"}, (np.log(np.cosh(error)) * MASK).mean((1, 2))),
    ):
        assert_close(flow.loss(m, noised, **options), expected, rel=1e-12, label=str(options))
    assert_close(noised.x_t, rows([0.1, 0.4, 0.7, 0.9]) * X0 + (1 - rows([0.1, 0.4, 0.7, 0.9])) * N, absolute=1e-14)
    torch.manual_seed(3)
    drawn = flow.noise(Path(), x0, n).t
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(4)), "t is drawn where none is given"


# ------------------------------------------------------------------------------------------------- fusing and undoing


def test_a_fused_scheduler_is_given_everything_back():
    """After ``unfuse`` an object is what it was: of its class, and with no coefficients left."""
    from fastdiff.integrations import diffusers as fused
    from fastdiff.integrations.diffusers import supported

    for name, methods in supported.SUPPORTED.items():
        scheduler = supported.resolve(name)()
        kind, before = type(scheduler), dict(scheduler.__dict__)
        fused.fuse(scheduler)
        assert type(scheduler) is not kind and set(methods) <= set(vars(type(scheduler))), name
        fused.unfuse(scheduler)
        assert type(scheduler) is kind and scheduler.__dict__ == before, name


@pytest.mark.parametrize("how", ["fuse", "patch"])
def test_fallbacks_in_a_compiled_program_are_counted(how):
    """A scheduler of a class with a variance of its own is left to diffusers; counted as it is traced."""
    from fastdiff.integrations import diffusers as fused

    class Own(diffusers.DDPMScheduler):
        def _get_variance(self, *arguments, **named):
            return 4 * super()._get_variance(*arguments, **named)

    torch._dynamo.reset()
    fused.reset_counts()
    patched = fused.patch() if how == "patch" else None
    scheduler = Own() if patched else fused.fuse(Own())
    scheduler.set_timesteps(4)
    try:
        x = torch.ones(1, 2)
        torch.compile(lambda x: scheduler.step(0.3 * x, 0, x).prev_sample * 2, backend="eager")(x)
        assert set(fused.fallbacks()["DDPMScheduler.step"]) == {"Own has a _get_variance of its own"}
        assert "DDPMScheduler.step" not in fused.fused_calls()
    finally:
        if patched:
            patched.undo()
        fused.reset_counts()
        torch._dynamo.reset()


class Doubled:
    """Something with a method to fuse, off by a factor."""

    def __init__(self, factor=1.0):
        self.factor = factor

    def twice(self, x):
        return 2 * self.factor * x


def twice(self, x):
    return 2 * x


@pytest.mark.parametrize("off", [1e-3, -1e-3, 0.1])
def test_a_method_that_is_off_by_a_thousandth_is_left_alone(off):
    """Float32 roundings of a formula are below 1e-5; a formula that is another one is not."""

    def fuse(obj):
        return method_swap.fuse_methods(
            obj, {"twice": twice}, {"twice": lambda d: d.twice(torch.linspace(-1, 1, 9))}, copy.copy
        )

    assert method_swap.fused_methods(fuse(Doubled(1 + 1e-6))) == ("twice",)
    # Whatever holds the tensors that a method returns.
    for held in (lambda x: (x.new_zeros(1), x), lambda x: [[x]], lambda x: {"a": x.new_zeros(1), "b": (x,)}):
        with pytest.raises(TypeError, match="twice: this class or release computes something else"):
            method_swap.fuse_methods(
                Doubled(1 + off),
                {"twice": twice},
                {"twice": lambda d, held=held: held(d.twice(torch.ones(3)))},
                copy.copy,
            )
    with pytest.raises(TypeError, match="twice: this class or release computes something else"):
        fuse(Doubled(1 + off))


def test_a_table_of_levels_may_rest():
    """Two steps of one level are allowed, rising is not."""
    process = tables.TabulatedVP([0.9, 0.9, 0.5], [0.1, 0.1, 0.8])
    assert process.betas.tolist() == pytest.approx([1 - 0.9**2, 0.0, 1 - (0.5 / 0.9) ** 2])
