"""Print a pytest-benchmark JSON file as a Markdown table: median times, ratios within a group, share of the copy
bandwidth measured in the same run.

    python benchmarks/table.py results.json
"""

import json
import sys


def main(path: str) -> None:
    with open(path) as file:
        report = json.load(file)
    groups: dict[str, dict[str, dict]] = {}
    for run in report["benchmarks"]:
        groups.setdefault(run["group"], {})[run["extra_info"]["implementation"]] = run
    copy = groups.pop("copy")["copy"]
    ceiling = copy["extra_info"]["bytes"] / copy["stats"]["median"]
    machine = report["machine_info"]
    print(
        f"{machine['device']}, {machine['cpu'].get('brand_raw', machine['machine'])}, {machine['threads']} threads, "
        f"PyTorch {machine['torch']}; copy {ceiling / 1e9:.1f} GB/s; medians in microseconds.\n"
    )
    print("| case | eager | compiled | fastdiff | backend | eager / fastdiff | compiled / fastdiff | of copy |")
    print("|---|---|---|---|---|---|---|---|")
    for name, runs in groups.items():
        times = {key: run["stats"]["median"] for key, run in runs.items()}
        ours = times["fastdiff"]
        share = runs["fastdiff"]["extra_info"]["bytes"] / ours / ceiling
        cells = [f"{times[key] * 1e6:.0f}" if key in times else "-" for key in ("eager", "compiled", "fastdiff")]
        ratios = [f"{times[key] / ours:.2f}" if key in times else "-" for key in ("eager", "compiled")]
        print(
            "| " + " | ".join([name, *cells, runs["fastdiff"]["extra_info"]["backend"], *ratios, f"{share:.0%}"]) + " |"
        )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
