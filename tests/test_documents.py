"""What the documents show works: each block of Python runs, each command and link leads somewhere."""

import copy
import importlib
import inspect
import json
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import libraries
import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdiff
import fastdiff.integrations as integrated
from fastdiff.bench.cases import PRESETS
from fastdiff.cli import _parser
from fastdiff.demo.settings import build, resolve

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the documents are not beside the tests")
# Large sizes, and what is put in their place.
SMALL = {"(16, 4, 64, 64)": "(2, 4, 8, 8)", '"ddim", 50': '"ddim", 3', "image_size=128": "image_size=8"}


@pytest.fixture(autouse=True)
def nothing_is_imported(monkeypatch):
    """A block finds what it uses by itself, whatever other tests have imported."""
    for name in list(sys.modules):
        package, _, module = name.rpartition(".")
        if package == "fastdiff.integrations" or name == "fastdiff.integrations":
            monkeypatch.delattr(sys.modules[package], module, raising=False)


def text_of(document):
    return (ROOT / document).read_text()


def blocks(document):
    """(heading, code) of each block of Python, in order."""
    heading = ""
    for found in re.finditer(r"^#+ ([^\n]+)$|^```python\n(.*?)^```$", text_of(document), re.M | re.S):
        if found[2] is None:
            heading = found[1]
        else:
            yield heading, found[2]


def run_blocks(document, fakes):
    """Run the blocks in one namespace, from the same seed each, with what a trainer has: ``fakes``, by heading. Yields
    the namespace after each."""
    namespace = {}
    known = set()
    for number, (heading, code) in enumerate(blocks(document)):
        if heading not in known:
            namespace |= fakes.get(heading, {})
            known.add(heading)
        for large, small in SMALL.items():
            code = code.replace(large, small)
        torch.manual_seed(0)
        exec(compile(code, f"{document}, block {number + 1}: {heading}", "exec"), namespace)
        yield namespace


class Network(nn.Module):
    """Called as trainers and samplers call theirs; ``calls`` counts them."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.tensor(0.5)), 0

    def forward(self, x, t, condition=0.0, **_):
        self.calls += 1
        return self.weight * x + condition


def latents(batch=4):
    return torch.randn(batch, 4, 8, 8)


def test_readme():
    network = Network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    trainer = dict(loader=[(latents(), 0.1), (latents(), 0.2)], network=network, optimizer=optimizer)
    trainer |= dict(conditions=torch.ones(2, 1, 1, 1), process=fastdiff.VariancePreserving(), t=torch.tensor([0, 999]))
    trainer |= dict(x0=latents(2), noise=latents(2))
    runs = run_blocks("README.md", {"Use": trainer})
    first = next(runs)
    trainer["prediction"] = first["prediction"] = latents(2)
    images, loss = first["images"], first["loss"]
    (second,) = runs
    assert network.calls == 2 + 3 and images.shape == (2, 4, 8, 8)
    assert network.weight != 0.5 and loss > 0
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[trainer["t"]].view(
        2, 1, 1, 1
    )
    x_t = alpha_bar**0.5 * trainer["x0"] + (1 - alpha_bar) ** 0.5 * trainer["noise"]
    torch.testing.assert_close(second["x_t"], x_t.float())
    weight = (alpha_bar / (1 - alpha_bar)).clamp(max=5.0) * (1 - alpha_bar) / alpha_bar
    expected = (weight * (trainer["prediction"] - trainer["noise"]) ** 2).mean()
    torch.testing.assert_close(second["loss"], expected.float())


class Pipeline:
    """A pipeline of three steps of its scheduler."""

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def __call__(self, prompt):
        self.scheduler.set_timesteps(3)
        x = latents(1)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(0.5 * x, t, x).prev_sample
        return SimpleNamespace(images=x)


@pytest.fixture
def schedulers():
    """diffusers' schedulers, left as they were."""
    found = pytest.importorskip("diffusers")
    from fastdiff.integrations.diffusers import unpatch

    before = dict(vars(found.DDIMScheduler))
    yield found
    for _ in range(5):
        unpatch()
    assert dict(vars(found.DDIMScheduler)) == before


