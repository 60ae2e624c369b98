"""The command line: what it writes, what it prints, and how it refuses."""

import argparse
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastdiff
from fastdiff import doctor
from fastdiff.cli import _parser, main
from fastdiff.demo import latent, run, settings, training

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

TINY = ("--steps", "6", "--batch", "8", "--width", "8", "--sample-steps", "3", "--device", "cpu", "--threads", "1")
FILES = {"checkpoint.pt", "report.json", "loss.png", "samples.png", "trajectory.png"}


def check_png(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        assert min(image.size) > 100
        assert len(image.convert("L").getcolors(256)) > 10  # not blank


def refused(capsys, *arguments):
    """The single line of an error that exits with status 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastdiff: error: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished tiny run on digits."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["demo", *TINY, "--out", str(out)]) == 0
    return out


@pytest.fixture
def asked(monkeypatch):
    """What a training and a drawing are asked for. Nothing is drawn or plotted; the files are there all the same."""
    found = SimpleNamespace(saved=[], plots={}, trainer=None)
    threads = torch.get_num_threads()

    def draw(network, recipe, labels, steps, guidance, seed, autoencoder=None):
        channels, size = network.settings["channels"], network.settings["size"]
        vars(found).update(recipe=recipe, labels=labels.tolist(), steps=steps, guidance=guidance, seed=seed)
        found.threads = torch.get_num_threads()
        x = torch.zeros(len(labels), channels, size, size)
        return x if autoencoder is None else autoencoder.decode(x)

    def trajectory(network, recipe, labels, *how, autoencoder=None):
        image = draw(network, recipe, labels, *how, autoencoder=autoencoder)[None]
        return ["only"], image, image

    def trainer(*arguments):
        found.trainer = training.Trainer(*arguments)
        return found.trainer

    def plot(name):
        return lambda path, *rest: (path.write_bytes(name.encode()), found.plots.update({name: rest}))

    real_save, real_device = run.checkpoint.save, run.pick_device
    monkeypatch.setattr(
        run.checkpoint, "save", lambda state, path: (found.saved.append(state.step), real_save(state, path))
    )
    monkeypatch.setattr(run, "pick_device", lambda name: (setattr(found, "device", name), real_device("cpu"))[1])
    monkeypatch.setattr(run, "Trainer", trainer)
    monkeypatch.setattr(run.generate, "draw", draw)
    monkeypatch.setattr(run.generate, "trajectory", trajectory)
    for name in ("loss_plot", "samples_plot", "trajectory_plot", "grid_plot"):
        monkeypatch.setattr(run.plots, name, plot(name))
    yield found
    torch.set_num_threads(threads)


# Option and value of ``fastdiff demo``, what it decides, without it and with it. Training takes the six steps of TINY.
DEMO_OPTIONS = {
    "--process flow": (lambda a: type(a.trainer.recipe.process).__name__, "VariancePreserving", "RectifiedFlow"),
    "--prediction v": (lambda a: a.trainer.recipe.objective.prediction.name, "epsilon", "v_prediction"),
    "--weighting min-snr": (lambda a: type(a.trainer.recipe.objective.weighting).__name__, "Uniform", "MinSNR"),
    "--loss l1": (lambda a: type(a.trainer.recipe.objective.loss_function).__name__, "MSE", "L1"),
    "--sampler ddim": (lambda a: type(a.recipe.sampler).__name__, "DDPM", "DDIM"),
    "--guidance 3.5": (lambda a: a.guidance, 1.5, 3.5),
    "--steps 4": (lambda a: (a.trainer.step, len(a.trainer.losses)), (6, 6), (4, 4)),
    "--batch 5": (lambda a: int(a.trainer.time_loss[1].sum()), 6 * 8, 6 * 5),
    "--sample-steps 7": (lambda a: a.steps, 3, 7),
    "--width 16": (lambda a: a.trainer.model.stem.out_channels, 8, 16),
    "--seed 11": (lambda a: (a.seed, a.trainer.settings.seed), (0, 0), (11, 11)),
    "--threads 2 --steps 1 --batch 1": (lambda a: a.threads, 1, 2),
    "--save-every 2": (lambda a: a.saved, [0, 6], [0, 2, 4, 6]),
    "--device cpu:0": (lambda a: a.device, "cpu", "cpu:0"),
    "--latent": (lambda a: a.trainer.model.stem.in_channels, 1, latent.CHANNELS),
    # One image of eight is held out: 1797 - 225 are learned.
    **{
        f"--{name}": (
            lambda a: (a.trainer.terms and a.trainer.terms.names, len(a.trainer.images)),
            (None, 1797),
            ((name,), 1572),
        )
        for name in ("perceptual", "adversarial", "align", "classifier")
    },
}
# The same of ``fastdiff sample``, on a run of TINY; then of ``fastdiff bench`` in test_bench.py.
SAMPLE_OPTIONS = {
    "--classes 3,1,3": (
        lambda a: (a.labels, a.plots["grid_plot"][1]),
        (list(range(10)) * 8, [*"0123456789"] * 8),
        ([3, 1, 3], ["3", "1", "3"]),
    ),
    "--count 12": (lambda a: (a.labels, a.plots["grid_plot"][2]), (list(range(10)) * 8, 10), ([*range(10), 0, 1], 10)),
    "--sampler ddim": (
        lambda a: (type(a.recipe.sampler).__name__, a.plots["grid_plot"][3].split(",")[0]),
        ("DDPM", "ddpm"),
        ("DDIM", "ddim"),
    ),
    "--steps 2": (lambda a: a.steps, 3, 2),
    "--guidance 4": (lambda a: a.guidance, 1.5, 4.0),
    "--seed 9": (lambda a: a.seed, 0, 9),
    "--device cpu:0": (lambda a: a.device, "auto", "cpu:0"),
}


def options_of(name):
    """The options of a command, without --help."""
    (commands,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    actions = commands.choices[name]._actions
    return {option for action in actions for option in action.option_strings} - {"-h", "--help"}


class TestOptions:
    """Each option decides what its help says; one that is added needs a case."""

    @pytest.mark.parametrize("option", DEMO_OPTIONS)
    def test_demo(self, asked, tmp_path, option):
        read, without, with_it = DEMO_OPTIONS[option]
        for arguments, expected in (((), without), (option.split(), with_it)):
            asked.saved.clear()
            assert main(["demo", *TINY, *arguments, "--out", str(tmp_path / str(len(arguments)))]) == 0
            assert read(asked) == expected

    @pytest.mark.parametrize(
        "options, shape, gray",
        [("", (2, 3, 32, 32), False), ("--size 9", (2, 3, 9, 9), False), ("--gray", (2, 1, 32, 32), True)],
    )
    def test_demo_of_images(self, asked, tmp_path, options, shape, gray):
        for name in "ab":
            (tmp_path / name).mkdir()
            Image.new("RGB", (20, 10), "red").save(tmp_path / name / "x.png")
        command = ["demo", *TINY, "--steps", "1", "--data", str(tmp_path), *options.split()]
        assert main([*command, "--out", str(tmp_path / "out")]) == 0
        assert asked.trainer.images.shape == shape and asked.trainer.labels.tolist() == [0, 1]
        # Eight of each class are drawn.
        assert asked.labels == [0, 1] and asked.plots["samples_plot"][1][1].shape == (8, *shape[1:])

    @pytest.mark.parametrize("option", SAMPLE_OPTIONS)
    def test_sample(self, finished, asked, tmp_path, option):
        read, without, with_it = SAMPLE_OPTIONS[option]
        command = ["sample", "--checkpoint", str(finished / "checkpoint.pt"), "--out", str(tmp_path / "a.png")]
        for arguments, expected in (((), without), (option.split(), with_it)):
            assert main([*command, "--overwrite", *arguments]) == 0
            assert read(asked) == expected

    def test_none_is_forgotten(self):
        tables = {"demo": DEMO_OPTIONS, "sample": SAMPLE_OPTIONS, "doctor": {}}
        elsewhere = {
            "demo": {"--data", "--size", "--gray", "--out", "--resume", "--parallel"},
            "sample": {"--checkpoint", "--out", "--overwrite"},
            "doctor": {"--json", "--trace", "--verify", "--shape", "--dtype", "--device"},
        }
        for name, table in tables.items():
            assert options_of(name) == {option.split()[0] for option in table} | elsewhere[name]


class TestDemo:
    def test_writes_every_file(self, finished):
        assert {path.name for path in finished.iterdir()} == FILES
        for name in FILES:
            if name.endswith(".png"):
                check_png(finished / name)

    def test_report(self, finished):
        report = json.loads((finished / "report.json").read_text())
        assert report["settings"]["steps"] == report["steps"] == 6
        assert report["settings"]["process"] == "vp-linear" and report["settings"]["seed"] == 0
        assert report["device"] == "cpu" and report["backend"] == fastdiff.backends.choose("cpu")
        assert report["loss_first"] > 0 and report["loss_last"] > 0
        assert report["seconds"] > 0 and report["images_per_second"] > 0
        assert report["samples_drawn"] == 500 and 0 <= report["digit_accuracy"] <= 1
        assert sum(report["digits_recognised"].values()) == round(500 * report["digit_accuracy"])
        assert report["classifier_accuracy"] >= 0.98
        assert report["versions"]["fastdiff"] == fastdiff.__version__
        assert report["versions"]["torch"] == torch.__version__

    def test_prints_the_results(self, asked, tmp_path, capsys):
        assert main(["demo", *TINY, "--process", "flow", "--out", str(tmp_path)]) == 0
        output = capsys.readouterr().out
        for text in ("flow", "of held-out real digits", "of 500 recognised", "images/s", *FILES):
            assert text in output

    def test_fresh_folder_without_out(self, asked, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        for _ in range(2):
            assert main(["demo", *TINY, "--steps", "1"]) == 0
        runs = list((tmp_path / "runs").iterdir())
        assert len(runs) == 2 and all({path.name for path in run.iterdir()} == FILES for run in runs)

    def test_own_images(self, tmp_path, capsys):
        for name, colour in (("a rather long name of a class", "red"), ("sky", "blue")):
            (tmp_path / "images" / name).mkdir(parents=True)
            Image.new("RGB", (20, 10), colour).save(tmp_path / "images" / name / "a.png")
        out = tmp_path / "out"
        assert main(["demo", *TINY, "--data", str(tmp_path / "images"), "--size", "9", "--out", str(out)]) == 0
        report = json.loads((out / "report.json").read_text())
        assert report["digit_accuracy"] is None and report["classes"] == ["a rather long name of a class", "sky"]
        assert report["settings"]["batch"] == 8 and report["images"] == 2
        for name in ("loss.png", "samples.png", "trajectory.png"):
            check_png(out / name)
        # Moved images are the same images; other images are not.
        (tmp_path / "images").rename(tmp_path / "moved")
        assert main(["demo", "--out", str(out), "--resume", "--data", str(tmp_path / "moved")]) == 0
        Image.new("RGB", (20, 10), "green").save(tmp_path / "moved" / "sky" / "b.png")
        assert "are not those" in refused(capsys, "demo", "--out", out, "--resume", "--data", tmp_path / "moved")

    def test_a_single_image(self, tmp_path):
        (tmp_path / "in").mkdir()
        Image.new("L", (30, 30), 99).save(tmp_path / "in" / "a.jpg")
        command = [
            "demo",
            *TINY,
            "--data",
            str(tmp_path / "in"),
            "--size",
            "8",
            "--gray",
            "--out",
            str(tmp_path / "out"),
        ]
        assert main(command) == 0
        check_png(tmp_path / "out" / "samples.png")

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("--process", "flow", "--prediction", "v_prediction"), "not defined for RectifiedFlow"),
            (("--process", "nonsense"), "unknown process"),
            (("--sampler", "nonsense"), "unknown sampler"),
            (("--steps", "0"), "--steps must lie in"),
            (("--size", "16"), "go with --data"),
            (("--data", "/nowhere/at/all"), "not a folder"),
            (("--device", "nonsense"), "cannot be used"),
            (("--threads", "0"), "--threads must be at least 1"),
            (("--save-every", "0"), "--save-every must be at least 1"),
            (("--parallel", "nonsense"), "unknown --parallel 'nonsense': use one of data"),
            (("--parallel", "data"), "--parallel data needs several processes: start them with  torchrun"),
        ],
    )
    def test_refuses_in_one_line_and_writes_nothing(self, tmp_path, capsys, arguments, message):
        assert message in refused(capsys, "demo", "--out", tmp_path / "out", *arguments)
        assert not (tmp_path / "out").exists()

    def test_out_that_cannot_be_made(self, tmp_path, capsys):
        (tmp_path / "file").touch()
        assert "not a folder" in refused(capsys, "demo", *TINY, "--out", tmp_path / "file")
        assert main(["demo", *TINY, "--out", str(tmp_path / "file" / "below")]) == 1
        assert capsys.readouterr().err.count("\n") == 1


class TestResume:
    @pytest.fixture
    def content(self, finished):
        """The files of the finished run; none may change."""
        before = {path.name: path.read_bytes() for path in finished.iterdir()}
        yield before
        assert {path.name: path.read_bytes() for path in finished.iterdir()} == before

    def test_refuses_to_overwrite(self, finished, content, capsys):
        message = refused(capsys, "demo", *TINY, "--out", finished)
        assert "checkpoint.pt" in message and "--resume" in message

    @pytest.mark.parametrize("name", ["report.json", "samples.png"])
    def test_refuses_to_overwrite_any_output(self, tmp_path, capsys, name):
        (tmp_path / name).touch()
        assert name in refused(capsys, "demo", *TINY, "--out", tmp_path)
        assert name in refused(capsys, "demo", *TINY, "--out", tmp_path, "--resume")
        assert (tmp_path / name).read_bytes() == b""

    def test_other_settings_are_named(self, finished, content, capsys):
        message = refused(capsys, "demo", "--out", finished, "--resume", "--steps", "7", "--prediction", "v")
        assert "--steps 7 (the checkpoint has 6)" in message and "--prediction v_prediction" in message
        assert "--batch" not in message

    def test_needs_out(self, capsys):
        assert "--out" in refused(capsys, "demo", "--resume")

    @pytest.mark.parametrize("made", [False, True], ids=["no folder", "an empty folder"])
    def test_without_a_run_to_resume(self, tmp_path, capsys, made):
        out = tmp_path / "new"
        if made:
            out.mkdir()
        message = refused(capsys, "demo", *TINY, "--out", out, "--resume")
        assert f"{out} holds no run to resume" in message and "leave out --resume" in message
        assert out.exists() == made and not list(tmp_path.glob("new/*"))

    def test_truncated_checkpoint(self, finished, tmp_path, capsys):
        whole = (finished / "checkpoint.pt").read_bytes()
        (tmp_path / "checkpoint.pt").write_bytes(whole[:-1000])
        (tmp_path / "report.json").write_text("old")
        assert "truncated" in refused(capsys, "demo", "--out", tmp_path, "--resume")
        assert (tmp_path / "checkpoint.pt").read_bytes() == whole[:-1000]
        assert (tmp_path / "report.json").read_text() == "old"

    def test_finished_run_makes_its_outputs_again(self, finished, tmp_path):
        (tmp_path / "checkpoint.pt").write_bytes((finished / "checkpoint.pt").read_bytes())
        assert main(["demo", "--out", str(tmp_path), "--resume", "--device", "cpu"]) == 0
        assert {path.name for path in tmp_path.iterdir()} == FILES
        for name in ("checkpoint.pt", "loss.png", "samples.png", "trajectory.png"):
            assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()

    def test_other_machine_is_said(self, asked, finished, tmp_path, capsys):
        (tmp_path / "checkpoint.pt").write_bytes((finished / "checkpoint.pt").read_bytes())
        assert main(["demo", "--out", str(tmp_path), "--resume", "--device", "cpu", "--threads", "2"]) == 0
        assert "threads 2" in capsys.readouterr().out


class TestSample:
    def test_draws_a_grid(self, finished, tmp_path, capsys):
        out = tmp_path / "a" / "b.png"
        command = ["sample", "--checkpoint", finished / "checkpoint.pt", "--out", out, "--steps", "2", "--count", "3"]
        assert main([str(argument) for argument in command]) == 0
        check_png(out)
        assert f"3 images: {out}" in capsys.readouterr().out

    def test_the_folder_of_a_run_is_its_checkpoint(self, finished, tmp_path, capsys):
        for name, given in (("a", finished), ("b", finished / "checkpoint.pt")):
            command = [
                "sample",
                "--checkpoint",
                given,
                "--out",
                tmp_path / f"{name}.png",
                "--steps",
                "2",
                "--count",
                "1",
            ]
            assert main([str(argument) for argument in command]) == 0
        assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()
        (tmp_path / "empty").mkdir()
        message = refused(capsys, "sample", "--checkpoint", tmp_path / "empty", "--out", tmp_path / "c.png")
        assert f"{tmp_path / 'empty'} holds no checkpoint.pt: name the folder of a run of fastdiff demo" in message

    def test_of_an_unfinished_run_is_said(self, asked, tmp_path, monkeypatch, capsys):
        def interrupt(trainer):
            raise KeyboardInterrupt

        monkeypatch.setattr(training.Trainer, "train_step", interrupt)
        assert main(["demo", *TINY, "--out", str(tmp_path)]) == 130
        assert f"continue with  fastdiff demo --out {tmp_path} --resume" in capsys.readouterr().out
        assert main(["sample", "--checkpoint", str(tmp_path / "checkpoint.pt"), "--out", str(tmp_path / "a.png")]) == 0
        assert "this checkpoint has done 0 of 6 training steps" in capsys.readouterr().out

    def test_depends_on_the_seed_alone(self, finished, tmp_path):
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
            command = ["sample", "--checkpoint", finished / "checkpoint.pt", "--count", "2", "--seed", seed]
            assert main([*map(str, command), "--out", str(tmp_path / f"{name}.png")]) == 0
        a, b, c = (Image.open(tmp_path / f"{name}.png").tobytes() for name in "abc")
        assert a == b and a != c

    def test_overwrite(self, finished, tmp_path, capsys):
        out = tmp_path / "a.png"
        out.write_bytes(b"mine")
        command = ("sample", "--checkpoint", finished / "checkpoint.pt", "--count", "1", "--out", out)
        assert "--overwrite" in refused(capsys, *command)
        assert out.read_bytes() == b"mine"
        assert main([*map(str, command), "--overwrite"]) == 0
        check_png(out)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("--classes", "12"), "no class '12'"),
            (("--classes", ""), "no class ''"),
            (("--count", "0"), "--count must be"),
            (("--steps", "1001"), "steps must lie in"),
            (("--sampler", "dimm"), "unknown sampler 'dimm' (did you mean 'ddim'?)"),
            (("--steps", "0"), "--steps must be"),
            (("--out", "a.jpg"), ".png"),
        ],
    )
    def test_refuses(self, finished, tmp_path, monkeypatch, capsys, arguments, message):
        monkeypatch.chdir(tmp_path)
        assert message in refused(capsys, "sample", "--checkpoint", finished / "checkpoint.pt", *arguments)
        assert not list(tmp_path.iterdir())

    def test_bad_checkpoint(self, finished, tmp_path, capsys):
        path = tmp_path / "c.pt"
        assert "there is no checkpoint" in refused(capsys, "sample", "--checkpoint", path, "--out", tmp_path / "a.png")
        path.write_bytes((finished / "checkpoint.pt").read_bytes()[:-1])
        assert "truncated" in refused(capsys, "sample", "--checkpoint", path, "--out", tmp_path / "a.png")


class TestDoctor:
    def test_text(self, capsys):
        assert main(["doctor"]) == 0
        output = capsys.readouterr().out
        for text in (fastdiff.__version__, torch.__version__, "cpu", "scikit-learn", "backend chosen for"):
            assert text in output
        for status in fastdiff.backends.status():
            assert status.name in output and status.reason in output

    @pytest.mark.parametrize("command", ["doctor --json", "doctor"])
    def test_a_reader_that_has_seen_enough(self, command):
        """As ``fastdiff doctor --json | head -1`` with a head that is gone before the first line."""
        reading, writing = os.pipe()
        os.close(reading)
        line = [sys.executable, "-m", "fastdiff", *command.split()]
        with os.fdopen(writing, "w") as output:
            done = subprocess.run(line, stdout=output, stderr=subprocess.PIPE, text=True)
        assert done.stderr == ""
        assert done.returncode == 141

    def test_json(self, capsys):
        assert main(["doctor", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report == json.loads(json.dumps(doctor.report()))
        assert report["versions"]["torch"] == torch.__version__
        assert report["chosen"]["cpu"] == fastdiff.backends.choose("cpu")
        assert [device["name"] for device in report["devices"]][0] == "cpu"

    def test_of_a_known_machine(self, monkeypatch, tmp_path, capsys):
        """Each line, of a machine with a GPU and a package that is not there."""
        (tmp_path / "cpuinfo").write_text("processor: 0\nmodel name\t: A Fast: CPU\nmodel name : another\n")
        (tmp_path / "version").write_text("NVRM version:  Module  570.1   of now\nGCC\n")
        files = {"/proc/cpuinfo": tmp_path / "cpuinfo", "/proc/driver/nvidia/version": tmp_path / "version"}
        properties = SimpleNamespace(name="A GPU", total_memory=79 * 2**30, major=9, minor=0)
        statuses = fastdiff.backends.status()
        for target, name, value in (
            (doctor.backends, "status", lambda: statuses),
            (doctor, "Path", files.get),
            (doctor, "version", {"triton": "3.2.1"}.get),
            (doctor.os, "cpu_count", lambda: 12),
            (doctor.platform, "python_version", lambda: "3.99"),
            (torch, "get_num_threads", lambda: 3),
            (torch.version, "cuda", "13.1"),
            (torch.version, "hip", None),
            (torch.backends.cpu, "get_cpu_capability", lambda: "AVX9"),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "get_device_properties", lambda index: properties),
            (torch.backends.mps, "is_available", lambda: False),
            (doctor.backends, "choose", lambda device: {"cpu": "slow", "cuda": "quick"}[device.type]),
            (doctor.torch_randn, "reason", lambda: "because"),
            (doctor.platform, "libc_ver", lambda: ("glibc", "2.36")),
            (doctor.os, "environ", {"MALLOC_MMAP_MAX_": "1"}),
        ):
            monkeypatch.setattr(target, name, value)
        assert main(["doctor"]) == 0
        lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        for line in (
            f"fastdiff {fastdiff.__version__}",
            "python 3.99",
            "cuda_runtime 13.1",
            "hip -",
            "cuda_driver Module 570.1 of now",
            "triton 3.2.1",
            "tqdm not installed",
            "cpu A Fast: CPU, 12 cores, 3 threads, AVX9",
            "cuda:0 A GPU, 79.0 GiB, compute capability 9.0",
            "cpu slow",
            "cuda:0 quick",
            "float32 torch.randn (because)",
            "fastdiff's new every time (the slow backend leaves that to PyTorch)",
            "PyTorch's often new; docs/performance.md says what to set",
        ):
            assert line in lines
        for status in statuses:
            said = f"{'available' if status.available else 'not available'} ({status.reason})"
            assert f"{status.name} {said}" in lines

    @pytest.mark.parametrize(
        ("libc", "settings", "said"),
        [
            ("glibc", {}, "often new; docs/performance.md says what to set"),
            ("glibc", {"MALLOC_MMAP_MAX_": "0"}, "often new; docs/performance.md says what to set"),
            (
                "glibc",
                {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1099511627776"},
                "used again, as MALLOC_MMAP_MAX_ and MALLOC_TRIM_THRESHOLD_ say",
            ),
            ("glibc", {"LD_PRELOAD": "/usr/lib/libtcmalloc.so.4"}, "tcmalloc decides how much is used again"),
            ("", {}, "the C library decides how much is used again"),
        ],
    )
    def test_what_becomes_of_freed_memory(self, libc, settings, said, monkeypatch):
        monkeypatch.setattr(doctor.platform, "libc_ver", lambda: (libc, "2"))
        monkeypatch.setattr(doctor.os, "environ", settings)
        assert doctor._freed_memory() == said

    @pytest.mark.parametrize(("chosen", "why", "said"), [("native", "", ""), ("native", "so", "so")])
    def test_which_results_lie_in_new_memory(self, chosen, why, said, monkeypatch):
        monkeypatch.setattr(doctor.recycling, "_reason", why)
        assert doctor._new_results(chosen) == said

    def test_works_with_torch_alone(self):
        """Neither the import nor the doctor needs an extra; the demo says which it needs."""
        code = (
            "import sys\n"
            "for name in ('numpy', 'sklearn', 'matplotlib', 'PIL', 'tqdm', 'triton'): sys.modules[name] = None\n"
            "from fastdiff.cli import main\n"
            "assert main(['doctor']) == 0\n"
            "sys.exit(main(['demo']))\n"
        )
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert done.stderr.strip().endswith('run  pip install "fastdiff[demo]"')


class TestBits:
    QUICK = ("--draws", "2", "--count", "20", "--device", "cpu")

    def test_prints_and_plots_the_parts(self, finished, tmp_path, capsys):
        out, state = tmp_path / "of" / "bits.png", tmp_path / "state.pt"
        command = ["bits", "--checkpoint", str(finished), *self.QUICK, "--out", str(out), "--state", str(state)]
        assert main(command) == 0
        check_png(out)
        printed = capsys.readouterr().out
        lines = [" ".join(line.split()) for line in printed.splitlines()]
        first = re.fullmatch(r"([0-9.]+) bits per dimension, \+- ([0-9.]+) \(standard error\), of 20 images", lines[0])
        parts = [line.rsplit(" ", 1) for line in lines[1:-1]]
        names = [name for name, _ in parts]
        assert names[0] == "L_0, the likelihood of the data" and names[1:3] == ["L_1", "L_2 to L_3"]
        assert names[-2:] == ["L_512 to L_999", "L_T, the prior"] and len(names) == 12
        assert lines[-1] == f"the terms by timestep: {out}"
        kept = torch.load(state)["sums"]
        assert float(first[1]) == pytest.approx(kept["total"] / 20, abs=1e-4) and float(first[2]) > 0
        assert main([*command, "--overwrite"]) == 0  # from its state
        assert capsys.readouterr().out == printed

    def test_is_the_bound_of_the_averaged_weights_over_the_digits(self, finished, tmp_path, monkeypatch):
        from fastdiff.demo import bits, checkpoint, data

        saved = checkpoint.find(finished)
        found = bits.show_bits(finished, tmp_path / "a.png", draws=3, count=30, seed=5, device="cpu")
        images = data.digits()
        want = fastdiff.bits_per_dim(
            saved.ema_network(torch.device("cpu")), [(images.images[:30], images.labels[:30])],
            fastdiff.VariancePreserving("linear"), "epsilon", bins=17, draws=3, seed=5, progress=False,
        )  # fmt: skip
        assert found.total == pytest.approx(want.total, rel=1e-6) and found.samples == 30
        torch.testing.assert_close(found.terms, want.terms, equal_nan=True)

    def test_images_of_ones_own_have_256_values(self, finished, tmp_path, monkeypatch):
        from fastdiff.demo import bits, data

        seen = []

        def stopped(*given, bins, **how):
            seen.append(bins)
            raise ValueError("enough")

        monkeypatch.setattr(bits, "folder", lambda *how: data.digits())
        monkeypatch.setattr(bits, "bits_per_dim", stopped)
        for source in (None, tmp_path):
            with pytest.raises(bits.DemoError, match="enough"):
                bits.show_bits(finished, tmp_path / "a.png", data=source, device="cpu")
        assert seen == [17, 256]

    @pytest.mark.parametrize(
        ("option", "name", "value"),
        [
            ("--count 7", "count", 7),
            ("--draws 4", "draws", 4),
            ("--variance fixed_large", "variance", "fixed_large"),
            ("--seed 3", "seed", 3),
            ("--device cpu:0", "device", "cpu:0"),
            ("--overwrite", "overwrite", True),
            ("--data images", "data", Path("images")),
            ("--state kept.pt", "state", Path("kept.pt")),
            ("--out other.png", "out", Path("other.png")),
        ],
    )
    def test_options(self, option, name, value, monkeypatch):
        from fastdiff.demo import bits

        given = []
        monkeypatch.setattr(bits, "show_bits", lambda path, out, **named: given.append({"out": out} | named))
        assert main(["bits", "--checkpoint", "x"]) == 0
        assert main(["bits", "--checkpoint", "x", *option.split()]) == 0
        assert given[1][name] == value != given[0][name]
        assert {k: v for k, v in given[1].items() if k != name} == {k: v for k, v in given[0].items() if k != name}
        assert options_of("bits") == {"--checkpoint", "--data", "--count", "--draws", "--variance", "--seed", "--state",
                                      "--out", "--overwrite", "--device"}  # fmt: skip

    def test_refusals(self, finished, tmp_path, capsys):
        bits = ("bits", "--checkpoint", finished, *self.QUICK)
        assert "must name a .png" in refused(capsys, *bits, "--out", tmp_path / "x.jpg")
        (tmp_path / "x.png").touch()
        assert "--overwrite" in refused(capsys, *bits, "--out", tmp_path / "x.png")
        out = ("--out", tmp_path / "y.png")
        assert "--count must be at least 1" in refused(capsys, *bits, *out, "--count", "0")
        assert "--draws must be at least 1" in refused(capsys, *bits, *out, "--draws", "0")
        assert "no checkpoint.pt" in refused(capsys, "bits", "--checkpoint", tmp_path, *out)
        main(["bits", "--checkpoint", str(finished), *self.QUICK, "--state", str(tmp_path / "s.pt"), "--out",
              str(tmp_path / "z.png")])  # fmt: skip
        said = refused(capsys, *bits, *out, "--state", tmp_path / "s.pt", "--seed", "1")
        assert "seed=0" in said

    def test_a_continuous_process_is_refused(self, tmp_path, capsys):
        run = tmp_path / "flow"
        assert main(["demo", *TINY, "--steps", "1", "--process", "flow", "--out", str(run)]) == 0
        assert "probability-flow" in refused(capsys, "bits", "--checkpoint", run, "--out", tmp_path / "y.png")


# What stands for the value of an option in the help, where it is not its own name.
VALUES = {
    "demo": {
        **dict.fromkeys(("--process", "--prediction", "--weighting", "--loss", "--sampler"), "NAME"),
        **{"--data": "DIR", "--out": "DIR", "--save-every": "STEPS", "--parallel": "HOW"},
    },
    "sample": {"--checkpoint": "PATH", "--sampler": "NAME", "--classes": "A,B,...", "--out": "FILE"},
    "bench": {
        **{"--preset": "NAME", "--dtype": "A,B,...", "--against": "A,B,...", "--nproc": "N", "--out": "DIR"},
        "--compare": ("A.json", "B.json"),
    },
    "bits": {"--checkpoint": "PATH", "--data": "DIR", "--state": "FILE", "--out": "FILE.png"},
    "doctor": {"--trace": "SCRIPT", "--shape": "BxCxHxW", "--dtype": "A,B,..."},
}
SAY_THEMSELVES = {"--guidance", "--seed"}  # of ``fastdiff sample``


@pytest.mark.parametrize("command", VALUES)
def test_what_the_help_says(command, capsys, monkeypatch):
    """What the command does, each option, its value and its default."""
    monkeypatch.setenv("COLUMNS", "500")
    printed = []
    for arguments in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 0
        printed.append(capsys.readouterr().out)
    assert "usage: fastdiff [-h] [--version] COMMAND ..." in printed[0] and "Fast arithmetic for" in printed[0]
    (line,) = (line.strip() for line in printed[0].splitlines() if line.strip().startswith(f"{command} "))
    usage, description = printed[1].split("\n\n")[:2]
    assert usage.startswith(f"usage: fastdiff {command} [-h]")
    # The list of commands says in short what the command's own help begins with.
    assert line.split()[1].capitalize() == description.split()[0] and description.endswith(".")
    (commands,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    defaults = vars(settings.resolve({})) | {"preset": "quick", "device": "auto", "save_every": 100}
    values = {}
    for action in commands.choices[command]._actions:
        (option,) = action.option_strings[-1:]
        if action.metavar is not None:
            values[option] = action.metavar
        said = action.help or ""
        assert said or (command == "sample" and option in SAY_THEMSELVES), option
        if action.dest in defaults and (default := re.search(r"default ([\w.-]+)[,)]", said)):
            assert default[1] == ("32" if option == "--size" else str(defaults[action.dest])), option  # 8 of digits
        assert action.required == (option == "--checkpoint"), option
    assert values == VALUES[command]


def test_help_and_version(capsys):
    for arguments in (["--help"], ["demo", "--help"], ["sample", "--help"], ["doctor", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 0
    assert fastdiff.__version__ in capsys.readouterr().out


def test_module_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastdiff", "--version"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("fastdiff", run_name="__main__")
    assert exit.value.code == 0
    assert capsys.readouterr().out.strip() == f"fastdiff {fastdiff.__version__}"
