"""Installing: what is built is of the sources that are there, and what is not says why. The C++ sources are replaced by
a module that tells one number."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import fastdiff
from fastdiff import extension

ROOT = Path(extension.__file__).resolve().parent.parent
MODULE = """#include <pybind11/pybind11.h>
PYBIND11_MODULE(_C, module) {
  module.attr("sources") = FASTDIFF_SOURCES;
  module.attr("number") = NUMBER;
}
"""
LOOK = (
    "import warnings; warnings.simplefilter('always'); from fastdiff import extension;"
    "module, because = extension.load(); print(module and module.number, because, sep='|')"
)

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
builds = pytest.mark.skipif(not all(map(shutil.which, ("cmake", "c++"))), reason="needs CMake and a C++ compiler")


@pytest.fixture
def tree(tmp_path):
    """A source tree with the real build, and little in it."""
    root = tmp_path / "tree"
    (root / "fastdiff").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "CMakeLists.txt", "fastdiff/extension.py"):
        shutil.copy(ROOT / name, root / name)
    (root / "fastdiff" / "__init__.py").write_text(f'__version__ = "{fastdiff.__version__}"\n')
    for path in (ROOT / "csrc").rglob("*.cpp"):
        copy = root / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("")
    say(root, 1)
    return root


def say(root, number):
    (root / "csrc" / "bindings.cpp").write_text(MODULE.replace("NUMBER", str(number)))


def run(*command, cwd, **variables):
    environment = {**os.environ, "FASTDIFF_CUDA": "0", "FASTDIFF_BUILD": "auto", **variables}
    environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), environment["PATH"]])
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def wheel(root, **variables):
    """Makes a wheel as ``pip install .`` does, and unpacks it: (folder, what pip said)."""
    out = root.parent / "wheels"
    shutil.rmtree(out, ignore_errors=True)
    command = sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(out), "."
    done = run(*command, cwd=root, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.glob("*.whl")
    installed = root.parent / "installed"
    shutil.rmtree(installed, ignore_errors=True)
    zipfile.ZipFile(made).extractall(installed)
    return installed, done.stdout + done.stderr


def look(folder, **variables):
    """What importing the package there gives: (the module's number, why there is no module, the warnings)."""
    # Without site: what is installed in this environment is not to be found.
    done = run(sys.executable, "-S", "-c", LOOK, cwd=folder, PYTHONPATH=str(folder), **variables)
    assert done.returncode == 0, done.stderr
    number, because = done.stdout.strip().split("|")
    return number, because, done.stderr


def test_the_module_here_is_of_the_sources_here():
    if fastdiff.backends.native.backend.unavailable_because:
        pytest.skip("there is no extension")
    from fastdiff import _C

    assert _C.sources == extension.digest(ROOT)


def test_the_digest_is_of_names_and_contents(tree):
    first = extension.digest(tree)
    (tree / "csrc" / "notes.md").write_text("no source")
    assert extension.digest(tree) == first
    (tree / "csrc" / "cpu" / "new.h").write_text("int a;")
    second = extension.digest(tree)
    (tree / "csrc" / "cpu" / "new.h").rename(tree / "csrc" / "cpu" / "other.h")
    (tree / "CMakeLists.txt").write_text((tree / "CMakeLists.txt").read_text() + "\n")
    assert len({first, second, extension.digest(tree)}) == 3


@builds
def test_installing_again_builds_again(tree):
    """Of the changed sources; without what was left of the build before; and not at all where that fails."""
    (tree / "fastdiff" / "old.py").write_text("")
    installed, _ = wheel(tree)
    assert look(installed) == ("1", "", "") and (installed / "fastdiff" / "old.py").exists()
    (tree / "fastdiff" / "old.py").unlink()
    say(tree, 2)
    installed, _ = wheel(tree)
    assert look(installed) == ("2", "", "") and not (installed / "fastdiff" / "old.py").exists()
    say(tree, "not a number")
    installed, said = wheel(tree)
    assert "installing without the native extension: `cmake` failed" in said
    number, because, warned = look(installed)
    assert number == "None" and because.startswith("`cmake` failed") and "error" in because
    assert warned.count("UserWarning: fastdiff runs without its native extension") == 1
    assert not list(installed.glob("fastdiff/_C*"))
    say(tree, 3)
    installed, _ = wheel(tree)
    assert look(installed) == ("3", "", "")


@builds
def test_a_module_of_other_sources_is_refused(tree):
    """Pulling new sources under an editable install; a module that was copied to another package; one of long ago."""
    done = run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree)
    assert done.returncode == 0, done.stderr
    assert look(tree) == ("1", "", "")
    say(tree, 2)
    number, because, warned = look(tree)
    assert number == "None" and "was built of other sources" in because and because in warned
    say(tree, 1)
    assert look(tree)[0] == "1"
    (tree / "fastdiff" / "_built.py").write_text('SOURCES, MISSING = "0123456789abcdef", ""\n')
    assert "than these (0123456789abcdef)" in look(tree)[1]
    (module,) = tree.glob("fastdiff/_C*")
    module.unlink()
    (tree / "fastdiff" / "_built.py").unlink()
    (tree / "fastdiff" / "_C.py").write_text("number = 7")
    assert "other sources (unknown)" in look(tree)[1]


def test_doing_without_the_extension_is_quiet(tree):
    installed, _ = wheel(tree, FASTDIFF_BUILD="0")
    assert look(installed) == ("None", extension.NOT_WANTED, "")
    number, because, warned = look(tree, FASTDIFF_BUILD="0")
    assert number == "None" and because == "FASTDIFF_BUILD=0 is set" and not warned


def test_a_build_that_is_insisted_on_fails(tree):
    command = sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "out", "."
    done = run(*command, cwd=tree, FASTDIFF_BUILD="1", FASTDIFF_CMAKE_ARGS="-DCMAKE_CXX_COMPILER=/nothing")
    assert done.returncode != 0 and "the native extension cannot be built" in done.stdout + done.stderr
