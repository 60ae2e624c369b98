"""Which tests are asked about a source file: the table below, or, where it has been recorded, who runs the line."""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

# For the beginning of a source file's path, the test files to ask (test_*.py, in any folder), the likeliest first.
TABLE = {
    "fastdiff/process": "process wrong_input pitfalls_of_objectives pitfalls_of_samplers objective samplers diffusers",
    "fastdiff/from_scheduler": "training_scripts diffusers samplers_diffusers",
    "fastdiff/sigma_schedules": "samplers wrong_input",
    "fastdiff/sdes": "process wrong_input objective scores likelihood samplers",
    "fastdiff/prediction": "prediction objective pitfalls_of_objectives samplers",
    "fastdiff/weighting": "weighting sigma_and_layout wrong_input pitfalls_of_objectives objective",
    "fastdiff/uncertainty": "uncertainty",
    "fastdiff/element_weights": "element_weights",
    "fastdiff/pairing": "pairing",
    "fastdiff/dropout": "dropout",
    "fastdiff/guidance": "guidance_rules guidance",
    "fastdiff/autoencoder": "autoencoder",
    "fastdiff/losses/autoencoder": "autoencoder latents",
    "fastdiff/pyramid": "pyramid_noise wrong_input",
    "fastdiff/video/shifts": "shifts rf_loss",
    "fastdiff/video/correlation": "frame_noise",
    "fastdiff/video/forcing": "forcing",
    "fastdiff/video/": "rf_loss",
    "fastdiff/converting": "objective fast_calls pitfalls_of_objectives sum trace",
    "fastdiff/functional": "objective wrong_input mistakes pitfalls_of_objectives",
    "fastdiff/losses/features": "features sum",
    "fastdiff/losses/adversarial": "adversarial sum",
    "fastdiff/losses/sum": "sum",
    "fastdiff/losses": "vlb loss objective pitfalls_of_objectives wrong_input",
    "fastdiff/timesteps": "timesteps wrong_input objective pitfalls_of_objectives",
    "fastdiff/quantiles": "timesteps",
    "fastdiff/philox": "philox noise",
    "fastdiff/tabulated": "process changed_in_place diffusers objects",
    "fastdiff/torch_randn": "torch_randn",
    "fastdiff/tensors": "images coefficients",
    "fastdiff/tokens": "tokens",
    "fastdiff/noised": "tokens objective images changed_in_place sample_ids",
    "fastdiff/packed": "packed packed_videos tokens",
    "fastdiff/loss_record": "objective loss left_out element_weights loss_by_elements distributed",
    "fastdiff/loss_gradient": "loss_gradient",
    "fastdiff/recycling": "recycling",
    "fastdiff/explaining": "explaining",
    "fastdiff/likelihood": "likelihood scores",
    "fastdiff/distributed/": "distributed rf_loss packed_videos",
    "fastdiff/names": "mistakes names wrong_input",
    "fastdiff/numeric": "mistakes wrong_input",
    "fastdiff/showing": "mistakes wrong_input",
    "fastdiff/coefficients": "coefficients fast_calls objective compile",
    "fastdiff/constancy": "coefficients",
    "fastdiff/program": "coefficients fast_calls objective triton_operations",
    "fastdiff/samplers/": "samplers wrong_input guidance pitfalls_of_samplers sampling samplers_diffusers k_diffusion",
    "fastdiff/sampling/cuda_graph": "cuda_step wrong_input devices",
    "fastdiff/sampling/guidance": "guidance guidance_rules sampling wrong_input corrector",
    "fastdiff/sampling": "sampling guidance_rules wrong_input trajectory guidance k_diffusion pitfalls_of_samplers "
    "samplers cuda_step",
    "fastdiff/objective": "objective wrong_input noise pitfalls_of_objectives fast_calls compile diffusers loss "
    "distributed",
    "fastdiff/ops/gaussian": "gaussian_kl wrong_input native",
    "fastdiff/ops/kl_normal": "latents wrong_input native",
    "fastdiff/ops/posterior": "latents wrong_input native",
    "fastdiff/ops/loss": "loss images wrong_input fast_calls objective native",
    "fastdiff/ops/noise": "noise images sigma_and_layout wrong_input fast_calls objective philox native",
    "fastdiff/ops/row_moments": "row_moments wrong_input",
    "fastdiff/ops/step_table": "step_table wrong_input",
    "fastdiff/ops/operators": "compile fast_calls noise loss convert_and_step wrong_input objective",
    "fastdiff/ops/": "convert_and_step wrong_input fast_calls trajectory noise loss step_table objective native",
    "fastdiff/integrations/diffusers/": "diffusers_schedulers diffusers_patching",
    "fastdiff/integrations/denoising": "denoising_diffusion",
    "fastdiff/integrations/method_swap": "denoising_diffusion objects",
    "fastdiff/integrations/objects": "denoising_diffusion objects",
    "fastdiff/integrations/guided": "objects",
    "fastdiff/integrations/k_diffusion/": "k_diffusion objects",
    "fastdiff/integrations/lightning": "trainers",
    "fastdiff/integrations/losses": "trainers",
    "fastdiff/integrations/training": "training_scripts",
    "fastdiff/integrations/": "objects training_scripts k_diffusion diffusers",
    "fastdiff/demo/terms": "demo_terms demo_latent demo cli",
    "fastdiff/demo/extractors": "demo_terms",
    "fastdiff/demo/latent": "demo_latent",
    "fastdiff/demo/video": "demo_video",
    "fastdiff/demo/motion": "demo_video",
    "fastdiff/demo/ranks": "demo_video cli",
    "fastdiff/demo/": "demo demo_terms demo_latent demo_video cli",
    "fastdiff/bench/": "bench",
    "fastdiff/doctor": "cli devices",
    "fastdiff/trace": "trace cli",
    "fastdiff/verify": "verify cli",
    "fastdiff/files": "demo cli bench",
    "fastdiff/": "cli demo bench",
}  # fmt: skip
# Asked besides, whatever the file: who asks for names, options and what a user types wrongly.
EVERYWHERE = ["names", "options"]
# What these run is not recorded: the compiler traces it, or other processes run it.
UNSEEN = {"test_compile", "test_distributed"}
# Not asked: they run no source of the package, or take minutes.
NEVER = {"test_large", "test_packaging", "test_optional_packages", "test_gpu_memory", "test_triton_ptx"}


