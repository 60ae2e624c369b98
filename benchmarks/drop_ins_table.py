"""Print the results of test_drop_ins.py as a Markdown table: lower quartiles, and the script's over fastdiff's.

The lower quartile, since on a shared machine what is interrupted is mostly the longer, eager run, and a median would
make that a merit of the other.

    python benchmarks/drop_ins_table.py results.json
"""

import json
import sys


def main(path: str) -> None:
    with open(path) as file:
        report = json.load(file)
    groups: dict[str, dict[str, float]] = {}
    for run in report["benchmarks"]:
        groups.setdefault(run["group"], {})[run["extra_info"]["implementation"]] = run["stats"]["q1"] * 1e6
    machine = report["machine_info"]
    print(
        f"{machine['device']}, {machine['cpu'].get('brand_raw', machine['machine'])}, {machine['threads']} threads, "
        f"PyTorch {machine['torch']}; lower quartiles in microseconds.\n"
    )
    print("| case | script | fastdiff | own noise | script / fastdiff | script / own noise |")
    print("|---|---|---|---|---|---|")
    for name, times in groups.items():
        script = times["script"]
        cells = [f"{times[key]:.0f}" if key in times else "-" for key in ("script", "fastdiff", "own noise")]
        ratios = [f"{script / times[key]:.1f}" if key in times else "-" for key in ("fastdiff", "own noise")]
        print("| " + " | ".join([name, *cells, *ratios]) + " |")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
