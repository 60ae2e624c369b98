"""The demo's parts: files, checkpoints, images, network, settings, and resuming to the same bits."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import fastdiff  # noqa: E402
from fastdiff.demo import DemoError, checkpoint, data, extras, settings, training  # noqa: E402
from fastdiff.demo.classifier import train_classifier  # noqa: E402
from fastdiff.demo.generate import draw, trajectory  # noqa: E402
from fastdiff.demo.unet import UNet  # noqa: E402
from fastdiff.files import remove_leftovers, write_atomically  # noqa: E402

TINY = {"steps": 12, "batch": 8, "width": 8, "sample_steps": 3}
MACHINE = {"device": "cpu", "threads": 1, "torch": str(torch.__version__)}


def make_trainer(resume=None, **given):
    chosen = settings.resolve(TINY | given)
    return training.Trainer(chosen, settings.build(chosen), data.digits(), torch.device("cpu"), MACHINE, resume)


def assert_same(a, b):
    """Equal to the bit, through nested containers."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_run(a, b):
    for name in ("step", "model", "ema", "optimizer", "losses", "time_loss", "settings", "data"):
        assert_same(getattr(a, name), getattr(b, name))


class TestFiles:
    def test_writes(self, tmp_path):
        path = tmp_path / "a.txt"
        for content in (b"one", b"two"):
            write_atomically(path, lambda file, content=content: file.write(content))
            assert path.read_bytes() == content
        assert os.listdir(tmp_path) == ["a.txt"]

    @pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
    def test_failing_writer_leaves_the_old_file(self, tmp_path, error):
        path = tmp_path / "a.txt"
        path.write_bytes(b"old")

        def fail(file):
            file.write(b"half of the n")
            raise error

        with pytest.raises(type(error)):
            write_atomically(path, fail)
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["a.txt"]

    def test_leftovers_of_killed_writers_are_removed(self, tmp_path):
        for name in ("a.txt", ".a.txt.123.tmp", ".b.txt.123.tmp"):
            (tmp_path / name).touch()
        remove_leftovers(tmp_path / "a.txt")
        assert sorted(os.listdir(tmp_path)) == [".b.txt.123.tmp", "a.txt"]


class TestCheckpoint:
    @pytest.fixture
    def path(self, tmp_path):
        trainer = make_trainer()
        trainer.train_step()
        self.saved = trainer.checkpoint()
        checkpoint.save(self.saved, tmp_path / "c.pt")
        return tmp_path / "c.pt"

    def test_round_trip(self, path):
        loaded = checkpoint.load(path)
        for field in dataclasses.fields(loaded):
            assert_same(
                *(
                    dict(v) if isinstance(v, dict) else v
                    for v in (getattr(self.saved, field.name), getattr(loaded, field.name))
                )
            )

    @pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99, 0.9999])
    def test_truncated(self, path, part):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(DemoError, match=r"c\.pt is truncated, damaged or no checkpoint"):
            checkpoint.load(path)

    def test_flipped_bit(self, path):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(DemoError, match="damaged"):
            checkpoint.load(path)

    @pytest.mark.parametrize("content", [{"a": 1}, torch.zeros(3), {"format": checkpoint.FORMAT, "settings": {}}])
    def test_foreign_file(self, tmp_path, content):
        torch.save(content, tmp_path / "c.pt")
        with pytest.raises(DemoError, match="no checkpoint of this version"):
            checkpoint.load(tmp_path / "c.pt")

    def test_code_is_not_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "made"),)

        torch.save({"format": checkpoint.FORMAT, "settings": Evil()}, tmp_path / "c.pt")
        with pytest.raises(DemoError, match="no checkpoint"):
            checkpoint.load(tmp_path / "c.pt")
        assert not (tmp_path / "made").exists()

    def test_missing(self, tmp_path):
        with pytest.raises(DemoError, match="there is no checkpoint"):
            checkpoint.load(tmp_path / "c.pt")


