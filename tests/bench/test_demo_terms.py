"""The demo's terms of the x0 estimate: what they look through, their values and gradients, their part of a run."""

import dataclasses
import json
import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from known import KnownNetwork

np = pytest.importorskip("numpy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import fastdiff  # noqa: E402
from fastdiff.cli import main  # noqa: E402
from fastdiff.demo import DemoError, checkpoint, data, extractors, plots, settings, terms, training  # noqa: E402

NAMES = ("perceptual", "adversarial", "align", "classifier")
TINY = {"steps": 12, "batch": 8, "width": 8, "sample_steps": 3}
MACHINE = {"device": "cpu", "threads": 1, "torch": str(torch.__version__)}


def resolved(*names, **given):
    return settings.resolve(TINY | dict.fromkeys(names, True) | given)


def make_terms(*names, **given):
    """Terms with networks that are hardly trained."""
    chosen = resolved(*names, **given)
    learned, held_out = terms.split(data.digits())
    return terms.Terms(chosen, settings.build(chosen).objective, learned, held_out, names)


def make_trainer(*names, resume=None, **given):
    chosen = resolved(*names, **given)
    recipe = settings.build(chosen)
    return training.Trainer(chosen, recipe, data.digits(), torch.device("cpu"), MACHINE, resume)


def lpips(extractor, layers, a, b):
    """Zhang et al. 2018, equation 1, with weights 1, of the features that are the outputs of these layers."""
    total = 0
    for number, module in enumerate(extractor):
        a, b = module(a), module(b)
        if number in layers:
            unit = [x / x.norm(dim=1, keepdim=True) for x in (a, b)]
            total = total + (unit[0] - unit[1]).square().sum(1).mean((1, 2))
    return total


class TestExtractors:
    @pytest.mark.parametrize(
        ("size", "places"), [(4, [4]), (5, [5, 3]), (8, [8, 4]), (9, [9, 5, 3]), (32, [32, 16, 8, 4])]
    )
    def test_features_halve_until_they_are_coarse(self, size, places):
        made = extractors.Extractors(3, size, 5)
        x, found = torch.randn(2, 3, size, size), []
        for number, module in enumerate(made.classifier):
            x = module(x)
            if number in made.layers:
                assert isinstance(module, torch.nn.LeakyReLU)
                found.append(x.shape)
        assert [shape[-1] for shape in found] == places and x.shape == (2, 5)
        assert [shape[1] for shape in found] == [16] + [32] * (len(places) - 1)
        images = torch.randn(2, 3, size, size)
        assert made.image_encoder(images).shape == made.label_encoder(torch.tensor([4, 0])).shape == (2, 16)
        assert extractors.discriminator(3, size)(images).shape == (2, 1)

    def test_loss_is_its_formula(self):
        """Cross-entropy of the logits, and of the cosines between an image and each label over 0.1."""
        made = extractors.Extractors(1, 8, 4)
        images, labels = torch.randn(3, 1, 8, 8), torch.tensor([2, 0, 2])
        logits = made.classifier(images).detach().double().numpy()
        image, label = made.image_encoder(images).detach().double(), made.label_encoder.weight.detach().double()
        cosines = (image @ label.T / image.norm(dim=1)[:, None] / label.norm(dim=1)).numpy() / 0.1
        expected = 0
        for each in (logits, cosines):
            p = np.exp(each) / np.exp(each).sum(1, keepdims=True)
            expected -= np.log(p[np.arange(3), labels]).mean()
        assert made.loss(images, labels).item() == pytest.approx(expected, rel=1e-5)

    def test_what_they_learn(self):
        """In 150 steps, of the half that each sees, to tell unseen digits apart by logits and by cosines."""
        learned, held_out = terms.split(data.digits())
        torch.manual_seed(0)
        made = extractors.Extractors(1, 8, 10)
        generator = torch.Generator().manual_seed(0)
        extractors.train_extractors(made, learned.images[::2], learned.labels[::2], 150, generator)
        cosines = F.normalize(made.image_encoder(held_out.images)) @ F.normalize(made.label_encoder.weight).T
        for scores in (made.classifier(held_out.images), cosines):
            assert (scores.argmax(1) == held_out.labels).float().mean() > 0.85

    def test_training_is_as_long_as_the_run_and_300_steps_at_most(self, monkeypatch):
        made, seen = extractors.Extractors(1, 8, 2), []
        real = made.loss
        monkeypatch.setattr(made, "loss", lambda images, labels: (seen.append(len(images)), real(images, labels))[1])
        monkeypatch.setattr(extractors, "STEPS", 5)
        images, labels = torch.randn(9, 1, 8, 8), torch.arange(9) % 2
        for steps, expected in ((3, 3), (7, 5)):
            seen.clear()
            extractors.train_extractors(made, images, labels, steps, torch.Generator())
            assert seen == [128] * expected

    def test_frechet_distance(self):
        """Of normal distributions: (m1 - m2)^2 + (s1 - s2)^2 in one dimension; in several, by SciPy's root."""
        linalg = pytest.importorskip("scipy.linalg")
        a, b = torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[1.0], [7.0]])  # deviations 2 and 18 ** 0.5
        assert extractors.frechet_distance(a, b).item() == pytest.approx(4 + (2 - 18**0.5) ** 2)
        a, b = torch.randn(50, 5), torch.randn(40, 5) @ torch.randn(5, 5) + 1
        covariances = [np.cov(x.numpy().astype(np.float64), rowvar=False) for x in (a, b)]
        expected = ((a.double().mean(0) - b.double().mean(0)) ** 2).sum().item()
        expected += np.trace(sum(covariances) - 2 * linalg.sqrtm(covariances[0] @ covariances[1]).real)
        assert extractors.frechet_distance(a, b).item() == pytest.approx(expected, rel=1e-6)
        assert extractors.frechet_distance(a, a).item() == pytest.approx(0, abs=1e-6)


