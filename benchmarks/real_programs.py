"""Fifty steps of other people's training programs, as they are and with fastdiff, on the CPU: are the losses the same?

    python benchmarks/real_programs.py dit PATH/TO/DiT --seed 0

PATH is a checkout of the program (``PROGRAMS`` below says of which). It is copied twice; in the second copy the lines
are changed that the pages in docs/trainers say. Both copies run in processes of their own, with the same flags, seed
and random images, and what each calls ``backward`` on is compared. Prints a row of the table in
results/real_programs.md.

Nothing of the programs is in this file: edits are given by names to look for. What is needed beside fastdiff and
diffusers: torchvision, timm (DiT, SiT), torchdiffeq (SiT), datasets (diffusers' scripts), click (EDM). The programs ask
for GPUs, downloaded autoencoders and trackers; ``stand_in`` gives both copies one process on the CPU, an untrained
autoencoder of eight channels, and no tracker.
"""

import argparse
import difflib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import fastdiff

ROOT = Path(__file__).resolve().parents[1]
STEPS = 50


# ------------------------------------------------------------------------------------------------------- the patches


@dataclass(frozen=True)
class Edit:
    """Lines of a file from the first that has ``start`` to the first from there that has ``stop`` become ``lines``.

    Without ``stop`` ``lines`` come behind the one line; ``lines`` are indented as it is."""

    file: str
    start: str
    stop: str | None
    lines: str

    def apply(self, root):
        path = root / self.file
        old = path.read_text().splitlines()
        first = next(i for i, line in enumerate(old) if self.start in line)
        indent = re.match(r"\s*", old[first]).group()
        new = [indent + line if line else line for line in self.lines.splitlines()]
        if self.stop is None:
            old[first + 1 : first + 1] = new
        else:
            last = next(i for i in range(first, len(old)) if self.stop in old[i])
            old[first : last + 1] = new
        path.write_text("\n".join(old) + "\n")


@dataclass(frozen=True)
class Program:
    """A training program: its folder in the checkout, file, flags ({data}, {out}, {model} filled in), and our edits."""

    folder: str
    file: str
    flags: str
    edits: tuple
    images: int = 64
    size: int = 32
    layout: str = "folders"
    environment: dict = field(default_factory=dict)


_DIT = "--data-path {data} --results-dir {out} --model {name}-S/8 --global-batch-size 4 --epochs 4 --num-workers 0"
_UNCONDITIONAL = (
    "--train_data_dir {data} --output_dir {out} --resolution 32 --train_batch_size 4 --num_epochs 1 "
    "--model_config_name_or_path {model}/unet2d --lr_warmup_steps 0 "
)
_TEXT_TO_IMAGE = (
    "--pretrained_model_name_or_path {model} --train_data_dir {data} --output_dir {out} --resolution 64 "
    "--train_batch_size 4 --max_train_steps 50 --learning_rate 1e-4 --lr_warmup_steps 0 --seed {seed} "
)