def test_diffusers(schedulers):
    given = dict(pipeline=Pipeline(schedulers.DDIMScheduler()), prompt="a digit")
    plain = Pipeline(schedulers.DDIMScheduler())
    torch.manual_seed(0)
    expected = plain("a digit").images
    (names,) = run_blocks("docs/diffusers.md", {"diffusers' schedulers, fused": given})
    torch.testing.assert_close(names["images"], expected)
    assert sum(names["fused_calls"]().values()) >= 3


def test_moments():
    """Each block against its paper's formula."""
    cond, uncond, target, x = (torch.randn(3, 4, 8, 8) for _ in range(4))
    near = target + 0.1 * cond
    given = dict(prediction=near, target=target, c=1e-3, p=0.75, x=x, fake=cond, real=uncond, x0=target)
    given |= dict(cond=cond, uncond=uncond, scale=4.0, r=5.0, eta=0.3, phi=0.7, now=near, before=target)
    *_, found = run_blocks("docs/moments.md", {"Row moments": given})
    c64, u64, t64, x64, n64 = (tensor.double().numpy() for tensor in (cond, uncond, target, x, near))
    weight = oracle.meanflow_weight(n64, t64, 1e-3, 0.75)
    expected = {
        "weight": weight,
        "loss": (weight * ((n64 - t64) ** 2).sum((1, 2, 3))).mean(),
        "gradient": oracle.dmd_gradient(x64, c64, u64),
        "nft_loss": oracle.nft_loss(n64, t64),
        "zero_star": oracle.cfg_zero_star(c64, u64, 4.0),
        "projected": oracle.projected_guidance(c64, u64, 4.0, 5.0, 0.3),
        "rescaled": oracle.rescaled_guidance(c64, u64, 4.0, 0.7),
        "change": oracle.teacache_change(n64, t64),
        "mean": x64.mean((1, 2, 3)),
        "root_mean_square": np.sqrt((x64**2).mean((1, 2, 3))),
        "size": np.abs(x64).mean((1, 2, 3)),
    }
    for name, value in expected.items():
        # A few roundings of float32, of numbers not much larger than the results.
        got, size = found[name].double().numpy(), np.abs(value).max().astype(float)
        np.testing.assert_allclose(got, value.astype(float), rtol=2e-6, atol=2e-6 * size, err_msg=name)


def test_performance():
    """The loop that has the gradient along with the loss learns what the usual one learns."""

    def given():
        network = Network()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        batch = dict(latents=data, condition=torch.arange(4.0).view(4, 1, 1, 1), accumulation_steps=2)
        return batch | dict(torch=torch, network=network, optimizer=optimizer, scaler=scaler, objective=objective)

    objective, data = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", "min_snr"), latents()
    (names,) = run_blocks("docs/performance.md", {"The loss and its gradient at once": given()})
    usual = SimpleNamespace(**given())
    torch.manual_seed(0)
    for part, labels in zip(usual.latents.chunk(2), usual.condition.chunk(2)):
        noised = objective.noise(part)
        loss = objective.loss(usual.network(noised.model_input, noised.model_time, labels), noised)
        usual.scaler.scale(loss / 2).backward()
    usual.scaler.step(usual.optimizer)
    assert torch.equal(names["network"].weight, usual.network.weight) and usual.network.weight != 0.5


