"""Random sequences of calls of diffusers' schedulers, fused and as they are: equal in numbers, dtypes, draws, state and
errors. Each sequence is a class, a config and up to a dozen calls: steps in and out of order, restarts, a begin index,
schedules written into, copies, odd timesteps, dtypes and shapes, modes."""
# ruff: noqa: B023  (what is passed to on_both is called at once)

import contextlib
import copy
import io
import pickle
import random
import warnings
from collections import Counter

import pytest
import torch
from devices import NIGHTLY

diffusers = pytest.importorskip("diffusers")
from fastdiff.integrations import diffusers as fused  # noqa: E402
from fastdiff.integrations.diffusers.supported import SUPPORTED, resolve  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]

SEQUENCES = 20_000 if NIGHTLY else 2_000
SHAPES = [(2, 3, 4, 4)] * 6 + [(1, 4, 8, 8), (2, 6), (5,), (2, 3, 16)]
DTYPES = [torch.float32] * 5 + [torch.float16, torch.bfloat16, torch.float64]
VP = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "timestep_spacing": ["leading", "linspace", "trailing"],
    "rescale_betas_zero_snr": [False, False, True],
}
CLIPS = {
    "clip_sample": [False, False, True],
    "thresholding": [False, False, True],
    "set_alpha_to_one": [True, False],
    "steps_offset": [0, 1],
}
SIGMAS = {"use_karras_sigmas": [False, False, True], "use_exponential_sigmas": [False, False, False, True]}
MULTISTEP = (
    VP
    | SIGMAS
    | {
        "prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction"],
        "solver_order": [1, 2, 3],
        "use_flow_sigmas": [False, False, True],
        "thresholding": [False, False, False, True],
        "lower_order_final": [True, False],
        "final_sigmas_type": ["zero", "sigma_min"],
    }
)
KINDS = {"prediction_type": ["epsilon", "sample", "v_prediction"]}
CONFIGS = {
    "DDPMScheduler": VP | CLIPS | KINDS | {"variance_type": ["fixed_small", "fixed_large", "fixed_small_log"]},
    "DDIMScheduler": VP | CLIPS | KINDS,
    "LCMScheduler": VP | CLIPS | KINDS,
    "EulerDiscreteScheduler": VP | SIGMAS | KINDS | {"interpolation_type": ["linear", "log_linear"]},
    "EulerAncestralDiscreteScheduler": VP | KINDS,
    "HeunDiscreteScheduler": {k: VP[k] for k in ("beta_schedule", "timestep_spacing")} | SIGMAS | KINDS | {
        "clip_sample": [False, True]
    },
    "EDMEulerScheduler": {"prediction_type": ["epsilon", "v_prediction"], "sigma_schedule": ["karras", "exponential"]},
    "DPMSolverMultistepScheduler": MULTISTEP | {
        "algorithm_type": ["dpmsolver++", "dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"],
        "solver_type": ["midpoint", "heun"],
        "euler_at_final": [False, True],
    },
    "UniPCMultistepScheduler": MULTISTEP | {
        "solver_type": ["bh1", "bh2"], "predict_x0": [True, True, False], "disable_corrector": [[], [0], [1, 2]]
    },
    "FlowMatchEulerDiscreteScheduler": {
        "shift": [1.0, 3.0], "stochastic_sampling": [False, False, True], "use_karras_sigmas": [False, True],
        "invert_sigmas": [False, False, True],
    },
    "FlowMatchHeunDiscreteScheduler": {"shift": [1.0, 3.0]},
}  # fmt: skip
CONFIGS["DDPMParallelScheduler"], CONFIGS["DDIMParallelScheduler"] = CONFIGS["DDPMScheduler"], CONFIGS["DDIMScheduler"]
assert CONFIGS.keys() == SUPPORTED.keys()


