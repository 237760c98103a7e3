#!/usr/bin/env bash
# All that needs a GPU, in under nine minutes: builds in place, tests, sanitizers, benches.
# Needs no network. Every stage has its time; one that fails does not stop the next, and the exit
# status is that of all. Logs and results go to $OUT too, where that is set.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
logs=$(mktemp -d)
failed=()

stage() {  # name, seconds, command...
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    if timeout --kill-after=5 "$limit" "$@" >"$logs/$name.log" 2>&1; then
        echo "$name: passed in $((SECONDS - started)) s"
    else
        failed+=("$name")
        echo "$name: FAILED ($?) in $((SECONDS - started)) s of $limit; its last lines:"
        tail -n 25 "$logs/$name.log" | cut -c1-300
    fi
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "bench/gpu.sh needs a CUDA device that torch can use; there is none here" >&2
    exit 2
fi
unset TRITON_INTERPRET
architecture=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')

# Several processes compile the tests' many variants at a time, where the plugin is there.
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 8)

stage build 80 env CM_FUSED_BUILD=cuda TORCH_CUDA_ARCH_LIST="$architecture" \
    "$python" setup.py --quiet build_ext --inplace
stage gpu_tests 70 "$python" -m pytest -q -m gpu tests/test_gpu.py tests/test_bookkeeping.py
stage benches 240 "$python" -m bench.run --device cuda
stage parity_tests 70 "$python" -m pytest -q "${parallel[@]}" tests/test_golden.py tests/test_parity.py \
    tests/test_properties.py tests/test_triton.py -k triton
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        stage "$tool" 35 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" -m bench.sanitize
    done
else
    echo "compute-sanitizer: not installed, nothing was sanitized"
fi

if [ -n "${OUT:-}" ]; then
    cp "$logs"/*.log "$OUT"
    mkdir -p "$OUT/results" && cp bench/results/* "$OUT/results"
fi
# Of the benches' report what matters most: the targets.
sed -n '/^Targets:/,$p' "$logs/benches.log" 2>/dev/null
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
