#!/usr/bin/env bash
# On a machine with a CUDA GPU: what fastdiff does there, in two calls of less than 290 s each. Nothing is downloaded.
#   bash benchmarks/gpu_check.sh numbers   install, compile, check and time the kernels, and run the tests marked gpu
#   bash benchmarks/gpu_check.sh tests     the operations on the GPU, memory and races under load, fastdiff bench
# Results are in $OUT, or a new folder: summary.txt (the table last), numbers.json, logs.tar.gz, and records.jsonl with
# a line for everything measured. They are written anew after every stage, so a run that is killed leaves what it had.
# PYTHON: the interpreter (python3). WHEEL_DIR: a folder with a wheel of fastdiff, installed instead of building one.
# CAP_SCALE: a factor on all caps (1).
# The exit status is 0 if no stage failed; 1 if one did; 2 if asked for wrongly; 143 if it was stopped.
set -uo pipefail
mode=${1:-}
case $mode in numbers | tests) ;; *) sed -n '2,4p' "$0" && exit 2 ;; esac
ROOT=$(cd "$(dirname "$0")/.." && pwd)
BENCHMARKS=$ROOT/benchmarks TESTS=$ROOT/tests
# The programs run in another folder.
PYTHON=$(command -v "${PYTHON:-python3}") && PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
OUT=${OUT:-$(mktemp -d)} && mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd)
WORK=$(mktemp -d)
SCALE=${CAP_SCALE:-1}
GRACE=5   # seconds to a stage that is told to end, before it is killed
REPORT=5  # seconds that are left for the last report
TOTAL=290
failed=0 last=0 running='' running_name='' running_cap=0

numbers() {
    stage install 20 "${install[@]}"
    from_source_unless_installed
    stage doctor 15 "$PYTHON" "$BENCHMARKS/gpu_numbers.py" doctor
    stage compile 30 "$PYTHON" "$BENCHMARKS/gpu_numbers.py" compile
    stage smoke 16 "$PYTHON" "$BENCHMARKS/gpu_numbers.py" smoke
    stage kernels 30 "$PYTHON" "$BENCHMARKS/gpu_numbers.py" kernels
    stage steps 60 "$PYTHON" "$BENCHMARKS/gpu_numbers.py" steps
    needs ncu && stage counters 25 "$PYTHON" "$BENCHMARKS/gpu_numbers.py" counters
    stage gpu-tests 84 "${pytest[@]}" $(processes 16) -m gpu \
        "$TESTS/backends/test_triton_gpu.py" "$TESTS/backends/test_cuda_step.py" $(marked_gpu)
}

tests() {
    stage install 10 "${install[@]}"
    from_source_unless_installed
    stage doctor 15 "$PYTHON" "$BENCHMARKS/gpu_numbers.py" doctor
    stage operations 70 "${pytest[@]}" $(processes 16) -m gpu_variants "$TESTS/backends/test_triton_operations.py"
    if needs compute-sanitizer; then
        stage compile 30 "$PYTHON" "$BENCHMARKS/gpu_memory.py" --compile-only
        stage memcheck 45 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" "$BENCHMARKS/gpu_memory.py"
        stage initcheck 25 compute-sanitizer --tool initcheck --error-exitcode 9 "$PYTHON" "$BENCHMARKS/gpu_memory.py"
    fi
    stage bench 85 "$PYTHON" -m fastdiff bench --device cuda --preset quick --model unet-small --out "$WORK/bench"
}

