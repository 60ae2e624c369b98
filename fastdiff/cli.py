"""The command line: ``fastdiff demo``, ``sample``, ``bits``, ``bench`` and ``doctor``."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__, doctor, trace, verify
from .bench import BenchError
from .bench.cases import DTYPES, PRESETS
from .demo import DemoError, bits, run
from .demo.settings import PROCESSES, SAMPLERS, Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 2 for what the user can put right, 1 for the machine, 130 for Ctrl-C, 141
    where nobody reads the output any more."""
    options = _parser().parse_args(arguments)
    try:
        status = options.command(options)
        sys.stdout.flush()  # here, where it can be seen to fail
    except (DemoError, BenchError) as error:
        print(f"fastdiff: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output, head for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        return 128 + 13  # as the shell says it of a program that SIGPIPE ended
    except OSError as error:  # a full disk, a folder that cannot be written to
        print(f"fastdiff: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastdiff", description="Fast arithmetic for diffusion models.")
    parser.add_argument("--version", action="version", version=f"fastdiff {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_sample(commands)
    _add_bits(commands)
    _add_bench(commands)
    _add_doctor(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a small U-Net on real images and draw new ones",
        description="Train a small class-conditional U-Net on handwritten digits (or your own images, or videos of "
        "moving digits), draw new ones, and say how many a classifier recognises. A run that was killed goes on with "
        "--resume, to the same bits. Under torchrun several processes train one network.",
    )
    parser.set_defaults(command=_demo)
    setting = parser.add_argument_group("settings").add_argument
    setting(
        "--data",
        metavar="DIR",
        help="PNG and JPEG images; subfolders are classes (default: 1797 real digits); or "
        "moving-digits, videos of these",
    )
    setting("--size", type=int, help="with --data: resize to SIZE x SIZE (default 32)")
    setting("--gray", action="store_true", default=None, help="with --data: one channel")
    setting("--process", metavar="NAME", help=f"{', '.join(PROCESSES)} (default vp-linear, of videos flow)")
    setting("--prediction", metavar="NAME", help="epsilon, v_prediction, flow, edm, ... (default: the process's)")
    setting("--weighting", metavar="NAME", help="uniform, min-snr, p2, ... (default uniform)")
    setting("--loss", metavar="NAME", help="mse, l1, huber, pseudo-huber, ... (default mse)")
    setting("--sampler", metavar="NAME", help=f"{', '.join(SAMPLERS)} (default: ddim for flow and edm, else ddpm)")
    setting("--guidance", type=float, help="strength of classifier-free guidance, 1 is none (default 1.5)")
    setting("--steps", type=int, help="training steps (default 1000, of videos 2000)")
    setting("--batch", type=int, help="images or videos a step (default 256, with --data 64, of videos 16)")
    setting("--sample-steps", type=int, help="sampling steps (default 50, of videos 30)")
    setting("--width", type=int, help="channels of the U-Net, a multiple of 8 (default 32, of videos 16)")
    setting("--seed", type=int, help="of everything random (default 0)")
    added = parser.add_argument_group("what is added to the loss, at low noise (together too)").add_argument
    for name, text in (
        ("perceptual", "the LPIPS distance of the x0 estimate, in features of a small classifier"),
        ("adversarial", "a small discriminator of x0 estimates, trained along"),
        ("align", "1 - the cosine of the embeddings of the x0 estimate and of its label"),
        ("classifier", "the cross-entropy of a small classifier of the x0 estimate"),
    ):
        added(f"--{name}", action="store_true", default=None, help=text)
    added = parser.add_argument_group("where the diffusion works").add_argument
    added("--latent", action="store_true", default=None, help="in the latents of a small autoencoder, trained first")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: a fresh runs/demo-TIME)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument(
        "--save-every", type=int, default=100, metavar="STEPS", help="checkpoint interval (default 100)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default 1 for images up to 16 x 16, else at most 8)")
    parser.add_argument(
        "--parallel", metavar="HOW", help="under torchrun: data, where each process has its share of every batch"
    )
    _add_device(parser)


def _demo(options: argparse.Namespace) -> None:
    run.demo(
        run.DemoOptions(
            settings={field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)},
            out=options.out,
            resume=options.resume,
            device=options.device,
            threads=options.threads,
            save_every=options.save_every,
            parallel=options.parallel,
        )
    )


def _add_sample(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "sample",
        help="draw images or videos from a checkpoint of the demo",
        description="Draw a grid of images or videos from a checkpoint of the demo. What is not given is as in that "
        "run.",
    )
    parser.set_defaults(command=_sample)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="PATH", help="the file, or its run's folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--classes", metavar="A,B,...", help="the class of each image, by name or index")
    which.add_argument("--count", type=int, help="so many images, of the classes in turn")
    parser.add_argument("--sampler", metavar="NAME", help=", ".join(SAMPLERS))
    parser.add_argument("--steps", type=int, help="sampling steps")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="default samples.png, of videos samples.gif")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    _add_device(parser)


def _sample(options: argparse.Namespace) -> None:
    run.draw_samples(
        options.checkpoint,
        options.out,
        classes=None if options.classes is None else options.classes.split(","),
        count=options.count,
        sampler=options.sampler,
        steps=options.steps,
        guidance=options.guidance,
        seed=options.seed,
        overwrite=options.overwrite,
        device=options.device,
    )


