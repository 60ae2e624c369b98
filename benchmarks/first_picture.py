"""The README's picture: a training step's time and memory, from the results of ``fastdiff bench``.

python benchmarks/first_picture.py [docs/training_step.png]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
CASE = {"operation": "training step", "kind": "v_prediction", "dtype": "fp32", "shape": [64, 4, 64, 64]}
PEERS = {
    "eager": ("eager PyTorch", "#c9cdd3"),
    "compile": ("torch.compile", "#8a93a0"),
    "fastdiff": ("fastdiff", "#0072b2"),
}


def peers(name: str) -> dict[str, dict]:
    report = json.loads((RESULTS / f"{name}.json").read_text())
    (case,) = (case for case in report["cases"] if all(case[key] == value for key, value in CASE.items()))
    return case["peers"]


def panel(axes: plt.Axes, title: str, values: list[float], unit: str) -> None:
    names, colors = zip(*PEERS.values())
    axes.barh(names, values, color=colors, height=0.62)
    for place, value in enumerate(values):
        axes.text(value, place, f"  {value:.3g} {unit}", va="center", fontsize=10, color="#3c4350")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color="#1f2530")
    axes.set_xlim(0, max(values) * 1.3)
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=10, labelcolor="#3c4350")
    axes.spines[:].set_visible(False)


def main() -> None:
    to = Path(sys.argv[1] if len(sys.argv) > 1 else RESULTS.parents[1] / "docs" / "training_step.png")
    gpu, cpu = peers("bench_h100"), peers("bench_cpu")
    figure, axes = plt.subplots(1, 3, figsize=(8.6, 1.8), sharey=True, layout="constrained")
    figure.set_facecolor("white")
    panel(axes[0], "H100: time", [1e6 * gpu[name]["seconds"]["median"] for name in PEERS], "µs")
    panel(axes[1], "2 CPU cores: time", [1e3 * cpu[name]["seconds"]["median"] for name in PEERS], "ms")
    panel(axes[2], "H100: extra memory", [gpu[name]["peak_bytes"] / 1e6 for name in PEERS], "MB")
    figure.savefig(to, dpi=150)
    print(to)


if __name__ == "__main__":
    main()
