"""Statistics of fastdiff's noise on many draws (1e8 by default): moments, tails, distribution, independence.

    python benchmarks/noise_statistics.py [--draws 100000000] [--output benchmarks/results]

Every statistic is a z-score: its distance from what independent standard normals have, over its standard deviation
there. Written: noise_statistics.md for people and noise_statistics.json for programs. The exit status is 1 where a |z|
reaches 4.5 (two-sided probability 7e-6 each). The seeds are fixed, so the numbers are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
from scipy import special, stats

from fastdiff.backends.reference.philox import normal, uniform

SEED = 20240607
SAMPLES, ELEMENTS = 1000, 1000  # a chunk: 1000 samples of 1000 elements
BINS = 2**16  # of equal probability, for chi-square and Kolmogorov-Smirnov
TAILS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
LAGS = (1, 2, 3, 4, 5, 8, 16, 100, 500)
LIMIT = 4.5


class Mean:
    """The mean of many numbers, summed in float64, as a z-score for a known expectation and variance."""

    def __init__(self, expectation: float = 0.0, variance: float = 1.0):
        self.expectation, self.variance = expectation, variance
        self.total, self.count = 0.0, 0

    def add(self, values: np.ndarray) -> None:
        self.total += float(values.sum(dtype=np.float64))
        self.count += values.size

    @property
    def z(self) -> float:
        return (self.total / self.count - self.expectation) * math.sqrt(self.count / self.variance)


def distribution_scores(counts: np.ndarray, label: str) -> dict[str, float]:
    """Chi-square over bins of equal probability, and Kolmogorov-Smirnov at the bins' edges as a normal quantile."""
    n, expected = counts.sum(), counts.sum() / counts.size
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    edges = np.arange(1, counts.size + 1) / counts.size
    d = float(np.abs(np.cumsum(counts) / n - edges).max())
    return {
        f"{label}: chi-square, {counts.size} bins": (chi2 - (counts.size - 1)) / math.sqrt(2 * (counts.size - 1)),
        f"{label}: Kolmogorov-Smirnov": float(stats.norm.isf(np.clip(stats.kstwobign.sf(d * math.sqrt(n)), 1e-300, 1))),
    }


def normals(chunks: int, report) -> dict[str, float]:
    """All statistics of `chunks` million normals of one seed and stream."""
    powers = {"mean": Mean(), "E z^2": Mean(1, 2), "E z^3": Mean(0, 15), "E z^4": Mean(3, 96)}
    lanes = {f"lane {i}: {m}": Mean(*e) for i in range(4) for m, e in (("mean", (0, 1)), ("E z^2", (1, 2)))}
    lags = {f"lag {k}: {w}": Mean() for k in LAGS for w in ("z", "z^2 - 1")}
    across = {f"lanes {i} and {j}: {w}": Mean() for i in range(4) for j in range(i) for w in ("z", "|z|")}
    rows = {f"samples {k} apart": Mean() for k in (1, 2, 7, 256)}
    beyond = dict.fromkeys([(t, side) for t in TAILS for side in (1, -1)], 0)
    counts, radii = np.zeros(BINS, dtype=np.int64), np.zeros(BINS, dtype=np.int64)
    largest, absolute_mean, absolute_std = 0.0, math.sqrt(2 / math.pi), math.sqrt(1 - 2 / math.pi)

    for chunk in range(chunks):
        z32 = normal(SEED, (SAMPLES, ELEMENTS), sample_offset=chunk * SAMPLES).numpy()
        z = z32.astype(np.float64)
        square = z * z
        for m, v in zip(powers.values(), (z, square, square * z, square * square), strict=True):
            m.add(v)
        for i in range(4):
            lanes[f"lane {i}: mean"].add(z[:, i::4])
            lanes[f"lane {i}: E z^2"].add(square[:, i::4])
        for k in LAGS:
            lags[f"lag {k}: z"].add(z[:, k:] * z[:, :-k])
            lags[f"lag {k}: z^2 - 1"].add((square[:, k:] - 1) * (square[:, :-k] - 1) / 2)
        size = (np.abs(z) - absolute_mean) / absolute_std
        for i in range(4):
            for j in range(i):
                across[f"lanes {i} and {j}: z"].add(z[:, i::4] * z[:, j::4])
                across[f"lanes {i} and {j}: |z|"].add(size[:, i::4] * size[:, j::4])
        for k in (1, 2, 7, 256):
            rows[f"samples {k} apart"].add(z[k:] * z[:-k])
        for t, side in beyond:
            beyond[t, side] += int((z32 * side > t).sum())
        # float64 is needed: float32 would leave fewer values than bins near 1
        place = np.minimum((special.ndtr(z) * BINS).astype(np.int64), BINS - 1).ravel()
        counts += np.bincount(place, minlength=BINS)
        pair = np.exp(-(square[:, 0::2] + square[:, 1::2]) / 2)  # of one Box-Muller pair: uniform
        radii += np.bincount(np.minimum((pair * BINS).astype(np.int64), BINS - 1).ravel(), minlength=BINS)
        largest = max(largest, float(np.abs(z32).max()))
        report(chunk)

    n = counts.sum()
    scores = {k: m.z for group in (powers, lanes, lags, across, rows) for k, m in group.items()}
    for (t, side), seen in beyond.items():
        p = float(stats.norm.sf(t))
        if n * p >= 10:
            score = (seen - n * p) / math.sqrt(n * p * (1 - p))
        else:  # few are expected: the smaller Poisson tail, as a normal quantile
            more, fewer = float(stats.poisson.sf(seen - 1, n * p)), float(stats.poisson.cdf(seen, n * p))
            score = math.copysign(float(stats.norm.isf(min(more, fewer, 0.5))), fewer - more)
        name = f"above {t:g}" if side > 0 else f"below -{t:g}"
        scores[f"{name}: {seen:,} seen, {n * p:,.1f} expected"] = score
    scores |= distribution_scores(counts, "normals") | distribution_scores(radii, "exp(-(z0^2 + z1^2)/2) of a pair")
    scores["largest |z| (not a score; at most 6.67)"] = largest
    return scores


