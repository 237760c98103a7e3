#!/usr/bin/env bash
# All that needs a GPU, in under nine minutes and without a network: builds in place, runs the tests
# and compute-sanitizer, then the benches.
#
#   bench/gpu.sh          runs it
#   bench/gpu.sh --plan   prints the stages, their limits in seconds, and the sum
#   bench/gpu.sh --smoke  a few tests, tiny sizes, no limits: shows that it runs, proves nothing
#
# The results go to bench/results/<gpu>-<torch>.json (a smoke run's do not), and with the logs to
# $OUT where that is set: after each stage, and when the script is interrupted or terminated.
# A stage that fails does not stop the next. "cannot" is said of a stage for which the machine lacks
# something; it is not a failure. The exit status is that of all. PYTHON names the interpreter,
# default python3.
set -uo pipefail
cd "$(dirname "$0")/.."

# The tests' lane and the sanitizers' lane run beside each other, all else by itself.
plan='
build          90  -           both libraries, for this GPU
tests-gpu      70  tests       graphs, synchronizations, launches, memory, two devices
tests-parity  100  tests       the cases of the Triton backend in all other tests
sanitize-plain 70  sanitizers  every path of the kernels against the reference
memcheck       50  sanitizers  the same under compute-sanitizer
racecheck      50  sanitizers  the same under compute-sanitizer
bench         200  -           bench.speed, all cases that the time allows
host-time      20  -           what a step costs the host
parity         30  -           errors against the reference in float64
report         10  -           the tables
'
# The time of the whole, and what a stage gets to end by itself after its limit.
whole=530
grace=5

limit_of() {  # a stage, of which the last line counts
    awk -v name="$1" '$1 == name { limit = $2 } END { print limit }' <<<"$plan"
}

lane_seconds() {  # a lane
    awk -v lane="$1" '$3 == lane { sum += $2 } END { print sum + 0 }' <<<"$plan"
}

print_plan() {
    local tests sanitizers sum
    tests=$(lane_seconds tests) sanitizers=$(lane_seconds sanitizers)
    sum=$(($(lane_seconds -) + (tests > sanitizers ? tests : sanitizers)))
    echo "stage       limit, s  lane        what"
    awk 'NF { line = $0; sub(/^[^ ]+ +[0-9]+ +[^ ]+ +/, "", line)
              printf "%-14s %6d  %-10s  %s\n", $1, $2, $3, line }' <<<"$plan"
    echo "together: $sum s, the lanes beside each other; the script ends after $whole s"
}

smoke=
case "${1:-}" in
    "") ;;
    --plan) print_plan; exit ;;
    --smoke) smoke=1; whole=100000 ;;
    *) echo "bench/gpu.sh: $1 is neither --plan nor --smoke" >&2; exit 2 ;;
esac

python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
deadline=$((SECONDS + whole))

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
touch "$logs/stages"
# A working tree without its history cannot say which it is.
commit=$(git rev-parse --short=12 HEAD 2>/dev/null) || commit=
[ -z "$commit" ] || [ -z "$(git status --porcelain --untracked-files=no)" ] || commit+=" and changes"
[ -z "$commit" ] || export CM_FUSED_COMMIT="$commit"
results=

