"""Numbers that something was made from, changed in place afterwards: every use goes by what they are now, or by a copy
that is said to be one; and copies of fused schedulers step themselves."""

import copy
import pickle

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import process as processes
from fastdiff import samplers
from fastdiff import tabulated as tables
from fastdiff import weighting as weightings
from fastdiff.integrations import guided_diffusion, training_scripts

diffusers = pytest.importorskip("diffusers")
from fastdiff.integrations import diffusers as fused  # noqa: E402
from fastdiff.integrations.diffusers import supported  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SHAPE = (2, 4, 4, 4)
WAYS = {  # of writing into a tensor: only the first changes its version
    "in place": lambda tensor: tensor,
    ".data": lambda tensor: tensor.data,
    "numpy": lambda tensor: tensor.numpy(),
}
STEPS = ("DDPMScheduler", "DDIMScheduler", "LCMScheduler")


def data(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=g), torch.randn(SHAPE, generator=g)


def scale(tensor, way, factor):
    changed = WAYS[way](tensor)
    changed *= factor


# ------------------------------------------------------------------------------------------- a scheduler's own numbers


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("factor", [0.25, 0.9])
def test_a_process_follows_the_table(way, factor):
    scheduler, t = diffusers.DDPMScheduler(), torch.tensor([3, 700])
    x0, n = data()

    def used():
        made = fastdiff.Objective.from_scheduler(scheduler).noise(x0, t, n).x_t
        script = training_scripts.text_to_image(scheduler).noise(x0, t, n).x_t
        return training_scripts.compute_snr(scheduler, t), made, script

    used()
    scale(scheduler.alphas_cumprod, way, factor)
    bars = scheduler.alphas_cumprod[t].double()
    wide = bars.view(2, 1, 1, 1)
    x_t = wide.sqrt() * x0 + (1 - wide).sqrt() * n
    snr, *noised = used()
    torch.testing.assert_close(snr.double(), bars / (1 - bars), rtol=1e-5, atol=0)
    for found in noised:
        torch.testing.assert_close(found.double(), x_t, rtol=0, atol=1e-6)


def test_a_script_made_before_keeps_its_table():
    scheduler, t = diffusers.DDPMScheduler(), torch.tensor([3, 700])
    x0, n = data()
    script = training_scripts.text_to_image(scheduler)
    before = script.noise(x0, t, n).x_t
    scheduler.alphas_cumprod.mul_(0.5)
    assert torch.equal(script.noise(x0, t, n).x_t, before)


def test_tables_of_float64_are_copied():
    sigmas = torch.linspace(1, 0.1, 5, dtype=torch.float64)
    flow = tables.TabulatedFlow(sigmas, sigmas)
    vp = processes.VariancePreserving(betas := torch.full((4,), 0.1, dtype=torch.float64))
    table = weightings.PerTimestep(weights := torch.ones(4, dtype=torch.float64))
    for tensor in (sigmas, betas, weights, vp.betas):
        tensor.fill_(0.9)
    assert torch.equal(flow.alpha_sigma(torch.tensor([0, 4]))[1], torch.tensor([1, 0.1], dtype=torch.float64))
    assert torch.equal(vp.betas, torch.full((4,), 0.1, dtype=torch.float64))
    assert torch.equal(table.table, torch.ones(4, dtype=torch.float64))


class Held:
    def __init__(self, value):
        self.value, self.other = value, torch.ones(2)


def written(value):
    value[1:] = 7.0
    return value


# What an attribute holds: (how it is made, {what became of it: whether that is another}).
HELD = {
    "a tensor": (
        lambda: torch.ones(3),
        {
            "itself": (lambda value: value, False),
            "an equal one": (lambda value: value.clone(), False),
            "written into": (written, True),
            "another dtype": (lambda value: value.double(), True),
            "fewer": (lambda value: value[:1].clone(), True),
            "a list": (lambda value: value.tolist(), True),
            "elsewhere": (lambda value: value.to("meta"), True),
        },
    ),
    "an array": (
        lambda: np.ones(3),
        {
            "itself": (lambda value: value, False),
            "an equal one": (lambda value: value.copy(), False),
            "written into": (written, True),
            "fewer": (lambda value: value[:1].copy(), True),
            "a list": (lambda value: value.tolist(), True),
            "nothing": (lambda value: None, True),
        },
    ),
    "a tensor elsewhere": (  # its values are not looked at
        lambda: torch.ones(3, device="meta"),
        {
            "itself": (lambda value: value, False),
            "an equal one": (lambda value: value.clone(), True),
            "written into": (written, True),
        },
    ),
    "a number": (
        lambda: 1000.5,
        {
            "itself": (lambda value: value, False),
            "an equal one": (lambda value: value + 1 - 1, False),
            "another": (lambda value: value + 1, True),
        },
    ),
}


