#!/usr/bin/env bash
# Everything that needs a GPU, in one command: tests, then benchmarks. Results go to benchmarks/results (and copies of
# all that was printed to OUT).
# Usage: benchmarks/gpu_all.sh [SHARDS] [OUT]      (SHARDS: a folder made by tools/make_shards.py; default: made here)
# PYTHON names the Python to use (default: .venv/bin/python if it is there, else python3).
set -uo pipefail
cd "$(dirname "$0")/.."
shards=${1:-}
out=${2:-runs/gpu}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$out"
failed=()

step() { # NAME COMMAND...: run, keep what it prints, go on whatever happens
    local name=$1
    shift
    echo "=== $name: $*"
    if ! "$@" 2>&1 | tee "$out/$name.log"; then
        failed+=("$name")
    fi
}

step machine nvidia-smi
{ ldconfig -p | grep nvcuvid || find / -name 'libnvcuvid.so*' -not -path '/proc/*' 2>/dev/null; } | tee "$out/nvcuvid.log"
[ -s "$out/nvcuvid.log" ] || echo "libnvcuvid was not found: backend dali-gpu cannot decode here" | tee "$out/nvcuvid.log"

if [ -z "$shards" ]; then
    shards=$out/shards
    step synthetic "$python" tools/make_synthetic_videos.py --out "$out/videos" --num-videos 64 --seconds 4
    step shards "$python" tools/make_shards.py --videos "$out/videos" --out "$shards"
fi

CMAC_REQUIRE_GPU=1 step tests "$python" -m pytest -q -m gpu
step frame_kernel "$python" benchmarks/frame_kernel.py --sweep
step nvdec "$python" benchmarks/nvdec.py --shards "$shards"
step loader_throughput "$python" benchmarks/loader_throughput.py --shards "$shards"
for backend in portable dali-cpu-decode dali-gpu; do
    step "loader_memory_$backend" "$python" benchmarks/loader_memory.py --shards "$shards" --backend "$backend"
done

echo "=== summary"
for log in "$out"/*.log; do
    echo "--- $(basename "$log" .log): $(grep -v '^[[:space:]]*$' "$log" | tail -1 | cut -c1-200)"
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
