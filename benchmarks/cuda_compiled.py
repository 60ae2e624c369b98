"""What the CUDA compiler makes of csrc/cuda/step.cu, for every architecture of CMakeLists.txt: registers, spills,
instructions and memory accesses of each kernel. It needs nvcc and a disassembler (cuobjdump), and no GPU.

    python benchmarks/cuda_compiled.py > benchmarks/results/cuda_step_compiled.md
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc" / "cuda" / "step.cu"
KERNELS = {
    (0, 0, 1): "float32",
    (2, 0, 1): "bfloat16",
    (3, 0, 1): "float16",
    (-1, 1, 1): "any dtype, all options",
    (-1, 1, 0): "any dtype, all options, not aligned",
}


@dataclass
class Kernel:
    """One kernel in one architecture. ``instructions`` counts each with its suffixes, such as LDG.E.128."""

    registers: int
    spilled_bytes: int
    stack_bytes: int
    instructions: Counter[str] = field(default_factory=Counter)

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))


def architectures() -> list[int]:
    """Those that CMakeLists.txt compiles for."""
    found = re.search(r"set\(FASTDIFF_CUDA_ARCHITECTURES ([\d ]+)\)", (ROOT / "CMakeLists.txt").read_text())
    assert found, "CMakeLists.txt names the architectures"
    return [int(word) for word in found.group(1).split()]


def flags() -> list[str]:
    """The compiler flags of CMakeLists.txt that decide what is made of the arithmetic."""
    found = re.search(r"set\(FASTDIFF_CUDA_FLAGS ([^)]+)\)", (ROOT / "CMakeLists.txt").read_text())
    assert found, "CMakeLists.txt names the flags"
    return found.group(1).split()


def compiler() -> str | None:
    """The path of nvcc, or None."""
    return shutil.which("nvcc")


def disassembler() -> str | None:
    """The path of cuobjdump, with nvdisasm beside it: of the CUDA toolkit, or of Triton's wheel; or None."""
    if shutil.which("cuobjdump") and shutil.which("nvdisasm"):
        return shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if path.exists():
            return str(path)
    return None


def _name(mangled: str) -> tuple[int, ...] | None:
    """The template arguments in a mangled name."""
    found = re.search(r"step_kernelILi(n?)(\d+)ELb([01])ELb([01])E", mangled)
    return found and (int(found[2]) * (-1 if found[1] else 1), int(found[3]), int(found[4]))


def compile_for(architecture: int, folder: Path) -> dict[str, Kernel]:
    """Compile and disassemble; the kernels by the names of ``KERNELS``. Without a disassembler, no instructions."""
    cubin = folder / f"step_{architecture}.cubin"
    command = [compiler(), "-std=c++17", "-O3", *flags(), f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin"]
    done = subprocess.run([*command, str(SOURCE), "-o", str(cubin)], capture_output=True, text=True)
    log = done.stdout + done.stderr
    if done.returncode or "warning" in log:
        raise RuntimeError(f"nvcc, sm_{architecture}:\n{log}")
    kernels: dict[str, Kernel] = {}
    pattern = (
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r"\s+ptxas info\s+: Used (\d+) registers"
    )
    for mangled, stack, stores, loads, registers in re.findall(pattern, log):
        arguments = _name(mangled)
        if arguments is not None:
            kernels[KERNELS[arguments]] = Kernel(int(registers), int(stores) + int(loads), int(stack))
    tool = disassembler()
    if tool is not None:
        found = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
        for part in re.split(r"Function : ", found)[1:]:
            mangled, _, body = part.partition("\n")
            arguments = _name(mangled)
            if arguments is not None:
                names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", body)
                kernels[KERNELS[arguments]].instructions.update(name for name in names if name != "NOP")
    return kernels


def double_precision(kernel: Kernel) -> int:
    """Instructions on float64."""
    return kernel.count(r"D(ADD|MUL|FMA|SETP|MNMX)(\..*)?|.*\.F64(\..*)?|MUFU\.\w*64H")


def main() -> None:
    if compiler() is None or disassembler() is None:
        sys.exit("needs nvcc, and cuobjdump with nvdisasm (of the CUDA toolkit, or of Triton's wheel)")
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout.splitlines()[-2]
    print("# The sampler step in CUDA, as compiled\n")
    print(
        f"nvcc {version.split('release ', 1)[-1].split(',')[0]}, flags {' '.join(flags())}. Written by "
        "`benchmarks/cuda_compiled.py`. A thread does 8 elements (4 where memory is\nnot aligned). Instructions are "
        "those of the program text, all options counted: what one launch runs is a part of them.\nNothing here is "
        "measured on a GPU.\n"
    )
    print(
        "| sm | kernel | registers | spilled | instructions | 128-bit loads / stores | narrower loads / stores | fp64 |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for architecture in architectures():
            kernels = compile_for(architecture, Path(folder))
            for name in KERNELS.values():
                kernel = kernels[name]
                wide = [kernel.count(rf"{op}\..*128.*") for op in ("LDG", "STG")]
                narrow = [kernel.count(rf"{op}(\..*)?") - n for op, n in zip(("LDG", "STG"), wide)]
                print(
                    f"| {architecture} | {name} | {kernel.registers} | {kernel.spilled_bytes} "
                    f"| {sum(kernel.instructions.values())} | {wide[0]} / {wide[1]} | {narrow[0]} / {narrow[1]} "
                    f"| {double_precision(kernel)} |"
                )


if __name__ == "__main__":
    main()