def test_data():
    images, x0 = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), latents()
    network, transformer, packed = Network(), Network(), Network()
    given = {
        "Images of uint8": {"images": images, "network": network},
        "Packed tokens": {"x0": x0, "transformer": transformer},
        "Packed sequences": {"x0": torch.randn(1344, 64), "transformer": lambda x, t, lengths: packed(x, t[:1])},
    }
    of_images, of_tokens, of_sequences = (dict(names) for names in run_blocks("docs/data.md", given))
    assert of_images["noised"].x_t.dtype == torch.bfloat16 and network.weight.grad.isfinite()
    noised = of_tokens["noised"]
    assert noised.x_t.shape == of_tokens["prediction"].shape == (4, 16, 16) and transformer.weight.grad.isfinite()
    plain = of_tokens["objective"].noise(x0, noised.t, noised.noise)
    torch.testing.assert_close(of_tokens["latents"].unpack(noised.x_t, 8, 8), plain.x_t, rtol=0, atol=0)
    prediction = of_tokens["latents"].unpack(of_tokens["prediction"].detach(), 8, 8)
    torch.testing.assert_close(of_tokens["loss"], of_tokens["objective"].loss(prediction, plain))
    torch.testing.assert_close(of_tokens["clean"], of_tokens["objective"].predict_x0(prediction, plain))
    noised, m = of_sequences["noised"], of_sequences["prediction"].detach()
    error = (m - (noised.noise - of_sequences["x0"])).square().split(of_sequences["lengths"])
    means = torch.stack([part.mean() for part in error])
    torch.testing.assert_close(of_sequences["per_sequence"], means)
    torch.testing.assert_close(of_sequences["of_sequences"], means.mean())
    torch.testing.assert_close(of_sequences["loss"], torch.cat(error).mean())
    assert noised.model_time.shape == (3,) and packed.weight.grad.isfinite()


def test_migrating(schedulers, monkeypatch):
    # Stands in for the package: the block needs its base class.
    monkeypatch.setitem(sys.modules, "lightning", SimpleNamespace(LightningModule=nn.Module))
    scheduler = schedulers.DDPMScheduler(prediction_type="v_prediction")
    written, trained, diffusions, x = [], [], [], latents()
    fakes = {
        "diffusers schedulers": dict(pipeline=Pipeline(schedulers.DDIMScheduler()), prompt="a digit"),
        "A scheduler of diffusers in a loop of your own": dict(scheduler=scheduler),
        "denoising-diffusion-pytorch": dict(
            unet=libraries.Net(),
            GaussianDiffusion=libraries.GaussianDiffusion,
            Trainer=lambda *given: trained.append(given),
        ),
        "guided-diffusion, improved-diffusion, DiT": dict(
            create_gaussian_diffusion=lambda others: (diffusions.append(libraries.Diffusion()), diffusions[0])[1]
        ),
        "k-diffusion: losses": dict(
            model=Network(),
            K=SimpleNamespace(
                layers=SimpleNamespace(Denoiser=lambda model, sigma_data, weighting: libraries.Denoiser())
            ),
        ),
        "Loss by timestep": dict(
            noised=fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon").noise(x),
            objective=fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon"),
            prediction=torch.sin(x),
            step=100,
            writer=SimpleNamespace(add_scalar=lambda *given: written.append(given)),
        ),
    }
    for (heading, _), names in zip(blocks("docs/migrating.md"), run_blocks("docs/migrating.md", fakes), strict=True):
        if heading == "A scheduler of diffusers in a loop of your own":
            assert names["objective"].prediction.name == "v_prediction"
            assert names["objective"].weighting == fastdiff.MinSNR(5.0)
    for module, made, method in (
        (names["denoising_diffusion"], trained[0][0], "p_losses"),
        (names["guided_diffusion"], diffusions[0], "training_losses"),
        (names["k_diffusion"], names["denoiser"], "loss"),
    ):
        assert method in module.fused_methods(made)
    assert written and all(step == 100 for _, _, step in written)