@pytest.mark.parametrize(("held", "became"), [(held, became) for held in HELD for became in HELD[held][1]])
def test_what_is_made_of_attributes_is_kept_as_long_as_they_hold_the_same(held, became):
    value, (change, anew) = HELD[held][0](), HELD[held][1][became]
    source, store, made = Held(value), {}, []

    def find():
        return tables.kept(store, "key", source, lambda s: made.append((s.value, s.value)) or len(made))

    assert find() == find() == 1
    source.other = None  # which is not read
    assert find() == 1
    source.value = change(value)
    assert find() == find() == (2 if anew else 1)
    assert tables.kept(store, "another", source, lambda s: "made") == "made" and find() == (2 if anew else 1)
    del source.value
    source.__class__ = type("Without", (Held,), {"value": object()})
    assert find() == find() == (3 if anew else 2)


def test_a_tensor_of_inference_has_no_version():
    with torch.inference_mode():
        source, store = Held(torch.ones(3, device="meta")), {}
    found = [tables.kept(store, "key", source, lambda s: (s.value, object())) for _ in range(2)]
    assert found[0] is found[1]


def both(name, **options):
    return supported.resolve(name)(**options), fused.fuse(supported.resolve(name)(**options))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STEPS)
def test_fused_steps_follow_the_table(name, way):
    """Against the scheduler that is not fused."""
    x0, n = data()
    runs = []
    for scheduler in both(name):
        scheduler.set_timesteps(4)
        found = []
        for k, t in enumerate(scheduler.timesteps):
            if k:
                scale(scheduler.alphas_cumprod, way, 0.8)
            g = torch.Generator().manual_seed(k)
            found += [scheduler.step(n, t, x0, generator=g).prev_sample, scheduler.add_noise(x0, n, t[None])]
            found.append(scheduler.get_velocity(x0, n, t[None]))
        runs.append(found)
    fused.reset_counts()
    for theirs, ours in zip(*runs):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name in supported.SUPPORTED if name not in STEPS and "Parallel" not in name])
def test_fused_steps_follow_the_sigmas(name, way, mode):
    runs = []
    with mode():
        for scheduler in both(name):
            scheduler.set_timesteps(6)
            x, found = data()[0], []
            for k, t in enumerate(scheduler.timesteps):
                if k in (2, 4):
                    at = (scheduler.step_index or 0) + 1
                    scale(scheduler.sigmas[at : at + 1], way, 0.9)
                if hasattr(scheduler, "scale_model_input"):
                    found.append(scheduler.scale_model_input(x, t))
                g = torch.Generator().manual_seed(k)
                options = {"generator": g} if "Ancestral" in name else {}
                x = scheduler.step(torch.sin(x), t, x, **options).prev_sample
                found.append(x)
            runs.append(found)
    for theirs, ours in zip(*runs):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


def test_what_did_not_change_is_not_made_again(monkeypatch):
    scheduler = fused.fuse(diffusers.DDIMScheduler())
    scheduler.set_timesteps(4)
    x0, n = data()
    stepper = scheduler._fastdiff_steps
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            scheduler.step(n, 500, x0)
            assert scheduler._fastdiff_steps is stepper
    scheduler.set_timesteps(4)
    assert scheduler._fastdiff_steps.table is stepper.table, "equal numbers"
    scheduler.alphas_cumprod.data[0] *= 0.5
    scheduler.step(n, 500, x0)
    assert scheduler._fastdiff_steps.table is not stepper.table


# ---------------------------------------------------------------------------------------------------- samplers' tensors


