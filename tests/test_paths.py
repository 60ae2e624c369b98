"""A number never depends on the path. Random objectives, shapes, strides, dtypes, rows, masks and reductions go through
every path that there is: fast calls, the general way, the reference, a mask of ones, "none" and then the mean, copied
and pickled objects, after use in another mode, Triton's interpreter and a compiled program (of few: they take seconds).
"""

import contextlib
import copy
import math
import pickle
import random
import threading
import warnings
from collections import Counter

import pytest
import torch
from asked import native, triton
from devices import NIGHTLY

import fastdiff
from fastdiff import losses, weighting

CASES = 20_000 if NIGHTLY else 2_000
PARTS = 20
PROCESSES = [
    fastdiff.VariancePreserving(),
    fastdiff.VariancePreserving("cosine", steps=50),
    fastdiff.VariancePreserving("scaled_linear", zero_terminal_snr=True),
    fastdiff.RectifiedFlow(),
    fastdiff.RectifiedFlow(shift=3.0),
    fastdiff.RectifiedFlow(sigma_min=1e-3),
    fastdiff.RectifiedFlow(2.0, data_at=1),
    fastdiff.EDM(),
    fastdiff.VPSDE(),
    fastdiff.VESDE(),
]
KINDS = ["epsilon", "sample", "v_prediction", "flow", "reversed_flow", "score", "edm"]
WEIGHTS = [
    None,
    None,
    "min_snr",
    "soft_min_snr",
    "sigma_sqrt",
    "cosmap",
    "edm",
    "bell",
    lambda levels: levels.alpha + 1,
]
LOSSES = [
    "mse",
    "mse",
    "l1",
    "huber",
    "smooth_l1",
    "log_cosh",
    losses.PseudoHuber(0.2),
    losses.PseudoHuber(schedule="snr"),
    losses.Combined((0.5, "mse"), (0.3, "huber"), (0.7, losses.PseudoHuber(0.2, schedule="snr"))),
]
SHAPES = [(3, 4, 8, 8)] * 4 + [(2, 3, 5), (4, 7), (6,), (1, 1), (2, 3, 4, 6, 6), (2, 16, 8), (5, 3, 1, 9)]
DTYPES = [torch.float32] * 5 + [torch.bfloat16, torch.float16, torch.float64]
HALF = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def arranged(x, how):
    """The numbers of ``x`` in another arrangement of memory."""
    if how == "last" and x.ndim == 4:
        return x.to(memory_format=torch.channels_last)
    if how == "turned" and x.ndim > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "gaps":
        wide = x.new_empty((*x.shape[:-1], 2 * x.shape[-1]))
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