def test_guidance():
    """Each block: which samples are dropped, the rules as runs of a network that guides itself, and a classifier."""

    class Conditional(Network):
        def forward(self, x, t, cond=0.0):
            cond = torch.as_tensor(cond).float()
            return super().forward(x, t, cond.reshape(len(cond), -1).mean(1).view(-1, 1, 1, 1) if cond.ndim else cond)

    network, x0, shape, head = Conditional(), torch.randn(64, 1, 4, 4), (4, 1, 4, 4), torch.nn.Linear(16, 3)
    classifier = lambda x, t: head(x.flatten(1))  # noqa: E731
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow")
    given = dict(fastdiff=fastdiff, F=F, objective=objective, network=network, denoiser=network, x0=x0, shape=shape)
    given |= dict(cond=torch.ones(64, 2), seed=7, first=3, classifier=classifier, classes=torch.arange(64) % 3)
    given |= dict(labels=torch.arange(64) % 10, tokens=torch.ones(64, 2, 3), mask=torch.ones(64, 2).bool())
    given |= dict(empty_tokens=torch.full((2, 3), -1.0), empty_mask=torch.tensor([True, False]))
    given |= dict(text=torch.ones(4), empty=torch.zeros(4), wanted=torch.tensor([0, 1, 2, 0]))
    runs = run_blocks("docs/guidance.md", {"Training: a condition that is dropped": given})
    names = next(runs)
    dropped = torch.from_numpy(oracle.uniform(7, 64, 8, 3) < 0.1)
    assert dropped.any() and torch.equal(names["dropped"], dropped)
    assert torch.equal(names["cond"], (~dropped).float()[:, None].expand(64, 2)) and names["loss"].isfinite()
    names = next(runs)
    tokens, mask = names["given"]["tokens"], names["given"]["mask"]
    assert set(names["labels"].tolist()) == {*range(11)}
    assert torch.equal(tokens[:, 0, 0] == -1, ~mask[:, 1]) and mask[:, 0].all() and not mask.all()

    def by_hand(weights):
        """A run whose network guides itself: c - u is 1."""
        step = iter(range(28))

        def guides(x, t):
            with torch.no_grad():
                c, u = network(x, t, 1.0), network(x, t, 0.0)
            return weights(next(step), c, u)

        torch.manual_seed(0)
        return objective.sample(guides, shape, "flow_euler", 28, progress=False)

    def zero_star(k, c, u):
        got = oracle.cfg_zero_star(c.double().numpy(), u.double().numpy(), 4.0).astype(np.float32)
        return torch.from_numpy(got) if k else 0 * c

    torch.testing.assert_close(next(runs)["images"], by_hand(zero_star), rtol=1e-4, atol=1e-4)
    fading = by_hand(lambda k, c, u: c + 3 * 0.9**k * (c - u))
    torch.testing.assert_close(next(runs)["faded"], fading, rtol=1e-4, atol=1e-4)
    names = next(runs)
    assert abs(names["loss"].item() - np.log(3)) < 1  # it is not trained
    led = next(runs)["led"]
    torch.manual_seed(0)
    unled = objective.sample(network, shape, "ddim", 50, progress=False)
    more = [classifier(x, None).log_softmax(1)[range(4), given["wanted"]] for x in (led, unled)]
    assert bool((more[0] > more[1]).all())


def test_the_bound_of_the_document():
    x0 = torch.rand(4, 1, 8, 8) * 2 - 1
    layer = torch.nn.Conv2d(1, 2, 3, padding=1)
    (names,) = run_blocks("docs/likelihood.md", {"The variational bound": {"x0": x0, "network": lambda x, t: layer(x)}})
    assert names["losses"].shape == (4,) and layer.weight.grad.isfinite().all() and layer.weight.grad[1].any()
    assert int(names["resampler"].state_dict()["counts"].sum()) == 4