# stage NAME CAP COMMAND...: run it for at most CAP seconds, or what is left. A status of 77 means that it cannot be done
# here, and the last line of its log why.
stage() {
    local name=$1 cap status start outcome why=''
    cap=$(calculate "c = $2 * $SCALE; l = $END - $(now) - ($GRACE + $REPORT) * $SCALE; print c < l ? c : l")
    shift 2
    if calculate "exit !($cap <= 0)"; then
        record_stage "$name" skipped 0 "$cap" 'no time was left'
        failed=1
        return
    fi
    echo "== $mode: $name, at most $cap s"
    start=$(now)
    running_name=$name running_cap=$cap
    FASTDIFF_STAGE=$name timeout -k "$(calculate "print $GRACE * $SCALE")" "$cap" "$@" >"$OUT/running.log" 2>&1 &
    running=$!
    wait "$running"
    status=$?
    running=
    case $status in
        0) outcome=passed ;;
        77) outcome=skipped why=$(tail -n 1 "$OUT/running.log" | tr -d '"\\' | tr -cd '[:print:]' | cut -c 1-200) ;;
        124 | 137) outcome='timed out' failed=1 ;;
        *) outcome=failed why="status $status" failed=1 ;;
    esac
    mv "$OUT/running.log" "$WORK/logs/$name.log"
    record_stage "$name" "$outcome" "$(calculate "print $(now) - $start")" "$cap" "$why"
    last=$status
    report --short
}

needs() { # a program; without it the stages that follow are left out
    command -v "$1" >/dev/null && return
    record_stage "$1" skipped 0 0 "there is no $1"
    return 1
}

from_source_unless_installed() {
    [ "$last" -eq 0 ] && return
    record "\"record\": \"note\", \"text\": \"not installed: everything is run from the sources\""
    export PYTHONPATH=$ROOT:$PYTHONPATH
}

processes() { # for pytest, where it can
    "$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n $1"
}

marked_gpu() { # the other files that have such tests
    grep -rlE 'mark\.gpu|\bdevice[,)]' --include='test_*.py' "$TESTS" | sort | grep -vE '/test_(triton_gpu|cuda_step|triton_operations)\.py$'
}

record() { echo "{$1}" >>"$FASTDIFF_RECORDS"; }
record_stage() {
    record "\"record\": \"stage\", \"name\": \"$1\", \"outcome\": \"$2\", \"seconds\": $3, \"cap\": $4, \"why\": \"$5\""
}
report() { timeout -k 1 "$REPORT" "$PYTHON" "$BENCHMARKS/gpu_report.py" "$mode" "$OUT" "$WORK" "$@"; }
now() { echo "${EPOCHREALTIME/,/.}"; }
calculate() { LC_ALL=C awk "BEGIN { OFMT = \"%.6g\"; $1 }"; }

stopped() {
    trap '' TERM INT HUP
    if [ -n "$running" ]; then
        kill -TERM "$running"
        record_stage "$running_name" stopped 0 "$running_cap" 'the check was told to end'
    fi
    report
    exit 143
}

trap stopped TERM INT HUP
trap 'rm -rf "$WORK"' EXIT
END=$(calculate "printf \"%.3f\", $(now) + $TOTAL * $SCALE")
mkdir -p "$WORK/logs"
export FASTDIFF_RECORDS=$OUT/records.jsonl PYTHONUNBUFFERED=1
: >"$FASTDIFF_RECORDS"
# For gpu_records.py, which pytest takes as a plugin. The package is not there.
export PYTHONPATH=$BENCHMARKS${PYTHONPATH:+:$PYTHONPATH}
install=("$PYTHON" -m pip install --quiet --no-build-isolation --no-deps "$ROOT")
[ -n "${WHEEL_DIR:-}" ] && install=("$PYTHON" -m pip install --quiet --no-index --no-deps --force-reinstall
    "$(cd "$WHEEL_DIR" && pwd)"/fastdiff-*.whl)
pytest=("$PYTHON" -m pytest -v -rfE -p no:cacheprovider -p gpu_records)
"$PYTHON" -c 'import pytest_timeout' 2>/dev/null && pytest+=(--timeout 60)
# From a folder without the sources, so that it is the installed package that runs.
cd "$WORK" || exit 1
$mode
report
echo "gpu_check $mode: $([ $failed -eq 0 ] && echo passed || echo FAILED), results in $OUT"
exit $failed