class TestTerms:
    def test_every_eighth_image_is_held_out(self):
        images = data.ImageData(torch.arange(18.0).view(18, 1, 1, 1), torch.arange(18) % 3, ["a", "b", "c"])
        learned, held_out = terms.split(images)
        assert held_out.images.flatten().tolist() == [0, 8, 16] and held_out.labels.tolist() == [0, 2, 1]
        assert learned.images.flatten().tolist() == [k for k in range(18) if k % 8]
        assert learned.labels.tolist() == [k % 3 for k in range(18) if k % 8]
        assert learned.class_names == held_out.class_names == ["a", "b", "c"]

    def test_what_looks_and_what_measures_have_seen_other_images_and_begin_otherwise(self, monkeypatch):
        seen = []
        monkeypatch.setattr(terms, "train_extractors", lambda *given: seen.append(given))
        made = make_terms(*NAMES, seed=5)
        learned = terms.split(data.digits())[0]
        for half, (name, given) in enumerate(zip(("looking", "measuring"), seen, strict=True)):
            network, images, labels, steps, generator = given
            assert network is made.networks[name] and steps == 12
            assert torch.equal(images, learned.images[half::2]) and torch.equal(labels, learned.labels[half::2])
        assert seen[0][4].initial_seed() != seen[1][4].initial_seed()
        assert not torch.equal(*(given[0].label_encoder.weight for given in seen))
        assert [p.requires_grad for p in made.networks.parameters()] == [
            name.startswith("discriminator") for name, _ in made.networks.named_parameters()
        ]

    @pytest.mark.parametrize("names", [*((name,) for name in NAMES), NAMES, ()])
    @pytest.mark.parametrize("step", [2, 3])
    def test_loss_and_values(self, names, step):
        """Against the formulas, on the same networks: the mean squared error, and of the least noisy samples, down to
        SNR 0.05, each term; the adversarial one, of half of them, from a quarter of the run on."""
        made = make_terms(*names)
        learned = terms.split(data.digits())[0]
        images, labels = learned.images[:8], learned.labels[:8]
        t = torch.tensor([700, 10, 400, 100, 560, 250, 540, 999])
        noised = made.objective.noise(images, t, seed=1)
        output = torch.randn(8, 1, 8, 8, requires_grad=True)
        loss = made.loss(output, noised, images, labels, step)
        (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)

        alpha, sigma = (
            torch.from_numpy(np.asarray(x, np.float64)).view(8, 1, 1, 1).float()
            for x in oracle.vp_alpha_sigma(oracle.alpha_bar(oracle.betas_linear(1000)), t.numpy())
        )
        x0_hat = (noised.x_t - sigma * output) / alpha
        snr = (alpha / sigma).flatten() ** 2
        kept = (snr >= 0.05).float()  # all but 700, 560 and 999
        assert kept.tolist() == [0, 1, 1, 1, 0, 1, 1, 0]
        looking = made.networks["looking"]
        logits = looking.classifier(x0_hat)
        cosine = F.cosine_similarity(looking.image_encoder(x0_hat), looking.label_encoder(labels))
        half = t.argsort()[:4]
        values = {
            "objective": F.mse_loss(output, noised.noise),
            "perceptual": (kept * lpips(looking.classifier, looking.layers, x0_hat, images)).sum() / 8,
            "adversarial": -made.networks["discriminator"](x0_hat[half]).sum() / 8,
            "align": (kept * (1 - cosine)).sum() / 8,
            "classifier": (kept * F.cross_entropy(logits, labels, reduction="none")).sum() / 8,
        }
        weights = {"perceptual": 0.3, "adversarial": 0.01, "align": 0.1, "classifier": 0.05}
        counted = [name for name in names if name != "adversarial" or step == 3]
        expected = values["objective"] + sum(weights[name] * values[name] for name in counted)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
        (known,) = torch.autograd.grad(expected, output)
        torch.testing.assert_close(gradient, known, rtol=1e-3, atol=1e-6)

        judge = made.networks["discriminator"]
        hinge = F.relu(1 - judge(images)).mean() + F.relu(1 + judge(x0_hat[half].detach())).mean()
        loss.backward()
        assert all(p.grad is None for p in made.networks.parameters())
        before = {name: value.clone() for name, value in made.networks.state_dict().items()}
        found = dict(zip(made.logged, made.after(images), strict=True))
        assert list(found) == ["objective", *names, *["discriminator"] * ("adversarial" in names)]
        for name, value in found.items():
            if name in ("objective", *counted):
                torch.testing.assert_close(value, values[name].detach(), rtol=1e-4, atol=1e-6)
            elif name == "discriminator" and step == 3:
                torch.testing.assert_close(value, hinge.detach())
            else:
                assert value.isnan()
        changed = {
            name.split(".")[0] for name, v in made.networks.state_dict().items() if not torch.equal(v, before[name])
        }
        assert changed == ({"discriminator"} if "adversarial" in counted else set())

    def test_what_is_logged_stays_on_the_device(self, monkeypatch):
        """No number is made of a value until it is read. (Of Adam's step counter one is made, on a CPU.)"""
        names = ("perceptual", "align", "classifier")
        made = make_terms(*names)
        learned = terms.split(data.digits())[0]
        noised = made.objective.noise(learned.images[:8], seed=1)
        loss = made.loss(torch.randn(8, 1, 8, 8), noised, learned.images[:8], learned.labels[:8], 5)
        for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
            monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"Tensor.{name} waits"))
        values = made.after(learned.images[:8])
        monkeypatch.undo()
        assert loss.item() == pytest.approx(sum(w * v for w, v in zip((1, 0.3, 0.1, 0.05), values.tolist())), rel=1e-5)

    def test_the_penalty_of_the_discriminator_is_in_every_eighth_step(self):
        made = make_terms("adversarial")
        images = terms.split(data.digits())[0].images[:8]
        found = [made.critic.step(images, torch.zeros_like(images)) for _ in range(10)]
        assert ["r1" in each for each in found] == [k % 8 == 0 for k in range(10)]
        assert made.critic.r1_gamma == 1.0 and made.critic.kind == "hinge"

    @pytest.mark.parametrize("process", settings.PROCESSES)
    def test_the_time_of_a_signal_to_noise_ratio(self, process):
        made = settings.build(settings.resolve({"process": process})).process
        for snr in (0.1, 1.0):
            t = terms.time_of_snr(made, snr)
            made.check_t(t)
            assert made.levels(t).snr.item() == pytest.approx(snr, rel=0.05)

    def test_measures_are_their_formulas(self):
        """Of a network that says that x0 is one gray for each class, of noise that is there once."""
        made = make_terms(prediction="sample")
        network = KnownNetwork(torch.linspace(-1, 1, 11).tolist())
        found = made.measure(network)
        _, held_out = terms.split(data.digits())
        ((x_t, t, labels),) = network.calls
        assert torch.equal(labels, held_out.labels) and len(labels) == 225 and len(t.unique()) == 1
        alpha, sigma = oracle.vp_alpha_sigma(oracle.alpha_bar(oracle.betas_linear(1000)), t[:1].numpy())
        assert (alpha / sigma) ** 2 == pytest.approx(0.1, rel=0.02)
        noise = (x_t - float(alpha[0]) * held_out.images) / float(sigma[0])
        assert noise.mean().item() == pytest.approx(0, abs=0.05) and noise.std().item() == pytest.approx(1, abs=0.05)
        estimates = network.values[labels].view(-1, 1, 1, 1).expand(-1, 1, 8, 8).detach()
        by = made.networks["measuring"]
        cosine = F.cosine_similarity(by.image_encoder(estimates), by.label_encoder(labels))
        hidden = [by.classifier[:-1](x) for x in (estimates, held_out.images)]
        assert hidden[0].shape == (225, 32)
        expected = {
            "perceptual": lpips(by.classifier, by.layers, estimates, held_out.images).mean(),
            "adversarial": extractors.frechet_distance(*hidden),
            "align": 1 - cosine.mean(),
            "classifier": F.cross_entropy(by.classifier(estimates), labels),
        }
        assert found == {name: pytest.approx(value.item(), rel=1e-4) for name, value in expected.items()}
        assert made.measure(network) == found

    def test_the_true_digits_are_the_best_estimates(self):
        made = make_terms(prediction="sample", steps=100)
        _, held_out = terms.split(data.digits())

        def truth(x, t, labels):
            return held_out.images

        noise = torch.randn(held_out.images.shape)
        best, noisy = made.measure(truth), made.measure(lambda x, t, labels: held_out.images + 0.7 * noise)
        assert best["perceptual"] == pytest.approx(0, abs=1e-6) and best["adversarial"] == pytest.approx(0, abs=1e-3)
        assert all(best[name] < noisy[name] for name in NAMES)


