#!/usr/bin/env bash
# On a machine with a CUDA GPU: build and install fastdiff, run the tests (those marked gpu too), run the benchmarks,
# and print a short table last. Works offline, with the Python packages that are there. Results: $OUT, or a new folder.
#   bash benchmarks/gpu_check.sh
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-$(mktemp -d)}
failed=0

"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"' || exit 1
"$PYTHON" -m pip install --quiet --no-build-isolation --no-deps . || exit 1

# From a folder without the sources, so that it is the installed package that is tested.
tests=$PWD/tests benchmarks=$PWD/benchmarks
cd "$OUT"
echo "== tests on the GPU"
"$PYTHON" -m pytest "$tests" -q -p no:cacheprovider -k "cuda or gpu" 2>&1 | tee gpu_tests.log | tail -n 3
[ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
# The step kernel with every access looked at, where the tool is there.
if command -v compute-sanitizer >/dev/null; then
    echo "== compute-sanitizer"
    for tool in memcheck racecheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 "$PYTHON" -m pytest "$tests/test_cuda_step.py" -q \
            -p no:cacheprovider -k "gpu_equals or gpu_graph" >"sanitizer_$tool.log" 2>&1 || failed=1
        tail -n 1 "sanitizer_$tool.log"
    done
fi
echo "== all tests"
"$PYTHON" -m pytest "$tests" -q -p no:cacheprovider -n 8 2>&1 | tee tests.log | tail -n 3
[ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        echo "== compute-sanitizer $tool"
        compute-sanitizer --tool $tool --error-exitcode 9 "$PYTHON" -m pytest "$tests/test_triton_operations.py" -q \
            -p no:cacheprovider -k "loss_and_gradients or several_tiles or masks or step" >"$tool.log" 2>&1 || failed=1
        tail -n 2 "$tool.log"
    done
else
    echo "== no compute-sanitizer: memcheck and racecheck left out"
fi
echo "== benchmarks"
"$PYTHON" -m pytest "$benchmarks" -q -p no:cacheprovider --benchmark-json=benchmarks.json >benchmarks.log 2>&1 ||
    failed=1
# The table of the operations; a model between noising and loss shows what the whole step gains.
"$PYTHON" -m fastdiff bench --device cuda --preset "${PRESET:-full}" --model unet-small --out "$OUT/bench" \
    >bench.log 2>bench.err || failed=1

echo "== summary"
"$PYTHON" -m fastdiff doctor
tail -qn 1 gpu_tests.log tests.log
if [ $failed -eq 0 ]; then echo "gpu_check: all passed"; else echo "gpu_check: FAILED, see the logs in $OUT"; fi
cat bench.log
exit $failed
