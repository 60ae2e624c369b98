"""How the fused methods of diffusers' schedulers are put in place and taken away, pipelines, and torch.compile."""

import copy
import dataclasses
import inspect
import pickle
import warnings

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
from fastdiff.integrations import diffusers as fused  # noqa: E402
from fastdiff.integrations.diffusers import patching, source_digests, supported  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SHAPE = (2, 3, 4, 4)
DDPM, DDIM, EULER = diffusers.DDPMScheduler, diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler


@pytest.fixture(autouse=True)
def untouched():
    """Every test leaves diffusers as it was."""

    def held():
        classes = {name: vars(supported.resolve(name)) for name in supported.SUPPORTED}
        return {(name, key): of[key] for name, of in classes.items() for key in of if key != "__slotnames__"}

    before = held()
    fused.reset_counts()
    yield
    fused.unpatch()
    fused.reset_counts()
    assert held() == before


def step(scheduler, seed=0):
    if scheduler.num_inference_steps is None:
        scheduler.set_timesteps(10)
    x = torch.ones(SHAPE)
    if "Euler" in type(scheduler).__name__:
        scheduler._step_index = 3
        scheduler.scale_model_input(x, scheduler.timesteps[3])
    g = torch.Generator().manual_seed(seed)
    return scheduler.step(0.3 * x, scheduler.timesteps[3], x, generator=g).prev_sample


def done(name="DDPMScheduler.step"):
    return fused.fused_calls().get(name, 0)


# ------------------------------------------------------------------------------------------------- putting it in place


def test_nothing_happens_on_import():
    assert not any(hasattr(supported.resolve(name).step, "_fastdiff_original") for name in supported.SUPPORTED)


def test_every_method_of_the_installed_version_is_known():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fused.patch():
            for name, methods in supported.SUPPORTED.items():
                for method in methods:
                    assert hasattr(getattr(supported.resolve(name), method), "_fastdiff_original"), (name, method)
                    assert method in methods[method].digests, "its own source is compared too"


def test_fuse_is_of_one_object():
    one, other = DDPM(), DDPM()
    assert fused.fuse(one) is one
    expected, got = step(other), step(one)
    torch.testing.assert_close(got, expected)
    assert done() == 1
    assert fused.unfuse(one) is one and not any(key.startswith("_fastdiff") for key in one.__dict__)
    assert torch.equal(step(one), expected) and done() == 1
    assert "step" not in one.__dict__ and fused.unfuse(one) is one


def test_fuse_twice_is_once():
    one = fused.fuse(fused.fuse(DDPM()))
    step(one)
    assert done() == 1
    fused.unfuse(one)
    step(one)
    assert done() == 1


def test_fuse_refuses_what_it_does_not_know():
    for other in (diffusers.PNDMScheduler(), torch.nn.Linear(1, 1), None):
        with pytest.raises(TypeError, match=r"fuse\(\) takes a scheduler of diffusers, one of DDIMScheduler, "):
            fused.fuse(other)
    with pytest.raises(TypeError, match=r"the class DDPMScheduler: make one, such as DDPMScheduler\(\)"):
        fused.fuse(DDPM)


