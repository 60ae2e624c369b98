"""The tool that plants faults: what it plants, what it leaves alone, what it draws."""

import ast
import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "mutants"
ROOT = FOLDER.parent.parent
ERRORS = "fastdiff/losses/error_functions.py"
if not (ROOT / "fastdiff").is_dir():
    pytest.skip("without the sources", allow_module_level=True)


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("mutants_tool", FOLDER / "__main__.py")
        module = sys.modules["mutants_tool"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))


def changes(tool, source):
    return {
        place.change(text)[1] for place in tool.faults.places(source) for text in place.texts if place.is_fault(text)
    }


@pytest.mark.parametrize(
    ("line", "planted"),
    [
        ("y = a + b", {"y = (a - b)"}),
        ("y = a < b", {"y = (a <= b)", "y = (a >= b)"}),
        ("y = a and b", {"y = (a or b)"}),
        ("y = 2", {"y = 3", "y = 1", "y = 4", "y = (-2)"}),
        ("y = 0.0", {"y = 1.0", "y = (-1.0)"}),
        ("y = True", {"y = False"}),
        ("y = not a", {"y = (a)"}),
        ("y = -a", {"y = (a)"}),
        ("y = f(a, b)", {"y = f(b, a)"}),
        ("y = f(a, k=b)", {"y = f(a)"}),
        ("y = a if b else c", {"y = a if (not b) else c"}),
        ("f(a)", {"pass"}),
        ("a.x = b", {"pass"}),
        ("raise ValueError(f'{a} + 1')", {"pass"}),
        ("warnings.warn('less', stacklevel=2)", {"pass"}),
        ("'''A docstring 1 + 1.'''", set()),
        ("y: Literal[1]", set()),
    ],
)
def test_what_is_planted_for_a_line(tool, line, planted):
    assert {change.replace("(not (b))", "(not b)") for change in changes(tool, line + "\n")} == planted


def test_another_name_is_returned(tool):
    source = "def f(self, a, b):\n    c = 'c'\n    return c\n"
    assert changes(tool, source) == {"return a", "return b"}


def test_other_lines_stay_where_they_were(tool):
    source = "def f(a):\n    y = (\n        a\n        + 1\n    )\n    return y\n"
    for place in tool.faults.places(source):
        for text in place.texts:
            planted = place.planted(text)
            ast.parse(planted)
            assert planted.splitlines()[-1] in ("    return y", "    return (a)", "    return a")
            assert planted.count("\n") == source.count("\n")


def test_a_seed_draws_the_same_faults_and_another_others(tool):
    files = [ERRORS, "fastdiff/timesteps.py"]
    first, again, other = ([m.key for m in tool.draw("mathematics", files, 30, seed)] for seed in (1, 1, 2))
    assert first == again != other and len(first) == 30
    assert {key[0] for key in first} == set(files)


def test_every_source_file_has_tests_to_ask(tool):
    for group in tool.GROUPS:
        assert tool.sources(group)
        for file in tool.sources(group):
            assert tool.choosing.files_for(ROOT, file), file


def test_a_group_names_files_and_folders_that_are_there(tool):
    for names in tool.GROUPS.values():
        for name in names.split():
            path = ROOT / "fastdiff" / name
            assert path.is_dir() if name.endswith("/") else path.with_suffix(".py").is_file(), name


def test_what_is_run_at_import_is_asked_of_the_whole_table(tool, tmp_path):
    """A test that is the first to import a file runs all that stands outside of functions; it does not ask for it."""
    source = (ROOT / ERRORS).read_text().splitlines()
    head, body = (
        source.index(line) + 1
        for line in (
            "@dataclass(frozen=True)",
            "    def rows(self, levels: Levels) -> tuple[Tensor | None, Tensor | float]:",
        )
    )
    inside = tool.choosing._in_a_function("\n".join(source), body + 2)
    assert inside and not tool.choosing._in_a_function("\n".join(source), head)
    one, other = "tests/test_documents.py::test_first", "tests/ops/test_loss.py::test_b"
    lines = {str(head): [one], str(body + 2): [one, other]}
    (tmp_path / "lines.json").write_text(json.dumps({ERRORS: lines}))
    (tmp_path / "costs.json").write_text(json.dumps({one: 3.0}))
    for name in (
        "test_documents",
        *(Path(file).stem for file in tool.choosing.files_for(ROOT, ERRORS)),
    ):
        (tmp_path / f"data.{name}").touch()
    recorded = tool.choosing.Recorded(ROOT, tmp_path)

    def asked(line):
        return recorded.functions_for(ROOT, ERRORS, range(line, line + 1))

    table = tool.choosing.files_for(ROOT, ERRORS)
    assert asked(head) == table | {"tests/test_documents.py": {"test_first": 3.0}}
    found = {"tests/ops/test_loss.py": {"test_b": 0.0}, "tests/test_documents.py": {"test_first": 3.0}}
    assert asked(body + 2) == found and list(asked(body + 2)) == list(found)  # the table's first


def test_no_two_test_files_have_the_same_name(tool):
    """The table of test files says names, and pytest imports each file by its name alone."""
    files = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py"))
    assert sorted(tool.choosing.test_files(ROOT).values()) == files and "tests/ops/test_loss.py" in files


def test_explained_faults_are_still_there(tool):
    """One whose line has changed explains nothing: take it out of equivalents.txt."""
    planted = {}
    for file, function, before, after in tool.read_equivalents(FOLDER / "equivalents.txt"):
        if file not in planted:
            source = (ROOT / file).read_text()
            planted[file] = {
                (place.function, *place.change(text)) for place in tool.faults.places(source) for text in place.texts
            }
        assert (function, before, after) in planted[file], (file, function, before, after)


def test_a_share_below_the_bar_may_be_chance(tool):
    """13 of 15 where 95% are noticed: 17% of all samples are as low. (1 - 0.95^15 - 15 * 0.05 * 0.95^14 = 0.171.)"""
    assert tool.by_chance(13, 15, 0.95) == pytest.approx(0.1710, abs=1e-4)
    assert tool.by_chance(15, 15, 0.95) == pytest.approx(1)
    assert tool.by_chance(180, 200, 0.95) < 0.01 < tool.by_chance(185, 200, 0.95)
