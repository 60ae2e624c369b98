"""How many digits are recognised with each sampler, from checkpoints of the demo. Prints a Markdown table.

fastdiff demo --out runs/vp && fastdiff demo --process flow --out runs/flow
python benchmarks/demo_samplers.py runs/vp/checkpoint.pt ddim:20 dpmpp_2m:20 unipc:20
python benchmarks/demo_samplers.py runs/flow/checkpoint.pt flow_euler:8
"""

import dataclasses
import sys
from pathlib import Path

import torch

from fastdiff.demo import checkpoint, generate
from fastdiff.demo.classifier import train_classifier
from fastdiff.demo.data import digits
from fastdiff.demo.settings import build

DIGITS_A_CLASS = 50


def main(path: str, samplers: list[str]) -> None:
    state, data = checkpoint.load(Path(path)), digits()
    classifier = train_classifier(data.images, data.labels)
    network = state.ema_network(torch.device("cpu"))
    labels = torch.arange(10).repeat_interleave(DIGITS_A_CLASS)
    print(f"{state.settings.process}, {state.settings.prediction}, {state.step} training steps\n")
    print("| sampler | steps | digits recognised |\n|---|---|---|")
    for name, steps in (entry.split(":") for entry in samplers):
        recipe = build(dataclasses.replace(state.settings, sampler=name, sample_steps=int(steps)))
        images = generate.draw(network, recipe, labels, int(steps), state.settings.guidance, 0, progress=False)
        print(
            f"| {name} | {steps} | {int((classifier.recognise(images) == labels).sum())} of {len(labels)} |", flush=True
        )


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
