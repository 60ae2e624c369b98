"""Runs checks in several processes over gloo. A process costs seconds to start, so there are few runs of many
checks."""

import datetime
import os
import pickle
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).parent


def run(modules, ranks, folder, patience=120):
    """Call every check of ``CHECKS`` in modules of this folder, as ``check(rank)``, in so many processes.

    Returns {name: [what came of it in each rank]}: "" where it passed, a traceback where not, None where the rank did
    not get so far."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, HERE / "processes.py", ",".join(modules), str(rank), str(ranks), str(folder)],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    said, until = [], time.monotonic() + patience
    for process in started:
        try:
            said.append(process.communicate(timeout=max(0.1, until - time.monotonic()))[1])
        except subprocess.TimeoutExpired:
            process.kill()  # what it was at has no result
            said.append(process.communicate()[1])
    found = []
    for rank in range(ranks):
        file = Path(folder) / f"rank{rank}"
        assert file.is_file(), f"rank {rank} began with nothing: {said[rank][-2000:]}"
        found.append(pickle.loads(file.read_bytes()))
    names = {name: None for of in found for name in of}
    return {name: [of.get(name) for of in found] for name in names}


def main(modules, rank, ranks, folder):
    rank, ranks = int(rank), int(ranks)
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=40))
    # A warning may be an error: in one rank alone it would leave the others waiting.
    warnings.filterwarnings("error", message="mask is 0 everywhere")
    results = {}
    checks = {name: check for module in modules.split(",") for name, check in __import__(module).CHECKS.items()}
    for name, check in checks.items():
        results[name] = None
        try:
            check(rank)
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
        (Path(folder) / f"rank{rank}").write_bytes(pickle.dumps(results))
        if results[name]:
            break  # the others may wait for this rank: its end tells them
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
