"""What each term of the demo does, and its diffusion in latents; and classifier guidance. Writes a Markdown file.

    python benchmarks/demo_terms.py                # about ten minutes on a CPU; writes benchmarks/results/demo_terms.md
    python benchmarks/demo_terms.py --steps 50 --out /tmp/a.md

For each seed a U-Net is trained without terms, and once more with each of them: from the same weights, on the same
images, times and noise, for as many steps. Then they estimate digits that none has seen, at a signal-to-noise ratio of
0.1, and networks that no term looked through, trained on images that none of those saw, say how good the estimates are.
"""

from __future__ import annotations

import argparse
import datetime
import runpy
import statistics
import tempfile
import textwrap
from pathlib import Path

import torch

from fastdiff.demo import generate, run, terms, training
from fastdiff.demo.classifier import train_classifier
from fastdiff.demo.data import digits
from fastdiff.demo.settings import build, resolve

ROOT = Path(__file__).parents[1]
DIGITS_A_CLASS = 50
HEADINGS = {
    "perceptual": "LPIPS distance",
    "adversarial": "Frechet distance",
    "align": "1 - cosine",
    "classifier": "cross-entropy",
}


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    torch.set_num_threads(1)  # for so small a network more threads are slower
    seeds = [int(seed) for seed in options.seeds.split(",")]
    found = {name: [measured(name, options.steps, seed) for seed in seeds] for name in (None, *terms.WEIGHTS)}
    lines = [
        "# What each term of the demo does",
        "",
        f"`benchmarks/demo_terms.py`, {datetime.date.today()}, one thread of a CPU, vp-linear, epsilon: "
        f"{options.steps} steps of 256 digits, the mean of seeds {options.seeds}. Estimates of 225 digits that no "
        "network has seen, at a signal-to-noise ratio of 0.1, as networks see them that no term looked through; lower "
        "is better. Recognised: of 500 samples.",
        "",
        f"| | {' | '.join(HEADINGS.values())} | recognised |",
        f"|{'---|' * (len(HEADINGS) + 2)}",
    ]
    for name, runs in found.items():
        means = {metric: statistics.fmean(each[metric] for each in runs) for metric in (*HEADINGS, "recognised")}
        cells = [f"**{means[k]:.4f}**" if k == name else f"{means[k]:.4f}" for k in HEADINGS]
        lines.append(f"| {f'`--{name}`' if name else 'no term'} | {' | '.join(cells)} | {means['recognised']:.1%} |")
    lines += ["", "Each term's own number in every seed, without it and with it:", ""]
    for name in HEADINGS:
        pairs = [f"{a[name]:.4f} to {b[name]:.4f}" for a, b in zip(found[None], found[name])]
        lower = sum(b[name] < a[name] for a, b in zip(found[None], found[name]))
        lines.append(f"- `--{name}`: {'; '.join(pairs)} (lower in {lower} of {len(seeds)})")
    lines += ["", *in_latents(options.latent_steps), "", *guided(options.guidance_steps)]
    options.out.write_text("\n".join(line if line[:1] in "|-#" else textwrap.fill(line, 120) for line in lines) + "\n")
    print(f"\n{options.out}:\n" + options.out.read_text())


def measured(name: str | None, steps: int, seed: int) -> dict[str, float]:
    """The metrics of a run with this term, or None, and how many of its samples are recognised (0 to 1)."""
    chosen = resolve({"steps": steps, "seed": seed} | ({name: True} if name else {}))
    recipe, data, cpu = build(chosen), digits(), torch.device("cpu")
    learned, held_out = terms.split(data)
    trainer = training.Trainer(chosen, recipe, data if name else learned, cpu, {"threads": 1})
    assert torch.equal(trainer.images, learned.images)
    trainer.train(lambda state: None, steps + 1)
    measure = trainer.terms or terms.Terms(chosen, recipe.objective, learned, held_out, ())
    found = measure.measure(trainer.ema)
    labels = torch.arange(10).repeat_interleave(DIGITS_A_CLASS)
    images = generate.draw(
        trainer.ema, recipe, labels, chosen.sample_steps, chosen.guidance, chosen.seed, progress=False
    )
    recognised = train_classifier(data.images, data.labels).recognise(images) == labels
    found["recognised"] = recognised.double().mean().item()
    print(f"{name or 'no term'}, seed {seed}: {found}", flush=True)
    return found


def in_latents(steps: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        report = run.demo(run.DemoOptions({"latent": True, "steps": steps}, Path(folder), device="cpu", threads=1))
    autoencoder = report["autoencoder"]
    return [
        "## In latents",
        "",
        f"`fastdiff demo --latent --steps {steps}`: {report['digit_accuracy']:.1%} of {report['samples_drawn']} "
        f"decoded samples are recognised as the digit asked for. The autoencoder's squared error is "
        f"{autoencoder['squared_error']:.4f} a pixel, its divergence {autoencoder['divergence']:.1f} nats a digit.",
    ]


def guided(steps: int) -> list[str]:
    example = runpy.run_path(str(ROOT / "examples" / "classifier_guidance.py"))
    found = example["main"](["--steps", str(steps)])
    return [
        "## Classifier guidance",
        "",
        f"`examples/classifier_guidance.py --steps {steps}`: without the classifier's gradient {found['without']:.1%} "
        f"of 500 samples are the digit that was wanted, with it {found['with']:.1%}.",
    ]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--steps", type=int, default=300, help="of training with and without each term")
    made.add_argument("--seeds", default="0,1", metavar="A,B,...")
    made.add_argument("--latent-steps", type=int, default=600)
    made.add_argument("--guidance-steps", type=int, default=2000)
    made.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "demo_terms.md")
    return made


if __name__ == "__main__":
    main()
