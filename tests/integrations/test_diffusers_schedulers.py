"""Fused schedulers of diffusers against the original ones: numbers, draws, state, dtypes and errors.

Trajectories are fp32 with a fixed nonlinear model and equal to 1e-5 of the largest value on the way, about 170 fp32
roundings. Where upstream is farther than that from itself in float64 (sigmas of 4096 at zero terminal SNR and 20000 of
the cosine schedule cancel in fp32), the fused one is to be no farther than twice that from it.

Half precision is compared step by step, from upstream's state at each, with upstream on the same values in fp32, whose
own error is a thousandth of what is compared: the fused step's root mean square error is no greater than upstream's,
but for the chance of roundings that both make once, 2 %.
"""

import importlib.util
import inspect
import itertools
import math
import random
import sys
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from devices import pairwise
from known import nonlinear

diffusers = pytest.importorskip("diffusers")
from fastdiff.backends.native import step_table  # noqa: E402
from fastdiff.integrations import diffusers as fused  # noqa: E402
from fastdiff.integrations.diffusers.step import results  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SHAPE = (2, 3, 4, 4)
UNUSABLE = "no finite coefficients for this step"


@pytest.fixture(autouse=True)
def counts():
    fused.reset_counts()
    yield
    fused.unpatch()
    fused.reset_counts()


def pick(count, **choices):
    """``count`` configs of the product of choices, the same in every run."""
    every = list(itertools.product(*choices.values()))
    chosen = random.Random(7).sample(every, min(count, len(every)))
    return [dict(zip(choices, values)) for values in chosen]