PROGRAMS = {
    # facebookresearch/DiT
    "dit": Program(
        "", "train.py", _DIT.replace("{name}", "DiT") + " --image-size 256 --global-seed {seed}",
        (
            Edit("train.py", "from diffusion import", None, "from fastdiff.integrations import guided_diffusion"),
            Edit("train.py", "create_diffusion(timestep", None, "guided_diffusion.fuse(diffusion)"),
        ),
    ),
    # willisma/SiT
    "sit": Program(
        "", "train.py", _DIT.replace("{name}", "SiT") + " --image-size 256 --global-seed {seed}",
        (
            Edit("train.py", "from transport import", None, "from fastdiff.integrations import flow"),
            Edit("train.py", "transport_sampler = ", None, "flow.fuse(transport)"),
        ),
        environment={"ENTITY": "nobody", "PROJECT": "none"},
    ),
    # NVlabs/edm
    "edm": Program(
        "", "train.py",
        "--outdir {out} --data {data} --cbase 16 --cres 1,2 --batch 20 --duration 0.001 --lr 10 --tick 1 --seed {seed}",
        (
            *(
                Edit("train.py", f"training.loss.{name}", f"training.loss.{name}",
                     f"c.loss_kwargs.class_name = 'fastdiff.integrations.edm.{name}'")
                for name in ("VPLoss", "VELoss", "EDMLoss")
            ),
            Edit("training/training_loop.py", "'Loss/loss'", "'Loss/loss'",
                 "training_stats.report('Loss/loss', loss / images[0].numel())"),
        ),
        layout="flat",
    ),
    # huggingface/diffusers
    "unconditional": Program(
        "examples/unconditional_image_generation", "train_unconditional.py", _UNCONDITIONAL,
        (
            Edit("train_unconditional.py", "from diffusers.utils.import_utils", None,
                 "from fastdiff.integrations import training_scripts"),
            Edit("train_unconditional.py", "# Initialize the optimizer", "# Initialize the optimizer",
                 "script = training_scripts.unconditional(noise_scheduler)\n\n# Initialize the optimizer"),
            Edit("train_unconditional.py", "# Sample noise that", "noise_scheduler.add_noise(",
                 "noised = script.noise(clean_images)"),
            Edit("train_unconditional.py", "model_output = model(", "model_output = model(",
                 "model_output = model(noised.model_input, noised.model_time).sample"),
            Edit("train_unconditional.py", 'if args.prediction_type == "epsilon"', "Unsupported prediction type",
                 "loss = script.loss(model_output, noised)"),
        ),
        images=208,  # an epoch, behind which the script draws samples, is longer than the fifty steps
    ),
    "text_to_image": Program(
        "examples/text_to_image", "train_text_to_image.py", _TEXT_TO_IMAGE,
        (
            Edit("train_text_to_image.py", "from diffusers.utils.torch_utils", None,
                 "from fastdiff.integrations import training_scripts"),
            Edit("train_text_to_image.py", "noise_scheduler = DDPMScheduler", None,
                 "script = training_scripts.text_to_image(\n"
                 "    noise_scheduler,\n"
                 "    prediction_type=args.prediction_type,\n"
                 "    snr_gamma=args.snr_gamma,\n"
                 "    noise_offset=args.noise_offset,\n"
                 "    input_perturbation=args.input_perturbation,\n"
                 ")"),
            Edit("train_text_to_image.py", "# Sample noise that", "add_noise(latents, noise,",
                 "noised = script.noise(latents)"),
            Edit("train_text_to_image.py", "# Get the target for loss", "# Predict the noise residual",
                 "# Predict the noise residual and compute loss"),
            Edit("train_text_to_image.py", "unet(noisy_latents", "unet(noisy_latents",
                 "model_pred = unet(\n"
                 "    noised.model_input, noised.model_time, encoder_hidden_states, return_dict=False\n"
                 ")[0]"),
            Edit("train_text_to_image.py", "if args.snr_gamma is None:", "loss = loss.mean()",
                 "loss = script.loss(model_pred, noised)"),
        ),
        layout="captions",
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------- data and networks, for both runs alike


def make_data(where, program):
    rng = np.random.default_rng(0)
    folder = where / ("class" if program.layout == "folders" else "")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(program.images):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((program.size, program.size), Image.BICUBIC).save(folder / f"{i:03d}.png")
        rows.append(json.dumps({"file_name": f"{i:03d}.png", "text": "ab ba"[: i % 5 + 1]}))
    if program.layout == "captions":
        (where / "metadata.jsonl").write_text("\n".join(rows))


def autoencoder():
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
        return AutoencoderKL(
            down_block_types=down, up_block_types=up, block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4
        ).requires_grad_(False)


def make_models(where):
    """What diffusers' scripts load: an untrained pipeline of a few thousand parameters, and the config of a U-Net."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(2)
    size = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    UNet2DModel(
        sample_size=32, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8, **size,
    ).save_config(where / "unet2d")  # fmt: skip
    words = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>", "ab</w>", "ba</w>"]
    tokens = where / "tokens"
    tokens.mkdir()
    (tokens / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tokens / "merges.txt").write_text("#version: 0.2\na b</w>\nb a</w>\n")
    StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
            )
        ),
        tokenizer=CLIPTokenizer(str(tokens / "vocab.json"), str(tokens / "merges.txt"), model_max_length=16),
        unet=UNet2DConditionModel(
            sample_size=8, cross_attention_dim=16, attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **size,
        ),
        scheduler=DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(where)  # fmt: skip


# ------------------------------------------------------------------------------------------- what stands in, in a run


class _Cpu:
    """As the number of GPUs: ``rank % _Cpu()`` is the CPU."""

    def __rmod__(self, rank):
        return torch.device("cpu")


def stand_in(name, losses, fused, seed):
    """One process on the CPU for programs that ask for GPUs; records losses, stops after fifty of them, and notes in
    ``fused`` the steps in which fastdiff computed one. Returns what is raised then."""
    import diffusers

    class Done(BaseException):
        pass

    backward = torch.Tensor.backward

    def recorded(self, *args, **kwargs):
        if len(losses) == STEPS:
            raise Done
        losses.append(self.detach().double().item())
        return backward(self, *args, **kwargs)

    torch.Tensor.backward = recorded

    def counted(own):
        def call(*args, **kwargs):
            fused.add(len(losses))
            return own(*args, **kwargs)

        return call

    fastdiff.ops.loss, fastdiff.Objective.loss = counted(fastdiff.ops.loss), counted(fastdiff.Objective.loss)
    if name in ("dit", "sit", "edm"):
        torch.cuda.is_available, torch.cuda.device_count = (lambda: True), _Cpu
        for quiet in ("set_device", "synchronize", "reset_peak_memory_stats"):
            setattr(torch.cuda, quiet, lambda *args: None)
        torch.cuda.max_memory_allocated = torch.cuda.max_memory_reserved = lambda *args: 0
        init = torch.distributed.init_process_group
        torch.distributed.init_process_group = lambda *args, **kwargs: init("gloo", init_method="env://")
        parallel = torch.nn.parallel.DistributedDataParallel
        wrapped = lambda module, device_ids=None, **options: parallel(module, **options)  # noqa: E731
        torch.nn.parallel.DistributedDataParallel = wrapped
    if name in ("dit", "sit"):
        diffusers.models.AutoencoderKL.from_pretrained = lambda *args, **kwargs: autoencoder()
        sys.modules["wandb"] = types.ModuleType("wandb")
    if name == "edm":
        torch.utils.data.Sampler.__init__ = lambda self, dataset: None  # which newer PyTorch has without the argument
        from training import training_loop

        loop = training_loop.training_loop
        training_loop.training_loop = lambda **kwargs: loop(**kwargs, device=torch.device("cpu"))
    if name in ("unconditional", "text_to_image"):
        import accelerate

        made = accelerate.Accelerator

        def accelerator(*args, log_with=None, **kwargs):
            torch.manual_seed(seed)  # train_unconditional has no flag for it
            return made(*args, **kwargs, cpu=True)

        accelerate.Accelerator = accelerator
        from diffusers.utils import import_utils

        import_utils._tensorboard_available = True
    return Done


def inside(options):
    """Run the program in the working directory; write its losses to ``options.losses``."""
    torch.set_num_threads(1)
    losses, fused = [], set()
    sys.path.insert(0, os.getcwd())
    done = stand_in(options.program, losses, fused, options.seed)
    sys.argv = [PROGRAMS[options.program].file, *options.flags.split()]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except (done, SystemExit):
        pass
    Path(options.losses).write_text(json.dumps([losses, len(fused - {STEPS})]))


# -------------------------------------------------------------------------------------------------------- comparison


def changed_lines(before, after):
    removed = added = 0
    for path in before.rglob("*.py"):
        old, new = path.read_text().splitlines(), (after / path.relative_to(before)).read_text().splitlines()
        for line in difflib.unified_diff(old, new, n=0, lineterm=""):
            removed += line.startswith("-") and not line.startswith("---")
            added += line.startswith("+") and not line.startswith("+++")
    return removed, added


def run(options, copy, data, models, out):
    program = PROGRAMS[options.program]
    flags = f"{program.flags} {options.more}".format(data=data, out=out, model=models, seed=options.seed)
    losses = copy.parent / f"{copy.name}.json"
    environment = os.environ | program.environment | {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(29500 + os.getpid() % 999),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HF_HOME": str(copy.parent / "hub"), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1",
    }  # fmt: skip
    command = [options.program, str(copy), f"--seed={options.seed}", f"--losses={losses}", f"--flags={flags}"]
    log = copy.parent / f"{copy.name}.log"
    with log.open("w") as file:
        done = subprocess.run([sys.executable, __file__, *command], cwd=copy, env=environment, stdout=file, stderr=file)
    if done.returncode:
        raise SystemExit(f"{copy.name} failed:\n" + log.read_text()[-4000:])
    return json.loads(losses.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", default="", help="further flags of the program, in one string")
    parser.add_argument("--keep", type=Path, help="a new folder for the copies, instead of a temporary one")
    parser.add_argument("--losses", help=argparse.SUPPRESS)
    parser.add_argument("--flags", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.losses:
        return inside(options)
    program = PROGRAMS[options.program]
    with tempfile.TemporaryDirectory() as temporary:
        where = (options.keep or Path(temporary)).resolve()
        where.mkdir(parents=True, exist_ok=not options.keep)
        for name in ("plain", "fused"):
            shutil.copytree(options.checkout / program.folder, where / name, ignore=shutil.ignore_patterns(".git"))
        for edit in program.edits:
            edit.apply(where / "fused")
        make_data(where / "data", program)
        if program.folder:
            (where / "models").mkdir()
            make_models(where / "models")
        found = [
            run(options, where / name, where / "data", where / "models", where / f"{name}-out")
            for name in ("plain", "fused")
        ]
        removed, added = changed_lines(where / "plain", where / "fused")
    (plain, none), (fused, all_steps) = ((np.array(losses), by_fastdiff) for losses, by_fastdiff in found)
    assert len(plain) == len(fused) == all_steps == STEPS, (len(plain), len(fused), all_steps)
    assert none == 0, "the plain copy is plain"
    off = np.abs(fused - plain) / np.abs(plain)
    worst = int(off.argmax())
    print(
        f"| {options.program} {options.more} | -{removed} +{added} | {plain[0]:.5g} to {plain[-1]:.5g} "
        f"| {off.max():.1e} at step {worst + 1} | {np.median(off):.1e} |"
    )


if __name__ == "__main__":
    main()