def _add_bits(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bits",
        help="the likelihood of a checkpoint of the demo, in bits per dimension",
        description="The variational bound of a checkpoint of the demo over its images, in bits per dimension: its "
        "parts, printed and plotted. For the discrete processes, such as vp-linear.",
    )
    parser.set_defaults(command=_bits)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="PATH", help="the file, or its run's folder")
    parser.add_argument("--data", type=Path, metavar="DIR", help="other images than those of the run")
    parser.add_argument("--count", type=int, help="so many of the images (default: all)")
    parser.add_argument("--draws", type=int, help="timesteps drawn for each image (default: all of them)")
    parser.add_argument(
        "--variance",
        default="fixed_small",
        choices=("fixed_small", "fixed_large"),
        help="of the model's steps (default fixed_small)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--state", type=Path, metavar="FILE", help="keep what was computed there, and go on from it")
    parser.add_argument(
        "--out", type=Path, default=Path("bits.png"), metavar="FILE.png", help="the plot (default bits.png)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    _add_device(parser)


def _bits(options: argparse.Namespace) -> None:
    bits.show_bits(
        options.checkpoint,
        options.out,
        data=options.data,
        variance=options.variance,
        draws=options.draws,
        count=options.count,
        seed=options.seed,
        state=options.state,
        overwrite=options.overwrite,
        device=options.device,
    )


def _add_bench(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure the operations on this machine, against what one would use instead",
        description="Measure what the operations and a whole training step take on this machine: against the memory, "
        "and against eager PyTorch, torch.compile and diffusers in the same run. Writes bench.json, bench.csv, "
        "bench.md, bench.png and bench.html.",
    )
    parser.set_defaults(command=_bench)
    parser.add_argument("--preset", default="quick", metavar="NAME", help=f"{', '.join(PRESETS)} (default quick)")
    parser.add_argument("--dtype", metavar="A,B,...", help=f"{', '.join(DTYPES)} (default: the preset's)")
    parser.add_argument(
        "--against",
        default="eager,compile,diffusers,reference",
        metavar="A,B,...",
        help="eager, compile, diffusers, reference, or none (default: all)",
    )
    parser.add_argument("--model", default="none", help="unet-small or dit-b: a network between noising and loss")
    parser.add_argument("--nproc", type=int, metavar="N", help="measure in N processes at once, one a GPU")
    parser.add_argument("--seconds", type=float, help="measure for so long (default: the preset's)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: a fresh runs/bench-TIME)")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="show what changed between two reports"
    )
    _add_device(parser)


def _bench(options: argparse.Namespace) -> int | None:
    from .bench import command

    if options.compare is not None:
        command.compare_files(*options.compare)
        return None
    if options.nproc is not None:
        return command.in_processes(options.nproc, _without_nproc(options))
    command.bench(
        command.BenchOptions(
            preset=options.preset,
            device=options.device,
            dtypes=None if options.dtype is None else tuple(options.dtype.split(",")),
            against=() if options.against == "none" else tuple(options.against.split(",")),
            model=options.model,
            out=options.out,
            seconds=options.seconds,
            threads=options.threads,
        )
    )
    return None


def _without_nproc(options: argparse.Namespace) -> list[str]:
    """The arguments of the processes that --nproc starts."""
    names = ("preset", "dtype", "against", "model", "seconds", "threads", "out", "device")
    given = {name: getattr(options, name) for name in names}
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "doctor",
        help="show versions, devices and backends; or how exact steps are here; or what of a script is fused",
        description="Show versions, devices, and which backends are available, or why not. With --verify, compare "
        "training steps, fused and as scripts write them, with float64: the error of x_t, loss and gradient, the "
        "gradient's cosine and bias. With --trace, run a script and say which calls of its objectives and schedulers "
        "were fused, which were not, and why.",
    )
    parser.set_defaults(command=_doctor)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="the status is 1 where fastdiff is less exact than eager steps, or its loss than rounding",
    )
    parser.add_argument(
        "--shape", action="append", metavar="BxCxHxW", help="of the data, with --verify; may be repeated"
    )
    parser.add_argument("--dtype", metavar="A,B,...", help=f"with --verify: {', '.join(DTYPES)} (default bf16,fp32)")
    parser.add_argument("--device", help="with --verify: auto (a GPU if there is one), cpu, cuda, ... (default auto)")
    parser.add_argument(
        "--trace", nargs=argparse.REMAINDER, metavar="SCRIPT", help="a Python script, and its arguments behind it"
    )


def _doctor(options: argparse.Namespace) -> int | None:
    if options.verify:
        if options.trace is not None:
            raise BenchError("--verify and --trace are two things: ask for one of them.")
        dtypes = ("bf16", "fp32") if options.dtype is None else tuple(options.dtype.split(","))
        if unknown := [dtype for dtype in dtypes if dtype not in DTYPES]:
            raise BenchError(f"--dtype must be of {', '.join(DTYPES)}; got {', '.join(unknown)}.")
        shapes = verify.SHAPES if options.shape is None else [_shape(words) for words in options.shape]
        fine = verify.show(shapes, dtypes, run.pick_device(options.device or "auto"), options.json)
        return 0 if fine else 1
    for name in ("shape", "dtype", "device"):
        if getattr(options, name) is not None:
            raise BenchError(f"--{name} goes with --verify.")
    if options.trace is None:
        doctor.show(options.json)
        return None
    if not options.trace or not Path(options.trace[0]).is_file():
        print(f"fastdiff: error: --trace needs a script; got {' '.join(options.trace) or 'none'}.", file=sys.stderr)
        return 2
    return trace.run(options.trace[0], options.trace[1:])


def _shape(words: str) -> tuple[int, ...]:
    sizes = words.lower().split("x")
    if len(sizes) < 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise BenchError(f"--shape must be sizes, the batch first, such as 4x16x128x128; got {words!r}.")
    return tuple(map(int, sizes))


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, ... (default auto)")