def test_report():
    """Means over twentieths of the training, without what was not computed; None where nothing was."""
    values = torch.arange(80.0)
    late = torch.where(values < 6, math.nan, values)
    found = terms.report({"objective": values, "align": late}, {"align": 0.25, "classifier": 9.0})
    assert list(found) == ["objective", "align"]
    assert found["objective"] == {"values": [4 * k + 1.5 for k in range(20)]}
    assert found["align"] == {
        "values": [None, 6.5, *[4 * k + 1.5 for k in range(2, 20)]],
        "weight": 0.1,
        "metric": 0.25,
    }
    assert terms.report({"objective": values[:3]}, {})["objective"]["values"] == [0.0, 1.0, 2.0]
    assert terms.said("objective", found["objective"]) == "1.5000 at first, 77.5000 over the last steps"
    said = terms.said("align", found["align"])
    assert said == "6.5000 at first, 77.5000 over the last steps; 1 - cosine of held-out images 0.2500"
    nothing = terms.report({"adversarial": torch.tensor([math.nan])}, {"adversarial": 1.5})["adversarial"]
    assert terms.said("adversarial", nothing) == "not computed; Frechet distance of held-out images 1.5000"


class TestTraining:
    def test_each_term_changes_what_is_learned(self):
        """From the same weights, images, times and noise."""
        weights = []
        for names in (*((name,) for name in NAMES), NAMES):
            trainer = make_trainer(*names)
            assert len(trainer.images) == 1797 - 225
            for _ in range(6):
                trainer.train_step()
            weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        for k, a in enumerate(weights):
            assert a.isfinite().all() and not any(torch.equal(a, b) for b in weights[k + 1 :])

    @pytest.mark.parametrize("process", settings.PROCESSES)
    def test_every_process_has_them(self, process):
        trainer = make_trainer(*NAMES, process=process, steps=4)
        losses = [trainer.train_step() for _ in range(4)]
        assert all(math.isfinite(loss) for loss in losses) and trainer.term_values[:, 1:].isfinite().all()
        assert all(math.isfinite(value) for value in trainer.terms.measure(trainer.ema).values())

    def test_a_term_lowers_its_value(self):
        values = [{}, {}]
        for weight, found in zip((0.0, 2.0), values):
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(terms.WEIGHTS, "classifier", weight)
                trainer = make_trainer("classifier", steps=60, batch=32)
                for _ in range(60):
                    trainer.train_step()
            found |= trainer.terms.measure(trainer.model)
        assert values[1]["classifier"] < 0.8 * values[0]["classifier"]

    def test_resumed_is_uninterrupted_bit_for_bit(self, tmp_path):
        whole = make_trainer(*NAMES)
        for _ in range(12):
            whole.train_step()
        for cut in (0, 7, 12):
            first = make_trainer(*NAMES)
            for _ in range(cut):
                first.train_step()
            checkpoint.save(first.checkpoint(), tmp_path / "c.pt")
            second = make_trainer(*NAMES, resume=checkpoint.load(tmp_path / "c.pt"))
            for _ in range(12 - cut):
                second.train_step()
            a, b = whole.checkpoint(), second.checkpoint()
            for part in (*("model", "ema"), *(("networks", "values"))):
                one, two = (getattr(x, part, None) or x.terms[part] for x in (a, b))
                assert one.keys() == two.keys()
                for name in one:
                    torch.testing.assert_close(one[name], two[name], rtol=0, atol=0, equal_nan=True)
            assert a.terms["critic_steps"] == b.terms["critic_steps"] == 9 and torch.equal(a.losses, b.losses)

    def test_checkpoints_without_terms_have_none(self):
        state = make_trainer().checkpoint()
        assert state.terms == {} and state.autoencoder == {}

    @pytest.mark.parametrize(
        "change",
        [
            lambda c: c["terms"].pop("networks"),
            lambda c: c["terms"]["networks"].popitem(),
            lambda c: c["terms"]["values"].pop("align"),
            lambda c: c["terms"]["values"].update(align=torch.zeros(9)),
            lambda c: c["settings"].update(align=1),
            lambda c: c["settings"].update(classifier=True),
            lambda c: c.update(terms={}),
        ],
    )
    def test_made_up(self, tmp_path, change):
        trainer = make_trainer("align")
        trainer.train_step()
        checkpoint.save(trainer.checkpoint(), path := tmp_path / "c.pt")
        checkpoint.load(path)
        contents = torch.load(path)
        change(contents)
        torch.save(contents, path)
        with pytest.raises(DemoError, match="no checkpoint of this version"):
            checkpoint.load(path)