class Case:
    def __init__(self, seed):
        self.random = r = random.Random(seed)
        self.seed, pick = seed, r.choice
        self.options = {}
        self.process, self.kind = pick(PROCESSES), pick(KINDS)
        self.how = {"weighting": pick(WEIGHTS), "loss": pick(LOSSES)}
        if r.random() < 0.3:
            self.how["error_space"] = pick(KINDS)
        self.shape = pick(SHAPES)
        g = torch.Generator().manual_seed(seed)
        same, form = r.random() < 0.6, pick(["plain"] * 5 + ["last", "turned", "gaps"])
        first = pick(DTYPES)
        self.x0, self.n, self.p = (
            arranged(
                torch.randn(self.shape, generator=g, dtype=torch.float64).to(first if same else pick(DTYPES)), form
            )
            for _ in range(3)
        )
        self.t = self.times(g, pick(["sample"] * 4 + ["one", "frame", "channels", "all"]))
        self.given = r.random() < 0.6
        self.keep = pick([None, True, False])
        if r.random() < 0.4:
            self.options["mask"] = self.mask(g, pick(["all", "spatial", "sample", "rows"]))
            self.options["mask_normalization"] = pick(["none", "row", "global", "sample"])
        if r.random() < 0.3:
            self.options["weight"] = pick([0.5, torch.rand(self.t.shape, generator=g) + 0.1])
        self.options["reduction"] = pick(["mean", "mean", "none", "sum", "elements"])
        if self.options["reduction"] in ("sum", "elements"):
            self.options.pop("mask_normalization", None)
        self.upstream = pick([1.0, 1.0, 0.25])

    def __str__(self):
        options = {k: tuple(v.shape) if torch.is_tensor(v) else v for k, v in self.options.items()}
        return (
            f"{self.seed}: {self.process!r}, {self.kind}, {self.how}, {options}, {self.shape}, "
            f"t {tuple(self.t.shape)}, {self.x0.dtype}, {self.n.dtype}, {self.p.dtype}, strides {self.p.stride()}, "
            f"noise {'given' if self.given else self.keep}, upstream {self.upstream}"
        )

    def times(self, g, form):
        shape = {
            "sample": self.shape[:1], "one": (), "frame": self.shape[:2], "all": (1,) * len(self.shape),
            "channels": (self.shape[0], *(1 if d != 2 else s for d, s in enumerate(self.shape[1:], 1))),
        }[form]  # fmt: skip
        if self.process.discrete:
            return torch.randint(0, self.process.steps, shape, generator=g)
        t = torch.rand(shape, generator=g, dtype=torch.float64) * 0.98 + 0.01
        return t * 3 if isinstance(self.process, fastdiff.EDM) else t

    def mask(self, g, form):
        shape = {
            "all": self.shape, "sample": self.shape[:1], "rows": self.shape[:2],
            "spatial": (self.shape[0], *(1 if d == 1 else s for d, s in enumerate(self.shape[1:], 1))),
        }[form]  # fmt: skip
        mask = torch.rand(shape, generator=g) < 0.7
        return self.random.choice([mask, mask.float(), mask * torch.rand(shape, generator=g)])

    def objective(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fastdiff.Objective(self.process, self.kind, **self.how)

    def run(self, objective, change=None, **options):
        """(x_t, loss, gradient, what it stands for of x0) on the path that is set."""
        x0, n = self.x0, self.n if self.given else None
        seed = None if self.given else self.seed
        noised = objective.noise(x0, self.t, n, seed=seed, keep_noise=self.keep)
        if change is not None:
            noised = change(noised)
        p = self.p.clone(memory_format=torch.preserve_format).requires_grad_()
        loss = objective.loss(p, noised, **(self.options | options))
        (self.upstream * loss.sum()).backward()
        return noised.x_t, loss.detach(), p.grad

    def check(self, what, found, expected, exact=False):
        for name, a, b in zip(("x_t", "loss", "gradient"), found, expected):
            assert a.dtype == b.dtype and a.shape == b.shape, f"{self}\n{what}: {name} of {a.dtype}, {a.shape}"
            if exact:
                assert (
                    torch.equal(a, b) or (a.isnan() == b.isnan()).all() and torch.equal(a.nan_to_num(), b.nan_to_num())
                ), f"{self}\n{what}: {name} has other bits"
                continue
            wide, other = a.double(), b.double()
            assert torch.equal(wide.isfinite(), other.isfinite()), f"{self}\n{what}: {name} finite"
            wide, other = (torch.where(v.isfinite(), v, 0.0) for v in (wide, other))
            unit = HALF.get(a.dtype, 1e-13 if a.dtype == torch.float64 else 4e-6)
            off = (wide - other).abs().max() / other.abs().max().clamp(min=1e-30) if wide.numel() else 0.0
            assert off <= unit, f"{self}\n{what}: {name} is off by {float(off):.2e}"

    def everywhere(self, slow):
        try:
            objective = self.objective()
            with fastdiff.use_backend("reference"):
                expected = self.run(objective)
        except (ValueError, TypeError) as problem:
            for name in ("native", "reference"):
                with fastdiff.use_backend(name), pytest.raises(type(problem)):
                    self.run(self.objective())
            return "refused"
        self.check("reference again", self.run_with("reference", self.objective()), expected, exact=True)
        whole = self.run_with("native", self.objective())
        self.check("native", whole, expected)
        self.check("native again", self.run_with("native", objective), whole, exact=True)
        with patched():
            self.check("native, general way", self.run_with("native", self.objective()), whole, exact=True)
        for change in (copy.deepcopy, lambda noised: pickle.loads(pickle.dumps(noised))):
            if not callable(self.how["weighting"]) or change is copy.deepcopy:
                self.check(
                    "a copied batch", self.run_with("native", self.objective(), change=change), whole, exact=True
                )
        copied = copy.deepcopy(objective)
        self.check("a copied objective", self.run_with("native", copied), whole, exact=True)
        for mode in (torch.inference_mode, torch.no_grad):
            fresh = self.objective()
            with mode(), contextlib.suppress(RuntimeError):  # nothing to differentiate
                self.run(fresh)
            self.check(f"after {mode.__name__}", self.run_with("native", fresh), whole, exact=True)
        if self.seed % 10 == 0:
            fresh = self.objective()
            thread = threading.Thread(target=self.run, args=(fresh,))
            thread.start()
            thread.join()
            self.check("after a thread", self.run_with("native", fresh), whole, exact=True)
        if "mask" not in self.options:
            ones = {"mask": torch.ones((1,) * len(self.shape))}
            self.check("a mask of ones", self.run_with("native", self.objective(), **ones), expected)
        if self.options["reduction"] == "none" and "mask" not in self.options:
            rows = self.run_with("native", self.objective())[1]
            mean = self.run_with("native", self.objective(), reduction="mean")[1]
            self.check("none, then the mean", (rows.double().mean().to(mean.dtype),), (mean,))
        if slow == "triton":
            self.check("triton", self.run_with("triton", self.objective()), expected)
        if slow == "compiled":
            torch._dynamo.reset()
            fresh = self.objective()

            def step(x0, n, t, p, upstream):
                noised = fresh.noise(x0, t, n, seed=None if self.given else self.seed, keep_noise=self.keep)
                return noised.x_t, fresh.loss(p, noised, **self.options)

            p = self.p.clone(memory_format=torch.preserve_format).requires_grad_()
            x_t, loss = torch.compile(step, backend="aot_eager")(
                self.x0, self.n if self.given else None, self.t, p, self.upstream
            )
            (self.upstream * loss.sum()).backward()
            self.check("compiled", (x_t, loss.detach(), p.grad), whole)
        return "equal"

    def run_with(self, backend, objective, **how):
        with fastdiff.use_backend(backend):
            return self.run(objective, **how)


@contextlib.contextmanager
def patched():
    """Without fast calls."""
    backend = native.backend
    fast, backend.fast = backend.fast, None
    try:
        yield
    finally:
        backend.fast = fast


def run_cases(seeds, slow=None):
    found = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in seeds:
            found[Case(seed).everywhere(slow)] += 1
    return found


needs_native = pytest.mark.skipif(not native.available, reason="the native backend is not there")


@needs_native
@pytest.mark.parametrize("part", range(PARTS))
def test_every_path_has_the_same_numbers(part):
    found = run_cases(range(part, CASES, PARTS))
    assert found["equal"] > CASES / PARTS / 4, found


@needs_native
@pytest.mark.skipif(bool(triton.no_device_because()), reason="Triton is not there")
@pytest.mark.parametrize("part", range(4))
def test_triton_has_them_too(part):
    found = run_cases(range(part, CASES // 40, 4), "triton")
    assert found["equal"], found


@needs_native
@pytest.mark.parametrize("part", range(2))
def test_a_compiled_program_has_them_too(part):
    assert run_cases(range(part, CASES // 100, 2), "compiled")["equal"]


def test_the_cases_reach_everything():
    """Each choice is drawn often, so that a case that finds nothing is no accident."""
    cases = [Case(seed) for seed in range(400)]
    assert {case.kind for case in cases} == set(KINDS) and len({repr(case.process) for case in cases}) == len(PROCESSES)
    assert {case.p.dtype for case in cases} == set(DTYPES) and {case.shape for case in cases} == set(SHAPES)
    assert {case.options["reduction"] for case in cases} == {"mean", "none", "sum", "elements"}
    assert sum("mask" in case.options for case in cases) > 100 and not math.isnan(sum(c.x0.sum().item() for c in cases))
    assert weighting.get("bell") in [weighting.get(case.how["weighting"]) for case in cases]


def negated(values):
    """A tensor that PyTorch negates as it is read: dense, which only a single number is by public functions."""
    return torch._neg_view(-values.clone())


@pytest.mark.parametrize("name", ["reference", pytest.param("native", marks=needs_native), "triton"])
def test_tensors_that_are_negated_as_they_are_read(name):
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow")
    torch.manual_seed(3)
    for shape in ((1, 1), (2, 3, 4)):
        single = shape == (1, 1)
        x0, n, m, t = torch.randn(shape), torch.randn(shape), torch.randn(shape), torch.rand(shape[0]).double()
        imaginary = torch.complex(torch.zeros(shape), -x0).conj().imag
        assert torch.equal(imaginary, x0) and imaginary.is_neg() and imaginary.is_contiguous() == single
        elements, with_backend = {"reduction": "elements"}, fastdiff.use_backend(name)
        with with_backend:
            want = objective.noise(x0, t, n)
            for data in (imaginary, *([negated(x0)] if not single and name != "native" else [])):
                assert torch.equal(objective.noise(data, t, n).x_t, want.x_t)
            prediction = torch.complex(torch.zeros(shape), -m).conj().imag
            assert objective.loss(prediction, want) == objective.loss(m, want)
            got, slope = objective.loss_and_gradient(prediction, want)
            assert (got, slope.tolist()) == (objective.loss(m, want), objective.loss_and_gradient(m, want)[1].tolist())
            map_of = torch.rand(shape)
            assert torch.equal(objective.loss(m, want, weight=negated(map_of)), objective.loss(m, want, weight=map_of))
            leaf, upstream = m.clone().requires_grad_(), torch.randn(shape)
            of = lambda g: torch.autograd.grad(objective.loss(leaf, want, **elements), leaf, g)[0]  # noqa: B023, E731
            assert torch.equal(of(negated(upstream)), of(upstream))
