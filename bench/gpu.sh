#!/usr/bin/env bash
# All that needs a GPU, in under nine minutes and without a network: builds in place, runs the tests
# and compute-sanitizer, then the benches.
#
# The results go to bench/results/<gpu>-<torch>.json, and with the logs to $OUT where that is set.
# Every stage has its time; one that fails does not stop the next, and the exit status is that of
# all. PYTHON names the interpreter, default python3.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
deadline=$((SECONDS + 530))
grace=5

if ! command -v "$python" >/dev/null; then
    echo "bench/gpu.sh: $python not found; PYTHON names another. Nothing was run." >&2
    exit 2
fi
if ! found=$("$python" -c '
import torch
if not torch.cuda.is_available():
    raise SystemExit(f"torch {torch.__version__} sees no GPU")
print("%d.%d" % torch.cuda.get_device_capability())' 2>&1); then
    echo "bench/gpu.sh: no GPU can be used here: ${found##*$'\n'}. Nothing was run." >&2
    exit 2
fi
# The last line: warnings come before it.
export TORCH_CUDA_ARCH_LIST="${found##*$'\n'}"

logs=$(mktemp -d)
# A working tree without its history cannot say which it is.
commit=$(git rev-parse --short=12 HEAD 2>/dev/null) || commit=
[ -z "$commit" ] || [ -z "$(git status --porcelain --untracked-files=no)" ] || commit+=" and changes"
[ -z "$commit" ] || export CM_FUSED_COMMIT="$commit"
results=

deliver() {  # what there is, for there may be no later
    [ -n "${OUT:-}" ] || return 0
    mkdir -p "$OUT"
    if [ -n "$results" ]; then
        cp "$results" "$OUT" 2>/dev/null
    fi
    # One file: only some come back.
    for log in "$logs"/*.log; do
        echo "===== $(basename "$log" .log)"
        cat "$log"
    done >"$OUT/gpu.log" 2>/dev/null
    cp "$logs/stages" "$OUT/stages.txt" 2>/dev/null
}

finish() {
    # Lanes that are still at work, and the stages they started.
    local lane
    for lane in $(jobs -p); do
        kill "$lane" 2>/dev/null
        pkill -P "$lane" 2>/dev/null
    done
    deliver
    rm -rf "$logs"
}
trap finish EXIT
trap 'exit 130' INT TERM

stage() {  # name, seconds, command...
    local name=$1 limit=$2 started=$SECONDS status=0 result
    shift 2
    if [ "$limit" -gt $((deadline - SECONDS)) ]; then
        limit=$((deadline - SECONDS))
    fi
    if [ "$limit" -lt "$grace" ]; then
        echo "$name: NOT RUN, the time is up" | tee -a "$logs/stages"
        return 1
    fi
    timeout --kill-after="$grace" "$limit" "$@" >"$logs/$name.log" 2>&1 || status=$?
    case $status in
        0) result=passed ;;
        124 | 137) result="FAILED: more than its $limit s" ;;
        *) result="FAILED: exit status $status" ;;
    esac
    echo "$name: $result, $((SECONDS - started)) s" | tee -a "$logs/stages"
    if [ "$status" -ne 0 ]; then
        tail -n 12 "$logs/$name.log" | cut -c1-200 | sed "s/^/    $name| /"
    fi
    return "$status"
}

build() {  # cpu or cuda
    # In a folder without pyproject.toml, whose form an older setuptools does not read.
    local work
    work=$(mktemp -d) || return
    cp -r setup.py csrc README.md "$work" || return
    (cd "$work" && CM_FUSED_BUILD=$1 "$python" setup.py build_ext \
        --build-lib "$OLDPWD" --build-temp "$work/temp")
    local status=$?
    rm -rf "$work"
    return "$status"
}
export -f build
export python

# The CUDA library is what is asked for; without it Triton keeps the books too, and there is
# something to measure.
stage build 110 bash -c 'build cuda' || stage build-without-cuda 60 bash -c 'build cpu'

# Correctness does not mind company: tests beside sanitizers. Where pytest-xdist is, several
# processes compile the tests' many kernels.
parallel=()
if "$python" -c 'import xdist' 2>/dev/null; then
    parallel=(-n 6)
fi
# The mark is also on every case of the Triton backend, whose tensors are on the GPU here.
pytest=("$python" -m pytest -q --continue-on-collection-errors -p no:cacheprovider -m gpu)

tests() {
    stage tests-gpu 80 "${pytest[@]}" tests/backends/test_gpu.py
    stage tests-parity 110 "${pytest[@]}" "${parallel[@]}" tests --ignore=tests/backends/test_gpu.py
}

sanitizers() {
    # First without: it also leaves the compiled kernels for the others, which takes most of a minute.
    stage sanitize-plain 90 "$python" -m bench.reliability.sanitize || return
    if ! command -v compute-sanitizer >/dev/null; then
        echo "memcheck, racecheck: NOT RUN, compute-sanitizer is not installed" |
            tee -a "$logs/stages"
        return
    fi
    # torch's own queries make errors that it handles; its allocator hides what is out of bounds.
    local tool
    for tool in memcheck racecheck; do
        stage "$tool" 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
            --target-processes application-only --report-api-errors no --error-exitcode 9 \
            "$python" -m bench.reliability.sanitize
    done
}

tests &
lanes=($!)
sanitizers &
lanes+=($!)
wait "${lanes[@]}"
deliver

# Alone on the machine from here on. The bench has its own clock, so that it ends with a report.
seconds=$((deadline - SECONDS - 60))
if [ "$seconds" -gt 230 ]; then
    seconds=230
fi
name=$("$python" -c 'from bench.speed.__main__ import default_name; print(default_name("cuda"))')
if [ -n "$name" ]; then
    out="bench/results/$name"
    rm -f "$out"
    stage bench $((seconds + 40)) "$python" -m bench.speed --device cuda --seconds "$seconds" \
        --out "$out"
    if [ -f "$out" ]; then
        results=$out
        stage parity 40 "$python" -m bench.reliability.parity --device cuda "$results"
        stage report 20 "$python" -m bench.speed.report "$results"
    fi
else
    echo "bench: FAILED: the GPU has no name" | tee -a "$logs/stages"
fi

echo
if [ -n "$results" ]; then
    "$python" -m bench.speed.report --summary "$results" | tail -c 10000
fi
echo
cat "$logs/stages"
if grep -q "FAILED\|the time is up" "$logs/stages"; then
    exit 1
fi
