"""Each part of the package imports only from the floors below it."""

import ast
import itertools
import re
from pathlib import Path

import pytest

import fastdiff

PACKAGE = Path(fastdiff.__file__).parent
# The lowest first. A name ending with "." is a folder, of whose files each may import the others but in a circle.
FLOORS = [
    # The ground: noise as data, names, numbers, lookups, and what kernels and Python call alike.
    "codes extension names showing files modes tensors philox numeric calls program sigma_schedules recycling "
    "torch_access torch_randn",
    "backends.",
    "process sdes prediction weighting losses losses.error_functions quantiles timesteps tabulated from_scheduler",
    "ops.",
    "constancy coefficients",
    "guidance samplers. sampling.",
    "distributed. tokens packed noised uncertainty explaining converting element_weights loss_record loss_gradient "
    "objective functional dropout pyramid pairing likelihood autoencoder losses. video.",
    "integrations.",
    "trace doctor demo. bench. verify cli __main__",
]
# Imported when they are used, as they need packages that are optional: Triton, and what draws plots.
LATE = ("backends.triton.", "bench.command", "demo.")


def _modules():
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = _modules()


def imports(name):
    """(module, whether it is imported inside a function) for all that a module imports of the package."""
    file = MODULES[name]
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]

    def found(node, late):
        for child in ast.iter_child_nodes(node):
            inside = late or isinstance(child, (ast.FunctionDef, ast.Lambda))
            base = None
            if isinstance(child, ast.ImportFrom):
                if child.level:
                    base = ".".join([*package[: len(package) - child.level + 1], *filter(None, [child.module])])
                elif child.module == "fastdiff" or (child.module or "").startswith("fastdiff."):
                    base = child.module.partition(".")[2]
            if base is not None:
                for alias in child.names:
                    whole = f"{base}.{alias.name}".strip(".")
                    target = whole if whole in MODULES else base
                    if target and target != name:
                        yield target, inside
            yield from found(child, inside)

    return list(found(ast.parse(file.read_text()), False))


def floor_of(module):
    for number, floor in enumerate(FLOORS):
        for name in floor.split():
            if module == name.rstrip(".") or (name.endswith(".") and module.startswith(name)):
                return number
    raise AssertionError(f"{module} is on no floor")


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_no_import_goes_up(module):
    up = [target for target, _ in imports(module) if floor_of(target) > floor_of(module)]
    assert not up


def test_there_is_no_circle():
    """Among files, imports inside of functions too: a package's __init__, which runs first, is not looked into."""
    open_, done = [], set()

    def visit(module):
        assert module not in open_, " -> ".join([*open_, module])
        if module not in done:
            open_.append(module)
            for target, _ in imports(module):
                visit(target)
            open_.pop()
            done.add(module)

    for module in MODULES:
        if module:
            visit(module)


def test_imports_inside_functions_are_of_what_needs_optional_packages():
    late = {(name, target) for name in MODULES if name for target, inside in imports(name) if inside}
    assert not [(name, target) for name, target in late if not target.startswith(LATE)]


def test_the_mathematics_imports_no_backend():
    for module in FLOORS[2].split():
        assert not [target for target, _ in imports(module) if target.startswith("backends")]


def test_the_design_names_the_files_of_each_floor():
    """Its table, from the highest floor to the lowest, and no file elsewhere."""
    document = Path(__file__).parents[1] / "docs" / "design.md"
    if not document.is_file():
        pytest.skip("the documents are not beside the tests")
    rows = document.read_text().partition("| Floor | Files |")[2].splitlines()[2:]
    named = []
    for line in itertools.takewhile(lambda line: line.startswith("|"), rows):
        files = re.findall(r"`([^`]+)`", line.split("|")[2])
        named.append(
            {file.removesuffix(".py").removesuffix("__init__").rstrip("/").replace("/", ".") for file in files}
        )
    inside = {name.name for name in (PACKAGE / "backends").iterdir() if name.is_dir()}
    named = [names - inside for names in named]
    assert named == [{name.rstrip(".") for name in floor.split()} for floor in reversed(FLOORS)]
