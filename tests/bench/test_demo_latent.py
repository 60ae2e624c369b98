"""The demo's diffusion in the latents of an autoencoder: the autoencoder, what is noised, what is drawn, the files."""

import json

import oracle
import pytest
import torch
import torch.nn.functional as F
from known import KnownNetwork

np = pytest.importorskip("numpy")
image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import fastdiff  # noqa: E402
from fastdiff.cli import main  # noqa: E402
from fastdiff.demo import DemoError, checkpoint, data, generate, latent, run, settings, terms, training  # noqa: E402

TINY = {"steps": 12, "batch": 8, "width": 8, "sample_steps": 3, "latent": True}
MACHINE = {"device": "cpu", "threads": 1, "torch": str(torch.__version__)}
COMMAND = ("--steps", "6", "--batch", "8", "--width", "8", "--sample-steps", "2", "--device", "cpu", "--threads", "1")


def make_trainer(resume=None, **given):
    chosen = settings.resolve(TINY | given)
    return training.Trainer(chosen, settings.build(chosen), data.digits(), torch.device("cpu"), MACHINE, resume)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished tiny run."""
    out = tmp_path_factory.mktemp("runs") / "latent"
    assert main(["demo", *COMMAND, "--latent", "--out", str(out)]) == 0
    return out


class TestAutoencoder:
    @pytest.fixture
    def made(self):
        torch.manual_seed(0)
        made = latent.Autoencoder(3).requires_grad_(False)
        made.shift.copy_(torch.linspace(-1, 1, latent.CHANNELS))
        made.scale.copy_(torch.linspace(0.5, 2, latent.CHANNELS))
        return made

    def test_latents_are_the_means_shifted_and_scaled(self, made):
        images = torch.randn(2, 3, 8, 12)
        mean = made.encoder(images)[:, : latent.CHANNELS]
        z = made.encode(images)
        assert z.shape == (2, latent.CHANNELS, 4, 6)
        for channel in range(latent.CHANNELS):
            expected = (mean[:, channel] - made.shift[channel]) * made.scale[channel]
            torch.testing.assert_close(z[:, channel], expected)
        decoded = made.decode(z)
        assert decoded.shape == images.shape
        torch.testing.assert_close(decoded, made.decoder(mean))

    def test_moments_in_parts_are_those_at_once(self, made, monkeypatch):
        images = torch.randn(5, 3, 8, 8)
        whole = made.moments(images)
        monkeypatch.setattr(latent, "AT_ONCE", 2)
        torch.testing.assert_close(made.moments(images), whole)
        assert whole.shape == (5, 2 * latent.CHANNELS, 4, 4) and torch.equal(whole, made.encoder(images))

    def test_report_is_its_formulas(self, made):
        images = torch.randn(5, 3, 8, 8)
        mean, v = made.encoder(images).double().chunk(2, 1)
        divergence = 0.5 * (mean**2 + v.exp() - 1 - v).sum((1, 2, 3)).mean()
        found = made.report(images)
        assert found["divergence"] == pytest.approx(divergence.item(), rel=1e-5)
        assert found["squared_error"] == pytest.approx(F.mse_loss(made.decode(made.encode(images)), images).item())
        assert found["parameters"] == sum(p.numel() for p in made.parameters())

    @pytest.mark.parametrize(("given", "deviation"), [({}, 1.0), ({"process": "edm"}, 0.5), ({"process": "flow"}, 1.0)])
    def test_training_places_the_latents(self, given, deviation):
        """At mean 0, at the deviation that the process reckons with."""
        trainer = make_trainer(**given)
        z = trainer.autoencoder.encode(trainer.images)
        torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(latent.CHANNELS), rtol=0, atol=1e-4)
        torch.testing.assert_close(z.std((0, 2, 3)), torch.full((latent.CHANNELS,), deviation), rtol=1e-3, atol=0)
        assert not any(p.requires_grad for p in trainer.autoencoder.parameters())

    def test_learns_to_reconstruct(self):
        """The mean digit has an error of 0.30 a pixel."""
        images = data.digits().images
        made = latent.train_autoencoder(settings.resolve({"steps": 150, "batch": 64, "latent": True}), images, 1.0)
        found = made.report(images)
        assert found["squared_error"] < 0.15 and 2 < found["divergence"] < 60

    def test_a_step_is_that_of_the_loss(self, monkeypatch):
        """The bound with a learned variance, of latents that are drawn with noise of a stream of its own."""
        given, real = [], fastdiff.AutoencoderLoss.forward

        def forward(self, decoded, images, moments):
            loss = real(self, decoded, images, moments)
            given.append((self, decoded.detach(), images, moments.detach(), loss.item()))
            return loss

        monkeypatch.setattr(fastdiff.AutoencoderLoss, "forward", forward)
        images = data.digits().images
        latent.train_autoencoder(settings.resolve(TINY | {"steps": 2}), images, 1.0)
        (loss_of, decoded, x, moments, loss), (_, _, other, *_) = given
        mean, v = moments.double().chunk(2, 1)
        error = (decoded.double() - x.double()).square().sum((1, 2, 3)).mean()
        divergence = (0.5 * (mean**2 + v.exp() - 1 - v)).mean(0).sum((1, 2)).clamp(min=0.5).sum()
        expected = (error + 64 * np.log(2 * np.pi)) / 2 + 0.1 * divergence  # the variance begins at 1
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert x.shape == (8, 1, 8, 8) and not torch.equal(x, other)
        assert loss_of.log_variance.item() != 0  # it is learned


class TestTraining:
    def test_what_is_noised(self):
        """Latents drawn from the moments, noised with the noise of their place in the run: by the formulas."""
        trainer, seen = make_trainer(seed=4), []
        trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append([value.clone() for value in inputs]))
        process = oracle.alpha_bar(oracle.betas_linear(1000))
        for step in range(2):
            loss = trainer.train_step()
            x_t, t, labels = seen.pop()
            index = training.batch_indices(1797, 8, step, 4)
            mean, v = trainer.autoencoder.encoder(trainer.images[index]).chunk(2, 1)
            xi, n = (
                fastdiff.ops.materialize(fastdiff.ops.Philox(4, 8 * step, stream), mean.shape, mean.device)
                for stream in (7, 0)
            )
            shift, scale = (each.view(-1, 1, 1) for each in (trainer.autoencoder.shift, trainer.autoencoder.scale))
            z = (mean + (v / 2).exp() * xi - shift) * scale
            alpha, sigma = (
                torch.from_numpy(np.asarray(each, np.float32)).view(8, 1, 1, 1)
                for each in oracle.vp_alpha_sigma(process, t.numpy())
            )
            torch.testing.assert_close(x_t, alpha * z + sigma * n, rtol=1e-4, atol=1e-5)
            if step == 0:  # the network begins with 0
                assert loss == pytest.approx(n.square().mean().item(), rel=1e-5)

    @pytest.mark.parametrize("names", [(), ("perceptual", "adversarial")])
    def test_resumed_is_uninterrupted_bit_for_bit(self, tmp_path, names):
        chosen = dict.fromkeys(names, True)
        whole = make_trainer(**chosen)
        for _ in range(12):
            whole.train_step()
        first = make_trainer(**chosen)
        for _ in range(7):
            first.train_step()
        checkpoint.save(first.checkpoint(), tmp_path / "c.pt")
        second = make_trainer(checkpoint.load(tmp_path / "c.pt"), **chosen)
        for _ in range(5):
            second.train_step()
        a, b = whole.checkpoint(), second.checkpoint()
        assert torch.equal(a.losses, b.losses)
        for one, two in ((a.model, b.model), (a.ema, b.ema), (a.autoencoder, b.autoencoder)):
            assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    def test_terms_look_at_what_is_decoded(self):
        """The perceptual term is that of decoded estimates beside the images themselves."""
        trainer, given = make_trainer(perceptual=True), []
        term = trainer.terms.sum.terms["perceptual"]
        real = type(term.loss).__call__

        def look(self, estimate, truth):
            given.append((estimate.detach(), truth))
            return real(self, estimate, truth)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(term.loss), "__call__", look)
            trainer.train_step()
        ((estimate, truth),) = given
        assert estimate.shape == truth.shape == (6, 1, 8, 8)  # three quarters of the batch
        index = training.batch_indices(len(trainer.images), 8, 0, 0)
        kept = [row for row in truth if row.any()]
        assert kept and all((row == trainer.images[index]).flatten(1).all(1).any() for row in kept)
        metrics = trainer.terms.measure(trainer.ema)
        assert set(metrics) == set(terms.WEIGHTS) and all(np.isfinite(value) for value in metrics.values())

    @pytest.mark.parametrize(
        "change",
        [
            lambda c: c.update(autoencoder={}),
            lambda c: c["autoencoder"].popitem(),
            lambda c: c["autoencoder"].update(shift=torch.zeros(99)),
            lambda c: c["data"].update(channels=3),
            lambda c: c["data"].update(channels="many"),
        ],
    )
    def test_made_up(self, tmp_path, change):
        trainer = make_trainer()
        checkpoint.save(trainer.checkpoint(), path := tmp_path / "c.pt")
        checkpoint.load(path)
        contents = torch.load(path)
        change(contents)
        torch.save(contents, path)
        with pytest.raises(DemoError, match="no checkpoint of this version"):
            checkpoint.load(path)


class TestDrawing:
    def test_what_is_drawn_is_decoded(self):
        """A network that says that every latent is 0.2 or -0.4, by class, which no clamp cuts: 3 stays 3."""
        torch.manual_seed(0)
        autoencoder = latent.Autoencoder(1).requires_grad_(False)
        network, labels = KnownNetwork([-0.4, 3.0, 0.1], latent.CHANNELS, 4), torch.tensor([1, 0])
        recipe = settings.build(settings.resolve({"prediction": "sample", "sampler": "ddim", "latent": True}))
        assert recipe.sampler.clip is None
        images = generate.draw(network, recipe, labels, 4, 1.0, 0, autoencoder=autoencoder, progress=False)
        z = torch.tensor([3.0, -0.4]).view(2, 1, 1, 1).expand(2, latent.CHANNELS, 4, 4)
        torch.testing.assert_close(images, autoencoder.decode(z).clamp(-1, 1), rtol=1e-4, atol=1e-5)
        _, seen, estimates = generate.trajectory(network, recipe, labels, 4, 1.0, 0, autoencoder=autoencoder)
        assert seen.shape == estimates.shape == (4, 2, 1, 8, 8)
        torch.testing.assert_close(estimates[0], autoencoder.decode(z), rtol=1e-4, atol=1e-4)

    def test_report(self, finished):
        report = json.loads((finished / "report.json").read_text())
        state = checkpoint.load(finished / "checkpoint.pt")
        autoencoder = state.autoencoder_network(torch.device("cpu"))
        found = autoencoder.report(data.digits().images)
        assert report["autoencoder"] == {name: pytest.approx(value, rel=1e-5) for name, value in found.items()}
        assert report["settings"]["latent"] and report["terms"] is None and 0 <= report["digit_accuracy"] <= 1
        recipe, labels = settings.build(state.settings), torch.arange(10).repeat_interleave(50)
        network = state.ema_network(torch.device("cpu"))
        images = generate.draw(network, recipe, labels, 2, 1.5, 0, autoencoder=autoencoder, progress=False)
        assert run._sha256(images) == report["samples_sha256"]

    def test_sample(self, finished, tmp_path, monkeypatch):
        """The command draws decoded images, with a sampler that clamps no latents."""
        drawn, real = [], generate.draw

        def draw(*given, **named):
            drawn.append((given[1], named["autoencoder"], real(*given, **named)))
            return drawn[-1][2]

        monkeypatch.setattr(run.generate, "draw", draw)
        for name in ((), ("--sampler", "ddim")):
            command = ["sample", "--checkpoint", str(finished), "--count", "3", "--out", str(tmp_path / "a.png")]
            assert main([*command, *name, "--overwrite"]) == 0
        for recipe, autoencoder, images in drawn:
            assert recipe.sampler.clip is None and images.shape == (3, 1, 8, 8)
            assert torch.equal(autoencoder.shift, checkpoint.find(finished).autoencoder["shift"])
        assert (tmp_path / "a.png").exists()

    def test_the_training_of_the_autoencoder_is_announced(self, tmp_path, capsys):
        """Once: a run that goes on has it in its checkpoint."""
        for more, times in (((), 1), (("--resume",), 0)):
            assert main(["demo", *COMMAND, "--latent", "--out", str(tmp_path), *more]) == 0
            said = capsys.readouterr().out
            assert said.count("training the autoencoder first: 6 steps") == times
            assert "squared error" in said and "vp-linear" in said

    def test_bits_are_refused(self, finished, tmp_path, capsys):
        assert main(["bits", "--checkpoint", str(finished), "--out", str(tmp_path / "b.png")]) == 2
        assert "is of a diffusion in latents" in capsys.readouterr().err
        assert not (tmp_path / "b.png").exists()

    def test_sizes(self, tmp_path, capsys):
        for name in "ab":
            (tmp_path / name).mkdir()
            image.new("RGB", (20, 10), "red").save(tmp_path / name / "x.png")
        command = ["demo", *COMMAND, "--data", str(tmp_path), "--latent", "--out", str(tmp_path / "out")]
        assert main([*command, "--size", "9"]) == 2
        assert "--latent needs a --size that is a multiple of 2; got 9." in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        assert main([*command, "--size", "10"]) == 0
        network = checkpoint.load(tmp_path / "out" / "checkpoint.pt").network
        assert (network["channels"], network["size"]) == (latent.CHANNELS, 5)
