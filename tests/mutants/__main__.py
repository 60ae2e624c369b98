"""Plants faults in the package, one at a time, and says which of them the tests do not notice.

    python tests/mutants --count 200 --seed 1 --group mathematics

Each fault is planted in a copy of the tree and asked about in a process of its own, until a test fails. One that no
test notices is a test that is missing, or changes nothing that can be seen: those are kept, with the reason, in
equivalents.txt. ``--record`` runs the tests once and keeps which of them run which line, in build/mutants; without it a
table says which test files to ask.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import asking
import choosing
import faults

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
GROUPS = {
    "mathematics": "process sdes prediction weighting losses/ timesteps tabulated coefficients program constancy "
    "samplers/ sampling/ guidance noised objective functional converting autoencoder tokens dropout uncertainty "
    "element_weights pyramid pairing video/ ops/ distributed/ packed likelihood loss_record loss_gradient explaining "
    "from_scheduler quantiles sigma_schedules tensors philox torch_randn recycling names numeric showing",
    "faces": "integrations/ demo/ bench/ cli doctor files trace verify __main__",
}
# In none: kernels, which have tests of their own in each language; records and numbers; what an installation has.
NO_GROUP = "backends/ __init__ calls codes extension modes torch_access"
BARS = {"mathematics": 0.95, "faces": 0.85}


@dataclass(frozen=True)
class Mutant:
    group: str
    file: str
    place: faults.Place
    text: str

    @property
    def key(self):
        """What it is called in equivalents.txt: no line number, which changes with every edit."""
        return self.file, self.place.function, *self.place.change(self.text)

    def __str__(self):
        before, after = self.place.change(self.text)
        return f"{self.file}:{self.place.lines.start} {self.place.function}\n- {before}\n+ {after}"


def main(arguments=None) -> int:
    options = parse(arguments)
    recording = ROOT / "build" / "mutants"
    if options.record is not None:
        choosing.record(ROOT, recording, options.jobs, options.record)
        return 0
    recorded = (
        choosing.Recorded(ROOT, recording) if (recording / "lines.json").is_file() and not options.table else None
    )
    equivalents = read_equivalents(HERE / "equivalents.txt")
    drawn = [
        mutant
        for group in options.group
        for mutant in draw(group, sources(group, options.files), options.count, options.seed)
    ]
    print(f"{len(drawn)} faults, seed {options.seed}, {'recorded lines' if recorded else 'table of tests'}", flush=True)
    asked = [mutant for mutant in drawn if mutant.key not in equivalents]
    # Those of a group are spread, so that a budget that ends early leaves a sample of each.
    random.Random(options.seed).shuffle(asked)
    outcomes = run(asked, recorded, options)
    outcomes |= {mutant: "explained" for mutant in drawn if mutant.key in equivalents}
    return report(outcomes, drawn, options.group)


def parse(arguments):
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=30, help="faults of each group (default: %(default)s); 0: all")
    parser.add_argument("--seed", type=int, default=0, help="which ones; the same number draws the same faults")
    parser.add_argument("--group", choices=GROUPS, nargs="+", default=list(GROUPS))
    parser.add_argument("--files", nargs="+", help="only these source files")
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds after which no further fault is planted"
    )
    parser.add_argument("--limit", type=float, default=30, help="processor seconds of tests a fault (default: 30)")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time (default: %(default)s)")
    parser.add_argument("--record", nargs="*", metavar="TESTS", help="record which tests run which line; plant nothing")
    parser.add_argument("--table", action="store_true", help="use the table of test files, whatever is recorded")
    parser.add_argument("--control", action="store_true", help="see that what notices a fault passes without it")
    parser.add_argument("--show", action="store_true", help="say for each fault which test noticed it")
    return parser.parse_args(arguments)


def sources(group, only=None):
    starts = tuple(f"fastdiff/{name if name.endswith('/') else name + '.py'}" for name in GROUPS[group].split())
    files = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "fastdiff").rglob("*.py"))
    return [file for file in files if file.startswith(starts) and (not only or file in only)]


def draw(group, files, count, seed):
    """``count`` faults spread evenly over the places of ``files``: every n-th place, from a random one on."""
    places = [(file, place) for file in files for place in faults.places((ROOT / file).read_text())]
    rng = random.Random(f"{group} {seed}")
    count = min(count or len(places), len(places))
    start = rng.random()
    found = []
    for i in range(count):
        file, place = places[int((i + start) * len(places) / count)]
        texts = [text for text in rng.sample(place.texts, len(place.texts)) if place.is_fault(text)]
        found += [Mutant(group, file, place, text) for text in texts[:1]]
    return found


def read_equivalents(file):
    """{key of a fault: why no test can notice it}. A block says the file and function, the line before (-) and after
    (+), and the reason."""
    found = {}
    for block in file.read_text().split("\n\n"):
        lines = [line for line in block.strip().splitlines() if not line.startswith("#")]
        if lines:
            where, before, after, *reason = lines
            source, _, function = where.partition(" ")
            assert before[:2] == "- " and after[:2] == "+ " and reason, f"{file.name}: {block}"
            found[source, function, before[2:], after[2:]] = " ".join(reason)
    return found


def run(mutants, recorded, options):
    """{mutant: outcome}, of as many as the budget allows."""
    asking.preload()
    trees = asking.Trees(ROOT, options.jobs)
    began, waiting, running, outcomes = time.monotonic(), list(mutants), [], {}
    try:
        while running or (waiting and time.monotonic() - began < options.budget):
            while waiting and trees.free and time.monotonic() - began < options.budget:
                mutant = waiting.pop(0)
                tests = (
                    recorded.functions_for(ROOT, mutant.file, mutant.place.lines)
                    if recorded
                    else choosing.files_for(ROOT, mutant.file)
                )
                running.append(asking.Asked(mutant, trees.free.pop(), tests, options.limit))
            time.sleep(0.02)
            for asked in list(running):
                outcome = asked.outcome()
                if outcome is not None:
                    running.remove(asked)
                    trees.free.append(asked.tree)
                    if options.control and outcome == asking.NOTICED and not passes(asked, trees):
                        outcome = asking.BROKEN
                    outcomes[asked.mutant] = outcome
                    if outcome not in (asking.NOTICED, asking.TIMED_OUT) or options.show:
                        seconds = time.monotonic() - asked.began
                        print(f"\n{outcome} ({seconds:.0f} s) {asked.by}\n{asked.mutant}", flush=True)
    finally:
        for asked in running:
            asked.stop()
        trees.remove()
    return outcomes


def passes(asked, trees, known={}):  # noqa: B006
    """Whether the test that noticed a fault passes where there is none."""
    file, _, function = asked.by.split("[")[0].partition("::")
    if not function:  # the package could not be imported, or the file not collected
        return True
    if (file, function) not in known:
        place = asked.mutant.place
        nothing = replace(asked.mutant, text=place.source.encode()[place.start : place.end].decode())
        control = asking.Asked(nothing, trees.free[-1], {file: {function.replace("::", "."): 0.0}}, 60)
        while (outcome := control.outcome()) is None:
            time.sleep(0.02)
        known[file, function] = outcome == asking.SURVIVED
    return known[file, function]


def report(outcomes, drawn, groups):
    """Prints the table; 1 where a group is below its bar by more than chance, or something is broken."""
    kinds = [asking.NOTICED, asking.TIMED_OUT, asking.SURVIVED, "explained", asking.BROKEN]
    print(f"\n{'':12}", *(f"{kind:>10}" for kind in kinds), f"{'not asked':>10} {'noticed':>9}")
    failed = False
    for group in groups:
        mine = [mutant for mutant in drawn if mutant.group == group]
        n = {kind: sum(outcomes.get(mutant) == kind for mutant in mine) for kind in kinds}
        good = n[asking.NOTICED] + n[asking.TIMED_OUT]
        total = good + n[asking.SURVIVED]
        share = good / total if total else 1.0
        counts = (f"{n[kind]:10}" for kind in kinds)
        print(f"{group:12}", *counts, f"{len(mine) - sum(n.values()):10} {share:9.1%} (bar {BARS[group]:.0%})")
        failed |= by_chance(good, total, BARS[group]) < 0.01 or n[asking.BROKEN] > 0
    if failed:
        print("A group is below its bar by more than chance, or a fault could not be asked about.")
    return int(failed)


def by_chance(good, total, bar):
    """How probable so few are, of ``total``, if the share of all faults that is noticed were ``bar``."""
    return sum(math.comb(total, k) * bar**k * (1 - bar) ** (total - k) for k in range(good + 1))


if __name__ == "__main__":
    sys.exit(main())