CLIPS = [
    {"clip_sample": False},
    {"clip_sample": True, "clip_sample_range": 0.7},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
]
SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]
KINDS = ["epsilon", "sample", "v_prediction"]
SPACINGS = ["leading", "linspace", "trailing"]
SIGMAS = [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
BETAS = {"trained_betas": [0.001 * (k + 1) for k in range(60)], "num_train_timesteps": 60}


def grid():
    """(class, config, steps, arguments of step)."""

    def add(name, configs, steps=(4, 10, 25), calls=({},)):
        for i, config in enumerate(configs):
            settings = {}
            for key, value in config.items():
                settings |= value if key.startswith("_") else {key: value}
            yield name, settings, steps[i % len(steps)], calls[i % len(calls)]

    ddpm = {
        "beta_schedule": [*SCHEDULES, "sigmoid"],
        "prediction_type": KINDS,
        "variance_type": ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"],
        "_clip": CLIPS,
        "timestep_spacing": SPACINGS,
        "steps_offset": [0, 1],
        "rescale_betas_zero_snr": [False, True],
    }
    yield from add("DDPMScheduler", pick(110, **ddpm))
    yield from add("DDPMScheduler", [{"_b": BETAS}, {}, {"variance_type": "fixed_large"}], steps=(60, 1000, 1000))
    yield from add("DDPMParallelScheduler", pick(15, **ddpm))
    ddim = {
        "beta_schedule": SCHEDULES,
        "prediction_type": KINDS,
        "_clip": CLIPS,
        "timestep_spacing": SPACINGS,
        "steps_offset": [0, 1],
        "rescale_betas_zero_snr": [False, True],
        "set_alpha_to_one": [False, True],
    }
    calls = ({}, {"eta": 1.0}, {"eta": 0.5, "use_clipped_model_output": True}, {"use_clipped_model_output": True})
    yield from add("DDIMScheduler", pick(110, **ddim), calls=calls)
    yield from add("DDIMScheduler", [{"_b": BETAS}, {}], steps=(60, 1000), calls=({}, {"eta": 1.0}))
    yield from add("DDIMParallelScheduler", pick(15, **ddim), calls=calls)
    lcm = {
        "beta_schedule": SCHEDULES,
        "prediction_type": KINDS,
        "_clip": CLIPS,
        "rescale_betas_zero_snr": [False, True],
        "set_alpha_to_one": [False, True],
        "timestep_scaling": [10.0, 1.0],
    }
    yield from add("LCMScheduler", pick(40, **lcm), steps=(1, 4, 12))
    k_space = {
        "beta_schedule": SCHEDULES,
        "prediction_type": ["epsilon", "v_prediction", "sample"],
        "_sigmas": SIGMAS,
        "timestep_spacing": SPACINGS,
        "steps_offset": [0, 1],
    }
    euler = k_space | {
        "final_sigmas_type": ["zero", "sigma_min"],
        "interpolation_type": ["linear", "log_linear"],
        "timestep_type": ["discrete", "continuous"],
        "rescale_betas_zero_snr": [False, True],
    }
    yield from add("EulerDiscreteScheduler", pick(80, **euler))
    yield from add("EulerDiscreteScheduler", [{"_b": BETAS}, {}], steps=(60, 1000))
    ancestral = {key: value for key, value in k_space.items() if key != "_sigmas"}
    ancestral |= {"prediction_type": ["epsilon", "v_prediction"], "rescale_betas_zero_snr": [False, True]}
    yield from add("EulerAncestralDiscreteScheduler", pick(40, **ancestral))
    yield from add("EulerAncestralDiscreteScheduler", [{}], steps=(1000,))
    yield from add("HeunDiscreteScheduler", pick(50, **k_space, _clip=CLIPS[:2]))
    edm = {
        "prediction_type": ["epsilon", "v_prediction"],
        "sigma_schedule": ["karras", "exponential"],
        "final_sigmas_type": ["zero", "sigma_min"],
        "sigma_data": [0.5, 1.0],
    }
    yield from add("EDMEulerScheduler", pick(16, **edm))
    multistep = {
        "beta_schedule": SCHEDULES,
        "prediction_type": KINDS,
        "solver_order": [1, 2, 3],
        "lower_order_final": [True, False],
        "timestep_spacing": SPACINGS,
        "_sigmas": SIGMAS,
        "rescale_betas_zero_snr": [False, True],
        "_clip": [{}, {}, CLIPS[2]],
    }
    dpm = multistep | {
        "algorithm_type": ["dpmsolver++", "sde-dpmsolver++"],
        "solver_type": ["midpoint", "heun"],
        "final_sigmas_type": ["zero", "sigma_min"],
        "euler_at_final": [False, True],
        "_sigmas": [*SIGMAS, {"use_lu_lambdas": True}],
    }
    yield from add("DPMSolverMultistepScheduler", pick(110, **dpm), steps=(5, 12, 25))
    noises = dpm | {"algorithm_type": ["dpmsolver", "sde-dpmsolver"], "final_sigmas_type": ["sigma_min"], "_clip": [{}]}
    noises["solver_order"] = [1, 2]
    yield from add("DPMSolverMultistepScheduler", pick(30, **noises), steps=(5, 12, 25))
    third = {**noises, "solver_order": [3], "algorithm_type": ["dpmsolver"]}
    yield from add("DPMSolverMultistepScheduler", pick(8, **third), steps=(5, 12, 25))
    flow = {"use_flow_sigmas": [True], "flow_shift": [1.0, 3.0], "solver_order": [1, 2, 3]}
    flow["prediction_type"] = ["flow_prediction", "epsilon", "sample"]
    yield from add("DPMSolverMultistepScheduler", pick(12, **flow, algorithm_type=dpm["algorithm_type"]), steps=(5, 20))
    unipc = multistep | {
        "solver_type": ["bh1", "bh2"],
        "disable_corrector": [[], [0], [0, 1, 3]],
        "final_sigmas_type": ["zero", "sigma_min"],
    }
    unipc["solver_order"] = [1, 2, 2, 3]
    yield from add("UniPCMultistepScheduler", pick(90, **unipc), steps=(5, 12, 25))
    noises = unipc | {"predict_x0": [False], "final_sigmas_type": ["sigma_min"]}
    yield from add("UniPCMultistepScheduler", pick(25, **noises), steps=(5, 12, 25))
    yield from add("UniPCMultistepScheduler", pick(12, **flow, solver_type=["bh1", "bh2"]), steps=(5, 20))
    match = {
        "shift": [1.0, 3.0],
        "_sigmas": SIGMAS,
        "invert_sigmas": [False, True],
        "shift_terminal": [None, 0.1],
        "stochastic_sampling": [False, True],
    }
    yield from add("FlowMatchEulerDiscreteScheduler", pick(40, **match))
    yield from add("FlowMatchHeunDiscreteScheduler", [{"shift": 1.0}, {"shift": 3.0}], steps=(4, 30))


GRID = list(grid())
NAMES = sorted({case[0] for case in GRID})


STATE = [
    *("_step_index", "_begin_index", "lower_order_nums", "this_order", "model_outputs", "last_sample", "timestep_list"),
    *("prev_derivative", "dt", "sample", "num_inference_steps", "is_scale_input_called", "custom_timesteps"),
]


def state_of(scheduler):
    return {name: scheduler.__dict__[name] for name in STATE if name in scheduler.__dict__}


def flat(value):
    return list(itertools.chain.from_iterable(map(flat, value))) if isinstance(value, (list, tuple)) else [value]


def assert_same_state(a, b, scale, differences=frozenset()):
    """``differences`` are kept over sigma, which magnifies the rounding of x: compared in kind alone."""
    a, b = state_of(a), state_of(b)
    assert a.keys() == b.keys()
    dt = abs(float(a["dt"])) if a.get("dt") is not None else 1.0
    for name in a:
        left, right = flat(a[name]), flat(b[name])
        assert len(left) == len(right), name
        for one, other in zip(left, right):
            assert isinstance(one, torch.Tensor) == isinstance(other, torch.Tensor), name
            if not isinstance(one, torch.Tensor):
                assert one == other, name
            elif one.ndim == 0:
                assert torch.equal(one, other), name
            else:
                assert one.dtype == other.dtype and one.shape == other.shape, name
                if one.isfinite().all() and name not in differences:
                    factor = dt if name == "prev_derivative" else 1.0  # as it is added to x
                    assert factor * float((one - other).abs().max()) <= 1e-5 * scale, name


@cache
def exact_module(name):
    """Upstream's module of that class once more, with float64 in the place of every float32 of torch."""
    module = inspect.getmodule(getattr(diffusers, name))
    spec = importlib.util.spec_from_loader(module.__name__ + "_exact", loader=None)
    exact = importlib.util.module_from_spec(spec)
    exact.__package__, exact.__file__ = module.__package__, module.__file__
    sys.modules[exact.__name__] = exact
    exec(
        compile(inspect.getsource(module).replace("torch.float32", "torch.float64"), module.__file__, "exec"),
        vars(exact),
    )
    drawn = exact.__dict__.get("randn_tensor")
    exact.randn_tensor = lambda *a, dtype=None, **k: drawn(*a, dtype=torch.float32, **k).double()
    return exact


class Exact:
    """A scheduler of ``exact_module`` with another's tables, as they come out of set_timesteps."""

    def __init__(self, name, config):
        self.held, self.ours = make(name, config), getattr(exact_module(name), name)(**config)

    def set_timesteps(self, steps):
        self.held.set_timesteps(steps)
        self.ours.set_timesteps(steps)
        for name in ("alphas_cumprod", "sigmas", "final_alpha_cumprod", "one"):
            table = getattr(self.held, name, None)
            if isinstance(table, torch.Tensor):
                setattr(self.ours, name, table.double())
        self.ours.timesteps = self.held.timesteps

    def __getattr__(self, name):
        return getattr(self.ours, name)


def run(scheduler, steps, dtype=torch.float32, generator=None, **given):
    """The outputs of every step; an error is raised with those before it as ``outputs``."""
    if generator is None:
        generator = torch.Generator().manual_seed(11)
    double = getattr(scheduler, "variance_type", None) == "learned_range"
    scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    x = (x * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(dtype)
    if "generator" in inspect.signature(scheduler.step).parameters:
        given = given | {"generator": generator}
    outputs = []
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        outputs.append(scheduler.step(nonlinear(seen, t, double), t, x, **given))
        x = outputs[-1].prev_sample
    return outputs


def outcome(scheduler, *arguments, **named):
    """(outputs, None), or (None, error)."""
    try:
        return run(scheduler, *arguments, **named), None
    except Exception as error:
        return None, (type(error), str(error))


def make(name, config):
    return getattr(diffusers, name)(**config)


def fused_share(name):
    done = fused.fused_calls().get(f"{name}.step", 0)
    return done, fused.fallbacks().get(f"{name}.step", {})


@pytest.mark.parametrize("case", range(len(GRID)), ids=lambda i: f"{i}-{GRID[i][0]}")
def test_trajectory(case):
    name, config, steps, given = GRID[case]
    original, ours = make(name, config), fused.fuse(make(name, config))
    draws, our_draws = (torch.Generator().manual_seed(11) for _ in range(2))
    expected, error = outcome(original, steps, generator=draws, **given)
    got, our_error = outcome(ours, steps, generator=our_draws, **given)
    assert our_error == error
    assert torch.equal(draws.get_state(), our_draws.get_state()), "draws"
    assert torch.equal(original.timesteps, ours.timesteps)
    if error is not None:  # a config that upstream itself cannot run
        return
    exact = None
    for field in expected[0].keys():
        theirs, mine = (torch.stack([getattr(output, field) for output in outputs]) for outputs in (expected, got))
        assert mine.dtype == theirs.dtype
        finite = theirs.isfinite()
        assert torch.equal(finite, mine.isfinite()), field
        if not finite.any():
            continue
        scale = float(theirs[finite].abs().max())
        worst = float((mine - theirs)[finite].abs().max()) / scale
        if worst <= 1e-5:
            continue
        exact = exact or run(Exact(name, config), steps, torch.float64, **given)
        truth = torch.stack([getattr(output, field) for output in exact])
        own, error = (float((y - truth)[finite].abs().max()) / scale for y in (theirs, mine))
        assert own > 5e-6 and error <= 2 * own, (
            f"{field}: {worst:.1e}, {error:.1e}, {own:.1e}: {config} {steps} {given}"
        )
    clean = bool(finite.all())
    if clean and exact is None:
        scale = max(float(output.prev_sample.abs().max()) for output in expected)
        noises = config.get("algorithm_type") in ("dpmsolver", "sde-dpmsolver") or not config.get("predict_x0", True)
        assert_same_state(original, ours, scale, {"model_outputs"} if noises else set())
    done, rest = fused_share(name)
    assert set(rest) <= {UNUSABLE} and done + sum(rest.values()) == len(got)
    if clean:  # upstream has an infinity that is clipped afterwards
        assert sum(rest.values()) <= (config.get("rescale_betas_zero_snr", False) or "use_lu_lambdas" in config), rest


def test_the_grid_is_of_hundreds():
    assert len(GRID) > 700 and len(NAMES) == 13


# ------------------------------------------------------------------------------------------------------ half precision

HALF = []
for _name in NAMES:
    _cases = [case for case in GRID if case[0] == _name and case[2] < 100]
    HALF += random.Random(3).sample(_cases, min(8, len(_cases)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", range(len(HALF)), ids=lambda i: f"{i}-{HALF[i][0]}")
def test_half_precision_is_no_farther_from_the_truth(monkeypatch, case, dtype):
    name, config, steps, given = HALF[case]
    module = inspect.getmodule(getattr(diffusers, name))
    shape = (4, 3, 16, 16)
    runs = {"upstream": make(name, config), "ours": fused.fuse(make(name, config)), "truth": make(name, config)}
    double = config.get("variance_type") == "learned_range"
    for scheduler in runs.values():
        scheduler.set_timesteps(steps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
    g = torch.Generator().manual_seed(5)
    x = torch.randn(shape, generator=g) * float(getattr(runs["truth"], "init_noise_sigma", 1.0))
    x = dict.fromkeys(runs, x.to(dtype)) | {"truth": x.to(dtype).float()}
    errors = {"upstream": 0.0, "ours": 0.0}
    for t in runs["truth"].timesteps:
        z = torch.randn(shape, generator=g).to(dtype)
        monkeypatch.setattr(module, "randn_tensor", lambda *a, z=z, dtype=None, **k: z.to(dtype), raising=False)
        # All are at the same half-precision x, with the same history.
        for key in ("ours", "truth"):
            copy_history(runs["upstream"], runs[key], float if key == "truth" else lambda tensor: tensor)
        m = nonlinear(x["upstream"].float(), t, double).to(dtype)
        outputs = {}
        for key, scheduler in runs.items():
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x[key], t)
            wide = key == "truth"
            outputs[key] = scheduler.step(m.float() if wide else m, t, x[key], **given)
        truth = outputs["truth"].prev_sample
        if not truth.isfinite().all():
            return
        assert outputs["ours"].prev_sample.dtype == outputs["upstream"].prev_sample.dtype == dtype
        for field in outputs["truth"].keys():
            ours, upstream = (getattr(outputs[key], field) for key in ("ours", "upstream"))
            assert ours.dtype == upstream.dtype
        for key in errors:
            errors[key] += float((outputs[key].prev_sample.double() - truth.double()).square().sum())
        x = dict.fromkeys(runs, outputs["upstream"].prev_sample)
        x["truth"] = x["upstream"].float()
    assert math.sqrt(errors["ours"]) <= 1.02 * math.sqrt(errors["upstream"]), (errors, config, steps, given)
    if not {"dpmsolver", "sde-dpmsolver"} & {config.get("algorithm_type")}:
        assert_same_kinds(runs["upstream"], runs["ours"])


def copy_history(of, to, convert):
    """The tensors that a scheduler keeps between steps."""

    def converted(value):
        if isinstance(value, list):
            return [converted(entry) for entry in value]
        if not isinstance(value, torch.Tensor):
            return value
        return value.float() if convert is float else value

    for name in ("model_outputs", "last_sample", "prev_derivative", "sample"):
        if name in of.__dict__:
            setattr(to, name, converted(of.__dict__[name]))


def assert_same_kinds(a, b):
    a, b = state_of(a), state_of(b)
    for name in a:
        for one, other in zip(flat(a[name]), flat(b[name])):
            if isinstance(one, torch.Tensor):
                assert one.dtype == other.dtype and one.shape == other.shape, name


# ------------------------------------------------------------------------------------------ noising and its relatives

NOISING = {name: [config for case, config, _, _ in GRID if case == name] for name in NAMES}
NOISING = {name: configs[:: max(1, len(configs) // 6)][:6] for name, configs in NOISING.items()}
WITH_NOISE = [(name, config) for name, configs in NOISING.items() for config in configs]


@pairwise(
    case=range(len(WITH_NOISE)),
    dtype=[torch.float32, torch.float64, torch.float16, torch.bfloat16],
    begun=["training", "set", "begun", "running"],
)
def test_add_noise(case, dtype, begun):
    name, config = WITH_NOISE[case]
    original, ours = make(name, config), fused.fuse(make(name, config))
    method = "scale_noise" if "Flow" in name else "add_noise"
    g = torch.Generator().manual_seed(2)
    x, n = (torch.randn(6, 3, 5, generator=g).to(dtype) for _ in range(2))
    for scheduler in (original, ours):
        if begun != "training":
            scheduler.set_timesteps(9)
        if begun in ("begun", "running") and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(2)
        if begun == "running" and hasattr(scheduler, "_step_index"):
            scheduler._step_index = 3
    times = original.timesteps
    t = times[torch.randint(0, len(times), (6,), generator=g)]
    if name == "FlowMatchHeunDiscreteScheduler":
        t = times[5]
    calls = [(method, (x, t, n) if method == "scale_noise" else (x, n, t))]
    if hasattr(original, "get_velocity"):
        calls.append(("get_velocity", (x, n, t)))
    for called, arguments in calls:
        expected, got = getattr(original, called)(*arguments), getattr(ours, called)(*arguments)
        wide = [a.double() if isinstance(a, torch.Tensor) and a is not t else a for a in arguments]
        truth = getattr(original, called)(*wide)
        assert got.dtype == expected.dtype and got.shape == expected.shape
        error, theirs = (float((y.double() - truth).square().mean().sqrt()) for y in (got, expected))
        # sqrt(alpha_bar) and sqrt(1 - alpha_bar) of fp32 are rounded to fp32 once by upstream's fp64 too.
        limit = 1.02 * theirs + 2.0**-23 * float(truth.abs().max())
        assert error <= limit, (called, error, theirs)
        assert fused.fused_calls()[f"{name}.{called}"] == 1, fused.fallbacks()


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_add_noise_of_other_shapes(name):
    """A single timestep for a batch; timesteps that make a batch of one sample are upstream's."""
    original, ours = make(name, {}), fused.fuse(make(name, {}))
    x, n = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    one, four = original.timesteps[100:101], original.timesteps[[3, 3, 500, 7]]
    for arguments, count in (((x, n, one), 1), ((x, n, four), 2), ((x[:1], n[:1], four), 2), ((x, n[:1], four), 2)):
        expected, got = original.add_noise(*arguments), ours.add_noise(*arguments)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        assert fused.fused_calls()[f"{name}.add_noise"] == count
    half = original.add_noise(x.half(), n, four)
    assert ours.add_noise(x.half(), n, four).dtype == half.dtype
    assert fused.fallbacks()[f"{name}.add_noise"] == {
        "timesteps are not one a sample": 1,
        "sample and noise differ in shape": 1,
        "sample and noise differ in dtype": 1,
    }


def test_add_noise_at_timesteps_of_no_schedule():
    """DPM-Solver takes the last level for one that is not its own; Euler raises; negative ones count from the end."""
    x, n = torch.randn(2, 3), torch.randn(2, 3)
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        original, ours = make(name, {}), fused.fuse(make(name, {}))
        for scheduler in (original, ours):
            scheduler.set_timesteps(5)
        t = torch.tensor([123456, int(original.timesteps[1])])
        torch.testing.assert_close(ours.add_noise(x, n, t), original.add_noise(x, n, t))
        assert fused.fused_calls()[f"{name}.add_noise"] == 1
    original, ours = make("DDPMScheduler", {}), fused.fuse(make("DDPMScheduler", {}))
    t = torch.tensor([-1, -1000])
    torch.testing.assert_close(ours.add_noise(x, n, t), original.add_noise(x, n, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name", [name for name in NAMES if "Euler" in name and "Flow" not in name or name[:4] == "Heun"]
)
def test_scale_model_input_is_equal_to_the_bit(name, dtype):
    original, ours = make(name, {}), fused.fuse(make(name, {}))
    x = torch.randn(2, 3, 8, 8).to(dtype)
    for scheduler in (original, ours):
        scheduler.set_timesteps(7)
    for k, t in enumerate(original.timesteps):
        for scheduler in (original, ours):
            scheduler._step_index = k if k else None
        expected, got = original.scale_model_input(x, t), ours.scale_model_input(x, t)
        assert got.dtype == expected.dtype and torch.equal(got, expected)
        assert state_of(ours) == state_of(original)
    assert fused.fused_calls()[f"{name}.scale_model_input"] == len(original.timesteps)


def test_flow_euler_is_equal_to_the_bit():
    for config in ({}, {"shift": 3.0}, {"stochastic_sampling": True}):
        original, ours = (
            make("FlowMatchEulerDiscreteScheduler", config),
            make("FlowMatchEulerDiscreteScheduler", config),
        )
        for one, other in zip(run(original, 12), run(fused.fuse(ours), 12)):
            assert torch.equal(one.prev_sample, other.prev_sample)


# -------------------------------------------------------------------------------------------- how schedulers are called


@pytest.fixture(params=["quick", "general"])
def way(request, monkeypatch):
    """How a step reads its tensors and draws: in C and in its own pass, or in Python and with torch.randn."""
    from fastdiff import torch_randn

    if request.param == "quick":
        yield
        return
    monkeypatch.setattr(torch_randn, "_reason", "left to torch.randn here")
    step_table.allow(False)
    yield
    step_table.allow(True)


@pytest.mark.parametrize("name", NAMES)
def test_a_list_of_generators(name, way):
    def seeded():
        return [torch.Generator().manual_seed(k) for k in range(SHAPE[0])]

    a, b = seeded(), seeded()
    expected, got = run(make(name, {}), 6, generator=a), run(fused.fuse(make(name, {})), 6, generator=b)
    torch.testing.assert_close(got[-1].prev_sample, expected[-1].prev_sample, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(one.get_state(), other.get_state()) for one, other in zip(a, b))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_list_of_another_length(count):
    """One generator is for all samples; upstream leaves out those beyond the batch, and refuses none at all."""
    outcomes = []
    for scheduler in (make("DDPMScheduler", {}), fused.fuse(make("DDPMScheduler", {}))):
        generators = [torch.Generator().manual_seed(k) for k in range(count)]
        made, error = outcome(scheduler, 3, generator=generators)
        outcomes.append((error, [g.get_state().tolist() for g in generators]))
        assert made is None or made[-1].prev_sample.shape == SHAPE
    assert outcomes[0] == outcomes[1] and (outcomes[0][0] is None) == (count > 0)


@pytest.mark.parametrize("name", NAMES)
def test_the_default_generator_and_tuples(name, way):
    outputs = []
    for scheduler in (make(name, {}), fused.fuse(make(name, {}))):
        torch.manual_seed(4)
        scheduler.set_timesteps(5)
        x = torch.ones(SHAPE)
        for t in scheduler.timesteps:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            result = scheduler.step(nonlinear(x, t), t, x, return_dict=False)
            assert type(result) is tuple
            x = result[0]
        outputs.append((*result, torch.randn(3)))
    assert len(outputs[0]) == len(outputs[1])
    for one, other in zip(*outputs):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_results_as_tuples_are_those_of_the_record(name, way):
    scheduler, steps = fused.fuse(make(name, {})), 5
    records = run(scheduler, steps)
    tuples = run(TupleOutputs(fused.fuse(make(name, {}))), steps)
    original = run(TupleOutputs(make(name, {})), steps)
    for one, other, theirs in zip(records, tuples, original):
        assert type(other.given) is tuple and len(other.given) == len(theirs.given)
        for name_of, value in zip(one.keys(), other.given):
            assert torch.equal(one[name_of], value), name_of
    assert fused_share(name) == (2 * len(records), {})


def test_a_result_that_cannot_be_made_otherwise_is_constructed():
    """Of a class that is no mapping, say."""

    class Plain:
        def __init__(self, prev_sample):
            self.prev_sample = prev_sample

    value = torch.ones(2)
    made = results(Plain, "prev_sample")(value)
    assert type(made) is Plain and made.prev_sample is value


class TupleOutputs:
    """A scheduler whose ``step`` gives tuples: ``given`` of its outputs."""

    def __init__(self, scheduler):
        self.held = scheduler

    def __getattr__(self, name):
        return getattr(self.held, name)

    @property
    def step(self):
        def step(*arguments, generator=None, **given):
            given |= {} if generator is None else {"generator": generator}
            found = self.held.step(*arguments, **given, return_dict=False)
            return SimpleNamespace(given=found, prev_sample=found[0])

        if "generator" not in inspect.signature(self.held.step).parameters:
            return lambda *arguments: step(*arguments)
        return step


@pytest.mark.parametrize("name", NAMES)
def test_results_are_of_the_same_kind(name):
    (expected, *_), (got, *_) = run(make(name, {}), 3), run(fused.fuse(make(name, {})), 3)
    assert type(got) is type(expected) and list(got.keys()) == list(expected.keys())
    assert len(got.to_tuple()) == len(expected.to_tuple()) and got[0] is got["prev_sample"] is got.prev_sample
    got.prev_sample = torch.zeros(1)
    assert torch.equal(got["prev_sample"], torch.zeros(1))


@pytest.mark.parametrize("name", [n for n in NAMES if n[:3] not in ("DDP", "DDI")])
def test_from_the_middle(name, way):
    """As image-to-image does it: a begin index, and the order of multistep methods starts anew there."""
    outputs = []
    for scheduler in (make(name, {}), fused.fuse(make(name, {}))):
        scheduler.set_timesteps(12)
        first = 4 if "Heun" not in name else 7
        scheduler.set_begin_index(first)
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        g = {"generator": torch.Generator().manual_seed(1)}
        g = g if "generator" in inspect.signature(scheduler.step).parameters else {}
        for t in scheduler.timesteps[first:]:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            x = scheduler.step(nonlinear(x, t), t, x, **g).prev_sample
        outputs.append(x)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert not fused_share(name)[1]


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "LCMScheduler"])
@pytest.mark.parametrize("as_number", [int, lambda t: t, lambda t: t.reshape(1), lambda t: t.numpy()[()]])
def test_timesteps_as_numbers(name, as_number, way):
    outputs = []
    for scheduler in (make(name, {}), fused.fuse(make(name, {}))):
        scheduler.set_timesteps(10)
        t = as_number(scheduler.timesteps[3])
        if name == "LCMScheduler":
            scheduler.set_begin_index(3)
        g, x = torch.Generator().manual_seed(0), torch.ones(SHAPE)
        outputs.append(scheduler.step(x * 0.3, t, x, generator=g).prev_sample)
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    assert fused_share(name)[0] == 1


def test_ddpm_without_and_with_timesteps_of_ones_own():
    for chosen in (None, [900, 500, 499, 20, 0]):
        outputs = []
        for scheduler in (make("DDPMScheduler", {}), fused.fuse(make("DDPMScheduler", {}))):
            if chosen:
                scheduler.set_timesteps(timesteps=chosen)
            g, x = torch.Generator().manual_seed(0), torch.ones(SHAPE)
            for t in chosen or [999, 500, 1, 0]:
                x = scheduler.step(0.3 * x, t, x, generator=g).prev_sample
            outputs.append(x)
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    assert fused_share("DDPMScheduler") == (9, {})


def test_variance_noise_is_taken():
    z = torch.randn(SHAPE)
    for name, config, given in (
        ("DDIMScheduler", {}, {"eta": 0.7}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ):
        outputs = []
        for scheduler in (make(name, config), fused.fuse(make(name, config))):
            scheduler.set_timesteps(8)
            x, t = torch.ones(SHAPE), scheduler.timesteps[2]
            outputs.append(scheduler.step(0.2 * x, t, x, variance_noise=z, **given).prev_sample)
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
        assert fused_share(name) == (1, {})


def test_noise_is_drawn_by_upstream(monkeypatch):
    """Through the function of its module, with its dtype: what replaces that is called."""
    seen = []
    module = inspect.getmodule(diffusers.DDPMScheduler)
    drawn = module.randn_tensor
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: seen.append(k["dtype"]) or drawn(*a, **k))
    got = run(fused.fuse(make("DDPMScheduler", {})), 5, dtype=torch.bfloat16)
    assert seen == [torch.bfloat16] * 4  # none at t = 0
    # From the generator that is given: upstream's numbers, to the few roundings of bfloat16 in which a step differs.
    expected = run(make("DDPMScheduler", {}), 5, dtype=torch.bfloat16)
    torch.testing.assert_close(got[0].prev_sample, expected[0].prev_sample, rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"])
def test_float64(name):
    for one, other in zip(run(make(name, {}), 8, torch.float64), run(fused.fuse(make(name, {})), 8, torch.float64)):
        assert one.prev_sample.dtype == other.prev_sample.dtype == torch.float64
        torch.testing.assert_close(other.prev_sample, one.prev_sample, rtol=1e-5, atol=1e-5)
    assert not fused_share(name)[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("x_dtype, m_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_mixed_dtypes(name, x_dtype, m_dtype, way):
    outputs = []
    for scheduler in (make(name, {}), fused.fuse(make(name, {}))):
        scheduler.set_timesteps(8)
        x, t = torch.linspace(-1, 1, 96).reshape(SHAPE).to(x_dtype), scheduler.timesteps[2]
        g = {"generator": torch.Generator().manual_seed(1)}
        g = g if "generator" in inspect.signature(scheduler.step).parameters else {}
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        outputs.append(scheduler.step((0.3 * x).to(m_dtype), t, x, **g))
    for field in outputs[0].keys():
        one, other = (getattr(output, field) for output in outputs)
        assert one.dtype == other.dtype
        torch.testing.assert_close(other.float(), one.float(), rtol=2.0**-7, atol=2.0**-6)
    # Where upstream computes in the model output's dtype what it has kept in the sample's.
    differ = name in ("DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler")
    assert fused_share(name) == ((0, {"sample and model output differ in dtype": 1}) if differ else (1, {}))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_go_through(name):
    gradients = []
    for scheduler in (make(name, {}), fused.fuse(make(name, {}))):
        scheduler.set_timesteps(8)
        x, t = torch.linspace(-1, 1, 96).reshape(SHAPE).requires_grad_(), scheduler.timesteps[2]
        g = {"generator": torch.Generator().manual_seed(1)}
        g = g if "generator" in inspect.signature(scheduler.step).parameters else {}
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        y = scheduler.step(nonlinear(x, t), t, x, **g).prev_sample
        gradients += torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    assert fused_share(name) == (1, {})


# --------------------------------------------------------------------------------------------------------------- errors


def wrong_calls(name):
    x = torch.ones(SHAPE)
    yield "a model output of another shape", lambda s, t: s.step(x[:, :2], t, x)
    yield "no tensor", lambda s, t: s.step(None, t, x)
    yield "beyond the end", lambda s, t: (setattr(s, "_step_index", 99), s.step(x, t, x))
    yield "no such timestep", lambda s, t: s.step(x, 12345 if t.dtype == torch.int64 else 12345.5, x)
    yield "an integer", lambda s, t: s.step(x, 3, x)
    yield "an unknown argument", lambda s, t: s.step(x, t, x, nonsense=1)
    if hasattr(getattr(diffusers, name), "scale_model_input") and name in BY_INDEX:
        yield "scaling beyond the end", lambda s, t: (setattr(s, "_step_index", 99), s.scale_model_input(x, t))
        yield "scaling no tensor", lambda s, t: s.scale_model_input(None, t)
    if name == "FlowMatchHeunDiscreteScheduler":
        yield "noising beyond the end", lambda s, t: (setattr(s, "_step_index", 99), s.scale_noise(x, t, x))
    if "Flow" not in name:
        yield "noise for another batch", lambda s, t: s.add_noise(x, x[:, :1, :1, :3], t.reshape(1))
        yield "timesteps beyond", lambda s, t: s.add_noise(x, x, torch.tensor([5000, 5000]))
        yield "float timesteps", lambda s, t: s.add_noise(x, x, torch.tensor([0.5, 0.5]))
        yield "a timestep of no dimension", lambda s, t: s.add_noise(x, x, t)
        yield "a number for timesteps", lambda s, t: s.add_noise(x, x, 3)
        yield "timesteps of two dimensions", lambda s, t: s.add_noise(x, x, t.reshape(1, 1))


BY_INDEX = {"EDMEulerScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"}
MULTISTEP = {"DPMSolverMultistepScheduler", "UniPCMultistepScheduler"}
BY_TIME = {name for name in NAMES if name[:3] in ("DDP", "DDI", "LCM")}
WHOLE_REFUSED = {name for name in NAMES if "Euler" in name or "FlowMatch" in name}
# Why a wrong call is left to diffusers, and of which schedulers; of the others it is fused, or diffusers' own error
# comes before.
REASONS = {
    "a model output of another shape": {"sample and model output differ in shape": set(NAMES)},
    "no tensor": {"sample or model output is no tensor": set(NAMES)},
    "beyond the end": {UNUSABLE: (set(NAMES) - BY_TIME) | {"LCMScheduler"}},
    "no such timestep": {UNUSABLE: BY_TIME - {"LCMScheduler"}},
    "an integer": {
        "an integer for a timestep": WHOLE_REFUSED,
        UNUSABLE: {"DDPMScheduler", "DDPMParallelScheduler"},  # it is none of the ten
    },
    "an unknown argument": {},
    "scaling beyond the end": {"the step index is beyond the schedule": BY_INDEX},
    "scaling no tensor": {"sample is no tensor": BY_INDEX},
    "noising beyond the end": {"the step index is beyond the schedule": set(NAMES)},
    "noise for another batch": {"sample and noise differ in shape": set(NAMES)},
    "timesteps beyond": {"a timestep is none of the scheduler's": BY_INDEX},
    "float timesteps": {"a timestep is none of the scheduler's": BY_INDEX, "timesteps are no integers": BY_TIME},
    "a timestep of no dimension": {"timesteps are no tensor of one a sample": BY_INDEX | MULTISTEP},
    "a number for timesteps": {"timesteps are no tensor of one a sample": set(NAMES)},
    "timesteps of two dimensions": {"timesteps are no tensor of one a sample": set(NAMES)},
}


@pytest.mark.parametrize("name", NAMES)
def test_wrong_use_gives_the_same_errors(name):
    for described, call in wrong_calls(name):
        outcomes = []
        for scheduler in (make(name, {}), fused.fuse(make(name, {}))):
            scheduler.set_timesteps(10)
            t = scheduler.timesteps[2]
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(torch.ones(SHAPE), t)
            try:
                call(scheduler, t)
                outcomes.append(None)
            except Exception as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1], described
        (left,) = fused.fallbacks().values() or ({},)
        assert left == {reason: 1 for reason, names in REASONS[described].items() if name in names}, described
        fused.reset_counts()


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "LCMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
)
def test_without_set_timesteps(name):
    messages = []
    for scheduler in (make(name, {}), fused.fuse(make(name, {}))):
        with pytest.raises(ValueError) as caught:
            scheduler.step(torch.ones(SHAPE), 5, torch.ones(SHAPE))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    "name, config",
    [
        ("DDPMScheduler", {"prediction_type": "nonsense"}),
        ("DDIMScheduler", {"prediction_type": "nonsense"}),
        ("LCMScheduler", {"prediction_type": "nonsense"}),
        ("EulerDiscreteScheduler", {"prediction_type": "nonsense"}),
        ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}),
        ("HeunDiscreteScheduler", {"prediction_type": "nonsense"}),
        ("EDMEulerScheduler", {"prediction_type": "nonsense"}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "nonsense"}),
        ("UniPCMultistepScheduler", {"prediction_type": "nonsense"}),
    ],
)
def test_configs_that_raise_raise_the_same(name, config):
    messages = []
    for scheduler in (make(name, config), fused.fuse(make(name, config))):
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            run(scheduler, 4)
        messages.append((type(caught.value), str(caught.value)))
    assert messages[0] == messages[1]
    assert fused_share(name)[0] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "LCMScheduler", "DDIMParallelScheduler"])
def test_a_timestep_of_shape_one(name, dtype):
    """It promotes half precision to float32, as in diffusers; a plain one does not."""
    x, m = (torch.randn(SHAPE).to(dtype) for _ in range(2))
    for one in (True, False):
        results = []
        for scheduler in (make(name, {}), fused.fuse(make(name, {}))):
            scheduler.set_timesteps(4)
            t = scheduler.timesteps[:1] if one else scheduler.timesteps[0]
            options = {} if "DDIM" in name else {"generator": torch.Generator().manual_seed(0)}
            results.append(scheduler.step(m, t, x, **options))
        for theirs, ours in zip(results[0].values(), results[1].values()):
            assert theirs.dtype == ours.dtype == (torch.float32 if one else dtype)
            torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    "name, config, shape",
    [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, SHAPE),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}, SHAPE),
        ("DDIMScheduler", {"thresholding": True}, (2, 3)),
        ("DDPMScheduler", {"thresholding": True}, (4, 6)),
        ("UniPCMultistepScheduler", {"thresholding": True}, (4, 6)),
        ("UniPCMultistepScheduler", {}, (5,)),
    ],
)
def test_what_diffusers_refuses_is_refused(name, config, shape):
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if "algorithm_type" in config else {}
    errors = []
    for scheduler in (make(name, config | flow), fused.fuse(make(name, config | flow))):
        scheduler.set_timesteps(4)
        x = torch.randn(shape)
        with pytest.raises(Exception) as caught:
            for t in scheduler.timesteps:
                x = scheduler.step(torch.sin(x), t, x).prev_sample
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    "name, config, given, reason",
    [
        ("DDPMScheduler", {"variance_type": "fixed_large_log"}, {}, "variance_type='fixed_large_log'"),
        ("EulerDiscreteScheduler", {}, {"s_churn": 1.0}, "s_churn"),
        ("EDMEulerScheduler", {}, {"s_churn": 1.0}, "s_churn"),
        ("FlowMatchHeunDiscreteScheduler", {}, {"s_churn": 1.0}, "s_churn"),
        ("UniPCMultistepScheduler", {"solver_order": 4}, {}, "solver_order=4"),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "thresholding": True},
            {},
            "thresholding with algorithm_type='dpmsolver'",
        ),
        ("DDPMScheduler", {"clip_sample_range": 0.0}, {}, "clip_sample_range=0.0"),
        ("UniPCMultistepScheduler", {"solver_p": diffusers.DDIMScheduler()}, {}, "solver_p"),
    ],
)
def test_what_is_left_to_diffusers_is_counted_and_equal(name, config, given, reason):
    expected, got = run(make(name, config), 6, **given), run(fused.fuse(make(name, config)), 6, **given)
    for one, other in zip(expected, got):
        torch.testing.assert_close(one.prev_sample, other.prev_sample, rtol=0, atol=0, equal_nan=True)
    assert fused_share(name) == (0, {reason: len(got)})