def test_the_terms_of_the_document():
    """Each block's loss is that of its parts."""
    vae, extractor, discriminator = (
        nn.Conv2d(4, 3, 1),
        nn.Conv2d(3, 5, 3),
        nn.Sequential(nn.Flatten(), nn.Linear(256, 1)),
    )
    vae.decode = vae.forward
    network, x0, captions = Network(), latents(), torch.randint(7, (4,))
    image_encoder, text_encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 6)), nn.Embedding(7, 6)
    given = dict(vae=vae, extractor=extractor, image_encoder=image_encoder, text_encoder=text_encoder, latents=x0)
    given |= dict(network=network, captions=captions, step=500, discriminator=discriminator)
    given |= dict(optimizer=torch.optim.SGD(network.parameters(), 0.1))
    runs = run_blocks("docs/features.md", {"Losses on the x0 estimate": given})

    def parts(names):
        """(the objective's loss, the x0 estimate, the signal-to-noise ratios)"""
        noised, objective = names["noised"], names["objective"]
        prediction = network.weight * noised.x_t
        return objective.loss(prediction, noised), objective.predict_x0(prediction, noised), noised.snr

    names = next(runs)
    assert network.weight.grad != 0 and vae.weight.grad is None and extractor.weight.grad is None
    (loss, x0_hat, snr), log = parts(names), names["log"]
    images, least = vae(x0_hat), snr.argsort(descending=True)[:2]
    each = names["features"].Perceptual(extractor)(images, vae(x0))
    perceptual = each[least][snr[least] >= 1].sum() / 4
    cosine = F.cosine_similarity(image_encoder(images), text_encoder(captions))
    expected = {"objective": loss, "perceptual": perceptual, "alignment": 1 - cosine.mean()}
    assert log == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5)
    assert names["loss"].item() == pytest.approx(
        (loss + 0.1 * perceptual + 500 / 20000 * expected["alignment"]).item(), rel=1e-5
    )
    names = next(runs)
    found = names["total"](network.weight * names["noised"].x_t, names["noised"])
    change = (x0_hat.mean((1, 2, 3)) - x0.mean((1, 2, 3))) ** 2
    assert found.item() == pytest.approx((loss + 0.5 * change.mean()).item(), rel=1e-5)
    before = copy.deepcopy(discriminator), copy.deepcopy(network)
    (names,) = runs
    network = before[1]
    loss, x0_hat, snr = parts(names)
    least = snr.argsort(descending=True)[:2]
    judged = x0_hat[least].detach()
    assert names["loss"].item() == pytest.approx((loss - 500 / 20000 * before[0](judged).sum() / 4).item(), rel=1e-5)
    expected = F.relu(1 - before[0](x0)).mean() + F.relu(1 + before[0](judged)).mean()
    assert names["values"]["discriminator"].item() == pytest.approx(expected.item(), rel=1e-5)
    weight = before[0][1].weight.detach()
    assert names["values"]["r1"].item() == pytest.approx(5 * weight.square().sum().item(), rel=1e-5)
    assert not torch.equal(weight, discriminator[1].weight)


def test_the_autoencoders_of_the_document():
    encoder, decoder = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)
    given = {"network": Network(), "moments": torch.randn(2, 8, 4, 4)}
    training = {"images": torch.rand(2, 1, 8, 8) * 2 - 1, "encoder": encoder, "decoder": decoder}
    runs = run_blocks(
        "docs/autoencoder.md", {"From moments to a noised batch": given, "Training an autoencoder": training}
    )
    assert next(runs)["noised"].x0.shape == (2, 4, 4, 4) and given["network"].weight.grad.isfinite()
    (names,) = runs
    assert encoder.weight.grad[2:].any() and decoder.weight.grad.any()
    parts = names["loss_of"].parts(decoder(names["moments"].chunk(2, 1)[0]), names["images"], names["moments"])
    assert parts.divergence >= 2 * 0.5 and names["loss_of"].log_variance.grad.isfinite()


def test_video():
    """Each block: the shift, a clean first frame, forcing with fused SNR, losses of the frames' images."""
    torch.manual_seed(0)
    network, latents = Network(), torch.randn(2, 4, 5, 8, 8)
    decoder, extractor = nn.Conv2d(4, 3, 1), nn.Conv2d(3, 2, 3)
    given = {"Training": {"network": lambda x, t: network(x, t), "latents": latents}}
    given["Losses of images on the frames"] = {"decoder": decoder, "extractor": extractor}
    runs = run_blocks("docs/video.md", given)
    first = next(runs)
    u = torch.from_numpy(oracle.quantile_logit_normal(oracle.uniform(0, 2, 3)).astype(np.float64))
    again = first["objective"].noise(latents, seed=0)
    torch.testing.assert_close(again.t, 3 * u / (1 + 2 * u))  # of 64 x 64 pixels, as at 480p
    assert network.weight.grad.isfinite()
    second = dict(next(runs))
    rest = (second["prediction"] - second["noised"].target)[:, :, 1:].square().mean()
    torch.testing.assert_close(second["loss"], rest)
    assert torch.equal(second["noised"].x_t[:, :, 0], latents[:, :, 0])
    third = dict(next(runs))
    assert third["noised"].t.unique().numel() == 10
    weight = first["video"].fused_snr(third["noised"])
    torch.testing.assert_close(
        third["loss"].double(), (weight * (third["prediction"] - third["noised"].target).double() ** 2).mean()
    )
    assert third["videos"].shape == latents.shape and torch.equal(third["videos"][:, :, :2], latents[:, :, :2])
    assert len(third["schedule"]) == 20 + 4 * 2 + 1
    (last,) = runs
    values = last["total"].values
    torch.testing.assert_close(last["loss"].detach(), values["objective"] + 0.1 * values["perceptual"])
    assert decoder.weight.grad is None and extractor.weight.grad is None


