"""The first part of benchmarks/gpu_all.sh runs on a machine with torch, Triton, numpy and pytest alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = (ROOT / "benchmarks" / "gpu_all.sh").read_text()
FIRST_PART = SCRIPT.partition("\n# The loaders:")[0]


def bare(*arguments: str, seconds: float = 120) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "tests/bare_machine.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def test_a_package_that_the_machine_lacks_cannot_be_imported():
    for module in ("dacite", "webdataset"):
        done = bare("import", module)
        assert done.returncode == 1 and f"No module named '{module}'" in done.stderr, done.stderr


def test_benchmarks_need_torch_triton_and_numpy_alone():
    names = sorted(set(re.findall(r"benchmarks/(\w+)\.py", FIRST_PART)))
    assert {"losses", "train_step", "frame_kernel"} <= set(names)
    modules = [f"benchmarks.{name}" for name in names if (ROOT / "benchmarks" / f"{name}.py").exists()]
    done = bare("import", *modules)
    assert done.returncode == 0, done.stderr


def test_gpu_tests_are_collected():
    loop = re.search(r"for file in (.*); do", FIRST_PART)[1].split()
    files = sorted({str(path.relative_to(ROOT)) for pattern in loop for path in ROOT.glob(pattern)})
    assert len(files) >= 4
    done = bare("pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    collected = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    kernels = {name for name in files if "test_cmac_kernels_" in name}
    assert kernels & collected and "tests/test_loaders_frames.py" not in collected


def test_a_step_runs(tmp_path: Path):
    arguments = ["--only", "ours, reference", "--rounds", "1", "--steps", "1", "--results", str(tmp_path)]
    done = bare("benchmarks/train_step.py", "--device", "cpu", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "train_step.jsonl").read_text().count("\n") == 1
