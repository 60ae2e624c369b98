"""The demo's parts: files, checkpoints, images, network, settings, and resuming to the same bits."""

import contextlib
import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import oracle
import pytest
import torch
import torch.nn.functional as F
from drawn import described
from known import Clock, KnownNetwork

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import fastdiff  # noqa: E402
from fastdiff.cli import main  # noqa: E402
from fastdiff.demo import DemoError, checkpoint, data, extras, plots, run, settings, training  # noqa: E402
from fastdiff.demo.classifier import _features, train_classifier  # noqa: E402
from fastdiff.demo.generate import draw, trajectory  # noqa: E402
from fastdiff.demo.unet import Attention, ResidualBlock, UNet, sinusoidal_embedding, upsample  # noqa: E402
from fastdiff.files import held, remove_leftovers, write_atomically  # noqa: E402

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

    @pytest.mark.parametrize(
        "change",
        [
            lambda c: c["settings"].update(steps="many"),
            lambda c: c["settings"].update(process="\x1b[31mred"),
            lambda c: c["data"].update(class_names=["\x1b]0;title\x07", "b"]),
            lambda c: c["data"].update(class_names=[]),
            lambda c: c["data"].pop("fingerprint"),
            lambda c: c["network"].update(width=1 << 20),
            lambda c: c["network"].update(nothing=1),
            lambda c: c["ema"].popitem(),
            lambda c: c.update(model={}),
            lambda c: c.update(step=7),
            lambda c: c.update(losses=None),
            lambda c: c["machine"].update(threads=0),
        ],
    )
    def test_made_up(self, path, change, capsys):
        """What a file holds is looked at before it is used, and said in one line that a terminal does not obey."""
        contents = torch.load(path)
        change(contents)
        torch.save(contents, path)
        with pytest.raises(DemoError, match="no checkpoint of this version") as found:
            checkpoint.load(path)
        assert str(found.value).isprintable() and len(str(found.value)) < 400 + len(str(path))
        assert main(["sample", "--checkpoint", str(path), "--out", str(path.with_suffix(".png"))]) == 2
        said = capsys.readouterr().err.strip()
        assert "no checkpoint" in said and said.isprintable()


@pytest.mark.skipif(os.name == "nt", reason="such names are for POSIX")
def test_class_folders_of_any_name(tmp_path, capsys):
    """Dollars are no formula, bytes that are no text and what a terminal would obey are shown as such; the run ends
    with its report."""
    names = ["$x", "cost $5$", os.fsdecode(b"caf\xe9"), "\x1b[31mred"]
    for index, name in enumerate(names):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("L", (8, 8), 60 * index).save(tmp_path / "images" / name / f"{number}.png")
    arguments = ["--steps", "1", "--batch", "4", "--width", "8", "--sample-steps", "2", "--size", "8"]
    command = ["demo", "--data", str(tmp_path / "images"), "--out", str(tmp_path / "out"), *arguments]
    assert main(command) == 0
    shown = ["\ufffd[31mred", "$x", "caf\ufffd", "cost $5$"]
    assert sorted(checkpoint.load(tmp_path / "out" / "checkpoint.pt").data["class_names"]) == sorted(shown)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["steps"] == 1
    assert (tmp_path / "out" / "samples.png").exists()
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="there is no such lock")
def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    written = tmp_path / ".checkpoint.pt.1.tmp"  # what the other run is writing
    written.touch()
    with held(tmp_path):
        assert main(["demo", "--out", str(tmp_path), "--steps", "1"]) == 2
        assert f"another run writes into {tmp_path}" in capsys.readouterr().err
        assert written.exists()
    with held(tmp_path):  # it is free again
        pass