@pytest.mark.parametrize("make", [torch.tensor, list, torch.Tensor.numpy], ids=["tensor", "list", "numpy"])
@pytest.mark.parametrize(
    ("cls", "name", "values"),
    [
        (samplers.DDIM, "timesteps", [999, 500, 100]),
        (samplers.DDPM, "timesteps", [900, 400, 30]),
        (samplers.LCM, "timesteps", [999, 259]),
        (samplers.Euler, "sigmas", [14.0, 5.0, 0.5]),
        (samplers.Heun, "sigmas", [10.0, 2.0, 0.5]),
        (samplers.DPMSolverPP, "timesteps", [999, 500, 100]),
        (samplers.UniPC, "sigmas", [10.0, 2.0, 0.5]),
    ],
)
def test_samplers_keep_a_copy(cls, name, values, make):
    """The field shows the numbers that are used."""
    given = make(torch.tensor(values) if make is torch.Tensor.numpy else values)
    sampler, fresh = cls(**{name: given}), cls(**{name: list(values)})
    x0 = data()[0]

    def run(sampler):
        return fastdiff.sample(
            lambda x, t: torch.sin(x),
            SHAPE,
            fastdiff.VariancePreserving(),
            sampler,
            None,
            "epsilon",
            x=x0,
            seed=1,
            progress=False,
        )

    first = run(sampler)
    given[0] -= 1
    assert list(getattr(sampler, name)) == values
    assert torch.equal(run(sampler), first) and torch.equal(run(fresh), first)
    other = run(cls(**{name: given}))
    assert not torch.equal(other, first), "a sampler made with the changed ones has them"


# ------------------------------------------------------------------------------------------------------- fused objects


def test_tables_of_guided_diffusion_follow_its_arrays():
    from libraries import Diffusion

    plain, ours = Diffusion(), guided_diffusion.fuse(Diffusion())
    x0, n = data()
    t = torch.tensor([0, 60])

    def used(d):
        torch.manual_seed(0)
        step = d.p_sample(lambda x, t: torch.sin(x), x0, t)["sample"]
        return d.q_sample(x0, t, n), step, d.ddim_sample(lambda x, t: torch.sin(x), x0, t, eta=0.5)["sample"]

    for change in (1.0, 0.9, 0.8):
        for d in (plain, ours):
            d.sqrt_alphas_cumprod *= change  # written into, as id() and identity do not see
            d.posterior_mean_coef1 *= change
            d.sqrt_recip_alphas_cumprod *= change
        for theirs, mine in zip(used(plain), used(ours)):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_tables_of_denoising_diffusion_follow_its_buffers():
    from libraries import GaussianDiffusion, Net

    from fastdiff.integrations import denoising_diffusion as dd

    plain, ours = (GaussianDiffusion(Net(), image_size=4, timesteps=20, objective="pred_v") for _ in range(2))
    dd.fuse(ours)
    x = torch.randn(2, 1, 4, 4)
    for change in (1.0, 0.9, 0.8):
        found = []
        for d in (plain, ours):
            d.posterior_mean_coef1.data.mul_(change)  # .data leaves the version as it is
            torch.manual_seed(0)
            found.append(d.p_sample(x, 10)[0])
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5 * float(found[0].abs().max()))
    for d in (plain, ours):
        d.objective = "pred_noise"
        torch.manual_seed(0)
        found.append(d.p_sample(x, 10)[0])
    torch.testing.assert_close(found[3], found[2], rtol=0, atol=1e-5 * float(found[2].abs().max()))


# --------------------------------------------------------------------------------------------------- copied schedulers


def advance(scheduler, x, k):
    t = scheduler.timesteps[k]
    if hasattr(scheduler, "scale_model_input"):
        x_in = scheduler.scale_model_input(x, t)
    options = {}
    if any(name in type(scheduler).__name__ for name in ("DDPM", "LCM", "Ancestral")):
        options = {"generator": torch.Generator().manual_seed(k)}
    return scheduler.step(torch.sin(x_in if hasattr(scheduler, "scale_model_input") else x), t, x, **options)[0]