def test_every_block_is_one_that_runs():
    """In a document that has a test above, in test_recipes.py or in trainers/, or that has none."""
    found = {document: sum(1 for _ in blocks(document)) for document in DOCUMENTS}
    assert {name: number for name, number in found.items() if number} == {
        "README.md": 2,
        "docs/autoencoder.md": 2,
        "docs/data.md": 3,
        "docs/diffusers.md": 1,
        "docs/distributed.md": 8,
        "docs/features.md": 3,
        "docs/guidance.md": 6,
        "docs/likelihood.md": 1,
        "docs/migrating.md": 7,
        "docs/moments.md": 9,
        "docs/performance.md": 1,
        "docs/recipes.md": 18,
        "docs/trainers/ai_toolkit.md": 4,
        "docs/trainers/diffusion_pipe.md": 7,
        "docs/trainers/diffsynth.md": 3,
        "docs/trainers/diffusers.md": 11,
        "docs/trainers/dit_sit.md": 9,
        "docs/trainers/edm.md": 5,
        "docs/trainers/finetrainers.md": 3,
        "docs/trainers/flow_matching.md": 4,
        "docs/trainers/musubi_tuner.md": 3,
        "docs/trainers/onetrainer.md": 6,
        "docs/trainers/robot_policies.md": 7,
        "docs/trainers/sd_scripts.md": 7,
        "docs/trainers/simpletuner.md": 4,
        "docs/trainers/stable_audio_tools.md": 3,
        "docs/video.md": 4,
    }


def commands():
    """(words, whether it is shown to be typed or only named) of every command of fastdiff, make or bash."""
    found = []
    for document in DOCUMENTS if (ROOT / "docs").is_dir() else []:
        text = text_of(document)
        shown = re.findall(r"^    (?:\S+=\S+ )?((?:\.venv/bin/)?fastdiff .*|(?:make|bash) .*)$", text, re.M)
        named = re.findall(r"`(fastdiff [^`|]+|make [^`]+|bash [^`]+)`", text.replace("\n", " "))
        for typed, lines in ((True, shown), (False, named)):
            for line in lines:
                words = shlex.split(line, comments=True)
                found.append(pytest.param(words, typed, id=f"{document}: {' '.join(words)}"))
    return found


@pytest.mark.parametrize("words, typed", commands())
def test_command(words, typed):
    program, *arguments = words
    if program == "bash":
        assert (ROOT / arguments[0]).is_file()
        return
    if program == "make":
        variables = dict(word.split("=", 1) for word in arguments if "=" in word)
        targets = re.search(r"^\.PHONY: (.*)$", text_of("Makefile"), re.M)[1].split()
        (target,) = (word for word in arguments if "=" not in word)
        assert target in targets
        if target not in ("demo", "bench"):
            return
        arguments = [target, *shlex.split(variables.get("ARGS", ""))]
    if not typed and arguments[-1] == "--compare":  # it is named, without its files
        arguments += ["a.json", "b.json"]
    options = _parser().parse_args(arguments)
    if arguments[0] == "demo":
        given = {name: getattr(options, name) for name in ("process", "prediction", "weighting", "loss", "sampler")}
        build(resolve(given))
    if arguments[0] == "bench":
        assert options.preset in PRESETS


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links(document):
    """To files that are there, and headings that they have."""
    for target in re.findall(r"\]\(([^)]+)\)", text_of(document)):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        assert path.exists(), target
        headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M) if anchor else []
        anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in anchors, target


