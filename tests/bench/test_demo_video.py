"""The demo's videos of moving digits: what they are, what judges them, the network, runs in one process and in two."""

import concurrent.futures
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import fastdiff  # noqa: E402
from fastdiff.cli import main  # noqa: E402
from fastdiff.demo import DemoError, checkpoint, data, motion, plots, ranks, run, settings, training, videos  # noqa: E402
from fastdiff.demo.unet import UNet  # noqa: E402
from fastdiff.demo.video_unet import FrameAttention, FrameMixing, VideoUNet  # noqa: E402

TINY = {"data": "moving-digits", "steps": 6, "batch": 5, "width": 8, "sample_steps": 2}
COMMAND = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
COMMAND += ["--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def real():
    return videos.moving_digits(0, 600)


@pytest.fixture(scope="module")
def held_out():
    return videos.moving_digits(0, 200, held_out=True)


@pytest.fixture(scope="module")
def judge(real):
    return motion.Judge.of(real)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a tiny run in one process, whose judge has learned 300 videos and sees 4 of each class."""
    out = tmp_path_factory.mktemp("runs") / "videos"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(motion, "LEARNED", 300)
        patch.setattr(run, "VIDEOS_A_CLASS", 4)
        assert main(["demo", *COMMAND, "--out", str(out)]) == 0
    return out


def square(places, side=2):
    """A video [1, 1, F, 16, 16] of a white square whose upper left corner is at whole pixels."""
    made = torch.full((1, 1, len(places), 16, 16), -1.0)
    for frame, (y, x) in enumerate(places):
        made[0, 0, frame, y : y + side, x : x + side] = 1.0
    return made


class TestVideos:
    def test_bouncing(self):
        """As a ball goes that is moved in small steps, and turned around wherever it would leave."""
        for start, velocity, room in ((3.0, 2.0, 8), (7.5, -2.0, 8), (0.0, -1.25, 5), (8.0, 19.0, 8), (2.0, 0.0, 8)):
            place, step, expected = start, velocity / 64, [start]
            for _ in range(7 * 64):
                place += step
                if place > room:
                    place, step = room - (place - room), -step
                if place < 0:
                    place, step = -place, -step
                expected.append(place)
            found = videos.bounced(start + velocity * torch.arange(8.0), room)
            np.testing.assert_allclose(found, expected[::64], atol=1e-4)

    def test_a_digit_at_whole_and_half_pixels(self):
        digit = data.digits().images[:1]
        places = torch.tensor([[[0, 0], [8, 8], [3, 5], [3.5, 5], [3, 5.25]]] + [[[0.0, 0.0]] * 5])
        made = videos.placed(digit.expand(2, 1, 8, 8), places)
        assert made.shape == (2, 1, 5, 16, 16)

        def at(y, x):
            expected = np.full((16, 16), -1.0)
            expected[y : y + 8, x : x + 8] = digit[0, 0]
            return expected

        for frame, expected in enumerate(
            [at(0, 0), at(8, 8), at(3, 5), (at(3, 5) + at(4, 5)) / 2, 0.75 * at(3, 5) + 0.25 * at(3, 6)]
        ):
            np.testing.assert_allclose(made[0, 0, frame], expected, atol=1e-5)

    def test_a_video_is_a_function_of_seed_and_id(self):
        few, many, other = (videos.moving_digits(seed, n) for seed, n in ((3, 5), (3, 50), (4, 5)))
        assert torch.equal(few.images, many.images[:5]) and torch.equal(few.labels, many.labels[:5])
        assert not torch.equal(few.images, other.images)
        assert few.images.shape == (5, 1, 8, 16, 16) and few.images.dtype == torch.float32
        assert few.class_names == [*"0123456789"] and few.images.min() == -1 and few.images.max() <= 1

    def test_no_digit_is_both_learned_and_held_out(self, monkeypatch):
        """Of digits that are squares of their own gray, whose label is their number."""
        gray = torch.arange(40.0).view(40, 1, 1, 1).expand(40, 1, 8, 8) / 40
        monkeypatch.setattr(videos, "digits", lambda: data.ImageData(gray, torch.arange(40), ["a"] * 40))
        sides = [videos.moving_digits(0, 400, held_out=out) for out in (False, True)]
        for side in sides:
            seen = (side.images.amax((1, 2, 3, 4)) * 40).round().long()
            assert torch.equal(seen, side.labels)
        learned, held_out = (set(side.labels.tolist()) for side in sides)
        assert held_out == set(range(0, 40, 4)) and learned == set(range(40)) - held_out

    def test_where_they_go(self, monkeypatch):
        """All over the room, in all directions, at 0.75 to 2 pixels a frame along each line, to a border and back."""
        white = data.ImageData(torch.ones(4, 1, 8, 8), torch.arange(4), ["a"] * 4)
        monkeypatch.setattr(videos, "digits", lambda: white)
        mass = (videos.moving_digits(0, 2000).images[:, 0].double().numpy() + 1) / 2
        along = [(mass.sum(axis) * np.arange(16)).sum(-1) / mass.sum((-2, -1)) for axis in (-1, -2)]
        corner = np.stack(along, axis=-1) - 3.5  # [2000, F, (y, x)]
        assert -1e-5 < corner.min() < 0.01 and 7.99 < corner.max() < 8 + 1e-5
        steps = np.diff(corner, axis=1)
        velocity = np.abs(steps).max(axis=1, keepdims=True)
        thrown_back = np.abs(np.abs(steps) - velocity) > 1e-4
        away = np.minimum(corner, 8 - corner)  # from the nearest border: there and back is a whole step
        there_and_back = away[:, 1:] + away[:, :-1] - velocity
        assert 2000 < thrown_back.sum() < 8000 and np.abs(there_and_back[thrown_back]).max() < 1e-4
        speeds = np.linalg.norm(velocity[:, 0], axis=-1)
        assert 0.75 - 1e-4 < speeds.min() < 0.76 and 1.99 < speeds.max() < 2 + 1e-4
        assert (np.histogram(speeds, 5, (0.75, 2.0))[0] > 300).all()
        straight = ~thrown_back.any((1, 2))
        angles = np.arctan2(*steps[straight, 0].T)
        assert straight.sum() > 100 and (np.histogram(angles, 8, (-np.pi, np.pi))[0] > 5).all()
        assert all((np.histogram(start, 4, (0, 8))[0] > 400).all() for start in corner[:, 0].T)


class TestMotion:
    def test_a_square_in_whole_steps(self):
        """3 right and 4 down is 5 pixels; a turn by a right angle changes steps of 2 by the root of 8."""
        found = square([(0, 0), (4, 3), (8, 6)])
        assert motion.centres(found)[0].tolist() == [[0.5, 0.5], [4.5, 3.5], [8.5, 6.5]]
        assert motion.speed(found).item() == 5 and motion.turning(found).item() == 0
        found = square([(0, 0), (2, 0), (2, 2)])
        assert motion.speed(found).item() == 2 and motion.turning(found).item() == pytest.approx(8**0.5)

    def test_background_has_no_mass(self):
        """Noise below a tenth of white moves no centre, nor does what is beyond white. Black is in the middle."""
        clear = square([(10, 2), (0, 0)])
        noisy = torch.where(clear < 0, -0.82 - 0.5 * torch.rand(clear.shape), 3.0)
        assert torch.equal(motion.centres(noisy), motion.centres(clear))
        assert motion.centres(-torch.ones(1, 1, 1, 16, 16)).tolist() == [[[7.5, 7.5]]]

    def test_windows_hold_the_digit_wherever_it_is(self, held_out):
        """Those of a symmetric digit are the digit itself; those of any, at another place, the same."""
        image = torch.full((1, 1, 8, 8), -1.0)
        image[..., 2:6, 1:7] = torch.tensor([0.5, 1.0, 1.0, 1.0, 1.0, 0.5])
        places = torch.tensor([[[0, 0], [8, 8], [3, 5.0]]])
        found = motion.windows(videos.placed(image, places))
        assert found.shape == (3, 1, 8, 8)
        torch.testing.assert_close(found, image.expand(3, 1, 8, 8), atol=1e-5, rtol=0)
        digit = data.digits().images[5:6]
        found = motion.windows(videos.placed(digit, places))
        torch.testing.assert_close(found[1:], found[:1].expand(2, 1, 8, 8), atol=1e-4, rtol=0)

    def test_real_videos_are_judged_right(self, judge, held_out):
        found = judge(held_out.images, held_out.labels)
        assert found["frames_recognised"] > 0.97 and found["keeps_its_digit"] > 0.93 and found["moves_as_real"] > 0.9
        assert found["speed"] == pytest.approx(motion.speed(held_out.images).mean().item(), rel=1e-6)
        assert found["turning"] == pytest.approx(motion.turning(held_out.images).mean().item(), rel=1e-6)

    def test_what_does_not_move_is_not_moving(self, judge, held_out):
        still = held_out.images[:, :, :1].expand_as(held_out.images)
        found = judge(still, held_out.labels)
        assert found["frames_recognised"] > 0.95 and found["keeps_its_digit"] == 1 and found["moves_as_real"] == 0
        assert found["speed"] == 0 == found["turning"]

    def test_what_jumps_is_not_moving(self, judge, held_out):
        order = torch.tensor([3, 7, 0, 5, 2, 6, 1, 4])
        found, real = (judge(of, held_out.labels) for of in (held_out.images[:, :, order], held_out.images))
        assert found["frames_recognised"] == real["frames_recognised"] and found["moves_as_real"] < 0.1
        assert found["turning"] > 3 * real["turning"] and found["speed"] > 1.3 * real["speed"]

    def test_what_is_no_digit_or_another_one(self, judge, held_out):
        """Noise is no digit; of wrong labels none is right; a video that goes over into another keeps no digit."""
        noise = torch.rand(held_out.images.shape) * 2 - 1
        found = judge(noise, held_out.labels)
        assert found["frames_recognised"] < 0.25 and found["moves_as_real"] < 0.05
        found = judge(held_out.images, (held_out.labels + 1) % 10)
        assert found["frames_recognised"] < 0.03 and found["keeps_its_digit"] > 0.93
        other = (held_out.labels != held_out.labels.roll(1)).nonzero()[:, 0]
        mixed = torch.cat([held_out.images[:, :, :4], held_out.images.roll(1, 0)[:, :, 4:]], dim=2)[other]
        found = judge(mixed, held_out.labels[other])
        assert 0.45 < found["frames_recognised"] < 0.55 and found["keeps_its_digit"] < 0.05

    def test_what_is_said(self):
        real = dict(frames_recognised=0.99, keeps_its_digit=0.98, moves_as_real=0.97, speed=1.25, turning=0.5)
        made = dict(frames_recognised=0.9, keeps_its_digit=0.8, moves_as_real=0.7, speed=1.5, turning=0.75)
        said = dict(motion.said({"real": real, "generated": made}))
        assert said == {
            "digit in a frame": "90.0% of the frames recognised as the class asked for (of held-out real ones 99.0%)",
            "digit in a video": "80.0% of the videos show one digit in all frames (of held-out real ones 98.0%)",
            "motion": "70.0% of the videos move as real ones do (of held-out real ones 97.0%)",
            "speed": "1.50 pixels a frame (of held-out real ones 1.25)",
            "turning": "0.75 pixels a frame of change (of held-out real ones 0.50)",
        }


class TestNetwork:
    @pytest.fixture
    def network(self):
        torch.manual_seed(0)
        made = VideoUNet(1, 4, 16, classes=3, time_scale=1000.0, width=8)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return made

    def test_depends_on_every_input_and_uses_every_parameter(self, network):
        x, time, label = torch.randn(2, 1, 4, 16, 16), torch.tensor([0.5, 0.6]), torch.tensor([0, 1])
        base = network(x, time, label)
        assert base.shape == x.shape
        # Each video by itself; times a frame each, if there are such.
        torch.testing.assert_close(network(x[1:], time[1:], label[1:]), base[1:])
        torch.testing.assert_close(network(x, time[:, None].expand(2, 4), label), base)
        for changed in (
            network(x, time + 0.01, label),
            network(x, torch.tensor([[0.5, 0.5, 0.5, 0.6], [0.6] * 4]), label),
            network(x, time, torch.tensor([network.null_class, 1])),
        ):
            assert not torch.allclose(changed[0], base[0])
        base.square().sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())

    def test_frames_see_each_other_and_know_their_order(self, network):
        x, time, label = torch.randn(1, 1, 4, 16, 16), torch.tensor([0.5]), torch.tensor([0])
        base = network(x, time, label)
        last = x.clone()
        last[:, :, 3] += 1
        assert not torch.allclose(network(last, time, label)[:, :, 0], base[:, :, 0])
        assert not torch.allclose(network(x.flip(2), time, label).flip(2), base)

    def test_it_begins_as_a_unet_without_a_change(self):
        network = VideoUNet(1, 4, 16, classes=3, time_scale=1.0)
        assert not network(torch.randn(2, 1, 4, 16, 16), torch.zeros(2), torch.tensor([0, 3])).any()
        plain = UNet(1, 16, 3, 1.0, 16, widest=4)
        assert [[block[0].conv2.out_channels for block in stage] for stage in (plain.down, plain.up)] == [
            [16, 32, 64],
            [64, 32, 16],
        ]
        wanted = {name: weight.shape for name, weight in plain.state_dict().items()}
        found = {name: weight.shape for name, weight in network.state_dict().items()}
        assert wanted.items() <= found.items()

    def test_parts_are_their_formulas(self):
        torch.manual_seed(0)
        mixing, attention = FrameMixing(16, 3), FrameAttention(16, 3)
        for parameter in (*mixing.parameters(), *attention.parameters()):
            torch.nn.init.normal_(parameter, std=0.3)
        x = torch.randn(2, 16, 3, 4, 5)
        frames = x.transpose(1, 2).reshape(6, 16, 4, 5)

        def as_videos(found):
            return found.view(2, 3, 16, 4, 5).transpose(1, 2)

        h = F.silu(as_videos(mixing.norm(frames))) + mixing.place_in_time[:, :, None, None]
        expected = x + F.conv3d(h, mixing.conv.weight[..., None, None], mixing.conv.bias, padding=(1, 0, 0))
        torch.testing.assert_close(as_videos(mixing(frames, None)), expected, atol=1e-5, rtol=1e-5)

        h = F.group_norm(x, 2, attention.norm.weight, attention.norm.bias)
        qkv = torch.einsum("dc,bcfhw->bfhwd", attention.qkv.weight[:, :, 0, 0], h) + attention.qkv.bias
        mixed = F.scaled_dot_product_attention(*qkv.flatten(1, 3).chunk(3, dim=-1)).view(2, 3, 4, 5, 16)
        out = torch.einsum("dc,bfhwc->bdfhw", attention.out.weight[:, :, 0, 0], mixed)
        expected = x + out + attention.out.bias[:, None, None, None]
        torch.testing.assert_close(as_videos(attention(frames)), expected, atol=1e-5, rtol=1e-5)


class TestSettings:
    def test_defaults_are_those_of_the_help(self):
        found = settings.resolve({"data": "moving-digits"})
        expected = settings.resolve({"process": "flow"})
        changed = dict(data="moving-digits", size=16, steps=2000, batch=16, sample_steps=30, width=16)
        assert dataclasses.asdict(found) == dataclasses.asdict(expected) | changed
        assert found.video and not expected.video and not settings.resolve({"data": "./moving-digits"}).video

    def test_times_are_logit_normal_of_a_flow(self):
        recipes = [settings.build(settings.resolve(TINY | {"process": name})) for name in ("flow", "edm", "vp-linear")]
        kinds = [type(recipe.objective.timesteps).__name__ for recipe in recipes]
        assert kinds == ["LogitNormal", "LogNormal", "Uniform"]
        images = settings.build(settings.resolve({"process": "flow"}))
        assert type(images.objective.timesteps).__name__ == "Uniform"

    @pytest.mark.parametrize("name", settings.FOR_IMAGES)
    def test_what_is_for_images(self, name):
        with pytest.raises(DemoError, match=f"--{name} is for images, and moving-digits are videos: leave it out"):
            settings.resolve(TINY | {name: True})

    @pytest.mark.parametrize("given", [{"size": 24}, {"gray": True}])
    def test_their_size_is_given(self, given):
        with pytest.raises(DemoError, match="go with --data and a folder: moving-digits are 16 x 16 and gray"):
            settings.resolve(TINY | given)

    def test_differing(self):
        old = settings.resolve(TINY)
        assert settings.differing(old, {"data": "moving-digits", "steps": 6}) == []
        assert settings.differing(old, {"steps": 7}) == ["--steps 7 (the checkpoint has 6)"]


class TestTraining:
    def trainer(self, resume=None, **given):
        chosen = settings.resolve(TINY | given)
        machine = {"device": "cpu", "threads": 1, "torch": str(torch.__version__)}
        made = videos.moving_digits(chosen.seed, 64)
        return training.Trainer(chosen, settings.build(chosen), made, torch.device("cpu"), machine, resume)

    def test_a_step_is_that_of_plain_pytorch(self):
        trainer, made = self.trainer(seed=3), videos.moving_digits(3, 64)
        with torch.no_grad():
            trainer.model.head.weight.normal_()
        before = VideoUNet(**trainer.model.settings)
        before.load_state_dict(trainer.model.state_dict())
        loss = trainer.train_step()
        index = training.batch_indices(64, 5, 0, 3)
        objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", timesteps="logit_normal")
        noised = objective.noise(made.images[index], seed=3)
        labels, _ = fastdiff.drop_condition(made.labels[index], 0.1, 10, seed=3)
        t, x0 = noised.t.float().view(5, 1, 1, 1, 1), made.images[index]
        torch.testing.assert_close(noised.x_t, (1 - t) * x0 + t * noised.noise)
        expected = F.mse_loss(before(noised.x_t, noised.t, labels), noised.noise - x0)
        assert loss == pytest.approx(expected.item(), rel=1e-5)

    @pytest.mark.parametrize("process", ["flow", "vp-linear", "edm"])
    def test_resumed_is_uninterrupted_bit_for_bit(self, tmp_path, process):
        whole, first = self.trainer(process=process), self.trainer(process=process)
        for trainer, steps in ((whole, 6), (first, 2)):
            for _ in range(steps):
                trainer.train_step()
        checkpoint.save(first.checkpoint(), tmp_path / "c.pt")
        second = self.trainer(checkpoint.load(tmp_path / "c.pt"), process=process)
        for _ in range(4):
            second.train_step()
        a, b = whole.checkpoint(), second.checkpoint()
        assert torch.equal(a.losses, b.losses) and torch.equal(a.time_loss, b.time_loss)
        for one, two in ((a.model, b.model), (a.ema, b.ema)):
            assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    def test_loss_falls(self):
        trainer = self.trainer(steps=20)
        losses = [trainer.train_step() for _ in range(20)]
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5])

    def test_the_weights_must_be_those_of_a_video_network(self, tmp_path):
        checkpoint.save(self.trainer().checkpoint(), tmp_path / "c.pt")
        contents = torch.load(tmp_path / "c.pt")
        contents["settings"]["data"] = None
        torch.save(contents, tmp_path / "c.pt")
        with pytest.raises(DemoError, match="no checkpoint of this version"):
            checkpoint.load(tmp_path / "c.pt")


class TestGif:
    def test_rows_of_parts(self, tmp_path):
        """Three videos in rows of two, and below a wider gap one more; each pixel is 4 by 4, each frame 0.15 s; in 32
        grays, of which 0.5 is the 16th of 31 and 0.75 the 23rd."""
        first = torch.linspace(-1, 1, 3).view(3, 1, 1, 1, 1) * torch.tensor([1.0, -1.0]).view(2, 1, 1)
        parts = first.expand(3, 1, 2, 16, 16), torch.ones(1, 1, 2, 16, 16) * torch.tensor([0.5, 1.5]).view(2, 1, 1)
        plots.gif(tmp_path / "a.gif", parts, 2)
        with Image.open(tmp_path / "a.gif") as image:
            assert image.format == "GIF" and image.n_frames == 2 and image.info["loop"] == 0
            frames = []
            for index in range(2):
                image.seek(index)
                assert image.info["duration"] == 150
                frames.append(np.array(image.convert("L")))
        gap, between = 4, 90
        for frame, (grays, last) in zip(frames, (((0, 131, 255), 189), ((255, 131, 0), 255))):
            assert frame.shape == (4 * (3 * 17 + 3), 4 * 2 * 17)
            cells = [frame[68 * row : 68 * row + 64, 68 * col : 68 * col + 64] for row in (0, 1) for col in (0, 1)]
            for cell, gray in zip(cells, (*grays, between), strict=True):
                assert (cell == gray).all()
            assert (frame[64:68] == between).all() and (frame[:, 64:68] == between).all()
            assert (frame[136 : 136 + 3 * gap] == between).all()
            assert (frame[148:212, :64] == last).all() and (frame[148:212, 64:] == between).all()


class TestRuns:
    FILES = {"checkpoint.pt", "report.json", "loss.png", "samples.png", "trajectory.png", "samples.gif"}

    def test_files_and_report(self, finished):
        assert {path.name for path in finished.iterdir()} == self.FILES
        report = json.loads((finished / "report.json").read_text())
        state = checkpoint.load(finished / "checkpoint.pt")
        network, recipe = state.ema_network(torch.device("cpu")), settings.build(state.settings)
        labels = torch.arange(10).repeat_interleave(4)
        drawn = run.generate.draw(network, recipe, labels, 2, 1.5, 0, progress=False)
        assert drawn.shape == (40, 1, 8, 16, 16) and run._sha256(drawn) == report["samples_sha256"]
        made, unseen = videos.moving_digits(0), videos.moving_digits(0, 400, held_out=True)
        judge = motion.Judge.of(made.first(300))
        assert report["video"] == {
            "real": judge(unseen.images, unseen.labels),
            "generated": judge(drawn, labels),
        }
        assert report["images"] == 8192 and report["samples_drawn"] == 40 and report["processes"] == 1
        assert report["digit_accuracy"] is None and report["classifier_accuracy"] is None
        assert state.data["fingerprint"] == made.fingerprint() and state.losses.isfinite().all()

    def test_gif(self, finished):
        """Two rows of held-out videos above, three of generated ones, a column a class."""
        with Image.open(finished / "samples.gif") as image:
            assert image.size == (4 * 10 * 17, 4 * (5 * 17 + 3)) and image.n_frames == 8
            first = np.array(image.convert("L"))
        unseen = videos.moving_digits(0, 400, held_out=True)
        for digit, row in itertools.product(range(10), range(2)):
            wanted = (unseen.images[unseen.labels == digit][row, 0, 0] + 1) * 127.5  # up to half of a 31st
            shown = first[68 * row : 68 * row + 64 : 4, 68 * digit : 68 * digit + 64 : 4]
            np.testing.assert_allclose(shown, wanted, atol=255 / 62 + 1)

    def test_sample(self, finished, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        command = ["sample", "--checkpoint", str(finished)]
        assert main([*command, "--classes", "3,1,3"]) == 0
        assert "3 videos: samples.gif" in capsys.readouterr().out
        with Image.open("samples.gif") as image:
            assert image.size == (4 * 3 * 17, 4 * 17) and image.n_frames == 8
        before = Path("samples.gif").read_bytes()
        more = ["--steps", "3", "--seed", "1", "--guidance", "1", "--sampler", "flow_euler", "--overwrite"]
        assert main([*command, "--classes", "3,1,3", *more]) == 0
        assert Path("samples.gif").read_bytes() != before
        assert main([*command, "--out", "a.png"]) == 2
        assert "--out must name a .gif file" in capsys.readouterr().err
        assert main(["bits", *command[1:]]) == 2
        assert "is of videos" in capsys.readouterr().err

    def test_a_run_that_is_there(self, finished, tmp_path, capsys):
        """Its files are not overwritten, and it does not go on with other data."""
        assert main(["demo", *COMMAND, "--out", str(finished)]) == 2
        assert "samples.gif" in capsys.readouterr().err
        assert main(["demo", "--data", str(tmp_path), "--out", str(finished), "--resume"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


class TestParallel:
    def test_shares(self):
        """Of every number, each sample is in one share, and the shares are as alike as they can be."""
        for number, count in itertools.product((1, 5, 8, 13), (1, 2, 3, 5)):
            shares = [list(range(number))[ranks.Ranks(rank, count).share(number)] for rank in range(count)]
            assert sum(shares, []) == list(range(number))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1

    @pytest.mark.parametrize("name", settings.FOR_IMAGES)
    def test_what_one_process_does(self, name):
        given = settings.resolve({name: True})
        with pytest.raises(DemoError, match=f"--{name} trains in one process; there are 2"):
            ranks.check_parallel(None, 2, given)
        ranks.check_parallel(None, 1, given)

    def test_a_batch_has_a_sample_for_each(self):
        ranks.check_parallel("data", 5, settings.resolve(TINY))
        with pytest.raises(DemoError, match="--batch 5 is less than one sample for each of 6 processes"):
            ranks.check_parallel("data", 6, settings.resolve(TINY))

    @pytest.mark.parametrize("count", [2, 3])
    @pytest.mark.parametrize("what", ["videos", "images"])
    def test_ranks_train_as_one(self, what, count):
        """In threads, which add up at the same place. Shares of 5 samples differ in length."""
        chosen = settings.resolve(TINY | {"steps": 4} | ({} if what == "videos" else {"data": None}))
        made = videos.moving_digits(0, 64) if what == "videos" else data.digits()
        barrier, given = threading.Barrier(count, timeout=60), {}

        class InThreads(ranks.Ranks):
            def add_up(self, tensors):
                given[self.rank] = [tensor.clone() for tensor in tensors]
                barrier.wait()
                for tensor, *parts in zip(tensors, *(given[rank] for rank in range(self.count))):
                    tensor.copy_(sum(parts))
                barrier.wait()

        def trainer_of(of):
            how = chosen, settings.build(chosen), made, torch.device("cpu"), {"threads": 1}, None, of
            return training.Trainer(*how)

        def trained(trainer):
            for _ in range(4):
                trainer.train_step()
            return trainer.checkpoint()

        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            found = list(pool.map(trained, [trainer_of(InThreads(rank, count)) for rank in range(count)]))
        alone = trained(trainer_of(ranks.ALONE))
        for each in found:
            assert torch.equal(each.losses, found[0].losses) and torch.equal(each.time_loss, found[0].time_loss)
            torch.testing.assert_close(each.losses, alone.losses, rtol=1e-5, atol=0)
            torch.testing.assert_close(each.time_loss, alone.time_loss, rtol=1e-5, atol=0)
            for name, weight in each.model.items():
                assert torch.equal(weight, found[0].model[name])
                torch.testing.assert_close(weight, alone.model[name], rtol=0, atol=1e-4)

    def test_the_first_says_what_is_wrong(self, monkeypatch):
        """The others leave with the same status, silently."""
        sent = []
        monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda said: sent.append(list(said)))

        def wrong():
            raise DemoError("wrong")

        with pytest.raises(DemoError, match="wrong"):
            ranks.Ranks(0, 2).from_first(wrong)
        assert ranks.Ranks(0, 2).from_first(lambda: 7) == 7
        assert sent == [[None, "wrong"], [7, None]]
        for received in sent:
            monkeypatch.setattr(
                torch.distributed,
                "broadcast_object_list",
                lambda said, received=received: said.__setitem__(slice(None), received),
            )
            if received[1] is None:
                assert ranks.Ranks(1, 2).from_first(wrong) == 7
            else:
                with pytest.raises(SystemExit) as left:
                    ranks.Ranks(1, 2).from_first(wrong)
                assert left.value.code == 2

    def test_resuming_with_other_processes_is_noted(self, capsys):
        """By the first alone. A checkpoint that does not say how many there were had one."""
        threads, cpu = torch.get_num_threads(), torch.device("cpu")
        same = run._prepare_machine(cpu, threads, None, ranks.ALONE)
        assert same["processes"] == 1
        for before, of, noted in ((same, ranks.Ranks(0, 2), True), (same, ranks.Ranks(1, 2), False)):
            assert run._prepare_machine(cpu, threads, SimpleNamespace(machine=before), of)["processes"] == 2
            assert ("resuming with processes 2 a run begun with 1" in capsys.readouterr().out) == noted
        for before in (same, {name: value for name, value in same.items() if name != "processes"}):
            run._prepare_machine(cpu, threads, SimpleNamespace(machine=before), ranks.ALONE)
            assert capsys.readouterr().out == ""

    def test_threads_and_devices(self, monkeypatch):
        """The cores of a machine are shared by its processes, each of which has a GPU of its own."""
        chosen = settings.resolve(TINY)
        monkeypatch.setattr(run, "_usable_cores", lambda: 6)
        assert run._default_threads(chosen, None) == 6
        environment = {"MASTER_ADDR": "here", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert run._default_threads(chosen, None) == 3 and ranks.started_by_torchrun() == 4
        assert ranks.own_device(torch.device("cpu")) == torch.device("cpu")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(DemoError, match="2 processes, but 1 GPU"):
            ranks.own_device(torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
        assert ranks.own_device(torch.device("cuda")) == torch.device("cuda", 1)

    @pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no processes")
    def test_two_processes_go_on_with_the_run_of_one(self, finished, tmp_path):
        """To its losses, up to rounding. The first process alone writes and prints."""
        whole = checkpoint.load(finished / "checkpoint.pt")
        recipe, made = settings.build(whole.settings), videos.moving_digits(0)
        trainer = training.Trainer(whole.settings, recipe, made, torch.device("cpu"), whole.machine)
        for _ in range(2):
            trainer.train_step()
        checkpoint.save(trainer.checkpoint(), tmp_path / "checkpoint.pt")
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "fastdiff",
        ]
        command += ["demo", *COMMAND, "--parallel", "data", "--out", str(tmp_path), "--resume"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        for said in ("resuming with processes 2", "resuming after step 2", "writing to", "digit in a frame"):
            assert done.stdout.count(said) == 1
        assert "1 thread(s) in each of 2 processes" in done.stdout
        found = checkpoint.load(tmp_path / "checkpoint.pt")
        torch.testing.assert_close(found.losses, whole.losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.time_loss, whole.time_loss, rtol=1e-5, atol=0)
        for name, weight in found.model.items():
            torch.testing.assert_close(weight, whole.model[name], rtol=0, atol=1e-4)
        assert {path.name for path in tmp_path.iterdir()} == TestRuns.FILES
        assert json.loads((tmp_path / "report.json").read_text())["processes"] == 2
