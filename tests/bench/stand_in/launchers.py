"""Prints, as JSON, the launches of a training step that Triton's own launchers make, and then those of C++: lists of
[function, grid, threads, shared memory, stream, parameters]. Kernels are compiled for sm_90, and nothing runs."""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from pathlib import Path

import device as stand_in


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        library = stand_in.driver(Path(folder))
        stand_in.put_in_place(stand_in.Device(library))
        import torch

        import fastdiff
        from fastdiff import backends
        from fastdiff.backends.triton import fast, launch

        stand_in.take_for_a_gpu()
        made = launch._Direct.__init__

        def watched(direct, compiled, layout):
            made(direct, compiled, layout)
            sizes = bytes(struct.calcsize(kind) for kind in (*layout, "Q", "Q") if kind is not None)
            assert not direct.unknown and library.stand_in_parameters(compiled.function, sizes, len(sizes))

        launch._Direct.__init__ = watched
        trained = fastdiff.Objective(fastdiff.RectifiedFlow(3.0), "flow", "cosmap", timesteps="logit_normal")
        trained.noise_offset = 0.1
        x0, prediction = torch.zeros(3, 4, 8, 8), torch.zeros(3, 4, 8, 8).requires_grad_()
        held = []

        def step() -> None:
            noised = trained.noise(x0, seed=2**40 + 5, sample_offset=2**33)
            value = trained.loss(prediction, noised)
            held.append((noised, value, torch.autograd.grad(value, prediction, torch.ones(()))))

        with backends.use_backend("triton"):
            told = fast.Kept.keep
            fast.Kept.keep = lambda *how: None
            step()  # compiles
            steps = []
            for cpp in (False, True):
                if cpp:
                    fast.Kept.keep = told
                    step()
                since = library.stand_in_launched()
                step()
                found = [library.stand_in_written(k).contents for k in range(since, library.stand_in_launched())]
                steps.append(
                    [
                        [e.function, list(e.grid), e.threads, e.shared, e.stream, list(e.values[: e.count])]
                        for e in found
                    ]
                )
            declined = fast.declined(trained._program(True))
        print(json.dumps({"python": steps[0], "cpp": steps[1], "declined": declined}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