def alike(theirs, ours):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
@pytest.mark.parametrize("name", supported.SUPPORTED)
def test_a_copy_steps_itself(name, copied):
    """Two runs of different lengths, step by step in turns: the original's and a copy's."""
    runs = []
    for one in both(name):
        one.set_timesteps(6)
        other = copied(one)
        assert type(other) is type(one) and other.step.__self__ is other
        other.set_timesteps(4)
        assert len(one.timesteps) > len(other.timesteps)
        x, y = data(1)
        found = []
        for k in range(4):
            x, y = advance(one, x, k), advance(other, y, k)
            found += [x, y]
        runs.append(found)
    for theirs, ours in zip(*runs):
        alike(theirs, ours)
    assert fused.fused_calls()[f"{name}.step"] > 0
    fused.reset_counts()


@pytest.mark.parametrize("saved", [copy.deepcopy, dict], ids=["deep", "shallow"])
@pytest.mark.parametrize("name", supported.SUPPORTED)
def test_a_state_that_is_put_back_is_gone_on_from(name, saved):
    """One scheduler for several views, whose states are taken and put back."""
    runs = []
    for one in both(name):
        one.set_timesteps(4)
        views, states, found = list(data(2)), [copy.deepcopy(one.__dict__), copy.deepcopy(one.__dict__)], []
        for k in range(4):
            for j in range(2):
                one.__dict__.clear()
                one.__dict__.update(states[j])
                if "model_outputs" in one.__dict__ and saved is dict:
                    one.model_outputs = list(one.model_outputs)
                views[j] = advance(one, views[j], k)
                states[j] = saved(one.__dict__)
                found.append(views[j])
        runs.append(found)
    for theirs, ours in zip(*runs):
        alike(theirs, ours)


def test_a_pickled_scheduler_is_its_own():
    for name in supported.SUPPORTED:
        one = both(name)[1]
        one.set_timesteps(4)
        advance(one, data()[0], 0)
        loaded = pickle.loads(pickle.dumps(one))
        assert type(loaded) is supported.resolve(name) and not set(loaded.__dict__) & set(fused.coefficient_cache.KEPT)
        assert dict(loaded.config) == dict(one.config)


def test_the_class_of_a_fused_scheduler_looks_as_its_own(tmp_path):
    one = both("DDIMScheduler")[1]
    cls = diffusers.DDIMScheduler
    assert isinstance(one, cls) and type(one).__name__ == "DDIMScheduler" and type(one).__module__ == cls.__module__
    one.save_pretrained(tmp_path)
    assert '"_class_name": "DDIMScheduler"' in (tmp_path / "scheduler_config.json").read_text()
    assert [c.__name__ for c in one.compatibles] == [c.__name__ for c in cls().compatibles]
    assert type(fused.fuse(cls())) is type(one), "one class for all"
    assert type(fused.unfuse(one)) is cls


# ------------------------------------------------------------------------------------------------- a process's numbers


@pytest.mark.parametrize(
    ("make", "name", "values"),
    [
        (fastdiff.RectifiedFlow, "shift", (3.0, 0.5, 1.0)),
        (lambda: fastdiff.RectifiedFlow(shift=2.0), "sigma_min", (0.1, 0.0)),
        (fastdiff.VPSDE, "beta_max", (10.0, 20.0)),
        (fastdiff.EDM, "sigma_data", (1.0, 0.3)),
    ],
    ids=["shift", "sigma_min", "beta_max", "sigma_data"],
)
@pytest.mark.parametrize("weighting", [None, "sigma_sqrt"])
def test_an_objective_follows_its_process(backend, make, name, values, weighting):
    process = make()
    kind = {"RectifiedFlow": "flow", "EDM": "edm"}.get(type(process).__name__, "score")
    objective, (x0, n), t = fastdiff.Objective(process, kind, weighting), data(), torch.tensor([0.2, 0.7])

    def used(objective):
        noised = objective.noise(x0, t, n)
        return noised.x_t, objective.loss(x0 * 0.5, noised), objective.predict_x0(n, noised), noised.model_time

    first = used(objective)
    for value in values:
        setattr(process, name, value)
        fresh = fastdiff.Objective(process, kind, weighting)
        for found, expected in zip(used(objective), used(fresh)):
            assert torch.equal(found, expected)
        changed = [not torch.equal(a, b) for a, b in zip(first, used(fresh))]
        assert any(changed) or value == {"shift": 1.0, "sigma_min": 0.0, "beta_max": 20.0}.get(name)