class TestRun:
    COMMAND = (
        "--steps",
        "6",
        "--batch",
        "8",
        "--width",
        "8",
        "--sample-steps",
        "2",
        "--device",
        "cpu",
        "--threads",
        "1",
    )

    def test_report_and_files(self, tmp_path, capsys):
        out = tmp_path / "run"
        assert main(["demo", *self.COMMAND, *(f"--{name}" for name in NAMES), "--out", str(out)]) == 0
        report = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)
        state = checkpoint.load(out / "checkpoint.pt")
        found = report["terms"]
        assert list(found) == ["objective", *NAMES, "discriminator"]
        for name, values in state.terms["values"].items():
            kept = [None if math.isnan(value) else value for value in values.tolist()]
            assert found[name]["values"] == kept and (None in kept) == (name in ("adversarial", "discriminator"))
        learned, held_out = terms.split(data.digits())
        objective = settings.build(state.settings).objective
        again = terms.Terms(state.settings, objective, learned, held_out, NAMES, None, state.terms)
        metrics = again.measure(state.ema_network(torch.device("cpu")))
        for name in NAMES:
            assert found[name]["metric"] == pytest.approx(metrics[name], rel=1e-6)
            assert found[name]["weight"] == terms.WEIGHTS[name]
        # The loss of a step is the sum.
        values = {name: each[-1].item() for name, each in state.terms["values"].items()}
        total = values["objective"] + sum(terms.WEIGHTS[name] * values[name] for name in NAMES)
        assert report["loss_last"] == pytest.approx(total, rel=1e-5)
        output = capsys.readouterr().out
        assert "loss: perceptual" in output and "Frechet distance of held-out images" in output

    def test_without_terms_there_are_none(self, tmp_path):
        assert main(["demo", *self.COMMAND, "--out", str(tmp_path)]) == 0
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["terms"] is None and report["autoencoder"] is None

    @pytest.mark.parametrize("name", NAMES)
    def test_images_that_cannot_have_it(self, tmp_path, capsys, name):
        image = pytest.importorskip("PIL.Image")
        (tmp_path / "in").mkdir()
        for number in range(32):
            image.new("L", (8, 8), 7 * number).save(tmp_path / "in" / f"{number:02}.png")
        command = ["demo", *self.COMMAND, "--data", str(tmp_path / "in"), "--size", "8", f"--{name}"]
        if name == "adversarial":
            assert main([*command, "--gray", "--out", str(tmp_path / "out")]) == 0
        else:
            assert main([*command, "--out", str(tmp_path / "out")]) == 2
            assert f"--{name} needs images of at least two classes" in capsys.readouterr().err
            assert not (tmp_path / "out").exists()
        (tmp_path / "in" / "31.png").unlink()
        assert main([*command, "--out", str(tmp_path / "few")]) == 2
        assert f"--{name} needs at least 32 images; there are 31." in capsys.readouterr().err

    def test_resuming_with_others_is_refused(self, tmp_path, capsys):
        assert main(["demo", *self.COMMAND, "--align", "--out", str(tmp_path)]) == 0
        assert main(["demo", "--align", "--perceptual", "--resume", "--out", str(tmp_path)]) == 2
        assert "--perceptual True (the checkpoint has False)" in capsys.readouterr().err