def streams_and_seeds(chunks: int) -> dict[str, float]:
    """Correlations between streams and between seeds, `chunks` million products each."""
    others = {
        "streams 0 and 1": dict(stream=1),
        "streams 0 and 2": dict(stream=2),
        "streams 0 and 2^31": dict(stream=2**31),
        "seeds s and s + 1": dict(seed=SEED + 1),
        "seeds s and s + 2^32": dict(seed=SEED + 2**32),
        "samples i and i + 2^32": dict(sample_offset=2**32),
    }
    scores = {}
    for label, change in others.items():
        m = Mean()
        for chunk in range(chunks):
            offset = chunk * SAMPLES
            a = normal(SEED, (SAMPLES, ELEMENTS), sample_offset=offset).double()
            b = normal(
                change.get("seed", SEED),
                (SAMPLES, ELEMENTS),
                stream=change.get("stream", 0),
                sample_offset=offset + change.get("sample_offset", 0),
            ).double()
            m.add((a * b).numpy())
        scores[label] = m.z
    return scores


def uniforms(chunks: int) -> dict[str, float]:
    """The uniforms that timesteps are made of, one a sample."""
    mean, second, lag = Mean(1 / 2, 1 / 12), Mean(1 / 3, 4 / 45), Mean(0, 1 / 144)
    counts = np.zeros(BINS, dtype=np.int64)
    for chunk in range(chunks):
        u = uniform(SEED, 1_000_000, stream=1, sample_offset=chunk * 1_000_000).double().numpy()
        mean.add(u)
        second.add(u * u)
        lag.add((u[1:] - 0.5) * (u[:-1] - 0.5))
        counts += np.bincount((u * BINS).astype(np.int64), minlength=BINS)
    return {
        "uniform: mean": mean.z,
        "uniform: E u^2": second.z,
        "uniform: lag 1": lag.z,
    } | distribution_scores(counts, "uniforms")


def markdown(record: dict) -> str:
    scores = record["scores"]
    lines = [
        "# Noise statistics",
        "",
        f"`python benchmarks/noise_statistics.py --draws {record['draws']}`: {record['draws']:,} normals of seed",
        f"{SEED} (1000 elements a sample), {record['products']:,} products for each pair of streams and seeds,",
        f"{record['uniforms']:,} uniforms. {record['seconds']:.0f} s on {record['machine']}, PyTorch",
        f"{record['torch']}, reference backend (the bits are the same on every backend and machine).",
        "",
        "A score is the distance from what independent standard normals have, in standard deviations. Of",
        f"{len(scores)} scores the largest |z| is {record['largest']:.2f}; for as many independent ones the median",
        f"of the largest is {record['expected_largest']:.2f}. The limit is {LIMIT}. The largest normal drawn is",
        f"{record['largest_normal']:.3f} (6.66 is the largest there is).",
        "",
        "| Statistic | z |",
        "|---|---|",
    ]
    rows = [f"| {k.replace('|', chr(92) + '|')} | {v:+.2f} |" for k, v in scores.items()]
    return "\n".join(lines + rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=100_000_000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    chunks = max(1, arguments.draws // (SAMPLES * ELEMENTS))
    start = time.perf_counter()

    def report(chunk: int) -> None:
        if (chunk + 1) % 10 == 0:
            print(f"{chunk + 1} of {chunks} million normals, {time.perf_counter() - start:.0f} s", flush=True)

    scores = normals(chunks, report)
    largest_normal = scores.pop("largest |z| (not a score; at most 6.67)")
    few = max(1, chunks // 10)
    scores |= streams_and_seeds(few) | uniforms(few)
    largest = max(abs(v) for v in scores.values())
    record = {
        "draws": chunks * SAMPLES * ELEMENTS,
        "products": few * SAMPLES * ELEMENTS,
        "uniforms": few * 1_000_000,
        "seed": SEED,
        "seconds": round(time.perf_counter() - start, 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "largest": largest,
        "expected_largest": float(stats.norm.isf((1 - 0.5 ** (1 / len(scores))) / 2)),
        "largest_normal": largest_normal,
        "scores": {k: round(v, 4) for k, v in scores.items()},
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "noise_statistics.json").write_text(json.dumps(record, indent=1) + "\n")
    (arguments.output / "noise_statistics.md").write_text(markdown(record))
    print(f"{len(scores)} scores, largest |z| {largest:.2f}, {record['seconds']} s")
    return int(largest >= LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
