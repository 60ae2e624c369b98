"""``benchmarks/gpu_check.sh`` without a GPU: its shell with a stand-in for all programs, its report, and what it
measures with a stand-in for the device."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from devices import nightly

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
gpu_records = pytest.importorskip("gpu_records", reason="needs the sources")
gpu_report = pytest.importorskip("gpu_report")

ROOT = Path(__file__).parents[2]
BENCHMARKS, STAND_IN = ROOT / "benchmarks", Path(__file__).parent / "stand_in"
SCRIPT = BENCHMARKS / "gpu_check.sh"
STAGES = {
    "numbers": ["install", "doctor", "compile", "smoke", "kernels", "steps", "counters", "gpu-tests"],
    "tests": ["install", "doctor", "operations", "compile", "memcheck", "initcheck", "bench"],
}
FILES = {"logs.tar.gz", "numbers.json", "records.jsonl", "summary.txt"}
pytestmark = pytest.mark.skipif(not shutil.which("timeout"), reason="needs GNU timeout")


# ---- the shell


class Check:
    """A run of the script with the stand-in in place of Python, ncu and compute-sanitizer."""

    def __init__(self, folder: Path, tools=("ncu", "compute-sanitizer")):
        self.out, self.bin, self.temporary = folder / "out", folder / "bin", folder / "tmp"
        self.bin.mkdir(), self.temporary.mkdir()
        for name in ("python", *tools):
            (self.bin / name).symlink_to(STAND_IN / "python")

    def start(self, mode: str, plan: str = "", scale: str = "1", **more: str) -> subprocess.Popen:
        environment = os.environ | {
            "PATH": f"{self.bin}:/usr/bin:/bin", "PYTHON": str(self.bin / "python"), "REAL_PYTHON": sys.executable,
            "OUT": str(self.out), "TMPDIR": str(self.temporary), "PLAN": plan, "CAP_SCALE": scale, **more,
        }  # fmt: skip
        command = ["bash", str(SCRIPT), mode]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def run(self, mode: str, plan: str = "", scale: str = "1", **more: str) -> tuple[int, str]:
        process = self.start(mode, plan, scale, **more)
        printed, _ = process.communicate(timeout=60)
        return process.returncode, printed

    def records(self, kind: str) -> list[dict]:
        return [r for r in gpu_records.load(self.out / "records.jsonl") if r["record"] == kind]

    def outcomes(self) -> dict[str, str]:
        return {stage["name"]: stage["outcome"] for stage in self.records("stage")}

    def log(self, name: str) -> str:
        with tarfile.open(self.out / "logs.tar.gz") as tar:
            return tar.extractfile(name).read().decode()


@pytest.fixture
def check(tmp_path):
    return Check(tmp_path)


@pytest.mark.parametrize("mode", STAGES)
def test_stages_and_their_caps_fit_into_a_call(mode):
    text = SCRIPT.read_text()
    body = re.search(rf"^{mode}\(\) {{\n(.*?)^}}", text, re.M | re.S)[1]
    stages = re.findall(r"stage (\S+) (\d+) ", body)
    assert [name for name, _ in stages] == STAGES[mode]
    grace, report, total = (int(re.search(rf"^{name}=(\d+)", text, re.M)[1]) for name in ("GRACE", "REPORT", "TOTAL"))
    assert sum(int(cap) for _, cap in stages) + grace + report <= total <= 290


@pytest.mark.parametrize("mode", STAGES)
def test_what_comes_back_when_all_is_well(check, mode):
    status, printed = check.run(mode)
    assert status == 0, printed
    assert list(check.outcomes().items()) == [(name, "passed") for name in STAGES[mode]]
    assert {path.name for path in check.out.rglob("*")} == FILES
    for name in STAGES[mode]:
        assert f"passed    {name}" in (check.out / "summary.txt").read_text()
        assert "PYTHONPATH" in check.log(f"{name}.log")
    found = json.loads((check.out / "numbers.json").read_text())
    assert found["mode"] == mode
    assert found["records"] == gpu_report.compared(gpu_records.load(check.out / "records.jsonl"))
    assert printed.rstrip().endswith(f"gpu_check {mode}: passed, results in {check.out}")
    assert "Kernels (" in printed[-12000:]
    assert not list(check.temporary.iterdir())


def test_a_stage_that_fails_does_not_stop_the_next(check):
    status, _ = check.run("numbers", "smoke=fails counters=skips")
    assert status == 1
    changed = {"smoke": "failed", "counters": "skipped"}
    assert check.outcomes() == dict.fromkeys(STAGES["numbers"], "passed") | changed
    summary = (check.out / "summary.txt").read_text()
    assert "it went wrong" in summary and "status 3" in summary and "not here" in summary


def test_what_is_skipped_is_said_and_is_no_failure(tmp_path):
    check = Check(tmp_path, tools=())
    status, _ = check.run("numbers")
    outcomes = check.outcomes()
    assert status == 0 and outcomes["ncu"] == "skipped" and "counters" not in outcomes
    assert "there is no ncu" in (check.out / "summary.txt").read_text()


def test_without_an_install_everything_is_run_from_the_sources(check):
    status, _ = check.run("numbers", "pip=fails")
    assert status == 1 and "not installed" in (check.out / "summary.txt").read_text()
    assert f"PYTHONPATH is {ROOT}:{BENCHMARKS}" in check.log("kernels.log")
    assert f"PYTHONPATH is {BENCHMARKS}" in check.log("install.log")


def test_a_wheel_is_taken_where_there_is_one(check, tmp_path):
    (tmp_path / "fastdiff-1-cp312-cp312-linux_x86_64.whl").touch()
    check.run("tests", WHEEL_DIR=str(tmp_path))
    assert "--no-index" in check.log("install.log") and f"{tmp_path}/fastdiff-1-" in check.log("install.log")


def test_a_stage_that_hangs_is_killed_and_the_next_runs(check):
    """It would take a minute, and does not listen to being told to end."""
    status, _ = check.run("numbers", "smoke=hangs", scale="0.05")
    assert status == 1
    assert check.outcomes() == dict.fromkeys(STAGES["numbers"], "passed") | {"smoke": "timed out"}


def test_no_stage_begins_when_the_call_is_over(check):
    """Here it is over before the first report is written."""
    status, _ = check.run("tests", scale="0.0003")
    stages = check.records("stage")
    assert status == 1 and [stage["name"] for stage in stages] == STAGES["tests"]
    assert stages[-1]["why"] == "no time was left"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize(("mode", "word", "before"), [("numbers", "kernels", 4), ("tests", "unet-small", 6)])
def test_killed_in_a_stage_it_leaves_what_it_had(check, number, mode, word, before):
    process = check.start(mode, f"{word}=hangs", scale="0.2")
    name, deadline = STAGES[mode][before], time.monotonic() + 50
    while len(check.records("kernel")) <= before:  # the stage has measured something
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)
    process.communicate(timeout=50)
    assert process.returncode == (-number if number == signal.SIGKILL else 143)
    stopped = {} if number == signal.SIGKILL else {name: "stopped"}
    assert check.outcomes() == dict.fromkeys(STAGES[mode][:before], "passed") | stopped
    assert len(check.records("kernel")) == before + 1
    left = {path.name for path in check.out.iterdir()}
    assert left >= FILES and len(left) <= 8
    records = json.loads((check.out / "numbers.json").read_text())["records"]
    assert [r["name"] for r in records if r["record"] == "stage"] == STAGES[mode][:before] + list(stopped)
    for stage in STAGES[mode][:before]:
        assert stage in (check.out / "summary.txt").read_text() and check.log(f"{stage}.log")
    if stopped:
        assert "PYTHONPATH" in check.log("running.log")


def test_asked_for_wrongly(check):
    status, printed = check.run("everything")
    assert status == 2 and "gpu_check.sh numbers" in printed and not check.out.exists()


# ---- records and report


def test_every_test_is_a_record_as_soon_as_it_ends(tmp_path):
    (tmp_path / "test_four.py").write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert 1 == 2, 'one is not two'\n"
        "def test_is_skipped(): pytest.skip('not now')\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError('no set-up')\n"
        "def test_is_not_set_up(broken): pass\n"
        "def test_ends_the_process():\n"
        "    import os\n"
        "    os._exit(9)\n"
    )
    environment = {name: value for name, value in os.environ.items() if "XDIST" not in name} | {
        "FASTDIFF_RECORDS": str(tmp_path / "records.jsonl"), "FASTDIFF_STAGE": "four", "PYTHONPATH": str(BENCHMARKS),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_records", "-p", "no:cacheprovider", "test_four.py"]
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    found = gpu_records.load(tmp_path / "records.jsonl")
    assert {(r["name"].split("::")[1], r["outcome"]) for r in found} == {
        *(("test_passes", "passed"), ("test_fails", "failed")),
        *(("test_is_skipped", "skipped"), ("test_is_not_set_up", "failed")),
    }
    text = gpu_report.tests(found)
    assert text.startswith("four: 1 passed, 1 skipped, 2 failed") and "one is not two" in text and "no set-up" in text


def test_records_of_a_killed_run(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"record": "note", "text": "whole"}\n{"record": "note", "te')
    assert [record["text"] for record in gpu_records.load(path)] == ["whole"]
    assert gpu_records.load(tmp_path / "nothing") == []


def test_nothing_is_larger_than_what_comes_back(tmp_path, monkeypatch, capsys):
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir(), (work / "logs").mkdir(parents=True)
    line = json.dumps({"record": "kernel", "name": "x" * 1000, "elements": 4, "bytes": 4, "gpu_us": 1.0}) + "\n"
    (out / "records.jsonl").write_text(line * (17 * 2**20 // len(line)))
    for k in range(9):
        (work / "logs" / f"{k}.log").write_bytes(os.urandom(4 * 2**20))
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "numbers", str(out), str(work)])
    gpu_report.main()
    assert all(path.stat().st_size < 16 * 2**20 for path in out.iterdir())
    assert len(capsys.readouterr().out) < 10000
    found = json.loads((out / "numbers.json").read_text())
    assert found["left_out"] > 0 and found["records"][0]["name"] == "x" * 1000
    assert (out / "records.jsonl").read_bytes().endswith(b"}\n")
    with tarfile.open(out / "logs.tar.gz") as tar:
        assert tar.getmembers()[0].size < 2.1 * 2**20


def a_kernel(name, elements, us, **more):
    return {"record": "kernel", "name": name, "elements": elements, "bytes": 4 * elements, "gpu_us": us, **more}


def test_the_table_of_kernels():
    """Rates count the bytes that must move; shares are of the copy in the same run, of the largest size."""
    records = [
        a_kernel("copy, bf16", 2**24, 16.777216),  # 4 TB/s
        a_kernel("copy, bf16", 2**20, 0.5),  # from the cache
        a_kernel("noising, exact, bf16", 2**24, 33.554432, instructions=38.5, predicted=0.625),
        a_kernel("noising, exact, bf16", 2**20, 2.0),
        {"record": "kernel", "name": "loss v, exact, bf16", "elements": 2**24, "bytes": 1, "error": "out of memory"},
    ]
    assert gpu_report.ceiling(records) == pytest.approx(4e12)
    records = gpu_report.compared(records)
    assert [record["of_copy"] for record in records[:-1]] == pytest.approx([1, 2.1, 0.5, 0.52], rel=0.01)
    lines = gpu_report.kernels(records).splitlines()
    (line,) = [line for line in lines if line.startswith("noising, exact")]
    assert line.split() == "noising, exact, bf16 38.5 | 33.55 2000 62% 50% | 2.00 52%".split()
    assert lines[-1] == "not measured: loss v, exact, bf16 2^24: out of memory"


def test_what_was_compiled_too_late_is_said(tmp_path):
    late = {"record": "compilations", "stage": "kernels", "command": "kernels", "kernels": 3, "launchers": 1}
    assert gpu_report.stages([late | {"kernels": 0, "launchers": 0}], tmp_path, tmp_path) == ""
    said = gpu_report.stages([late], tmp_path, tmp_path)
    assert said == "compiled while kernels ran: 3 kernels and 1 launchers"


def test_the_table_of_steps():
    step = {"record": "step", "kind": "v_prediction", "shape": [64, 4, 64, 64], "dtype": "bf16"}
    records = [
        step | {"peer": "fastdiff", "gpu_us": 10.0, "wall_us": 50.0, "host_us": 60.0},
        step | {"peer": "fastdiff", "kind": "flow", "gpu_us": 9.0, "wall_us": 40.0, "host_us": 50.0},
        step | {"peer": "eager", "gpu_us": 80.0, "wall_us": 400.0, "host_us": 300.0},
        step | {"record": "launches", "peer": "eager", "launches": 41},
    ]
    records = gpu_report.compared(records)
    assert records[2]["gpu_us_ratio"] == 8.0 and records[2]["host_us_ratio"] == 5.0
    lines = gpu_report.steps(records).splitlines()[2:]
    assert [line.split()[2] for line in lines] == ["fastdiff", "eager", "fastdiff"]
    assert lines[1].split()[2:] == ["eager", "80.0", "8.00", "400.0", "8.00", "300.0", "5.00", "41"]


def test_a_full_report_fits_into_what_is_printed():
    """Every kernel at four sizes, all steps with three peers, four kernels counted, some failures."""
    kernels = [
        a_kernel(f"loss epsilon, given, {k:04}", 2**n, 1234.5, predicted=1.0)
        for k in range(42)
        for n in (26, 24, 22, 20)
    ]
    steps = [
        {"record": "step", "kind": kind, "shape": [64, 4, size, size], "peer": peer, "gpu_us": 1.0, "wall_us": 1.0}
        for kind in ("v_prediction", "epsilon", "flow")
        for size in (32, 64, 256)
        for peer in ("fastdiff", "eager", "compile")
    ]
    records = gpu_report.compared(kernels + steps)
    assert len(gpu_report.kernels(records)) + len(gpu_report.steps(records)) < gpu_report.TABLE_CHARACTERS


# ---- what is measured, with a stand-in for the device


def on_the_stand_in(folder: Path, *arguments: str) -> tuple[int, dict, list[dict], str]:
    """(status, what the driver counted, records, what was printed) of a command of gpu_numbers.py."""
    before = gpu_records.load(folder / "records.jsonl")
    environment = os.environ | {
        "FASTDIFF_RECORDS": str(folder / "records.jsonl"), "TRITON_CACHE_DIR": str(folder / "triton"),
        "TRITON_INTERPRET": "0", "STAND_IN_FEW": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(STAND_IN / "device.py"), *arguments, "--exponents", "14"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.stdout, done.stderr
    records = gpu_records.load(folder / "records.jsonl")[len(before) :]
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), records, done.stderr


def of_kind(records: list[dict], kind: str) -> list[dict]:
    return [record for record in records if record["record"] == kind]


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler")
def test_what_is_measured_on_a_stand_in(tmp_path):
    """Every command in the order of gpu_check.sh, in one test: what is compiled in the first is there for the rest."""
    if not pytest.importorskip("triton").__version__.startswith("3.6."):
        pytest.skip("needs Triton 3.6, whose launchers are known")

    status, counted, records, printed = on_the_stand_in(tmp_path, "compile", "--processes", "2")
    assert status == 0, printed
    assert counted == {"modules": 0, "launched": 0, "refused": 0}
    assert len(of_kind(records, "compiled")) > 10 and not any("error" in record for record in records)
    assert all(record["instructions"] > 0 for record in of_kind(records, "compiled"))

    def nothing_is_compiled(records: list[dict]) -> None:
        (found,) = of_kind(records, "compilations")
        assert (found["kernels"], found["launchers"]) == (0, 0)

    # Kernels that do nothing are found out, by every check.
    status, counted, records, printed = on_the_stand_in(tmp_path, "smoke")
    checks = of_kind(records, "smoke")
    assert status == 1 and counted["launched"] > 0
    assert len(checks) == 9 and not any(check["passed"] for check in checks), printed
    nothing_is_compiled(records)

    # A launch takes 2 us of the device and a copy 4, whatever the host takes.
    status, counted, records, printed = on_the_stand_in(tmp_path, "kernels")
    assert status == 0, printed
    nothing_is_compiled(records)
    found = {record["name"]: record for record in of_kind(records, "kernel")}
    kernels = {
        **{"noising, exact, bf16": "affine", "loss v, fast, bf16": "loss"},
        **{"noising images, exact, bf16": "affine", "step, given, bf16": "step"},
    }
    assert found.keys() == {"copy, bf16", *kernels}
    assert found["copy, bf16"]["gpu_us"] == pytest.approx(4.0) and found["copy, bf16"]["launches"] == []
    for name, kernel in kernels.items():
        record = found[name]
        assert record["launches"] == [kernel] and record["gpu_us"] == pytest.approx(2.0)
        assert record["host_us"] > 2.0 and record["instructions"] > 0 and record["cache"] == "rotated past it"
        assert 0 < record["predicted"] <= 1
    assert [record["bytes"] / 2**14 / 2 for record in found.values()] == [2, 2, 3, 1.5, 4]  # tensors of bf16
    assert counted["refused"] == 0 and counted["launched"] > 3 * 5 * 50

    # The launches of a step: times, noising, loss and its backward.
    status, _, records, printed = on_the_stand_in(tmp_path, "steps", "--compile-seconds", "0")
    assert status == 0, printed
    nothing_is_compiled(records)
    steps = {record["peer"]: record for record in of_kind(records, "step")}
    assert steps.keys() == {"fastdiff", "eager"} and steps["fastdiff"]["gpu_us"] == pytest.approx(4 * 2.0)
    (run,) = of_kind(records, "sampler step")
    assert run["gpu_us"] == pytest.approx(2.0) and run["shape"] == steps["fastdiff"]["shape"]
    assert all(record["wall_us"] > 0 and record["host_us"] > 0 for record in (*steps.values(), run))


@nightly
def test_the_smoke_passes_where_the_numbers_are_right():
    """In Triton's interpreter; the graph aside, which needs a GPU."""
    pytest.importorskip("triton")
    code = (
        "import os, warnings; warnings.simplefilter('ignore'); os.environ['TRITON_INTERPRET'] = '1'\n"
        "import torch, fastdiff.backends.triton.launch, gpu_numbers\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"  # which has been looked at, and is again
        "gpu_numbers.DEVICE, gpu_numbers.NORMALS = torch.device('cpu'), (4, 2**10)\n"
        "checks = gpu_numbers.smoke_checks()[:-1]\n"
        "with fastdiff.use_backend('triton'), gpu_numbers.poisoned():\n"
        "    for name, check in checks: check()\n"
        "print(len(checks))\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{BENCHMARKS}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout == "8\n", done.stderr


def test_the_machine_is_shown_as_doctor_shows_it(tmp_path):
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment["FASTDIFF_RECORDS"] = str(tmp_path / "records.jsonl")
    command = [sys.executable, str(BENCHMARKS / "gpu_numbers.py"), "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert "backend chosen for" in done.stdout and "there is no CUDA device" in done.stdout, done.stderr
    (machine,) = gpu_records.load(tmp_path / "records.jsonl")
    assert machine["record"] == "machine" and machine["doctor"]["versions"]["torch"]


def test_counters_as_ncu_writes_them():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    said = (
        '==PROF== Profiling "affine": 0%....100% - 8 passes\n'
        '"ID","Kernel Name","Grid Size","gpu__time_duration.sum","smsp__inst_executed.sum",'
        '"sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active","sm__inst_executed_pipe_alu.sum",'
        '"smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio","launch__function_pcs"\n'
        '"","","","ns","inst","%","inst","inst",""\n'
        '"0","affine","(4096, 1, 1)","91,520","20,447,232","61.5","999","2.25","x"\n'
    )
    code = "import gpu_numbers, json, sys; print(json.dumps(gpu_numbers.parsed(sys.stdin.read())))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=BENCHMARKS, env=environment, input=said, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["kernel"] == "affine"
    assert row["metrics"]["gpu__time_duration.sum"] == [91520.0, "ns"] and len(row["metrics"]) == 5
    text = gpu_report.counters([{"record": "counters", "name": "noising", "elements": 2**24, **row}])
    assert "alu 61.5" in text and "999" not in text and "math_pipe_throttle 2.2" in text
    assert "time 91520 ns" in text and "instructions an element 39.0" in text