def test_the_plot_shows_each_term(monkeypatch):
    """Where it was computed, as means of a fortieth of the run (at least two steps) in their middle."""
    figures = []
    monkeypatch.setattr(plots, "_write", lambda figure, path: figures.append(figure))
    losses, time_loss = torch.linspace(3.0, 1.0, 80, dtype=torch.float64), torch.ones(2, 4, 5)
    rising = torch.linspace(1.0, 2.0, 80)
    values = {
        "objective": rising,
        "adversarial": torch.where(torch.arange(80) < 20, math.nan, -rising),
        "align": torch.full((80,), math.nan),
    }
    process = fastdiff.VariancePreserving()
    plots.loss_plot("", losses, time_loss, process, "title", values)
    plots.loss_plot("", losses, time_loss, process, "title", {"objective": rising})
    (*_, axes), (*_, positive) = (figure.axes for figure in figures)
    assert [len(figure.axes) for figure in figures] == [3, 3]
    first, second = axes.lines
    assert (first.get_label(), second.get_label()) == ("objective", "adversarial")
    assert first.get_xdata().tolist() == [k + 1.5 for k in range(79)]
    np.testing.assert_allclose(first.get_ydata(), (rising[1:] + rising[:-1]) / 2)
    assert second.get_xdata().tolist() == [k + 1.5 for k in range(20, 79)]
    np.testing.assert_allclose(second.get_ydata(), -(rising[21:] + rising[20:-1]) / 2)
    assert (axes.get_yscale(), positive.get_yscale()) == ("linear", "log")
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == (
        "Terms of the loss", "training step", "value, without its weight",
    )  # fmt: skip
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["objective", "adversarial"]
    assert figures[0].get_size_inches().tolist() == [15.0, 4.7]


def test_settings_say_which_terms():
    for name in NAMES:
        assert terms.chosen(resolved(name)) == (name,)
    assert terms.chosen(resolved(*NAMES)) == NAMES and terms.chosen(resolved("latent")) == ()
    assert {field.name for field in dataclasses.fields(settings.Settings)} > {*NAMES, "latent"}