@pytest.mark.parametrize(
    "name, config, held, reason",
    [
        ("DDPMScheduler", {}, {"variance_type": "fixed_large"}, "variance_type differs from the config's"),
        ("DDPMScheduler", {}, {"timesteps": torch.tensor([1500, 5])}, "timesteps beyond the schedule"),
        ("LCMScheduler", {}, {"timesteps": torch.tensor([1500, 5])}, "timesteps beyond the schedule"),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"},
            {},
            "sde-dpmsolver has no third order",
        ),
    ],
)
def test_what_no_table_can_be_made_of_is_left_to_diffusers(name, config, held, reason):
    """Also where diffusers then fails: with its own error, which says it."""
    found = []
    for scheduler in (make(name, config), fused.fuse(make(name, config))):
        scheduler.set_timesteps(6)
        for key, value in held.items():
            setattr(scheduler, key, value)
        x = torch.ones(SHAPE)
        try:
            for t in scheduler.timesteps:
                x = scheduler.step(0.3 * x, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
            found.append(x.tolist())
        except (IndexError, UnboundLocalError) as error:
            found.append(repr(error))
    assert found[0] == found[1]
    assert list(fused.fallbacks()[f"{name}.step"]) == [reason] and f"{name}.step" not in fused.fused_calls()


def test_scale_model_input_not_called_is_left_to_diffusers_to_warn():
    scheduler = fused.fuse(make("EulerDiscreteScheduler", {}))
    scheduler.set_timesteps(5)
    x = torch.ones(SHAPE)
    scheduler.step(x, scheduler.timesteps[0], x)
    assert fused_share("EulerDiscreteScheduler") == (0, {"scale_model_input was not called": 1})


# ------------------------------------------------------------------------------------------------ what outdates a table


def test_a_changed_scheduler_is_noticed():
    """Config, sigmas, alphas_cumprod and timesteps, replaced or changed in place between two steps."""

    def config(s):
        s.config.prediction_type = "v_prediction"

    def registered(s):
        s.register_to_config(clip_sample=False)

    def replaced(s):
        s.alphas_cumprod = s.alphas_cumprod**1.1

    def in_place(s):
        s.alphas_cumprod.mul_(0.9)

    def again(s):
        s.set_timesteps(7)

    for change in (config, registered, replaced, in_place, again):
        outputs = []
        for scheduler in (make("DDPMScheduler", {}), fused.fuse(make("DDPMScheduler", {}))):
            scheduler.set_timesteps(10)
            x, n = torch.ones(SHAPE), torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
            for _ in range(2):
                t = scheduler.timesteps[3]
                y = scheduler.step(0.3 * n, t, n, generator=torch.Generator().manual_seed(0)).prev_sample
                noisy = scheduler.add_noise(x, n, t.reshape(1))
                change(scheduler)
            outputs.append((y, noisy))
        for one, other in zip(*outputs):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not fused.fallbacks()


def test_sigmas_of_ones_own():
    outputs = []
    for scheduler in (make("EulerDiscreteScheduler", {}), fused.fuse(make("EulerDiscreteScheduler", {}))):
        scheduler.set_timesteps(sigmas=[10.0, 3.0, 1.0, 0.0])
        x = torch.ones(SHAPE)
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)
            x = scheduler.step(0.3 * x, t, x).prev_sample
            scheduler.sigmas = scheduler.sigmas * 1.01
        outputs.append(x)
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)