deliver() {  # what there is, for there may be no later
    [ -n "${OUT:-}" ] || return 0
    mkdir -p "$OUT"
    if [ -f "$results" ]; then
        cp "$results" "$OUT"
    fi
    # One file: only some come back. The lanes deliver too.
    local gathered="$logs/gathered.$BASHPID" log
    for log in "$logs"/*.log; do
        [ -f "$log" ] || continue
        echo "===== $(basename "$log" .log)"
        tail -c 1000000 "$log"
    done >"$gathered"
    mv "$gathered" "$OUT/gpu.log"
    cp "$logs/stages" "$OUT/stages.txt"
}

say() {  # stage, result
    echo "$1: $2" | tee -a "$logs/stages"
}

finish() {
    # Lanes that are still at work first, so that they start no further stage.
    local lanes work name
    lanes=$(jobs -p)
    # shellcheck disable=SC2086
    [ -z "$lanes" ] || kill $lanes 2>/dev/null
    for work in "$logs"/*.pid; do
        [ -f "$work" ] || continue
        kill "$(<"$work")" 2>/dev/null
    done
    for work in "$logs"/*.pid; do
        [ -f "$work" ] || continue
        name=$(basename "$work" .pid)
        # timeout kills what has not ended by then.
        for _ in $(seq $((10 * grace + 10))); do
            kill -0 "$(<"$work")" 2>/dev/null || break
            sleep 0.1
        done
        say "$name" "FAILED: cut off"
    done
    deliver
    rm -rf "$logs"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

cannot() {  # stage: prints why this machine cannot do it, if its log says so
    local why
    case $1 in
        build) why="no CUDA toolkit with an nvcc was found|but nvcc's major version is" ;;
        memcheck | racecheck) why="Device not supported|Unable to find injection library" ;;
        *) return 1 ;;
    esac
    grep -m 1 -E -o "($why).*" "$logs/$1.log"
}

stage() {  # name, command...
    local name=$1 limit started=$SECONDS status=0 result
    limit=$(limit_of "$name")
    shift
    if [ -n "$smoke" ] || [ "$limit" -gt $((deadline - SECONDS)) ]; then
        limit=$((deadline - SECONDS))
    fi
    if [ "$limit" -lt "$grace" ]; then
        say "$name" "FAILED: not run, the time is up"
        return 1
    fi
    # In the background: a trap waits for what runs in the foreground.
    timeout --kill-after="$grace" "$limit" "$@" >"$logs/$name.log" 2>&1 &
    echo $! >"$logs/$name.pid"
    wait $! || status=$?
    rm -f "$logs/$name.pid"
    case $status in
        0) result=passed ;;
        124 | 137) result="FAILED: more than its $limit s" ;;
        *) result="FAILED: exit status $status" ;;
    esac
    if [ "$status" -ne 0 ] && why=$(cannot "$name"); then
        result="cannot: $why"
    fi
    say "$name" "$result, $((SECONDS - started)) s"
    if [ "$status" -ne 0 ]; then
        tail -n 12 "$logs/$name.log" | cut -c1-200 | sed "s/^/    $name| /"
    fi
    deliver
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

# The CUDA library is what is asked for; without it Triton updates the priorities too, and there is
# something to measure.
if ! stage build bash -c 'build cuda'; then
    plan+=$'build-without-cuda 60 - the CPU library\n'
    stage build-without-cuda bash -c 'build cpu'
fi

# Only a GPU's cases are selected, of which benches and packages have none.
folders=(tests/backends tests/checkpoint tests/distributed tests/operators tests/optimizer)

missing_imports() {  # test files with what they import and this Python lacks
    "$python" - "${folders[@]}" <<'PYTHON'
import ast, importlib.util, pathlib, sys

folders = map(pathlib.Path, sys.argv[1:])
for path in sorted(path for folder in folders for path in folder.glob("test_*.py")):
    body = ast.parse(path.read_text()).body
    names = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in body if isinstance(node, ast.ImportFrom) and node.module}
    roots = {name.partition(".")[0] for name in names} - {"bench", "tests", "cm_fused"}
    for lacking in sorted(root for root in roots if importlib.util.find_spec(root) is None):
        print(path, lacking)
        break
PYTHON
}

# Correctness does not mind company: tests beside sanitizers. Where pytest-xdist is, several
# processes compile the tests' many kernels; one alone is likely to need more than the limit.
parallel=()
if "$python" -c 'import xdist' 2>/dev/null; then
    parallel=(-n 6)
fi
[ -z "$smoke" ] || parallel=()
# The mark is also on every case of the Triton backend, whose tensors are on the GPU here.
pytest=("$python" -m pytest -q --continue-on-collection-errors -rs -p no:cacheprovider -m gpu)

tell_skipped() {  # stage: what its tests could not do here; not what other tests do
    local line
    while read -r line; do
        say "$1" "cannot: ${line#SKIPPED }"
    done < <(grep -a "^SKIPPED" "$logs/$1.log" | grep -v "test_gpu.py has" | sort -u | head -n 20)
}

tests() {
    local others=() some=() few=() path lacking
    while read -r path lacking; do
        others+=(--ignore="$path")
        say "tests-parity" "cannot: $path needs $lacking"
    done < <(missing_imports)
    if [ -n "$smoke" ]; then
        some=(-k "repr or in_a_graph") few=(-k test_golden)
    fi
    stage tests-gpu "${pytest[@]}" "${some[@]}" tests/backends/test_gpu.py
    tell_skipped tests-gpu
    stage tests-parity "${pytest[@]}" "${few[@]}" "${parallel[@]}" "${others[@]}" \
        --ignore=tests/backends/test_gpu.py "${folders[@]}"
    tell_skipped tests-parity
}

sanitizers() {
    # First without: it also leaves the compiled kernels for the others, which takes most of a minute.
    stage sanitize-plain "$python" -m bench.reliability.sanitize || return
    # torch's own queries make errors that it handles; its allocator hides what is out of bounds.
    local tool
    for tool in memcheck racecheck; do
        if ! command -v compute-sanitizer >/dev/null; then
            say "$tool" "cannot: compute-sanitizer is not installed"
            continue
        fi
        stage "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
            --target-processes application-only --report-api-errors no --error-exitcode 9 \
            "$python" -m bench.reliability.sanitize
    done
}

tests &
lanes=($!)
sanitizers &
lanes+=($!)
wait "${lanes[@]}"

# Alone on the machine from here on. The bench has its own clock, so that it ends with a report.
after=$(($(limit_of host-time) + $(limit_of parity) + $(limit_of report)))
seconds=$((deadline - SECONDS - after - 40))
if [ "$seconds" -gt 230 ]; then
    seconds=230
fi
plan+="bench $((seconds + 40)) - what is left"$'\n'
tiny=() few_steps=()
if [ -n "$smoke" ]; then
    tiny=(--smoke) few_steps=(--steps 3 --elements 5000 7) seconds=$whole
fi
name=$("$python" -c 'from bench.speed.__main__ import default_name; print(default_name("cuda"))')
if [ -n "$name" ]; then
    results="bench/results/$name"
    [ -z "$smoke" ] || results="$logs/$name"
    rm -f "$results"
    stage bench "$python" -m bench.speed --device cuda --seconds "$seconds" --out "$results" \
        "${tiny[@]}"
    if [ -f "$results" ]; then
        stage host-time "$python" -m bench.speed.host_time --device cuda --results "$results" \
            "${tiny[@]}"
        stage parity "$python" -m bench.reliability.parity --device cuda "$results" "${few_steps[@]}"
        stage report "$python" -m bench.speed.report "$results"
    fi
else
    say bench "FAILED: the GPU has no name"
fi

echo
if [ -f "$results" ]; then
    "$python" -m bench.speed.report --summary "$results" | tail -c 10000
fi
echo
cat "$logs/stages"
if grep -q "FAILED" "$logs/stages"; then
    exit 1
fi