def test_patch_needs_diffusers(monkeypatch):
    monkeypatch.setattr(patching, "resolve", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the diffusers library: install fastdiff\[diffusers\]"):
        fused.patch()


def test_patch_is_of_all_and_undone():
    original, early = DDPM.step, DDPM()
    with fused.patch():
        assert DDPM.step is not original
        step(early), step(DDPM()), step(EULER())
    assert DDPM.step is original and done() == 2 and done("EulerDiscreteScheduler.step") == 1
    step(early)
    assert done() == 2
    fused.patch()
    step(early)
    fused.unpatch()
    step(early)
    assert done() == 3 and DDPM.step is original
    fused.unpatch()  # once more does nothing


def test_a_block_that_raises_is_undone():
    original = DDPM.step
    with pytest.raises(RuntimeError, match="inside"), fused.patch():
        raise RuntimeError("inside")
    assert DDPM.step is original


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_patches_nest_in_any_order(order):
    original, patches = DDPM.step, (fused.patch(), fused.patch())
    step(DDPM())
    assert done() == 1, "counted once"
    patches[order[0]].undo()
    patches[order[0]].undo()  # a second time does nothing
    step(DDPM())
    assert done() == 2 and DDPM.step is not original
    patches[order[1]].undo()
    assert DDPM.step is original
    step(DDPM())
    assert done() == 2


def test_fuse_and_patch_together():
    one = DDPM()
    with fused.patch():
        fused.fuse(one)
        step(one)
        assert done() == 1, "counted once"
    step(one)
    assert done() == 2, "still fused"
    fused.unfuse(one)
    step(one)
    assert done() == 2


def test_what_another_library_put_there_before_is_left_alone(monkeypatch):
    own = DDPM.step

    def theirs(self, *arguments, **named):
        return own(self, *arguments, **named)

    monkeypatch.setattr(DDPM, "step", theirs)
    with pytest.warns(UserWarning, match="DDPMScheduler.step is not diffusers' own"):
        patch = fused.patch()
    assert DDPM.step is theirs
    step(DDPM())
    assert done() == 0
    patch.undo()
    assert DDPM.step is theirs
    one = fused.fuse(DDPM())
    step(one)
    assert done() == 0 and fused.fallbacks()["DDPMScheduler.step"] == {"DDPMScheduler has a step of its own": 1}
    monkeypatch.undo()


def test_what_another_library_puts_there_afterwards_stays():
    original, patch = DDPM.step, fused.patch()
    ours, calls = DDPM.step, []

    def theirs(self, *arguments, **named):
        calls.append(1)
        return ours(self, *arguments, **named)

    DDPM.step = theirs
    try:
        expected = step(DDPM())
        assert done() == 1
        patch.undo()
        assert DDPM.step is theirs
        torch.testing.assert_close(step(DDPM()), expected)
        assert done() == 1 and len(calls) == 2
        assert fused.fallbacks()["DDPMScheduler.step"] == {"patch() was undone": 1}
    finally:
        DDPM.step = original


def test_a_method_that_an_object_has_of_its_own_stays():
    one = DDPM()
    one.step = lambda *arguments, **named: "theirs"
    with pytest.warns(UserWarning, match="the scheduler has a step of its own"):
        fused.fuse(one)
    assert one.step(None, 0, None) == "theirs"
    one.add_noise(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([3]))
    assert done("DDPMScheduler.add_noise") == 1


def test_signatures_and_names_stay():
    """Pipelines look for the arguments of ``step``."""
    for name, methods in supported.SUPPORTED.items():
        cls = supported.resolve(name)
        before = {method: inspect.signature(getattr(cls, method)) for method in methods}
        bound = {method: inspect.signature(getattr(cls(), method)) for method in methods}
        with fused.patch():
            for method in methods:
                found = getattr(cls, method)
                assert inspect.signature(found) == before[method] and found.__name__ == method
        one = fused.fuse(cls())
        for method in methods:
            assert inspect.signature(getattr(one, method)) == bound[method]


def test_copies_and_configs(tmp_path):
    one = fused.fuse(DDPM())
    expected = step(one)
    twin = copy.deepcopy(one)
    assert twin.step.__self__ is twin
    assert torch.equal(step(twin), expected) and done() == 2
    loaded = pickle.loads(pickle.dumps(one))
    torch.testing.assert_close(step(loaded), expected)
    assert done() == 2, "not fused"
    step(fused.fuse(loaded))
    assert done() == 3
    plain = DDPM()
    assert dict(one.config) == dict(plain.config)
    one.save_pretrained(tmp_path)
    torch.testing.assert_close(step(DDPM.from_pretrained(tmp_path)), expected)
    torch.testing.assert_close(step(DDPM.from_config(one.config)), expected)
    assert done() == 3


# ---------------------------------------------------------------------------------------------------------- subclasses


class Renamed(DDPM):
    """Overrides nothing."""


class OtherVariance(DDPM):
    def _get_variance(self, *arguments, **named):
        return 4 * super()._get_variance(*arguments, **named)


class OtherStep(DDPM):
    def step(self, *arguments, **named):
        result = super().step(*arguments, **named)
        result.prev_sample = result.prev_sample + 1
        return result


class OtherIndex(EULER):
    def index_for_timestep(self, timestep, schedule_timesteps=None):
        return 0


@pytest.mark.parametrize("how", ["fuse", "patch"])
def test_subclasses(how):
    for cls in (Renamed, OtherVariance, OtherStep):
        expected = step(cls())
        fused.reset_counts()
        if how == "fuse":
            got = step(fused.fuse(cls()))
        else:
            with fused.patch():
                got = step(cls())
        torch.testing.assert_close(got, expected)
        reasons = fused.fallbacks().get("DDPMScheduler.step", {})
        if cls is Renamed:
            assert done() == 1 and not reasons
        elif cls is OtherVariance:
            assert done() == 0 and reasons == {"OtherVariance has a _get_variance of its own": 1}
        elif how == "fuse":
            assert done() == 0 and reasons == {"OtherStep has a step of its own": 1}
        else:
            assert done() == 1 and not reasons, "what it hands on is fused"


def test_a_subclass_that_finds_its_timesteps_otherwise():
    x, n = torch.ones(2, 3), torch.randn(2, 3)
    one, plain = fused.fuse(OtherIndex()), OtherIndex()
    t = plain.timesteps[[4, 9]]
    assert torch.equal(one.add_noise(x, n, t), plain.add_noise(x, n, t))
    assert fused.fallbacks()["EulerDiscreteScheduler.add_noise"] == {
        "OtherIndex has a index_for_timestep of its own": 1
    }


def test_a_helper_that_is_replaced(monkeypatch):
    """On the object or on the class, by whomever: the fused step stands for diffusers' own only."""
    own = DDPM._get_variance
    one, plain = fused.fuse(DDPM()), DDPM()
    for scheduler in (one, plain):
        scheduler._get_variance = lambda *a, s=scheduler, **k: 9 * own(s, *a, **k)
    assert torch.equal(step(one), step(plain)) and done() == 0
    other = fused.fuse(DDPM())
    monkeypatch.setattr(DDPM, "_get_variance", lambda self, *a, **k: 9 * own(self, *a, **k))
    assert torch.equal(step(other), step(DDPM())) and done() == 0
    with pytest.warns(UserWarning, match="_get_variance"):
        third = fused.fuse(DDPM())
    assert torch.equal(step(third), step(DDPM())) and done() == 0


# ------------------------------------------------------------------------------------------------------------- versions


def test_an_unknown_version_is_left_as_it_is(monkeypatch):
    patching._replacement.cache_clear()
    methods = supported.SUPPORTED["DDPMScheduler"]
    digests = methods["step"].digests | {"_get_variance": ("000000000000",)}
    changed = methods | {"step": dataclasses.replace(methods["step"], digests=digests)}
    monkeypatch.setitem(supported.SUPPORTED, "DDPMScheduler", changed)
    try:
        with pytest.warns(UserWarning, match="DDPMScheduler._get_variance is none that fastdiff knows"):
            patch = fused.patch()
        expected = step(DDPM())
        assert done() == 0
        assert fused.fallbacks()["DDPMScheduler.step"] == {"DDPMScheduler._get_variance is none that fastdiff knows": 1}
        DDPM().add_noise(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([3]))
        step(EULER())
        assert done("DDPMScheduler.add_noise") == done("EulerDiscreteScheduler.step") == 1
        patch.undo()
        assert torch.equal(step(DDPM()), expected)
        with pytest.warns(UserWarning, match="What needs it is left as it is"):
            step(fused.fuse(DDPM()))
        assert done() == 0
    finally:
        patching._replacement.cache_clear()


def test_a_method_that_is_missing_or_has_no_source(monkeypatch):
    monkeypatch.delattr(DDPM, "_threshold_sample")
    assert supported.unknown(DDPM, "step") == "DDPMScheduler._threshold_sample is missing"
    monkeypatch.undo()
    scope = {}
    exec("def _threshold_sample(self, sample):\n    return sample", scope)
    monkeypatch.setattr(DDPM, "_threshold_sample", scope["_threshold_sample"])
    unread = "the source of DDPMScheduler._threshold_sample is not there to be compared"
    assert supported.unknown(DDPM, "step") == unread


def test_what_a_digest_is_of():
    plain = "def f(self, a, b=1):\n    x = a\n    return x, b\n"
    same = [
        'def f(self, a: int, b: float = 1):\n    """About f."""\n    # why\n    x = a  # how\n\n    return x, b\n',
        "    def f(self, a, b=1):\n        x = a\n        return x, b\n",
    ]
    other = [
        "def f(self, a, b=2):\n    x = a\n    return x, b\n",
        "def f(self, a, c, b=1):\n    x = a\n    return x, b\n",
        "def f(self, a, b=1):\n    x = -a\n    return x, b\n",
    ]
    assert {source_digests.digest(source) for source in same} == {source_digests.digest(plain)}
    assert source_digests.digest(plain) not in {source_digests.digest(source) for source in other}


# -------------------------------------------------------------------------------------------------------------- compile


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_step_in_a_compiled_program(fresh, name):
    """Without a break of the graph once the step index is there; calls are counted when they are traced."""
    plain, one = supported.resolve(name)(), fused.fuse(supported.resolve(name)())
    x, m = torch.randn(SHAPE), torch.randn(SHAPE)
    results = []
    for scheduler in (plain, one):
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(0)
        scheduler._step_index = 0
        scheduler.is_scale_input_called = True

        def run(x, m, scheduler=scheduler):
            return scheduler.step(m, scheduler.timesteps[0], x, return_dict=False)[0] * 2

        if scheduler is one:
            run = torch.compile(run, fullgraph=True, backend="aot_eager")
        y = x
        for _ in range(4):
            y = run(y, m)
        results.append(y)
        assert scheduler._step_index == 4
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert done(f"{name}.step") >= 1 and not fused.fallbacks()


@pytest.mark.parametrize("as_number", [False, True])
def test_ddpm_and_ddim_in_a_compiled_program(fresh, as_number):
    """A timestep that is a tensor breaks the graph where upstream's does; a number does not."""
    for cls in (DDPM, DDIM):
        results = []
        for scheduler in (cls(), fused.fuse(cls())):
            scheduler.set_timesteps(10)

            def run(x, m, t, scheduler=scheduler):
                return scheduler.step(m, t, x, return_dict=False)[0] + 1

            if scheduler.__dict__.get("step"):
                run = torch.compile(run, fullgraph=as_number and cls is DDIM, backend="aot_eager")
            torch.manual_seed(0)
            x = torch.ones(SHAPE)
            for t in scheduler.timesteps[3:6]:
                x = run(x, 0.3 * x, int(t) if as_number else t)
            results.append(x)
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
        assert done(f"{cls.__name__}.step") >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_noise_in_a_compiled_training_step(fresh, dtype):
    one, plain = fused.fuse(DDPM()), DDPM()
    x, n, t = torch.randn(4, 3, 8, 8, dtype=dtype), torch.randn(4, 3, 8, 8, dtype=dtype), torch.tensor([0, 5, 500, 999])

    def loss(scheduler, x, n, t):
        return (scheduler.add_noise(x, n, t) - scheduler.get_velocity(x, n, t)).float().square().mean()

    compiled = torch.compile(lambda x, n, t: loss(one, x, n, t), fullgraph=True, backend="aot_eager")
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(compiled(x, n, t), loss(plain, x, n, t), **tolerance)
    assert torch.equal(compiled(x, n, t), compiled(x, n, t))
    assert fused.fused_calls() == {"DDPMScheduler.add_noise": 1, "DDPMScheduler.get_velocity": 1}
    assert torch.equal(one.add_noise(x, n, t), torch.compile(one.add_noise, backend="aot_eager")(x, n, t))


# ------------------------------------------------------------------------------------------------------------ pipelines


def tiny_unet(**settings):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, **settings,
    ).eval()  # fmt: skip