ALL = {"*": math.inf}  # all functions of a file; what they cost is not known


def files_for(root: Path, file: str) -> dict[str, dict[str, float]]:
    """The test files of the table, and all of their functions."""
    names = next(names for start, names in TABLE.items() if file.startswith(start)).split()
    where = test_files(root)
    return {where[f"test_{name}"]: ALL for name in [*names, *EVERYWHERE]}


def test_files(root: Path) -> dict[str, str]:
    """Where each test file is, by its name, which no other has: {"test_loss": "tests/ops/test_loss.py"}."""
    return {file.stem: file.relative_to(root).as_posix() for file in sorted((root / "tests").rglob("test_*.py"))}


class Recorded:
    """Which test functions ran which lines, and what they cost, of the test files that have been recorded."""

    def __init__(self, root: Path, folder: Path):
        self.lines = json.loads((folder / "lines.json").read_text())
        self.costs = json.loads((folder / "costs.json").read_text())
        where = test_files(root)
        names = {file.suffix[1:] for file in folder.glob("data.*")} - UNSEEN
        self.files = {where[name] for name in names if name in where}
        self.known = {test for of in self.lines.values() for tests in of.values() for test in tests} | set(self.costs)

    def functions_for(self, root: Path, file: str, lines: range) -> dict[str, dict[str, float]]:
        """The functions that ran one of ``lines`` and what they cost, by test file: those of the table first, then
        cheap ones. For what is run when the package is imported, all that ran anything of the file, and the files of
        the table whole, those that ask for names and options first; else those of the table that were not recorded,
        files or functions."""
        ran = self.lines.get(file, {})
        tests = {test for line in lines for test in ran.get(str(line), ())}
        imported = not tests or not _in_a_function((root / file).read_text(), lines.start)
        if imported:
            tests = {test for each in ran.values() for test in each}
        chosen = defaultdict(dict)
        for test in tests:
            name, function = test.split("::", 1)
            chosen[name][function] = self.costs.get(test, 0.0)
        table = list(files_for(root, file))
        if imported:
            table = table[-len(EVERYWHERE) :] + table[: -len(EVERYWHERE)]
        for name in table:
            if imported or name not in self.files:
                start = f"{name}::"
                known = {test.removeprefix(start): cost for test, cost in self.costs.items() if test.startswith(start)}
                chosen[name] = {"*": 0.0} | known if known else ALL
            else:
                new = (test for test in _functions((root / name).read_text()) if f"{name}::{test}" not in self.known)
                if more := dict.fromkeys(new, 0.0):
                    chosen[name] = more | chosen[name]

        def order(name):
            functions = chosen[name]
            likely = table.index(name) if name in table else len(table)
            return likely, (1 + sum(functions.values())) / max(1, len(functions))

        return {name: chosen[name] for name in sorted(chosen, key=order)}