class TestImages:
    def test_digits(self):
        digits = data.digits()
        assert digits.images.shape == (1797, 1, 8, 8) and digits.labels.shape == (1797,)
        assert digits.images.min() == -1 and digits.images.max() == 1
        assert digits.class_names == [str(i) for i in range(10)]
        assert digits.fingerprint() == data.digits().fingerprint()

    def test_empty_folder(self, tmp_path):
        (tmp_path / "notes.txt").touch()
        with pytest.raises(DemoError, match="holds no PNG or JPEG images"):
            data.folder(tmp_path, 8, False)

    def test_not_a_folder(self, tmp_path):
        with pytest.raises(DemoError, match="not a folder"):
            data.folder(tmp_path / "nowhere", 8, False)

    @pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n and no more"])
    def test_unreadable_image_is_named(self, tmp_path, content):
        Image.new("L", (9, 9)).save(tmp_path / "good.png")
        (tmp_path / "zbad.png").write_bytes(content)
        with pytest.raises(DemoError, match=r"cannot read the image .*zbad\.png"):
            data.folder(tmp_path, 8, False)

    def test_truncated_image_is_named(self, tmp_path):
        path = tmp_path / "half.jpg"
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(DemoError, match=r"half\.jpg"):
            data.folder(tmp_path, 8, False)

    @pytest.mark.parametrize("gray", [False, True])
    def test_odd_modes_and_sizes(self, tmp_path, gray):
        """A plane of value 51 of 255, in every mode that PNG and JPEG have, is 51 / 127.5 - 1 = -0.6."""
        value = 51
        plane = Image.new("L", (13, 7), value)
        plane.save(tmp_path / "l.png")
        plane.convert("LA").save(tmp_path / "la.png")
        plane.convert("RGB").resize((1, 1)).save(tmp_path / "rgb.PNG")
        plane.convert("RGBA").resize((40, 3)).save(tmp_path / "rgba.png")
        plane.convert("P").save(tmp_path / "palette.png")
        plane.save(tmp_path / "l.jpg", quality=95)
        plane.convert("CMYK").save(tmp_path / "cmyk.jpeg", quality=95)
        Image.fromarray(np.full((5, 6), value * 257, np.uint16)).save(tmp_path / "sixteen.png")
        folder = data.folder(tmp_path, 8, gray)
        assert folder.images.shape == (8, 1 if gray else 3, 8, 8)
        assert folder.images.dtype == torch.float32
        assert (folder.images + 0.6).abs().max() < 0.02
        assert folder.class_names == [tmp_path.name]

    def test_one_bit_and_transparent(self, tmp_path):
        Image.new("1", (4, 4), 1).save(tmp_path / "a.png")
        Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "b.png")
        palette = Image.new("P", (4, 4), 0)
        palette.putpalette([0, 0, 0])
        palette.save(tmp_path / "c.png", transparency=0)
        assert (data.folder(tmp_path, 8, False).images == 1).all()

    def test_orientation_tag(self, tmp_path):
        picture = Image.new("L", (16, 16))
        picture.paste(255, (0, 0, 16, 8))
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down
        picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
        image = data.folder(tmp_path, 4, True).images[0, 0]
        assert image[0].max() < -0.9 and image[-1].min() > 0.9

    def test_subfolders_are_classes(self, tmp_path):
        for name, count in (("cat", 2), ("dog", 1), ("empty", 0), (".hidden", 1)):
            (tmp_path / name).mkdir()
            for index in range(count):
                Image.new("L", (4, 4)).save(tmp_path / name / f"{index}.png")
        folder = data.folder(tmp_path, 8, True)
        assert folder.class_names == ["cat", "dog"]
        assert folder.labels.tolist() == [0, 0, 1]

    def test_mixed_layout(self, tmp_path):
        (tmp_path / "cat").mkdir()
        for path in (tmp_path / "loose.png", tmp_path / "cat" / "a.png"):
            Image.new("L", (4, 4)).save(path)
        with pytest.raises(DemoError, match="both images"):
            data.folder(tmp_path, 8, True)


class TestUNet:
    @pytest.mark.parametrize("size, channels", [(4, 1), (5, 3), (8, 1), (13, 3), (32, 3)])
    def test_shapes(self, size, channels):
        network = UNet(channels, size, classes=3, time_scale=1.0, width=8)
        x = torch.randn(2, channels, size, size)
        output = network(x, torch.tensor([0, 999]), torch.tensor([0, 3]))
        assert output.shape == x.shape and output.isfinite().all()

    def test_depends_on_every_input_and_uses_every_parameter(self):
        torch.manual_seed(0)
        network = UNet(1, 8, classes=3, time_scale=1000.0, width=8)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        x = torch.randn(1, 1, 8, 8)
        base = network(x, torch.tensor([0.5]), torch.tensor([0]))
        for changed in (
            network(x + 1, torch.tensor([0.5]), torch.tensor([0])),
            network(x, torch.tensor([0.51]), torch.tensor([0])),
            network(x, torch.tensor([0.5]), torch.tensor([network.null_class])),
        ):
            assert not torch.allclose(base, changed)
        base.square().sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())

    def test_parameter_count(self):
        network = UNet(1, 8, classes=10, time_scale=1.0)
        assert 0.35e6 < sum(parameter.numel() for parameter in network.parameters()) < 0.45e6


