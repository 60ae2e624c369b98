"""The tool that plants faults: what it plants, what it leaves alone, what it draws."""

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

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


def test_a_decorator_is_not_in_the_body_that_it_stands_before(tool):
    source = "@f(a=True)\nclass C:\n    @g(1)\n    def m(self):\n        return 2\n"
    where = {place.change(text)[0]: place.lines.start for place in tool.faults.places(source) for text in place.texts}
    assert where == {"@f(a=True)": 2, "@g(1)": 4, "return 2": 5}


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


def test_every_source_file_is_in_one_group_or_said_to_be_in_none(tool):
    none = tuple(f"fastdiff/{name if name.endswith('/') else name + '.py'}" for name in tool.NO_GROUP.split())
    files = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "fastdiff").rglob("*.py"))
    drawn = [file for group in tool.GROUPS for file in tool.sources(group)]
    assert sorted(drawn + [file for file in files if file.startswith(none)]) == files


def test_a_group_names_files_and_folders_that_are_there(tool):
    for names in [*tool.GROUPS.values(), tool.NO_GROUP]:
        for name in names.split():
            path = ROOT / "fastdiff" / name
            assert path.is_dir() if name.endswith("/") else path.with_suffix(".py").is_file(), name


def test_what_is_run_at_import_is_asked_of_the_whole_table(tool, tmp_path, monkeypatch):
    """A test that is the first to import a file runs all that stands outside of functions; it does not ask for it."""
    monkeypatch.setattr(tool.choosing, "_functions", lambda source: [])
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
    (tmp_path / "costs.json").write_text(json.dumps({one: 3.0, other: 0.5}))
    for name in (
        "test_documents",
        *(Path(file).stem for file in tool.choosing.files_for(ROOT, ERRORS)),
    ):
        (tmp_path / f"data.{name}").touch()
    recorded = tool.choosing.Recorded(ROOT, tmp_path)

    def asked(line):
        return recorded.functions_for(ROOT, ERRORS, range(line, line + 1))

    table = tool.choosing.files_for(ROOT, ERRORS) | {"tests/ops/test_loss.py": {"*": 0.0, "test_b": 0.5}}
    assert asked(head) == table | {"tests/test_documents.py": {"test_first": 3.0}}
    assert list(asked(head))[:2] == ["tests/test_names.py", "tests/test_options.py"]  # they ask for what is defined
    found = {"tests/ops/test_loss.py": {"test_b": 0.5}, "tests/test_documents.py": {"test_first": 3.0}}
    assert asked(body + 2) == found and list(asked(body + 2)) == list(found)  # the table's first


def test_what_no_record_can_say_is_asked_for_by_the_table(tool, tmp_path, monkeypatch):
    """What a compiler or another process runs, and test functions that are newer than the record."""
    file, test = "fastdiff/objective.py", "tests/test_objective.py::test_a"
    own, there = (ROOT / "tests/test_objective.py").read_text(), ["test_a", "test_other", "TestNew.test_new"]
    monkeypatch.setattr(tool.choosing, "_functions", lambda source: there if source == own else [])
    line = (ROOT / file).read_text().splitlines().index("        check_noised(prediction, noised)") + 1
    lines = {file: {str(line): [test], "1": ["tests/test_objective.py::test_other"]}}
    (tmp_path / "lines.json").write_text(json.dumps(lines))
    (tmp_path / "costs.json").write_text(json.dumps({"tests/backends/test_compile.py::test_b": 3.0}))
    for each in tool.choosing.files_for(ROOT, file):
        (tmp_path / f"data.{Path(each).stem}").touch()
    found = tool.choosing.Recorded(ROOT, tmp_path).functions_for(ROOT, file, range(line, line + 1))
    assert found == {
        "tests/test_objective.py": {"test_a": 0.0, "TestNew.test_new": 0.0},
        "tests/backends/test_compile.py": {"*": 0.0, "test_b": 3.0},
        "tests/distributed/test_distributed.py": tool.choosing.ALL,
    }


def test_cheap_tests_are_asked_before_dear_ones(tool):
    costs = {"test_dear": 30.0, "test_cheap": 0.5, "test_middling": 5.0}
    cases = {"test_dear": 4, "test_cheap": 5, "test_other": 1, "test_middling": 9}
    items = [
        SimpleNamespace(nodeid=f"test_x.py::{name}[{k}]", cls=None, get_closest_marker=lambda mark: None)
        for name, count in cases.items()
        for k in range(count)
    ]

    def asked(functions, turn):
        chosen = items[:]
        tool.asking._Choice(functions, turn, 1.0).pytest_collection_modifyitems(chosen)
        return [item.nodeid.split("::")[1].split("[")[0] for item in chosen]

    assert asked(costs, 0) == ["test_cheap"] * 5 + ["test_middling"] * 3
    assert [asked(costs, turn) for turn in (1, 2)] == [["test_middling"] * 6, ["test_dear"] * 4]
    assert sorted(asked({"*": 0.0} | costs, 0)) == sorted(asked(costs, 0) + ["test_other"])
    first, later, last = (asked(tool.choosing.ALL, turn) for turn in range(3))
    assert later == [] and last.count("test_middling") == 6 and len(first) == 10 and len(last) == 9


def test_functions_of_a_test_file(tool):
    source = "def test_a(): ...\ndef helper(): ...\nclass TestB:\n    def test_c(self): ...\n    def other(self): ...\n"
    assert tool.choosing._functions(source) == ["test_a", "TestB.test_c"]


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