def _functions(source: str) -> list[str]:
    """The test functions of a file: "test_x", "TestY.test_z"."""
    found = []
    for node in ast.parse(source).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        start = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        found += [start + f.name for f in inside if isinstance(f, ast.FunctionDef) and f.name.startswith("test_")]
    return found


def _in_a_function(source: str, line: int) -> bool:
    """Whether a line is in the body of a function; what stands in its head is run where it is defined."""
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return any(node.body[0].lineno <= line <= node.end_lineno for node in functions)


def record(root: Path, folder: Path, jobs: int, only=()):
    """Runs each test file under coverage (or ``only`` some, again), and keeps the test functions of each line."""
    import coverage  # noqa: F401  # what the processes need: said here, before any starts

    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "coveragerc"
    settings.write_text("[run]\nsource = fastdiff\ndynamic_context = test_function\nrelative_files = true\n")
    files = [root / file for file in only] or [
        root / file for name, file in test_files(root).items() if name not in NEVER
    ]
    waiting = sorted(files, key=lambda f: f.stat().st_size, reverse=True)
    known = folder / "costs.json"
    running, costs = {}, json.loads(known.read_text()) if known.is_file() else {}
    while waiting or running:
        while waiting and len(running) < jobs:
            file = waiting.pop(0)
            run = [
                sys.executable,
                "-m",
                "coverage",
                "run",
                f"--rcfile={settings}",
                f"--data-file={folder}/data.{file.stem}",
            ]
            tests = [
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:benchmark",
                "--durations=0",
                "-vv",
                str(file),
            ]
            output = open(folder / f"{file.stem}.log", "w")
            done = subprocess.Popen([*run, *tests], cwd=root, stdout=output, stderr=output, env=_environment(root))
            running[done] = file
        process = next(iter(running)) if len(running) == 1 else _any(running)
        process.wait()
        file = running.pop(process)
        print(f"recorded {file.name} ({process.returncode})", flush=True)
        found = {}
        for line in (folder / f"{file.stem}.log").read_text(errors="replace").splitlines():
            words = line.split()
            if len(words) >= 3 and words[1] in ("call", "setup", "teardown") and words[0].endswith("s"):
                name, _, function = words[2].split("[")[0].partition("::")
                test = f"{name}::{function.replace('::', '.')}"
                found[test] = found.get(test, 0) + float(words[0][:-1])
        costs |= found
    _write(root, folder, costs)


def _any(running):
    while True:
        for process in running:
            try:
                process.wait(0.2)
                return process
            except subprocess.TimeoutExpired:
                pass


def _environment(root: Path):
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}


def _write(root: Path, folder: Path, costs):
    import coverage

    lines, where = defaultdict(lambda: defaultdict(set)), test_files(root)
    for file in folder.glob("data.*"):
        data = coverage.CoverageData(basename=str(file))
        data.read()
        for source in data.measured_files():
            name = os.path.relpath(root / source, root)
            for line, contexts in data.contexts_by_lineno(source).items():
                for context in contexts:
                    module, _, function = context.partition(".")
                    # "test_x.test_y", "test_x.TestZ.test_y"; a helper's context is its test's.
                    if module == file.suffix[1:] and module in where and function:
                        lines[name][str(line)].add(f"{where[module]}::{function}")
    plain = {name: {line: sorted(tests) for line, tests in each.items()} for name, each in lines.items()}
    (folder / "lines.json").write_text(json.dumps(plain))
    (folder / "costs.json").write_text(json.dumps(costs))