def images_of(make, *arguments, **named):
    """(images with diffusers as it is, images with patch())."""
    results = []
    for fuses in (False, True):
        pipeline = make()
        pipeline.set_progress_bar_config(disable=True)
        if fuses:
            with fused.patch():
                results.append(pipeline(*arguments, generator=torch.Generator().manual_seed(5), **named).images)
        else:
            results.append(pipeline(*arguments, generator=torch.Generator().manual_seed(5), **named).images)
    return [torch.as_tensor(images) for images in results]


def test_ddpm_and_ddim_pipelines():
    unet = tiny_unet()
    for make, name, named in (
        (lambda: diffusers.DDPMPipeline(unet, DDPM()), "DDPMScheduler", {"num_inference_steps": 20}),
        (lambda: diffusers.DDIMPipeline(unet, DDIM()), "DDIMScheduler", {"num_inference_steps": 12, "eta": 0.6}),
    ):
        expected, got = images_of(make, batch_size=2, output_type="np", **named)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        assert done(f"{name}.step") == named["num_inference_steps"] and not fused.fallbacks()


def tiny_vae(channels):
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=channels,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        sample_size=16, shift_factor=0.1, scaling_factor=0.9,
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        *(
            "DDPMScheduler",
            "DDIMScheduler",
            "LCMScheduler",
            "EulerDiscreteScheduler",
            "EulerAncestralDiscreteScheduler",
        ),
        *("HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
    ],
)
def test_stable_diffusion(name):
    pytest.importorskip("transformers")
    torch.manual_seed(2)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2,
    ).eval()  # fmt: skip
    vae, words = tiny_vae(4), torch.randn(2, 1, 5, 8)

    def make():
        return diffusers.StableDiffusionPipeline(
            vae, None, None, unet, supported.resolve(name)(), None, None, requires_safety_checker=False
        )

    named = {"prompt_embeds": words[0], "negative_prompt_embeds": words[1], "guidance_scale": 3.0}
    expected, got = images_of(make, num_inference_steps=6, height=16, width=16, output_type="np", **named)
    assert expected.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert done(f"{name}.step") == (11 if "Heun" in name else 6) and not fused.fallbacks()


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_stable_diffusion_3(name):
    pytest.importorskip("transformers")
    torch.manual_seed(3)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8, out_channels=4,
    ).eval()  # fmt: skip
    vae, words, pooled = tiny_vae(4), torch.randn(2, 1, 5, 8), torch.randn(2, 1, 8)

    def make():
        scheduler = supported.resolve(name)(shift=3.0)
        return diffusers.StableDiffusion3Pipeline(transformer, scheduler, vae, *(None,) * 6)

    named = {"prompt_embeds": words[0], "negative_prompt_embeds": words[1], "pooled_prompt_embeds": pooled[0]}
    named["negative_pooled_prompt_embeds"] = pooled[1]
    expected, got = images_of(make, num_inference_steps=5, height=16, width=16, output_type="np", **named)
    assert expected.isfinite().all()
    if name == "FlowMatchEulerDiscreteScheduler":
        assert torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert done(f"{name}.step") == (9 if "Heun" in name else 5) and not fused.fallbacks()


def test_flux():
    pytest.importorskip("transformers")
    torch.manual_seed(4)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=[4, 4, 8],
    ).eval()  # fmt: skip
    vae, words, pooled = tiny_vae(1), torch.randn(1, 5, 8), torch.randn(1, 8)

    def make():
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        return diffusers.FluxPipeline(scheduler, vae, None, None, None, None, transformer)

    named = {"prompt_embeds": words, "pooled_prompt_embeds": pooled, "height": 16, "width": 16, "output_type": "np"}
    expected, got = images_of(make, num_inference_steps=4, **named)
    assert expected.isfinite().all() and torch.equal(got, expected)
    assert done("FlowMatchEulerDiscreteScheduler.step") == 4 and not fused.fallbacks()


def test_counts_can_be_reset():
    step(fused.fuse(DDPM()))
    fused.fuse(DDPM()).add_noise(torch.ones(2, 1), torch.ones(2, 1).half(), torch.ones(2).long())
    assert fused.fused_calls() and fused.fallbacks()
    fused.fused_calls().clear()
    assert fused.fused_calls() == {"DDPMScheduler.step": 1}, "a copy"
    fused.reset_counts()
    assert fused.fused_calls() == {} and fused.fallbacks() == {}
