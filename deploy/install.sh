#!/usr/bin/env bash
# What has to be installed, in steps. The Dockerfile and `make install` run these; so can who sets a machine up by hand:
#
#   deploy/install.sh STEP...
#
#   system-build  Ubuntu packages to build with (as root)
#   system-run    Ubuntu packages to run with (as root)
#   python        this project and the Python packages it needs, into the virtual environment VENV
#   apex          NVIDIA Apex from its source, into VENV; needs nvcc of the CUDA version that torch is built for
#   check         whether VENV has what setup.py asks for, in the versions of constraints.txt
#
# Settings, from the environment:
#   VENV                  virtual environment, made if it is not there (default: .venv beside this folder)
#   PYTHON                Python that makes it (default: python3)
#   EXTRAS                of setup.py, separated by commas, for example s3,ray (default: none)
#   PIP_OPTIONS           further options of `pip install`, for example -q
#   APEX_COMMIT           of github.com/NVIDIA/apex
#   TORCH_CUDA_ARCH_LIST  GPU architectures that Apex is built for, for example "8.0;9.0"; then no GPU is needed
#   MAX_JOBS              compilers at the same time (default: one per core, at most 8: each takes gigabytes)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$root/.venv}
PYTHON=${PYTHON:-python3}
EXTRAS=${EXTRAS:-}
APEX_REPOSITORY=${APEX_REPOSITORY:-https://github.com/NVIDIA/apex}
APEX_COMMIT=${APEX_COMMIT:-6424da3b4faa6c8f062da4a48c424fff3f02d42d} # 2026-07-08

# Versions of Ubuntu packages are not pinned: its archive keeps the newest patch of a release alone.
apt_install() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    apt-get install -y --no-install-recommends "$@"
    rm -rf /var/lib/apt/lists/*
}

system_build() {
    apt_install build-essential ca-certificates git python3 python3-dev python3-venv
}

# ffmpeg comes with the Python packages. gcc, libc's and Python's headers: Triton compiles the launchers of its kernels
# where it runs.
system_run() {
    apt_install ca-certificates gcc libc6-dev python3 python3-dev
}

pip_install() {
    # shellcheck disable=SC2086  # options are words
    "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input ${PIP_OPTIONS:-} \
        -c "$root/constraints.txt" "$@"
}

python_packages() {
    [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
    pip_install -e "$root${EXTRAS:+[$EXTRAS]}"
}

# The package of this name on the package index is another project.
apex() {
    local nvcc cuda compiler folder
    nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
    cuda=$("$VENV/bin/python" -c 'import torch; print(torch.version.cuda)')
    compiler=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p') || true
    if [ "$compiler" != "$cuda" ]; then
        echo "install.sh: nvcc is of CUDA ${compiler:-none}, expected $cuda, which torch is built for;" \
            "install that CUDA toolkit, or set CUDA_HOME to it" >&2
        return 1
    fi
    # What a step needs without build isolation.
    pip_install ninja packaging setuptools wheel
    folder=$(mktemp -d)
    git -C "$folder" init -q
    git -C "$folder" fetch -q --depth 1 "$APEX_REPOSITORY" "$APEX_COMMIT"
    git -C "$folder" checkout -q FETCH_HEAD
    local cores
    cores=$(nproc)
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 \
        MAX_JOBS=${MAX_JOBS:-$((cores < 8 ? cores : 8))} \
        PATH="$VENV/bin:$PATH" \
        pip_install --no-build-isolation --no-deps "$folder"
    rm -rf "$folder"
    # Not the namesake: its kernels are there.
    "$VENV/bin/python" -c 'import torch, amp_C; amp_C.multi_tensor_axpby; from apex.optimizers import FusedSGD'
}

check() {
    "$VENV/bin/python" -m pip check --disable-pip-version-check
    "$VENV/bin/python" - "$root/constraints.txt" "$EXTRAS" <<'PYTHON'
import importlib.metadata as metadata
import sys

from packaging.requirements import Requirement

path, extras = sys.argv[1], ["", *filter(None, sys.argv[2].split(","))]
problems = []


def installed(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


for line in metadata.requires("cmac"):
    need = Requirement(line)
    if need.marker and not any(need.marker.evaluate({"extra": extra}) for extra in extras):
        continue
    version = installed(need.name)
    if version is None or not need.specifier.contains(version, prereleases=True):
        problems.append(f"{need.name} is {version or 'not installed'}, expected {need.specifier or 'any version'}")
for line in open(path, encoding="utf-8"):
    line = line.partition("#")[0].strip()
    need = Requirement(line) if line else None
    if need is None or (need.marker and not need.marker.evaluate()):
        continue
    version = installed(need.name)
    if version is not None and not need.specifier.contains(version, prereleases=True):
        problems.append(f"{need.name} is {version}, expected {need.specifier} by constraints.txt")
for problem in problems:
    print(f"install.sh: {problem}; run `deploy/install.sh python` again", file=sys.stderr)
sys.exit(bool(problems))
PYTHON
}

usage() {
    sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
}

[ $# -gt 0 ] || {
    usage >&2
    exit 2
}
for step in "$@"; do
    case $step in
        system-build) system_build ;;
        system-run) system_run ;;
        python) python_packages ;;
        apex) apex ;;
        check) check ;;
        -h | --help) usage ;;
        *)
            echo "install.sh: $step is no step, expected system-build, system-run, python, apex or check" >&2
            exit 2
            ;;
    esac
done
