"""The kernel variants that each test of test_triton_operations.py asks for, as JSON:

    python -O tests/backends/variants.py FILE

Nothing is launched, so the results are not looked at: -O takes the assertions out.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "FASTDIFF_NIGHTLY": "1"}

import pytest
import torch

from fastdiff.backends import registry
from fastdiff.backends.triton import launch

registry._CHOICE["cpu"] = "triton"  # as on a GPU, where what is not forced is Triton's too


class Recorder:
    """Keeps, for each test, whether it is marked for a GPU and the variants: the kernel, what its pointers point at,
    whether they are aligned, and its constants by name."""

    def __init__(self):
        self.tests = []
        launch.Kernel.__call__ = lambda kernel, *how: self.record(kernel, *how)
        torch.testing.assert_close = lambda *_, **__: None

    def pytest_runtest_setup(self, item):
        drawn = getattr(item.function, "is_hypothesis_test", False)
        self.tests.append({
            "name": item.name, "chosen": "gpu_variants" in item.keywords, "drawn": drawn, "variants": [],
        })  # fmt: skip

    def record(self, kernel, device, grid, arguments, constants):
        types, aligned, values, _ = kernel.key(arguments, constants, None)
        pointers = {name: str(kind) for name, kind in zip(kernel.runtime, types)}
        found = {"kernel": kernel.name, "aligned": aligned, **pointers, **dict(zip(kernel.constants, values))}
        self.tests[-1]["variants"].append(found)


def main(out):
    recorder = Recorder()
    tests = str(Path(__file__).with_name("test_triton_operations.py"))
    how = ["-q", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-profile=ci"]
    code = pytest.main([tests, *how, "-W", "ignore::pytest.PytestConfigWarning"], plugins=[recorder])
    Path(out).write_text(json.dumps(recorder.tests))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
