"""What the installed package is: what it loads, what its module links, what importing it pulls in."""

import shutil
import subprocess
import sys

import pytest

import fastdiff

native = pytest.mark.skipif(
    bool(fastdiff.backends.native.backend.unavailable_because), reason="needs the native backend"
)


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def module_path() -> str:
    import fastdiff._C

    return fastdiff._C.__file__


@native
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_the_module_needs_nothing_of_torch():
    """Neither PyTorch's C++ symbols nor those of its CUDA build: it loads beside every version."""
    undefined = run("nm", "-D", "-C", "--undefined-only", module_path())
    names = [line.split(maxsplit=1)[1] for line in undefined.splitlines() if len(line.split(maxsplit=1)) == 2]
    assert any("PyModule" in name for name in names), "the listing is of a Python module"
    assert not [name for name in names if any(word in name for word in ("at::", "c10::", "torch", "THP", "cuda"))]


@native
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_the_module_shows_nothing_of_the_cuda_runtime_inside():
    """PyTorch brings a CUDA runtime of its own: neither may be taken for the other."""
    defined = [line.split()[-1] for line in run("nm", "-D", "--defined-only", module_path()).splitlines()]
    assert "PyInit__C" in defined
    assert not [name for name in defined if "cuda" in name.lower() or name.startswith(("cu", "__cu"))]


@native
@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
def test_the_module_links_system_libraries_alone():
    header = run("objdump", "-p", module_path())
    needed = {line.split()[1].split(".so")[0] for line in header.splitlines() if "NEEDED" in line}
    assert needed <= {
        "libgomp",
        "libstdc++",
        "libgcc_s",
        "libm",
        "libc",
        "libpthread",
        "libdl",
        "librt",
        "ld-linux-x86-64",
    }


@native
def test_the_module_takes_the_threads_of_torch():
    """One OpenMP runtime in the process: torch's own."""
    code = (
        "import torch, fastdiff, re; maps = open('/proc/self/maps').read();"
        "print(*sorted(set(re.findall(r'\\S*lib[gi]omp\\S*', maps))), sep='\\n')"
    )
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    assert len(run(sys.executable, "-c", code).split()) == 1


def test_importing_pulls_in_little():
    """Nothing beyond torch, the package and the standard library: what makes an import slow is other packages."""
    code = (
        "import sys, torch; before = set(sys.modules); import fastdiff;"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    added = set(run(sys.executable, "-c", code).split())
    foreign = {name for name in added if name not in sys.stdlib_module_names and name not in ("fastdiff", "torch")}
    assert not foreign
    code = "import sys, torch, fastdiff; print(*(m for m in sys.modules if m.startswith('fastdiff')))"
    late = ("fastdiff.demo", "fastdiff.cli", "fastdiff.doctor", "fastdiff.bench", "fastdiff.integrations")
    assert not [name for name in run(sys.executable, "-c", code).split() if name.startswith(late)]