class Pair:
    """A scheduler as it is and one that is fused, of one config, on which the same is done."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        pick = self.random.choice
        self.name = pick(list(CONFIGS))
        self.config = {key: pick(values) for key, values in CONFIGS[self.name].items()}
        self.told = [f"{self.name}({self.config})"]
        self.shape, self.dtype = pick(SHAPES), pick(DTYPES)
        self.dtypes = {self.dtype}  # and those of outputs of the network, which histories keep
        self.mode = pick([contextlib.nullcontext, torch.no_grad, torch.inference_mode])
        generator = torch.Generator().manual_seed(seed)
        self.x, self.m = (torch.randn(self.shape, generator=generator) for _ in range(2))
        self.draws = [torch.Generator().manual_seed(seed + 1) for _ in range(2)]

    def __str__(self):
        return "\n  ".join([*self.told, f"of {self.dtype}, {self.shape}, {self.mode.__name__}"])

    def make(self):
        """Whether the config is one that the class takes."""
        try:
            self.both = [resolve(self.name)(**self.config) for _ in range(2)]
        except Exception:
            return False
        fused.fuse(self.both[1])
        return True

    def on_both(self, what, call, tolerance=2e-5):
        """``call(scheduler, k)`` of both; what they give, or raise, is compared."""
        self.told.append(what)
        results = []
        for k, scheduler in enumerate(self.both):
            torch.manual_seed(7)
            with self.mode(), contextlib.redirect_stdout(io.StringIO()):
                try:
                    results.append(call(scheduler, k))
                except Exception as error:
                    results.append(error)
        theirs, ours = results
        if isinstance(theirs, Exception) or isinstance(ours, Exception):
            assert type(theirs) is type(ours), f"{self}\n{ours!r} for {theirs!r}"
            assert str(theirs) == str(ours), f"{self}\n{ours} for {theirs}"
            return False
        self.compare(theirs, ours, tolerance)
        assert torch.equal(self.draws[0].get_state(), self.draws[1].get_state()), f"{self}\ndraws"
        for name in ("_step_index", "_begin_index", "num_inference_steps", "lower_order_nums", "this_order"):
            states = [getattr(scheduler, name, None) for scheduler in self.both]
            assert states[0] == states[1], f"{self}\n{name}: {states[1]} for {states[0]}"
        return True

    def compare(self, theirs, ours, tolerance):
        if theirs is None or isinstance(theirs, (int, float, str)):
            assert theirs == ours, f"{self}\n{ours} for {theirs}"
            return
        if not isinstance(theirs, torch.Tensor):
            theirs, ours = (r.values() if hasattr(r, "values") else r for r in (theirs, ours))
            for a, b in zip(theirs, ours, strict=True):
                self.compare(a, b, tolerance)
            return
        assert theirs.dtype == ours.dtype and theirs.shape == ours.shape, f"{self}\n{ours.dtype} for {theirs.dtype}"
        wide, other = theirs.double(), ours.double()
        finite, half = wide.isfinite(), self.dtypes & {torch.float16, torch.bfloat16}
        # float16 overflows in diffusers' arithmetic where float32 does not.
        assert torch.equal(finite & other.isfinite() if half else other.isfinite(), finite), f"{self}\nfinite"
        if finite.any() and not self.loses_digits(half):
            unit = max({torch.float16: 4e-2, torch.bfloat16: 2e-1}.get(dtype, tolerance) for dtype in self.dtypes)
            off = float((wide - other)[finite].abs().max()) / max(1e-3, float(wide[finite].abs().max()), self.size)
            assert off <= unit, f"{self}\noff by {off:.2e} of {self.size:.3g}"

    size = 1.0  # the largest value on the way
    noisiest = 0.0  # the largest sigma

    def loses_digits(self, half):
        """What docs/diffusers.md says of: where diffusers' own arithmetic has no digits left to compare."""
        noises = not self.config.get("predict_x0", True) or not self.config.get("algorithm_type", "++").endswith("++")
        return (self.config.get("use_flow_sigmas") and noises) or (half and self.noisiest > 100)

    def timestep(self, scheduler, k):
        t = scheduler.timesteps[min(k, len(scheduler.timesteps) - 1)]
        return {"own": t, "[1]": t[None], "number": t.item(), "other": t + 1, "list": [t.item()], "clone": t.clone()}

    def run(self):
        pick, chance = self.random.choice, self.random.random
        if not self.make():
            return "config"
        count, k = 0, 0
        options = {}
        if chance() < 0.97:
            count = pick([1, 2, 3, 4, 6, 10])
            self.restart(count)
            if any(isinstance(s.timesteps, torch.Tensor) and not len(s.timesteps) for s in self.both):
                return "none"
        if chance() < 0.1 and hasattr(self.both[0], "set_begin_index"):
            k = pick([0, 1, 2])
            self.on_both(f"set_begin_index({k})", lambda s, _: s.set_begin_index(k))
        takes = self.both[0].step.__code__.co_varnames
        ran = False
        for _ in range(pick([1, 3, 6, 10])):
            what = chance()
            if what < 0.05:
                k = 0
                self.restart(pick([1, 3, 5]))
            elif what < 0.10:
                how = pick([copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
                self.told.append("copied")
                self.both = [how(s) for s in self.both]
                if type(self.both[1]) is type(self.both[0]):
                    fused.fuse(self.both[1])
            elif what < 0.17 and hasattr(self.both[0], "sigmas"):
                at, way = pick(range(1, 4)), pick([lambda v: v, lambda v: v.data, lambda v: v.numpy()])
                self.on_both(f"sigmas[{at}] *= 0.97", lambda s, _: self.scale(s.sigmas, at, way))
            elif what < 0.22:
                t = self.both[0].timesteps[[min(k, len(self.both[0].timesteps) - 1)] * self.shape[0]]
                t = t + (1 if chance() < 0.2 else 0)
                method = "add_noise" if hasattr(self.both[0], "add_noise") else "scale_noise"
                named = {"scale_noise": (0, 2, 1)}.get(method, (0, 1, 2))
                values = self.x.to(self.dtype), self.m.to(self.dtype), t
                self.on_both(f"{method}(t={t.tolist()})", lambda s, _: getattr(s, method)(*(values[j] for j in named)))
            elif what < 0.27:
                k = pick(range(0, 5))
                self.told.append(f"next: step {k}")
            else:
                x, m = self.x.to(self.dtype), self.m.to(self.dtype)
                if chance() < 0.05:
                    m = m.to(pick(DTYPES))
                if chance() < 0.05 and x.ndim > 1:
                    x = x.transpose(0, 1).contiguous().transpose(0, 1)
                self.dtypes.add(m.dtype)
                form = pick(["own"] * 12 + ["[1]", "number", "other", "clone", "list"])
                if hasattr(self.both[0], "scale_model_input") and chance() < 0.95:
                    self.on_both(
                        f"scale_model_input({k}, {form})",
                        lambda s, _, x=x, form=form: s.scale_model_input(x, self.timestep(s, k)[form]),
                    )
                options = {}
                if "generator" in takes and chance() < 0.8:
                    options["generator"] = self.draws
                if "eta" in takes:
                    options |= {"eta": pick([0.0, 0.0, 0.5, 1.0]), "use_clipped_model_output": pick([False, True])}
                if "s_churn" in takes and chance() < 0.1:
                    options["s_churn"] = 0.5
                if chance() < 0.2:
                    options["return_dict"] = False
                self.size = max(self.size, float(x.double().abs().max()), self.largest(k))

                def step(s, j, x=x, m=m, form=form, options=options):
                    given = {n: v[j] if n == "generator" else v for n, v in options.items()}
                    return s.step(m, self.timestep(s, k)[form], x, **given)

                shown = ", ".join(f"{n}={v}" for n, v in options.items() if n != "generator")
                if not self.on_both(f"step({k}, {form}, {m.dtype}; {shown})", step, 1e-4):
                    ran = True
                    break
                ran, k = True, k + 1
        return "run" if ran else "no step"

    def largest(self, k):
        sigmas = getattr(self.both[0], "sigmas", None)
        return float(sigmas[min(k, len(sigmas) - 1)]) if sigmas is not None and len(sigmas) else 1.0

    def restart(self, count):
        self.on_both(f"set_timesteps({count})", lambda s, _: s.set_timesteps(count))
        self.noisiest = max(self.noisiest, self.largest(0))

    @staticmethod
    def scale(sigmas, at, way):
        if at < len(sigmas) - 1:
            changed = way(sigmas)
            changed[at : at + 1] *= 0.97


@pytest.mark.parametrize("part", range(20))
def test_random_sequences(part):
    fused.reset_counts()
    found = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(part, SEQUENCES, 20):
            found[Pair(seed).run()] += 1
    done = sum(fused.fused_calls().values())
    assert found["run"] > 0.5 * SEQUENCES / 20 and done > SEQUENCES / 20, (found, done)
    fused.reset_counts()
