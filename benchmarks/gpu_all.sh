#!/usr/bin/env bash
# Everything that needs a GPU, in one command: tests, then benchmarks. Result rows go to benchmarks/results; all that was
# printed, and the rows once more, to OUT and, in one file, to OUT/all.tar.gz.
# Usage: benchmarks/gpu_all.sh [SHARDS] [OUT]      (SHARDS: a folder made by tools/make_shards.py; default: made here)
# The first part takes CUDA, PyTorch, Triton, numpy and pytest, and at most LIMIT seconds (default 525). Loaders come
# after it, without a limit, where DALI, PyAV and webdataset are installed. What is left out is said.
# PYTHON names the Python to use (default: .venv/bin/python if it is there, else python3).
set -uo pipefail
cd "$(dirname "$0")/.."
shards=${1:-}
out=${2:-runs/gpu}
limit=${LIMIT:-525}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$out"
rm -f "$out"/*.log
export PYTHONUNBUFFERED=1
export CMAC_COMMIT=${CMAC_COMMIT:-$(git rev-parse HEAD 2>/dev/null)}
summary=()
failed=()
SECONDS=0

step() { # NAME SECONDS COMMAND...: run for at most so long, keep what it prints, go on whatever happens
    local name=$1 most=$2 began=$SECONDS status verdict
    shift 2
    if [ "$limit" -gt 0 ] && [ $((limit - SECONDS)) -lt "$most" ]; then
        most=$((limit - SECONDS))
    fi
    if [ "$most" -lt 5 ]; then
        skip "$name" "no time left of $limit s"
        failed+=("$name")
        return
    fi
    echo "=== $name (at most $most s): $*"
    timeout -k 5 "$most" "$@" 2>&1 | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    case $status in
        0) verdict=ok ;;
        124 | 137) verdict="TIMED OUT" ;;
        *) verdict="FAILED ($status)" ;;
    esac
    [ "$status" -eq 0 ] || failed+=("$name")
    summary+=("$(printf '%-28s %5d s  %s' "$name" $((SECONDS - began)) "$verdict")")
}

left() { # SECONDS: so many, or what is left of the limit with some to spare
    local rest=$((limit - SECONDS - 15))
    echo $((rest < $1 ? (rest > 1 ? rest : 1) : $1))
}

skip() { # NAME REASON
    echo "=== $1: left out: $2"
    summary+=("$(printf '%-28s %7s  left out: %s' "$1" "" "$2")")
}

missing() { # MODULES...: those that cannot be imported
    local module
    for module in "$@"; do
        "$python" -c "import importlib, sys; importlib.import_module(sys.argv[1])" "$module" 2>/dev/null || echo -n "$module "
    done
}

step machine 30 nvidia-smi
step versions 60 "$python" -c '
import platform, sys, torch, triton
print(platform.platform(), "python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__,
      "cuDNN", torch.backends.cudnn.version())
assert torch.cuda.is_available(), "torch sees no CUDA device"
print(torch.cuda.get_device_properties(0))'
if [[ " ${failed[*]} " == *" versions "* ]]; then
    echo "there is nothing to measure without CUDA, PyTorch and Triton"
    exit 1
fi

tests=()
for file in tests/test_cmac_kernels_*.py tests/test_cmac_step.py tests/test_cmac_optim.py; do
    [ -f "$file" ] && tests+=("$file")
done
without=$(missing av)
if [ -z "$without" ]; then
    tests+=(tests/test_loaders_frames.py)
else
    skip test_loaders_frames "not installed: $without"
fi
# All files at once: most of their time is Triton's compiler, on the CPU.
CMAC_REQUIRE_GPU=1 step tests 130 bash -c '
    python=$1 out=$2 status=0 jobs=()
    shift 2
    for file in "$@"; do
        "$python" -m pytest -v --tb=short -m gpu -p no:cacheprovider "$file" >"$out/$(basename "$file" .py).log" 2>&1 &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job" || status=1; done
    for file in "$@"; do echo "--- $file"; grep -E "^(FAILED|ERROR) |^=+ .* in " "$out/$(basename "$file" .py).log"; done
    exit $status' tests "$python" "$out" "${tests[@]}"

step losses 85 "$python" benchmarks/losses.py --seconds 1 --limit "$(left 65)"
# torch.compile by itself: how long it takes is not known beforehand, and must not cost the others their results.
step train_step 165 "$python" benchmarks/train_step.py --batch 128 --rounds 3 --steps 2 --without compile --limit "$(left 140)"
step train_step_compile 150 "$python" benchmarks/train_step.py --batch 128 --rounds 3 --steps 2 --limit "$(left 120)" \
    --only stock "stock, channels-last" ours compile
step train_step_small 80 "$python" benchmarks/train_step.py --batch 16 64 --rounds 3 --steps 4 --limit "$(left 60)" \
    --only stock "stock, channels-last" ours "ours, padded" graph
step convolutions 60 "$python" benchmarks/convolutions.py --seconds 5 --layer-seconds 0.2
step frame_kernel 40 "$python" benchmarks/frame_kernel.py

# The loaders: more packages, more time.
limit=0
without=$(missing nvidia.dali av webdataset)
if [ -n "$without" ]; then
    skip loaders "not installed: $without"
else
    { ldconfig -p | grep nvcuvid || find / -name 'libnvcuvid.so*' -not -path '/proc/*' 2>/dev/null; } | tee "$out/nvcuvid.log"
    [ -s "$out/nvcuvid.log" ] || echo "libnvcuvid was not found: backend dali-gpu cannot decode here" | tee "$out/nvcuvid.log"
    if [ -z "$shards" ]; then
        shards=$out/shards
        step synthetic 600 "$python" tools/make_synthetic_videos.py --out "$out/videos" --num-videos 64 --seconds 4
        step shards 600 "$python" tools/make_shards.py --videos "$out/videos" --out "$shards"
    fi
    CMAC_REQUIRE_GPU=1 step all_gpu_tests 900 "$python" -m pytest -q -m gpu
    step frame_kernel_sweep 300 "$python" benchmarks/frame_kernel.py --sweep
    step nvdec 900 "$python" benchmarks/nvdec.py --shards "$shards"
    step loader_throughput 3600 "$python" benchmarks/loader_throughput.py --shards "$shards"
    for backend in portable dali-cpu-decode dali-gpu; do
        step "loader_memory_$backend" 1800 "$python" benchmarks/loader_memory.py --shards "$shards" --backend "$backend"
    done
fi

mkdir -p "$out/results"
cp benchmarks/results/*.jsonl "$out/results/" 2>/dev/null
(cd "$out" && tar -czf all.tar.gz --exclude=all.tar.gz ./*.log results)

echo "=== targets"
grep -hE ': (met|MISSED|-)$|^WRONG RESULT|fastest flags|^=+ .*(passed|failed)' "$out"/{tests,losses,train_step,train_step_compile,train_step_small,convolutions,frame_kernel}.log 2>/dev/null
echo "=== summary: $SECONDS s"
printf '%s\n' "${summary[@]}"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