def test_the_notebook_runs(monkeypatch):
    """Its cells, with fewer steps of training; and it shows what they gave."""
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "show", lambda: None)
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    namespace = {}
    plt.switch_backend("Agg")
    for cell in cells:
        code = "".join(cell["source"]).replace("range(1500)", "range(100)")
        exec(compile(code, "quickstart.ipynb", "exec"), namespace)
    plt.close("all")
    assert namespace["samples"].shape == (32, 1, 8, 8) and namespace["samples"].isfinite().all()
    losses = namespace["losses"]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    assert any("image/png" in output.get("data", {}) for output in cells[-1]["outputs"])


def test_the_site_is_built_without_a_warning(tmp_path):
    """As ``make docs`` does; and the reference has every public name, with its docstring."""
    pytest.importorskip("sphinx")
    make = subprocess.run(
        ["make", "--no-print-directory", "-n", "docs"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    pages, site = tmp_path / "pages", tmp_path / "site"
    commands = (
        make[make.index("rm -rf build/pages") :].replace("build/pages", str(pages)).replace("build/site", str(site))
    )
    commands = commands.replace(".venv/bin/sphinx-build", f"{sys.executable} -m sphinx")
    done = subprocess.run(["sh", "-ec", commands], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (site / "docs" / "reference.html").read_text()
    modules = re.findall(r"automodule:: (\S+)", text_of("docs/reference.md"))
    integrations = [f"fastdiff.integrations.{m.name}" for m in pkgutil.iter_modules(integrated.__path__)]
    # What only the others use.
    assert set(integrations) - set(modules) == {f"fastdiff.integrations.{n}" for n in ("method_swap", "objects")}
    for name in modules:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            value = getattr(module, public)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert value.__doc__, f"{name}.{public} has no docstring"
                assert f'id="{name}.{public}"' in reference, f"{name}.{public}"
    if shutil.which("chromium"):
        nothing_is_cut_off(site, tmp_path / "user")


def nothing_is_cut_off(site, user):
    """In a browser, at 1280 and at 390 pixels: no page is wider than the screen, at 1280 no table than its page."""
    ask = """<script>onload = () => parent.postMessage([NUMBER, document.documentElement.scrollWidth,
        document.documentElement.clientWidth, ...[...document.querySelectorAll(".table-wrapper")]
        .map(w => w.scrollWidth - w.clientWidth)], "*")</script>"""
    pages = sorted(path for path in site.rglob("*.html") if path.name not in ("search.html", "outer.html"))
    frames = []
    for path in pages:
        for width in (1280, 390):
            inner = path.with_name(f"{path.stem}-{width}.html")
            inner.write_text(path.read_text().replace("</body>", ask.replace("NUMBER", str(len(frames))) + "</body>"))
            frames.append((inner.relative_to(site), width))
    (site / "outer.html").write_text(
        '<p id="found"></p><script>const all = []; onmessage = e => { all.push(e.data); '
        "found.textContent = JSON.stringify(all) }</script>"
        + "".join(
            f'<iframe src="{inner}" width="{width}" height="800" style="border: 0"></iframe>' for inner, width in frames
        )
    )
    line = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={user}"]
    line += ["--virtual-time-budget=20000", "--dump-dom", f"file://{site / 'outer.html'}"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=240)
    found = json.loads(re.search(r'<p id="found">(.+?)</p>', done.stdout)[1])
    assert len(found) == len(frames)
    for number, page, screen, *beyond in found:
        inner, width = frames[number]
        assert page <= screen <= width, f"{inner}: {page} pixels wide"
        assert width < 1280 or all(more <= 1 for more in beyond), f"{inner}: a table is {max(beyond)} pixels too wide"
