"""Builds ``fastdiff._C`` through CMake and ninja. Everything else is declared in pyproject.toml.

FASTDIFF_BUILD=auto (default) installs without the extension where it cannot be built, and says why; 1 fails there;
0 does not try. FASTDIFF_CUDA=auto (default) puts the CUDA kernel in where nvcc is found; 0 does without it, 1 fails
without nvcc. FASTDIFF_CMAKE_ARGS is passed on to CMake.

Nothing of an earlier build is used: CMake starts in an empty folder, and setuptools' ``build/lib`` is emptied. (For
short turns while writing C++: see CONTRIBUTING.md.)
"""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
EXTENSION = runpy.run_path(str(ROOT / "fastdiff" / "extension.py"))


class CMakeExtension(Extension):
    def __init__(self, name):
        # Optional in the sense of setuptools too: an editable install must not look for a file that was not built.
        super().__init__(name, sources=[], optional=wanted() != "1")


def wanted(name="FASTDIFF_BUILD"):
    choice = os.environ.get(name, "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 0 or 1; got {choice!r}.")
    return choice


class CannotBuild(Exception):
    """Why the extension is not built."""


class CleanBuild(build_py):
    """The Python files, into an empty folder: what an earlier build left there would be packaged too."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "fastdiff", ignore_errors=True)
        super().run()
        if not self.editable_mode:
            tell(self.build_lib, EXTENSION["NOT_WANTED"] if wanted() == "0" else "")


def tell(build_lib, missing):
    """Write what the package is built of, and why it has no extension, if it has none: see fastdiff/extension.py."""
    lines = f"SOURCES = {EXTENSION['digest'](ROOT)!r}\nMISSING = {missing!r}\n"
    (Path(build_lib) / "fastdiff" / "_built.py").write_text(f"# Written by setup.py.\n{lines}")


class CMakeBuild(build_ext):
    def run(self):
        try:
            super().run()
        except CannotBuild as reason:
            if wanted() == "1":
                raise SystemExit(f"fastdiff: the native extension cannot be built: {reason}") from reason
            print(
                f"fastdiff: installing without the native extension: {reason}. Operations on the CPU will use plain "
                "PyTorch. FASTDIFF_BUILD=1 makes this an error.",
                file=sys.stderr,
            )
            # Nothing was built, so there is nothing to copy for an editable install or a wheel.
            self.extensions = []
            if not (self.inplace or self.editable_mode):
                tell(self.build_lib, str(reason))

    def build_extension(self, extension):
        if sys.platform != "linux":
            raise CannotBuild(f"it is for Linux; this is {sys.platform}")
        cmake = shutil.which("cmake")
        if cmake is None:
            raise CannotBuild("cmake was not found")
        try:
            import pybind11
        except ImportError as error:
            raise CannotBuild("pybind11 was not found") from error
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "built"
            arguments = [
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={built}",
                f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
                f"-DFASTDIFF_CUDA={wanted('FASTDIFF_CUDA')}",
                *(["-G", "Ninja"] if shutil.which("ninja") else []),
                *shlex.split(os.environ.get("FASTDIFF_CMAKE_ARGS", "")),
            ]
            self._call([cmake, "-S", str(ROOT), "-B", folder, *arguments])
            self._call([cmake, "--build", folder, "--parallel", str(os.cpu_count() or 1)])
            if not (built / target.name).exists():
                raise CannotBuild(f"CMake built no {target.name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(built / target.name, target)

    def _call(self, command):
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except OSError as error:
            raise CannotBuild(f"{command[0]} does not run ({error})") from error
        if self.verbose or done.returncode:
            print(done.stdout)
        if done.returncode:
            lines = [line.strip() for line in done.stdout.splitlines() if "error" in line.lower()]
            raise CannotBuild(f"`cmake` failed ({'; '.join(lines[:2]) or 'no message'})")


setup(
    ext_modules=[CMakeExtension("fastdiff._C")] if wanted() != "0" else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuild},
)