class TestSettings:
    @pytest.mark.parametrize(
        "given, process, prediction, sampler",
        [
            ({}, "vp-linear", "epsilon", "ddpm"),
            ({"process": "flow"}, "flow", "flow", "ddim"),
            ({"prediction": "flow"}, "flow", "flow", "ddim"),
            ({"process": "edm"}, "edm", "edm", "ddim"),
            ({"process": "vp-cosine"}, "vp-cosine", "epsilon", "ddpm"),
            ({"prediction": "v"}, "vp-linear", "v_prediction", "ddpm"),
            ({"prediction": "v-prediction", "sampler": "ddim"}, "vp-linear", "v_prediction", "ddim"),
        ],
    )
    def test_defaults(self, given, process, prediction, sampler):
        resolved = settings.resolve(given)
        assert (resolved.process, resolved.prediction, resolved.sampler) == (process, prediction, sampler)

    @pytest.mark.parametrize("process", settings.PROCESSES)
    def test_every_process_builds_and_trains(self, process):
        trainer = make_trainer(process=process)
        losses = [trainer.train_step() for _ in range(3)]
        assert all(0 < loss < 100 for loss in losses)
        assert trainer.time_loss[1].sum() == 3 * TINY["batch"]
        images = draw(trainer.ema, trainer.recipe, torch.tensor([0, 1]), 3, 1.5, 0, progress=False)
        assert images.shape == (2, 1, 8, 8) and images.abs().max() <= 1

    @pytest.mark.parametrize(
        "given, message",
        [
            ({"process": "flow", "prediction": "v_prediction"}, "v_prediction is not defined for RectifiedFlow"),
            ({"process": "flow", "prediction": "epsilon"}, "does not determine x0"),
            ({"process": "vp-zero-snr", "prediction": "epsilon"}, "does not determine x0"),
            ({"process": "flow", "weighting": "bell"}, "needs a discrete process"),
            ({"prediction": "nonsense"}, "unknown prediction"),
            ({"weighting": "nonsense"}, "unknown weighting"),
            ({"loss": "nonsense"}, "unknown loss"),
            ({"sampler": "nonsense"}, "unknown sampler"),
            ({"sample_steps": 1001}, "steps must lie in"),
        ],
    )
    def test_incompatible(self, given, message):
        with pytest.raises(DemoError, match=message):
            settings.build(settings.resolve(given))

    @pytest.mark.parametrize(
        "given",
        [
            {"process": "nonsense"},
            {"steps": 0},
            {"batch": -1},
            {"width": 12},
            {"size": 8},
            {"guidance": float("nan")},
            {"seed": -1},
        ],
    )
    def test_out_of_range(self, given):
        with pytest.raises(DemoError):
            settings.resolve(given)

    def test_differing(self):
        old = settings.resolve(TINY)
        assert settings.differing(old, {"steps": 12, "batch": None, "prediction": "epsilon"}) == []
        assert settings.differing(old, {"steps": 13}) == ["--steps 13 (the checkpoint has 12)"]
        assert len(settings.differing(old, {"batch": 9, "loss": "l1", "sampler": "ddim"})) == 3