def test_inference_mode():
    with torch.inference_mode():
        for name in ("DDPMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"):
            expected, got = run(make(name, {}), 5), run(fused.fuse(make(name, {})), 5)
            torch.testing.assert_close(got[-1].prev_sample, expected[-1].prev_sample, rtol=1e-5, atol=1e-5)
            assert not fused_share(name)[1]


def test_a_view_of_the_timesteps_is_known_without_being_read():
    """On an accelerator the value of a timestep is looked up by where it lies: iterating, indexing, slicing."""
    scheduler = fused.fuse(make("DDPMScheduler", {}))
    scheduler.set_timesteps(10)
    stepper = scheduler.__dict__["_fastdiff_steps"]
    assert [stepper.position(t) for t in scheduler.timesteps] == list(range(10))
    assert [stepper.position(t) for t in scheduler.timesteps[4:]] == list(range(4, 10))
    assert stepper.position(scheduler.timesteps[-1]) == 9
    assert stepper.position(scheduler.timesteps[3].clone()) is None
    assert stepper.position(scheduler.timesteps[:2]) is None
    assert stepper.position(torch.tensor(900)) is None
    assert stepper.position(scheduler.timesteps.view(torch.int32)[0]) is None


SOME = []
for _name in NAMES:
    _cases = [case for case in GRID if case[0] == _name]
    SOME += random.Random(5).sample(_cases, min(6, len(_cases)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", range(len(SOME)), ids=lambda i: f"{i}-{SOME[i][0]}")
def test_the_quick_way_has_the_bits_of_the_other(monkeypatch, case, dtype):
    """Tensors read in C and noise drawn in the step's pass, against tensors read in Python and noise of torch.randn."""
    from fastdiff import torch_randn
    from fastdiff.torch_access import reads_tensors

    if not reads_tensors:
        pytest.skip("this PyTorch does not show its tensors to C")
    name, config, steps, given = SOME[case]
    generators = [torch.Generator().manual_seed(11) for _ in range(2)]
    torch.manual_seed(5)  # older versions draw from it here and there
    quick, error = outcome(fused.fuse(make(name, config)), steps, dtype, generators[0], **given)
    counted = fused.fused_calls(), fused.fallbacks()
    fused.reset_counts()
    monkeypatch.setattr(torch_randn, "_reason", "left to torch.randn here")
    step_table.allow(False)
    torch.manual_seed(5)
    try:
        other, other_error = outcome(fused.fuse(make(name, config)), steps, dtype, generators[1], **given)
    finally:
        step_table.allow(True)
    assert error == other_error and (fused.fused_calls(), fused.fallbacks()) == counted
    assert torch.equal(*(generator.get_state() for generator in generators))
    for one, two in zip(quick or (), other or ()):
        for field in one.keys():
            assert getattr(one, field).dtype == getattr(two, field).dtype
            assert torch.equal(getattr(one, field).nan_to_num(7), getattr(two, field).nan_to_num(7)), field


@pytest.mark.parametrize("kept, now", [*itertools.permutations([torch.float32, torch.bfloat16, torch.float16], 2)])
def test_a_history_of_another_dtype_has_the_same_bits_in_both_ways(kept, now):
    """A network that goes over to another dtype between two steps of DPM-Solver."""

    found = []
    for allowed in (True, False, None):  # the quick way, the other, diffusers' own
        scheduler, x = make("DPMSolverMultistepScheduler", {}), torch.linspace(-1, 1, 96).reshape(SHAPE)
        if allowed is not None:
            fused.fuse(scheduler)
            step_table.allow(allowed)
        try:
            scheduler.set_timesteps(8)
            for k, t in enumerate(scheduler.timesteps[:4]):
                dtype = kept if k < 2 else now
                x = scheduler.step(nonlinear(x.to(dtype), t), t, x.to(dtype)).prev_sample
        finally:
            step_table.allow(True)
        found.append(x)
    assert fused_share("DPMSolverMultistepScheduler") == (8, {})
    assert torch.equal(found[0], found[1])
    # diffusers rounds to the dtype on the way; four roundings of bfloat16 in four steps.
    assert float((found[0].float() - found[2].float()).abs().max()) <= 4 * 2.0**-8 * float(found[2].abs().max())


def test_the_quick_way_is_taken(monkeypatch):
    """A plain step reads its tensors in C: nothing of the other way is called, and nothing of torch.randn."""
    from fastdiff import ops, torch_randn
    from fastdiff.torch_access import reads_tensors

    if not reads_tensors or torch_randn.reason():
        pytest.skip("this PyTorch is left to draw")
    for name in NAMES:
        scheduler, x = fused.fuse(make(name, {})), torch.ones(SHAPE)
        scheduler.set_timesteps(8)
        noised = getattr(scheduler, "add_noise", None) or (lambda x, n, t: scheduler.scale_noise(x, t, n))  # noqa: B023
        for k, t in enumerate(scheduler.timesteps):
            with monkeypatch.context() as patch:
                if k:  # the first finds out where it is, and tries out the draw
                    patch.setattr(ops.PreparedSteps, "__call__", None)
                    patch.setattr(ops.PreparedNoise, "__call__", None)
                    patch.setattr(torch_randn, "randn", None)
                if hasattr(scheduler, "scale_model_input"):
                    scheduler.scale_model_input(x, t)
                scheduler.step(0.1 * x, t, x, return_dict=k % 2 == 0)
                if k:
                    for j in range(len(scheduler.timesteps)):
                        noised(x, x, scheduler.timesteps[j : j + 1])
                        if hasattr(scheduler, "get_velocity"):
                            scheduler.get_velocity(x, x, scheduler.timesteps[j : j + 1])


def test_backends(backend):
    for name in ("DDPMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"):
        expected, got = run(make(name, {}), 6), run(fused.fuse(make(name, {})), 6)
        torch.testing.assert_close(got[-1].prev_sample, expected[-1].prev_sample, rtol=1e-5, atol=1e-5)