class TestImages:
    def test_digits(self):
        digits = data.digits()
        assert digits.images.shape == (1797, 1, 8, 8) and digits.labels.shape == (1797,)
        assert digits.images.min() == -1 and digits.images.max() == 1
        assert digits.class_names == [str(i) for i in range(10)]
        from sklearn.datasets import load_digits

        loaded = load_digits()  # gray levels 0 to 16
        assert (digits.images[:, 0].numpy() == (loaded.images - 8) / 8).all()
        assert digits.labels.tolist() == loaded.target.tolist()

    def test_fingerprint_is_that_of_images_labels_and_names(self):
        def fingerprint(pixel=0.0, label=0, name="a"):
            images = torch.zeros(2, 1, 4, 4)
            images[1, 0, 3, 3] = pixel
            return data.ImageData(images, torch.tensor([0, label]), [name, "b"]).fingerprint()

        assert fingerprint() == fingerprint()
        assert len({fingerprint(), fingerprint(pixel=0.5), fingerprint(label=1), fingerprint(name="c")}) == 4

    def test_the_middle_square_in_the_files_colours(self, tmp_path):
        picture = Image.new("RGB", (12, 4), "blue")
        picture.paste("red", (4, 0, 8, 4))
        picture.save(tmp_path / "a.png")
        image = data.folder(tmp_path, 4, False).images[0]
        assert [plane.unique().tolist() for plane in image] == [[1.0], [-1.0], [-1.0]]

    def test_empty_folder(self, tmp_path):
        (tmp_path / "notes.txt").touch()
        with pytest.raises(DemoError, match="holds no PNG or JPEG images"):
            data.folder(tmp_path, 8, False)

    def test_parts_of_a_data_set_are_no_classes(self, tmp_path):
        for name in ("val", "Train"):
            for label in ("cat", "dog"):
                (tmp_path / name / label).mkdir(parents=True)
                Image.new("L", (9, 9)).save(tmp_path / name / label / "a.png")
        with pytest.raises(DemoError, match=r"holds Train, val: the parts .* --data .*/Train\."):
            data.folder(tmp_path, 8, False)
        assert data.folder(tmp_path / "Train", 8, False).class_names == ["cat", "dog"]
        # A class may be called so, beside others.
        (tmp_path / "Train").rename(tmp_path / "ship")
        assert data.folder(tmp_path, 8, False).class_names == ["ship", "val"]

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

    def test_parts_are_their_formulas(self):
        torch.manual_seed(0)
        time = torch.tensor([0.0, 1.0, 500.0])
        angles = time.numpy()[:, None] * 10000.0 ** (-np.arange(4) / 4)
        expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        # The angle is rounded to float32: 500 is known to 3e-5.
        np.testing.assert_allclose(sinusoidal_embedding(time, 8).numpy(), expected, atol=6e-5)

        x, condition = torch.randn(2, 8, 4, 6), torch.randn(2, 5)
        assert torch.equal(upsample(x), F.interpolate(x, scale_factor=2, mode="nearest"))

        attention, block = Attention(8), ResidualBlock(8, 16, 5)
        for parameter in [*attention.parameters(), *block.parameters()]:
            torch.nn.init.normal_(parameter, std=0.3)
        query, key, value = attention.qkv(attention.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
        torch.testing.assert_close(attention(x), x + attention.out(mixed))

        h = block.conv1(F.silu(block.norm1(x)))
        scale, shift = block.scale_shift(condition).view(2, 32, 1, 1).split(16, dim=1)
        expected = block.skip(x) + block.conv2(F.silu(block.norm2(h) * (1 + scale) + shift))
        torch.testing.assert_close(block(x, condition), expected)

    def test_time_is_scaled_and_the_start_is_zero(self):
        x, label = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
        networks = [UNet(1, 8, classes=2, time_scale=scale, width=8) for scale in (1.0, 1000.0)]
        assert not networks[0](x, torch.tensor([0, 999]), label).any()
        torch.nn.init.normal_(networks[0].head.weight)
        networks[1].load_state_dict(networks[0].state_dict())
        first, second = (
            network(x, time, label)
            for network, time in zip(networks, (torch.tensor([250, 750]), torch.tensor([0.25, 0.75])))
        )
        torch.testing.assert_close(first, second)

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

    def test_defaults_are_those_of_the_help(self, tmp_path):
        digits, images = settings.resolve({}), settings.resolve({"data": str(tmp_path)})
        common = dict(process="vp-linear", weighting="uniform", loss="mse", guidance=1.5, steps=1000, sample_steps=50)
        common |= dict(prediction="epsilon", sampler="ddpm", width=32, seed=0)
        common |= dict.fromkeys(("perceptual", "adversarial", "align", "classifier", "latent"), False)
        assert dataclasses.asdict(digits) == common | dict(data=None, size=8, gray=True, batch=256)
        assert dataclasses.asdict(images) == common | dict(data=str(tmp_path), size=32, gray=False, batch=64)

    @pytest.mark.parametrize(
        "name, process, latest",
        [
            ("vp-linear", fastdiff.VariancePreserving("linear"), 999),
            ("vp-cosine", fastdiff.VariancePreserving("cosine"), 999),
            ("vp-scaled-linear", fastdiff.VariancePreserving("scaled_linear"), 999),
            ("vp-zero-snr", fastdiff.VariancePreserving("linear", zero_terminal_snr=True), 999),
            ("flow", fastdiff.RectifiedFlow(), 1.0),
            ("edm", fastdiff.EDM(), math.log(80.0) / 4),
            ("vp-sde", fastdiff.VPSDE(), 1.0),
            ("sub-vp-sde", fastdiff.SubVPSDE(), 1.0),
            ("ve-sde", fastdiff.VESDE(), math.log(50.0) / 4),
        ],
    )
    def test_processes(self, name, process, latest):
        """The network is told times up to about 1000: ``latest`` is the largest of the process."""
        assert set(settings.PROCESSES) == {
            *(
                "vp-linear",
                "vp-cosine",
                "vp-scaled-linear",
                "vp-zero-snr",
                "flow",
                "edm",
                "vp-sde",
                "sub-vp-sde",
                "ve-sde",
            )
        }
        recipe = settings.build(settings.resolve({"process": name}))
        assert repr(recipe.process) == repr(process)
        assert 200 <= recipe.time_scale * latest <= 1100

    def test_the_recipe_is_what_was_named(self):
        given = {"prediction": "v", "weighting": "min-snr", "loss": "pseudo-huber", "sampler": "ddim"}
        recipe = settings.build(settings.resolve(given))
        objective = recipe.objective
        assert objective.process is recipe.process
        assert objective.prediction.name == "v_prediction"
        assert isinstance(objective.weighting, fastdiff.MinSNR)
        assert isinstance(objective.loss_function, fastdiff.losses.PseudoHuber)
        assert isinstance(recipe.sampler, fastdiff.samplers.DDIM)
        assert recipe.sampler.clip == 1.0 and recipe.sampler.rederive_epsilon

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
            ({"process": "flow", "weighting": "likelihood"}, "needs a process with g"),
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
            {"steps": 10**7 + 1},
            {"batch": 0},
            {"batch": 10**5 + 1},
            {"width": 12},
            {"width": 0},
            {"size": 8},
            {"gray": True},
            {"data": ".", "size": 3},
            {"data": ".", "size": 1025},
            {"sample_steps": 0},
            {"sample_steps": 10**4 + 1},
            {"guidance": float("nan")},
            {"seed": -1},
            {"seed": 2**63},
        ],
    )
    def test_out_of_range(self, given):
        with pytest.raises(DemoError):
            settings.resolve(given)

    @pytest.mark.parametrize(
        "given",
        [
            {"steps": 1, "batch": 1, "sample_steps": 1, "width": 8, "seed": 0, "guidance": -1.0},
            {"steps": 10**7, "batch": 10**5, "sample_steps": 10**4, "width": 16, "seed": 2**63 - 1},
            {"data": ".", "size": 4, "gray": True},
            {"data": ".", "size": 1024},
        ],
    )
    def test_what_is_taken_stays(self, given):
        resolved = dataclasses.asdict(settings.resolve(given))
        assert {name: resolved[name] for name in given if name != "data"} == {
            name: value for name, value in given.items() if name != "data"
        }

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

    def test_every_epoch_has_its_own_order(self):
        first, second, other = (
            training.batch_indices(100, 100, step, seed).tolist() for step, seed in ((0, 1), (1, 1), (0, 2))
        )
        assert first != second and first != other and first == training.batch_indices(100, 100, 0, 1).tolist()

    def test_learning_rate(self):
        """Up in a straight line to 0.002 in 100 steps (or a tenth of a shorter run), under half a cosine."""
        for step, steps, expected in [
            (0, 1000, 2e-5),
            (49, 1000, 1e-3 * (1 + math.cos(0.049 * math.pi)) / 2),
            (99, 1000, 1e-3 * (1 + math.cos(0.099 * math.pi))),
            (500, 1000, 1e-3),
            (999, 1000, 1e-3 * (1 - math.cos(0.001 * math.pi))),
            (0, 50, 2e-3 / 5),
            (25, 50, 1e-3),
            (0, 1, 2e-3),
        ]:
            assert training.learning_rate(step, steps) == pytest.approx(expected, rel=1e-9)

    def test_average_of_the_weights(self):
        """d ema + (1 - d) w after every step, d = (1 + k) / (10 + k) until it is 0.995."""
        trainer = make_trainer()
        assert_same(list(trainer.ema.state_dict().values()), list(trainer.model.state_dict().values()))
        expected = [parameter.double().clone() for parameter in trainer.ema.parameters()]
        for step, decay in [(0, 0.1), (1, 2 / 11), (2, 3 / 12), (10**6, 0.995)]:
            trainer.step = step
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter += torch.randn_like(parameter)
            trainer._update_ema()
            for index, parameter in enumerate(trainer.model.parameters()):
                expected[index] = decay * expected[index] + (1 - decay) * parameter.double()
        for average, parameter in zip(expected, trainer.ema.parameters()):
            torch.testing.assert_close(parameter.double(), average, rtol=1e-6, atol=1e-6)  # four float32 roundings

    def test_a_step_is_that_of_plain_pytorch(self):
        """Which images, labels, times and noise, and what AdamW makes of the loss, written out."""
        trainer = make_trainer(seed=3, steps=200)
        digits, process = data.digits(), fastdiff.VariancePreserving()
        seen = []
        trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append([value.clone() for value in inputs]))
        with torch.no_grad():
            trainer.model.head.weight.normal_()  # it begins with 0, where only its own gradient is not 0
        parameters = list(trainer.model.parameters())
        for step in range(3):
            before = UNet(**trainer.model.settings)
            before.load_state_dict(trainer.model.state_dict())
            loss = trainer.train_step()

            index = training.batch_indices(1797, 8, step, 3)
            dropped = oracle.uniform(3, 8, stream=8, sample_offset=8 * step) < 0.1
            labels = torch.where(torch.from_numpy(dropped), 10, digits.labels[index])
            objective = fastdiff.Objective(process, "epsilon")
            noised = objective.noise(digits.images[index], seed=3, sample_offset=8 * step)
            for found, expected in zip(seen.pop(), (noised.x_t, noised.t, labels), strict=True):
                torch.testing.assert_close(found, expected.to(found.dtype))
            expected = F.mse_loss(before(noised.x_t, noised.t, labels), noised.noise)
            assert loss == pytest.approx(expected.item(), rel=1e-5) and trainer.losses[step] == loss
            expected.backward()
            for parameter, known in zip(parameters, before.parameters(), strict=True):
                scale = known.grad.abs().max().item()
                torch.testing.assert_close(parameter.grad, known.grad, rtol=1e-3, atol=1e-4 * scale)
                if step == 0:  # AdamW's first step without decay is the learning rate, against the gradient
                    big = known.grad.abs() > 1e-2 * scale
                    moved = (parameter - known).detach()[big]
                    assert torch.allclose(moved, -1e-4 * known.grad[big].sign(), rtol=1e-2, atol=1e-7)
            average = dict(trainer.ema.named_parameters())["stem.weight"]
            first, last = (network.stem.weight.detach() for network in (before, trainer.model))
            if step == 0:  # a tenth of what it was
                torch.testing.assert_close(average, 0.1 * first + 0.9 * last, rtol=1e-6, atol=1e-7)
        assert trainer.step == 3

    @pytest.mark.parametrize("process", ["vp-linear", "flow", "edm"])
    def test_losses_by_quarter_and_time(self, process):
        """Sum and number of the rows' losses, in 25 bins of where the time lies between clean and noise."""
        trainer = make_trainer(process=process)
        objective, images = trainer.recipe.objective, trainer.images
        expected = np.zeros((4, 25))
        for step in range(12):
            noised = objective.noise(images[training.batch_indices(1797, 8, step, 0)], seed=0, sample_offset=8 * step)
            fraction = {
                "vp-linear": lambda t: t / 1000,
                "flow": lambda t: t,
                "edm": lambda t: np.log(t / 0.01) / np.log(20.0 / 0.01),
            }[process](noised.t.double().numpy())
            np.add.at(expected[step // 3], np.clip((25 * fraction).astype(int), 0, 24), 1)
            trainer.train_step()
        total, number = trainer.time_loss
        assert (number.numpy() == expected).all()
        assert (total > 0).equal(number > 0)
        by_quarter = torch.tensor(trainer.losses, dtype=torch.float64).view(4, 3).sum(1)
        torch.testing.assert_close(total.sum(1), 8 * by_quarter, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("save_every, saved", [(5, [5, 10, 12]), (6, [6, 12]), (100, [12])])
    def test_checkpoints_while_training(self, monkeypatch, save_every, saved):
        """With the seconds so far, on from those of the run that is resumed."""
        trainer, clock, found = make_trainer(), Clock(), []
        monkeypatch.setattr(training, "time", clock)
        real = trainer.train_step
        monkeypatch.setattr(trainer, "train_step", lambda: (clock.take(0.5), real())[1])
        trainer.seconds = 10.0
        trainer.train(lambda state: found.append((state.step, len(state.losses), state.seconds)), save_every)
        assert found == [(step, step, 10.0 + 0.5 * step) for step in saved]

    def test_what_the_bar_says(self, monkeypatch):
        """The steps of the whole run, the last loss, and the speed since this run began: 8 images in half a second."""
        trainer, clock, said = make_trainer(), Clock(), []

        class Bar(contextlib.nullcontext):
            def __init__(self, total, initial, **_):
                super().__init__(self)
                said.append((total, initial))

            def set_postfix_str(self, text, refresh):
                said.append(text)

            def update(self):
                pass

        def step():
            clock.take(0.5)
            trainer.step += 1
            return 1 / trainer.step

        monkeypatch.setattr(training, "time", clock)
        monkeypatch.setattr("tqdm.auto.tqdm", Bar)
        monkeypatch.setattr(trainer, "train_step", step)
        trainer.step = 8
        trainer.train(lambda state: None, 100)
        assert said == [(12, 8), *(f"loss {1 / k:.4f}, 16 images/s" for k in (9, 10, 11, 12))]

    def test_what_is_sampled_from_is_the_average(self):
        trainer = make_trainer()
        trainer.train_step()
        state = trainer.checkpoint()
        network = state.ema_network(torch.device("cpu"))
        assert_same(dict(network.state_dict()), dict(trainer.ema.state_dict()))
        assert not torch.equal(network.head.weight, trainer.model.head.weight)
        assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())

    def test_loss_falls(self):
        trainer = make_trainer(steps=40, batch=16)
        losses = [trainer.train_step() for _ in range(40)]
        assert sum(losses[-10:]) < 0.6 * sum(losses[:10])

    @pytest.mark.parametrize("process", ["vp-linear", "edm"])
    def test_resumed_is_uninterrupted_bit_for_bit(self, tmp_path, process):
        whole = make_trainer(process=process)
        for _ in range(TINY["steps"]):
            whole.train_step()
        for cut in (0, 7, 12):
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

    @pytest.mark.parametrize("guidance, expected", [(1.0, (-0.4, 0.2)), (1.5, (-0.65, 0.25)), (3.0, (-1.0, 0.4))])
    def test_guidance(self, guidance, expected):
        """u + g (c - u) of a network that says what x0 is: c by class, u = 0.1 without one; in [-1, 1]."""
        network, labels = KnownNetwork([-0.4, 0.2, 0.1]), torch.tensor([1, 0, 1])
        recipe = settings.build(settings.resolve({"prediction": "sample", "sampler": "ddim"}))
        images = draw(network, recipe, labels, 4, guidance, 0, progress=False)
        truth = torch.tensor(expected)[labels].view(3, 1, 1, 1).expand(3, 1, 8, 8)
        torch.testing.assert_close(images, truth, rtol=0, atol=1e-6)
        assert len(network.calls) == 4
        both = [1, 0, 1] if guidance == 1 else [2, 2, 2, 1, 0, 1]
        assert all(label.tolist() == both for _, _, label in network.calls)

    def test_images_are_in_range(self, monkeypatch):
        beyond = torch.tensor([-3.0, 0.5, 3.0]).view(3, 1, 1, 1)
        monkeypatch.setattr(fastdiff.Objective, "sample", lambda *_, **__: beyond)
        recipe = settings.build(settings.resolve({}))
        images = draw(KnownNetwork([0.0, 0.0]), recipe, torch.tensor([0, 0, 0]), 3, 1.0, 0)
        assert images.flatten().tolist() == [-1.0, 0.5, 1.0]

    def test_trajectory_of_a_known_network(self):
        network, labels = KnownNetwork([-0.4, 0.2, 0.1]), torch.tensor([1, 0])
        recipe = settings.build(settings.resolve({"prediction": "sample", "sampler": "ddim"}))
        titles, seen, estimates = trajectory(network, recipe, labels, 5, 1.5, 0, columns=4)
        times = [int(time[0]) for _, time, _ in network.calls]
        assert titles == [f"step {step + 1}\nt = {times[step]}" for step in (0, 1, 3, 4)]
        truth = torch.tensor([0.25, -0.65]).view(1, 2, 1, 1, 1).expand(4, 2, 1, 8, 8)
        torch.testing.assert_close(estimates, truth, rtol=0, atol=1e-5)
        # What the network is given next, twice for guidance, is what it came to.
        for column, step in enumerate((0, 1, 3)):
            torch.testing.assert_close(seen[column], network.calls[step + 1][0][:2], rtol=0, atol=1e-6)
        flow = settings.build(settings.resolve({"process": "flow", "prediction": "sample"}))
        titles, _, _ = trajectory(KnownNetwork([0.0, 0.0]), flow, torch.tensor([0]), 4, 1.0, 0)
        assert titles[0] == "step 1\nt = 1" and titles[2] == "step 3\nt = 0.5" and len(titles) == 4

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
    # Pixels as scikit-learn has them; what a network draws beyond black and white is cut off.
    assert _features(torch.tensor([[[[-1.0, 1.0, 0.0, 2.0]]]])).tolist() == [[0.0, 16.0, 8.0, 16.0]]


def test_threads(monkeypatch):
    """One for small images, else the cores up to 8; a resumed run has those that it had."""
    monkeypatch.setattr(run, "_usable_cores", lambda: 6)
    sizes = [settings.resolve({"data": ".", "size": size}) for size in (16, 17)]
    assert [run._default_threads(each, None) for each in sizes] == [1, 6]
    monkeypatch.setattr(run, "_usable_cores", lambda: 60)
    assert run._default_threads(sizes[1], None) == 8
    assert run._default_threads(sizes[0], SimpleNamespace(machine={"threads": 3})) == 3


class TestReport:
    """Every number that the demo says, of a run whose clock, losses, images and classifier are known."""

    SHOWN = (
        *("12 steps in 6.0 s", "16 images/s", "1.0000 at first, 0.2586 over the last steps", "500 images in 3.0 s"),
        *("9.0 s", "97.5% of held-out real digits", "455 of 500 recognised as the class asked for (91.0%)"),
        "0: 50  1: 49  2: 48  3: 47  4: 46  5: 45  6: 44  7: 43  8: 42  9: 41",
    )

    @pytest.fixture
    def made(self, tmp_path, monkeypatch, capsys):
        """(report, output, plots, what was drawn from and how, images) of such a run."""
        clock, plotted, drawn = Clock(), {}, []
        images = torch.arange(500.0).view(500, 1, 1, 1).expand(500, 1, 8, 8) / 500

        def step(trainer):
            clock.take(0.5)
            trainer.step += 1
            trainer.losses.append(1 / trainer.step)
            with torch.no_grad():
                trainer.model.head.bias += 1.0
            return trainer.losses[-1]

        def draw(network, recipe, labels, steps, guidance, seed, **_):
            clock.take(3.0)
            drawn.append((network, recipe, labels, steps, guidance, seed))
            return images

        class Classifier:
            held_out_accuracy = 0.975

            def recognise(self, given):
                assert given is images
                # k wrong ones of the 50 of digit k.
                return torch.tensor([digit + (k < digit) for digit in range(10) for k in range(50)])

        for module in (run, training):
            monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(training.Trainer, "train_step", step)
        monkeypatch.setattr(run.generate, "draw", draw)
        columns = torch.zeros(3, 5, 1, 8, 8), torch.ones(3, 5, 1, 8, 8)
        monkeypatch.setattr(
            run.generate, "trajectory", lambda *a, **_: (drawn.append(a), (["a", "b", "c"], *columns))[1]
        )
        monkeypatch.setattr(run, "train_classifier", lambda *_: Classifier())
        for name in ("loss_plot", "samples_plot", "trajectory_plot"):
            monkeypatch.setattr(plots, name, lambda path, *rest, name=name: plotted.update({name: (path, *rest)}))
        report = run.demo(run.DemoOptions(TINY | {"guidance": 2.0, "seed": 7}, tmp_path, device="cpu", threads=1))
        return report, capsys.readouterr().out, plotted, drawn, images

    def test_numbers(self, made, tmp_path):
        report = made[0]
        assert json.loads((tmp_path / "report.json").read_text()) == report
        known = {
            "steps": 12,
            "device": "cpu",
            "backend": fastdiff.backends.choose("cpu"),
            "threads": 1,
            "process": repr(fastdiff.VariancePreserving()),
            "images": 1797,
            "classes": [str(digit) for digit in range(10)],
            "loss_first": 1.0,
            "loss_last": 1 / 12,
            "loss_last_mean": sum(1 / k for k in range(1, 13)) / 12,
            "training_seconds": 6.0,
            "images_per_second": 16.0,
            "sampling_seconds": 3.0,
            "seconds": 9.0,
            "seconds_of_this_call": 9.0,
            "samples_drawn": 500,
            "digit_accuracy": 455 / 500,
            "digits_recognised": {str(digit): 50 - digit for digit in range(10)},
            "classifier_accuracy": 0.975,
        }
        for name, value in known.items():
            assert report[name] == (pytest.approx(value) if isinstance(value, float) else value), name
        assert report["settings"]["guidance"] == 2.0 and report["settings"]["seed"] == 7
        network = UNet(1, 8, 10, 1.0, width=8)
        assert report["parameters"] == sum(parameter.numel() for parameter in network.parameters())
        assert report["versions"]["torch"] == torch.__version__

    def test_is_printed(self, made, tmp_path):
        output = made[1]
        for text in ("1797 images 8 x 8 x 1 in 10 class(es)", *self.SHOWN, str(tmp_path / "samples.png")):
            assert text in output

    def test_is_of_the_averaged_weights_and_the_settings(self, made, tmp_path):
        drawn, followed = made[3]
        state = checkpoint.load(tmp_path / "checkpoint.pt")
        network, recipe, labels, *how = drawn
        assert torch.equal(network.head.bias, state.ema["head.bias"])
        assert not torch.equal(state.ema["head.bias"], state.model["head.bias"])
        assert labels.tolist() == [digit for digit in range(10) for _ in range(50)] and how == [3, 2.0, 7]
        assert followed[0] is network and followed[2].tolist() == [0, 1, 2, 3, 4] and list(followed[3:]) == [3, 2.0, 7]

    def test_plots_are_of_it(self, made):
        _, _, plotted, _, images = made
        path, losses, time_loss, process, title, terms = plotted["loss_plot"]
        assert path.name == "loss.png" and losses.tolist() == [1 / k for k in range(1, 13)] and terms == {}
        assert time_loss.shape == (2, 4, 25) and "vp-linear, predicting epsilon, 12 steps of 8 images" in title
        path, real, generated, names, title = plotted["samples_plot"]
        digits = data.digits()
        assert path.name == "samples.png" and names == digits.class_names and "ddpm, 3 steps, guidance 2" in title
        for digit in range(10):
            assert torch.equal(real[digit], digits.images[digits.labels == digit][:8])
            assert torch.equal(generated[digit], images[50 * digit : 50 * digit + 8])
        path, columns, seen, estimates, names, _ = plotted["trajectory_plot"]
        assert path.name == "trajectory.png" and columns == ["a", "b", "c"] and names == digits.class_names[:5]
        assert not seen.any() and estimates.all()


def test_a_checkpoint_says_what_the_images_were(tmp_path):
    images = data.ImageData(torch.zeros(6, 3, 8, 8), torch.tensor([0, 1] * 3), ["a", "b"])
    recipe = settings.build(given := settings.resolve({"width": 8, "batch": 2}))
    trainer = training.Trainer(given, recipe, images, torch.device("cpu"), {"threads": 1})
    checkpoint.save(trainer.checkpoint(), tmp_path / "a.pt")
    found = checkpoint.load(tmp_path / "a.pt").data
    assert found == {"channels": 3, "class_names": ["a", "b"], "fingerprint": images.fingerprint()}


@pytest.mark.parametrize(
    ("name", "index"), [("3", 1), ("7", 0), ("0", 0), ("1", 1), ("cat", 2), ("2", 2)], ids=lambda value: str(value)
)
def test_a_class_by_its_name_before_its_index(name, index):
    assert run._class_index(name, ["7", "3", "cat"]) == index


@pytest.mark.parametrize("name", ["4", "-1", "ca", ""])
def test_a_class_that_is_not_there(name):
    with pytest.raises(DemoError, match=f"there is no class '{name}': use names or indices of 7, 3, cat"):
        run._class_index(name, ["7", "3", "cat"])


class TestPlots:
    """What is drawn, from the figure before it becomes a file."""

    @pytest.fixture
    def figures(self, monkeypatch):
        found = []
        monkeypatch.setattr(plots, "_write", lambda figure, path: found.append(figure))
        return found

    def test_losses(self, figures, tmp_path):
        losses = torch.linspace(3.0, 1.0, 80, dtype=torch.float64)
        time_loss = torch.zeros(2, 4, 5)
        time_loss[:, 0, 1], time_loss[:, 3, 4] = torch.tensor([6.0, 2.0]), torch.tensor([1.0, 4.0])
        for process, t in ((fastdiff.VariancePreserving(), (300.0, 900.0)), (fastdiff.RectifiedFlow(), (0.3, 0.9))):
            plots.loss_plot(tmp_path / "a.png", losses, time_loss, process, "title")
            curve, by_time = figures.pop().axes
            every, mean = curve.lines
            assert every.get_xdata().tolist() == list(range(1, 81)) and every.get_ydata().tolist() == losses.tolist()
            # Of a fortieth of the run, 2 steps; it stands in their middle, so a loss that falls evenly is its own mean.
            assert mean.get_xdata().tolist() == [step + 0.5 for step in range(1, 80)]
            np.testing.assert_allclose(mean.get_ydata(), np.interp(mean.get_xdata(), every.get_xdata(), losses))
            assert mean.get_label() == "mean of the 2 steps around"
            np.testing.assert_allclose(mean.get_ydata(), (losses[1:] + losses[:-1]) / 2)
            assert [line.get_label() for line in by_time.lines] == [
                f"{q} quarter of training" for q in ("first", "last")
            ]
            drawn = [(*line.get_xdata(), *line.get_ydata()) for line in by_time.lines]
            assert drawn == [pytest.approx((t[0], 3.0)), pytest.approx((t[1], 0.25))]
            assert curve.get_yscale() == by_time.get_yscale() == "log"

    @pytest.mark.parametrize(("steps", "labels"), [(1, 1), (2, 2), (40, 2), (800, 2)])
    def test_the_legend_lies_over_no_curve(self, figures, tmp_path, steps, labels):
        """And a run that is too short for a mean has none, but its one point."""
        process, time_loss = fastdiff.VariancePreserving(), torch.ones(2, 4, 5)
        plots.loss_plot(tmp_path / "a.png", torch.rand(steps) + 0.1, time_loss, process, "title")
        figure = figures.pop()
        figure.draw_without_rendering()
        for axes in figure.axes:
            legend = axes.get_legend().get_window_extent()
            assert legend.y1 < axes.xaxis.label.get_window_extent().y0
            assert 0 <= legend.x0 and legend.x1 <= figure.bbox.width and 0 <= legend.y0
        legends = [axes.get_legend().get_window_extent() for axes in figure.axes]
        assert not legends[0].overlaps(legends[1])
        drawn = figure.axes[0].lines
        names = ["each step", f"mean of the {max(2, steps // 40)} steps around"][:labels]
        assert [line.get_label() for line in drawn] == names
        assert (drawn[0].get_marker() == ".") == (steps == 1)

    def test_axis_of_sigmas(self):
        centres = plots._bin_centres(fastdiff.EDM(), 2)
        assert centres.tolist() == pytest.approx([math.log(0.01) + f * math.log(2000.0) for f in (0.25, 0.75)])
        assert plots._time_label(fastdiff.EDM()).startswith("ln(sigma)")
        assert plots._time_label(fastdiff.RectifiedFlow()).startswith("time t")
        assert plots._time_label(fastdiff.VariancePreserving()).startswith("timestep t")

    def test_samples(self, figures, tmp_path):
        """Class k's images in row k, real left; black is -1, white 1; one pixel between images of 8."""
        real = [torch.full((2, 1, 8, 8), value) for value in (-1.0, 0.0)]
        generated = [torch.full((count, 1, 8, 8), value) for count, value in ((3, 1.0), (1, 0.5))]
        plots.samples_plot(tmp_path / "a.png", real, generated, ["one", "a name that is too long"], "title")
        left, right = figures.pop().axes
        a, b = (axes.images[0].get_array() for axes in (left, right))
        assert a.shape == (18, 18) and b.shape == (18, 27)
        assert (a[:8, :8] == 0).all() and (a[9:17, 9:17] == 0.5).all()
        assert (b[:8, 18:26] == 1).all() and (b[9:17, :8] == 0.75).all()
        assert np.isnan(np.ma.filled(b[9:17, 9:26], np.nan)).all()  # there is no such image
        assert [label.get_text() for label in left.get_yticklabels()] == ["one", "a name that i…"]
        assert left.get_yticks().tolist() == [3.5, 12.5]
        assert [axes.get_title() for axes in (left, right)] == ["real", "generated"]

    def test_trajectory(self, figures, tmp_path):
        """What has a wider spread than images is scaled to theirs; estimates are not."""
        seen = torch.stack([torch.randn(1, 1, 8, 8) * 10, torch.full((1, 1, 8, 8), 0.5)])
        estimates = torch.stack([torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)])
        plots.trajectory_plot(tmp_path / "a.png", ["first", "last"], seen, estimates, ["7"], "title")
        left, right = figures.pop().axes
        a, b = (axes.images[0].get_array() for axes in (left, right))
        noise = (seen[0, 0, 0] / seen[0].std()).clamp(-1, 1)
        np.testing.assert_allclose(a[:8, :8], (noise + 1) / 2, atol=1e-6)
        assert (a[:8, 9:17] == 0.75).all() and (b[:8, :8] == 0.5).all() and (b[:8, 9:17] == 1).all()
        for axes in (left, right):
            assert [label.get_text() for label in axes.get_xticklabels()] == ["first", "last"]
            assert axes.get_xticks().tolist() == [3.5, 12.5]
        assert (left.get_title(), right.get_title()) == ("x after the step", "estimate of x0")

    @pytest.mark.parametrize(("rows", "columns"), [(1, 2), (5, 7), (2, 7)])
    def test_nothing_of_a_trajectory_overlaps(self, figures, tmp_path, rows, columns):
        images = torch.zeros(columns, rows, 1, 8, 8)
        title = "From noise to image: vp-scaled-linear, predicting v_prediction; dpmpp_2m_sde, 50 steps, guidance 1.5"
        names = [str(row) for row in range(rows)]
        plots.trajectory_plot(tmp_path / "a.png", ["step 50\nt = 999"] * columns, images, images, names, title)
        figure = figures.pop()
        figure.draw_without_rendering()
        boxes = [figure._suptitle.get_window_extent()]
        for axes in figure.axes:
            boxes += [axes.title.get_window_extent(), axes.images[0].get_window_extent()]
            boxes += [label.get_window_extent() for label in axes.get_xticklabels()]
        for k, box in enumerate(boxes):
            assert 0 <= box.x0 and box.x1 <= figure.bbox.width and 0 <= box.y0 and box.y1 <= figure.bbox.height
            assert not any(box.overlaps(other) for other in boxes[k + 1 :])
        above = boxes[0].y0 - max(box.y1 for box in boxes[1:])
        assert above > 0.06 * figure.dpi, "room between the title and the headings"

    def test_grid(self, figures, tmp_path):
        images = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
        plots.grid_plot(tmp_path / "a.png", images, ["a", "b", "c"], 2, "title")
        axes = figures.pop().axes
        assert [each.get_title() for each in axes] == ["a", "b", "c", ""] and not axes[3].images
        for each, value in zip(axes, (0.0, 0.5, 1.0)):
            pixels = each.images[0].get_array()
            assert pixels.shape == (4, 4, 4) and (pixels[..., :3] == value).all() and (pixels[..., 3] == 1).all()

    LOOKS = """
        10 4.7 inches, #ffffff, ConstrainedLayoutEngine
        title 'title' 11 #000000
        axes 'Loss during training' 12 #000000 6 above
         x: linear, from -2.95 83.95, label 'training step' 10 #000000, GRID, ticks bottom 10 #000000 long 3.5
         y: log, from 0.9466 3.169, label 'loss' 10 #000000, GRID, ticks left 10 #000000 long 3.5
         frame: left #000000, right #000000, bottom #000000, top #000000 on #ffffff
         line 'each step' #b9c6d6 0.6 -
         line 'mean of the 2 steps around' #0b3c68 1.5 -
        legend in 2 columns, no frame, 2 0.8
         #b9c6d6 - 'each step' 9 #000000
         #0b3c68 - 'mean of the 2 steps around' 9 #000000
        axes 'Loss against time' 12 #000000 6 above
         x: linear, from 60 940, label 'timestep t: clean to noise' 10 #000000, GRID, ticks bottom 10 #000000 long 3.5
         y: log, from 0.9466 3.169, label 'mean loss' 10 #000000, GRID, ticks left 10 #000000 long 3.5
         frame: left #000000, right #000000, bottom #000000, top #000000 on #ffffff
         line 'first quarter of training' #b9c6d6 1.5 - .6
         line 'second quarter of training' #84a3c4 1.5 - .6
         line 'third quarter of training' #3f74a8 1.5 - .6
         line 'last quarter of training' #0b3c68 1.5 - .6
        legend in 2 columns, no frame, 2 0.8
         #b9c6d6 - .6 'first quarter of training' 9 #000000
         #84a3c4 - .6 'second quarter of training' 9 #000000
         #3f74a8 - .6 'third quarter of training' 9 #000000
         #0b3c68 - .6 'last quarter of training' 9 #000000

        8.5 2.2 inches, #ffffff, ConstrainedLayoutEngine
        title 'title' 11 #000000
        axes 'real' 12 #000000 6 above
         x: linear, from -0.5 17.5, label '' 10 #000000
         y: linear, from 17.5 -0.5, label 'class' 10 #000000, ticks left 10 #000000 long 0
         image (18, 18) from 0 1 gray nearest
        axes 'generated' 12 #000000 6 above
         x: linear, from -0.5 26.5, label '' 10 #000000
         y: linear, from 17.5 -0.5, label '' 10 #000000
         image (18, 27) from 0 1 gray nearest

        8.5 2.875 inches, #ffffff, ConstrainedLayoutEngine
        title 'title' 11 #000000
        axes 'x after the step' 10 #000000 24 above
         x: linear, from -0.5 17.5, label '' 10 #000000, ticks top 7 #000000 long 0
         y: linear, from 17.5 -0.5, label 'class' 10 #000000, ticks left 10 #000000 long 0
         image (18, 18) from 0 1 gray nearest
        axes 'estimate of x0' 10 #000000 24 above
         x: linear, from -0.5 17.5, label '' 10 #000000, ticks top 7 #000000 long 0
         y: linear, from 17.5 -0.5, label '' 10 #000000
         image (18, 18) from 0 1 gray nearest

        5 2.525 inches, #ffffff, ConstrainedLayoutEngine
        title 'title' 11 #000000
        axes 'a' 8 #000000 2 above
         image (4, 4, 4) from 0 1 gray nearest
        axes 'b' 8 #000000 2 above
         image (4, 4, 4) from 0 1 gray nearest
        axes 'c' 8 #000000 2 above
         image (4, 4, 4) from 0 1 gray nearest
        axes '' 12 #000000 6 above"""

    def test_how_they_look(self, figures):
        """Every word, size, colour and limit."""
        time_loss = torch.zeros(2, 4, 5)
        for quarter, (bin_, loss) in enumerate(((0, 3.0), (2, 2.0), (3, 1.5), (4, 1.0))):
            time_loss[:, quarter, bin_] = torch.tensor([2 * loss, 2.0])
        losses = torch.linspace(3.0, 1.0, 80, dtype=torch.float64)
        plots.loss_plot("", losses, time_loss, fastdiff.VariancePreserving(), "title")
        images = torch.zeros(3, 1, 8, 8)
        plots.samples_plot("", [images[:2], images[:1]], [images, images], ["a", "b"], "title")
        plots.trajectory_plot("", ["c", "d"], *torch.zeros(2, 2, 2, 1, 8, 8), ["a", "b"], "title")
        plots.grid_plot("", torch.zeros(3, 3, 4, 4), ["a", "b", "c"], 2, "title")
        expected = textwrap.dedent(self.LOOKS).strip().replace("GRID", "grid #b0b0b0 0.5 0.3")
        assert "\n\n".join("\n".join(described(figure)) for figure in figures) == expected

    @pytest.mark.parametrize("least", [1e-3, 0.0])
    def test_bits(self, figures, least):
        """The terms on a logarithmic axis, if it can show them, with all of its grid; and their sum from T down."""
        terms = torch.tensor([0.5, least, 0.25, math.nan])
        found = fastdiff.BitsPerDim(2.0, 0.1, 1.0, terms, torch.tensor([1, 1, 1, 0]), 1)
        plots.bits_plot("", found, "title")
        each, total = figures.pop().axes
        assert each.lines[0].get_xdata().tolist() == [0, 1, 2]
        assert each.lines[0].get_ydata().tolist() == terms[:3].tolist()
        assert total.lines[0].get_ydata().tolist() == pytest.approx([1.75 + least, 1.25 + least, 1.25, 1.0])
        assert each.get_yscale() == ("log" if least else "linear") and total.get_yscale() == "linear"
        if least:
            each.figure.draw_without_rendering()
            assert {tick.gridline.get_visible() for tick in each.yaxis.get_minor_ticks()} == {True}

    def test_many_columns_are_wider(self, figures):
        """0.55 inches an image, of a trajectory 0.69, of a grid with captions 0.77; and one between two pictures."""
        images = [torch.zeros(8, 1, 8, 8)] * 2
        plots.samples_plot("", images, images, ["a", "b"], "title")
        plots.trajectory_plot("", [""] * 9, *torch.zeros(2, 9, 2, 1, 8, 8), ["a", "b"], "title")
        plots.grid_plot("", torch.zeros(14, 1, 8, 8), [""] * 14, 7, "title")
        sizes = [tuple(figure.get_size_inches()) for figure in figures]
        assert sizes == [
            pytest.approx((0.55 * 17 + 1.2, 2 * 0.55 + 1.1)),
            pytest.approx((0.6875 * 19 + 1.2, 2 * 0.6875 + 1.5)),
            pytest.approx((0.77 * 7 + 0.4, 2 * 0.9625 + 0.6)),
        ]
        left, right = figures[0].axes
        assert left.get_gridspec().get_width_ratios() == [8, 8]

    def test_a_loss_of_0_is_on_a_plain_axis(self, figures):
        time_loss = torch.ones(2, 4, 5)
        plots.loss_plot("", torch.tensor([1.0, 0.0, 2.0]), time_loss, fastdiff.RectifiedFlow(), "title")
        curve, by_time = figures.pop().axes
        assert (curve.get_yscale(), by_time.get_yscale()) == ("linear", "log")

    def test_names_are_shortened_to_14_letters(self):
        assert [plots._shortened("x" * n) for n in (13, 14, 15)] == ["x" * 13, "x" * 14, "x" * 13 + "…"]

    def test_large_images_have_wider_gaps(self):
        """6 hundredths of an image: between those of 64, 4 pixels; one at the least."""
        assert [plots._gap(size) for size in (4, 8, 32, 64)] == [1, 1, 2, 4]
        assert plots._centres(3, 32) == [15.5, 49.5, 83.5]


def test_pictures_have_130_dots_an_inch(tmp_path):
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "a.png"
    plots.grid_plot(path, torch.zeros(3, 3, 4, 4), ["a", "b", "c"], 2, "title")
    with image.open(path) as opened:
        assert opened.format == "PNG" and opened.size == (650, int(130 * 2.525))


def test_the_classifier_is_the_one_that_is_known_for_these_digits():
    """gamma = 0.001 on pixels of 0 to 16, as in scikit-learn's own example of these digits, which has 96.9% of half of
    them; a harder margin and more of them to learn from: above 99% of the quarter that was not seen."""
    digits = data.digits()
    classifier = train_classifier(digits.images, digits.labels)
    assert (classifier.model.C, classifier.model.gamma) == (10.0, 0.001)
    assert classifier.held_out_accuracy > 0.99 and classifier.model.shape_fit_ == (1797 - 450, 64)
    images = torch.linspace(-1.5, 1.5, 64).view(1, 1, 8, 8)
    assert (features := _features(images)).shape == (1, 64) and (features.min(), features.max()) == (0.0, 16.0)


def test_held_out_accuracy_is_of_what_was_not_seen():
    """Of noise with labels by chance, what was seen is remembered, and a tenth of the rest is guessed."""
    images, labels = torch.rand(400, 1, 8, 8) * 2 - 1, torch.arange(400) % 10
    classifier = train_classifier(images, labels)
    assert (classifier.recognise(images) == labels).float().mean() > 0.7 and classifier.held_out_accuracy < 0.4


def test_missing_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(DemoError, match=r'scikit-learn, matplotlib: run  pip install "fastdiff\[demo\]"'):
        extras.require("numpy", "sklearn", "matplotlib")
    with pytest.raises(DemoError, match="scikit-learn: run"):
        data.digits()


class TestKilled:
    """A real process, killed with SIGKILL at a moment that varies from run to run."""

    COMMAND = (
        *("demo", "--steps", "150", "--batch", "16", "--width", "8", "--sample-steps", "3"),
        *("--save-every", "13", "--device", "cpu", "--threads", "1", "--out"),
    )

    def test_resumes_to_the_same_bits(self, tmp_path):
        uninterrupted, out = tmp_path / "whole", tmp_path / "run"
        assert main([*self.COMMAND, str(uninterrupted)]) == 0
        training_seconds = checkpoint.load(uninterrupted / "checkpoint.pt").seconds
        process = subprocess.Popen(
            [sys.executable, "-m", "fastdiff", *self.COMMAND, str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + 120
        # Imports take longer than the training: the first checkpoint says that it has begun.
        while not (out / "checkpoint.pt").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.001)
        moment = random.Random().uniform(0, 0.6 * training_seconds)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0]
        step = checkpoint.load(out / "checkpoint.pt").step
        print(f"killed {moment:.3f} s after the first checkpoint; it has {step} steps\n{output}")
        assert main([*self.COMMAND, str(out), "--resume"]) == 0
        assert_same_run(checkpoint.load(out / "checkpoint.pt"), checkpoint.load(uninterrupted / "checkpoint.pt"))
        for name in ("loss.png", "samples.png", "trajectory.png"):
            assert (out / name).read_bytes() == (uninterrupted / name).read_bytes()
        assert not [name for name in os.listdir(out) if name.endswith(".tmp")]


def test_settings_and_recipes_cannot_be_changed():
    """A checkpoint's settings are those of its whole run."""
    found = settings.resolve({})
    for each in (found, settings.build(found)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            each.process = "flow"


@pytest.mark.parametrize("name", list(fastdiff.samplers.NAMES))
def test_every_sampler_is_one_of_the_demos(name):
    """By name, with images' clamp, on the process that it needs."""
    recipe = settings.build(settings.resolve({"sampler": name}))
    assert recipe.sampler.clip == 1.0
    assert recipe.sampler.plan(recipe.process, 5, recipe.objective.prediction).table.shape[0] >= 5