class TestTraining:
    @pytest.mark.parametrize("count, batch", [(10, 4), (10, 10), (3, 8), (1, 5), (7, 3)])
    def test_every_epoch_visits_every_image_once(self, count, batch):
        order = torch.cat([training.batch_indices(count, batch, step, seed=1) for step in range(2 * count)])
        assert len(order) == 2 * count * batch
        for epoch in order[: len(order) // count * count].view(-1, count):
            assert sorted(epoch.tolist()) == list(range(count))

    def test_label_dropout(self):
        labels = torch.zeros(100_000, dtype=torch.long)
        dropped = training.drop_labels(labels, 7, step=3, seed=0)
        assert set(dropped.unique().tolist()) == {0, 7}
        assert (dropped == 7).float().mean().item() == pytest.approx(0.1, abs=0.005)

    def test_loss_falls(self):
        trainer = make_trainer(steps=60, batch=32, width=16)
        losses = [trainer.train_step() for _ in range(60)]
        assert sum(losses[-10:]) < 0.6 * sum(losses[:10])

    @pytest.mark.parametrize("process", ["vp-linear", "edm"])
    def test_resumed_is_uninterrupted_bit_for_bit(self, tmp_path, process):
        whole = make_trainer(process=process)
        for _ in range(TINY["steps"]):
            whole.train_step()
        for cut in (0, 1, 7, 12):
            first = make_trainer(process=process)
            for _ in range(cut):
                first.train_step()
            checkpoint.save(first.checkpoint(), tmp_path / "c.pt")
            torch.rand(cut)  # whatever else the process draws must not matter
            second = make_trainer(checkpoint.load(tmp_path / "c.pt"), process=process)
            for _ in range(TINY["steps"] - cut):
                second.train_step()
            assert_same_run(whole.checkpoint(), second.checkpoint())

    def test_seed_matters(self):
        assert make_trainer(seed=0).train_step() != make_trainer(seed=1).train_step()

    def test_drawing_in_chunks_is_drawing_at_once(self, monkeypatch):
        trainer = make_trainer()
        labels = torch.arange(5)
        whole = draw(trainer.ema, trainer.recipe, labels, 3, 1.0, 0, progress=False)
        monkeypatch.setattr("fastdiff.demo.generate.PIXELS_A_CALL", 2 * 64)
        parts = draw(trainer.ema, trainer.recipe, labels, 3, 1.0, 0, progress=False)
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)

    def test_trajectory_ends_in_the_images(self):
        trainer = make_trainer()
        labels = torch.arange(3)
        images = draw(trainer.ema, trainer.recipe, labels, 5, 1.5, 0, progress=False)
        titles, seen, estimates = trajectory(trainer.ema, trainer.recipe, labels, 5, 1.5, 0, columns=4)
        assert len(titles) == 4 and seen.shape == estimates.shape == (4, 3, 1, 8, 8)
        assert torch.equal(seen[-1].clamp(-1, 1), images)


def test_classifier_knows_real_digits():
    digits = data.digits()
    classifier = train_classifier(digits.images, digits.labels)
    assert classifier.held_out_accuracy >= 0.98
    assert (classifier.recognise(digits.images[:200]) == digits.labels[:200]).float().mean() > 0.98


def test_missing_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(DemoError, match=r'scikit-learn, matplotlib: run  pip install "fastdiff\[demo\]"'):
        extras.require("numpy", "sklearn", "matplotlib")


class TestKilled:
    """Real processes, killed with SIGKILL at moments that vary from run to run."""

    COMMAND = (
        *(sys.executable, "-m", "fastdiff", "demo", "--steps", "300", "--batch", "16", "--width", "8"),
        *("--sample-steps", "3", "--save-every", "13", "--device", "cpu", "--threads", "1", "--out"),
    )

    def start(self, out, *extra):
        return subprocess.Popen(
            [*self.COMMAND, str(out), *extra], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self, process):
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output

    def test_resumes_to_the_same_bits(self, tmp_path):
        uninterrupted, out = tmp_path / "whole", tmp_path / "run"
        self.finish(self.start(uninterrupted))
        training_seconds = checkpoint.load(uninterrupted / "checkpoint.pt").seconds
        for kill in range(2):
            process = self.start(out, "--resume") if kill else self.start(out)
            deadline = time.monotonic() + 120
            before = (out / "checkpoint.pt").stat().st_mtime_ns if kill else None
            # Imports take longer than the training: the first checkpoint of this process says that it has begun.
            while not (out / "checkpoint.pt").exists() or (out / "checkpoint.pt").stat().st_mtime_ns == before:
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.001)
            moment = random.Random().uniform(0, 0.6 * training_seconds)
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
            output = process.communicate()[0]
            step = checkpoint.load(out / "checkpoint.pt").step
            print(f"kill {kill}: {moment:.3f} s after the first checkpoint; it has {step} steps\n{output}")
        self.finish(self.start(out, "--resume"))
        assert_same_run(checkpoint.load(out / "checkpoint.pt"), checkpoint.load(uninterrupted / "checkpoint.pt"))
        for name in ("loss.png", "samples.png", "trajectory.png"):
            assert (out / name).read_bytes() == (uninterrupted / name).read_bytes()
        assert not [name for name in os.listdir(out) if name.endswith(".tmp")]


@pytest.mark.parametrize("name", list(fastdiff.samplers.NAMES))
def test_every_sampler_is_one_of_the_demos(name):
    """By name, with images' clamp, on the process that it needs."""
    recipe = settings.build(settings.resolve({"sampler": name}))
    assert recipe.sampler.clip == 1.0
    assert recipe.sampler.plan(recipe.process, 5, recipe.objective.prediction).table.shape[0] >= 5
