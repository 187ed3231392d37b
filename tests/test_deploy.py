"""The image, the compose file and the Slurm scripts: linted, and run against stand-ins for Slurm, git, nvcc and pip."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

from cmac.config import PRESETS
from cmac.provenance import git_commit
from tools.make_shards import build_parser
from train import parse

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
SCRIPTS = sorted([*DEPLOY.glob("*.sh"), *DEPLOY.glob("*.slurm")])
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def executable(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def program(name: str) -> str | None:
    """Beside this Python, or on PATH."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def run(command: Sequence[str | Path], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_dockerfile_has_nothing_that_hadolint_minds() -> None:
    hadolint = program("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    result = run([hadolint, "--no-color", ROOT / "Dockerfile"])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "hadolint ignore" not in DOCKERFILE


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_have_nothing_that_shellcheck_minds(script: Path) -> None:
    assert script.stat().st_mode & stat.S_IXUSR
    result = run(["bash", "-n", script])
    assert result.returncode == 0, result.stderr
    shellcheck = program("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    result = run([shellcheck, script])
    assert result.returncode == 0, result.stdout


def test_both_stages_are_of_one_pinned_cuda_which_torch_is_built_for() -> None:
    arguments = dict(re.findall(r"^ARG (\w+)=\"?([^\"\n]*)", DOCKERFILE, re.MULTILINE))
    images = [
        image.replace("${CUDA}", arguments["CUDA"]).replace("${UBUNTU}", arguments["UBUNTU"])
        for image in re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    ]
    assert [re.fullmatch(r"nvidia/cuda:13\.0\.\d-(devel|base)-ubuntu\d\d\.\d\d", image) for image in images]
    assert images[0].replace("devel", "base") == images[1]
    cuda = torch.version.cuda
    if cuda is not None:
        assert arguments["CUDA"].startswith(f"{cuda}.")


def test_the_image_runs_as_another_than_root_and_ends_in_train_py() -> None:
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (\S+)$", last, re.MULTILINE)[-1] == "10001:10001"
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", last, re.MULTILINE)[1])
    assert (ROOT / Path(entry[0]).relative_to("/opt/cmac")).samefile(DEPLOY / "entrypoint.sh")
    for step in re.findall(r"deploy/install\.sh ((?:[a-z-]+ ?)+)", DOCKERFILE):
        for name in step.split():
            assert f"{name})" in (DEPLOY / "install.sh").read_text(), name
    assert not re.search(r"pip3? install|apt-get", DOCKERFILE)  # all of it is in the script that CI runs


def test_the_build_context_has_what_is_copied_and_nothing_private() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name in (".git", ".venv", "runs", "data", "tests", "*.egg-info", "**/__pycache__", "**/.env"):
        assert name in ignored
    for line in (ROOT / ".gitignore").read_text().split():
        name = line.strip("/")
        assert name in ignored or f"**/{name}" in ignored, name
    for names in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE):
        for name in names.split():
            assert (ROOT / name).exists() and name not in ignored


STAND_IN = """printf '%s\\n' "$(basename "$0") $*" >> "$LOG"
[ -z "${SHOW:-}" ] || printf '%s\\n' "$(eval echo "$SHOW")" >> "$LOG"
"""


def test_the_python_step_installs_what_constraints_allow(tmp_path: Path) -> None:
    python = executable(
        tmp_path / "base", "python3", f'{STAND_IN}[ "$2" != venv ] || cp "$0" -T "$3/bin/python"'
    )
    log = tmp_path / "log"
    (tmp_path / "venv/bin").mkdir(parents=True)
    environment = {"LOG": str(log), "VENV": str(tmp_path / "venv"), "PYTHON": str(python)}
    assert run([DEPLOY / "install.sh", "python"], **environment).returncode == 0
    assert (
        run([DEPLOY / "install.sh", "python"], **environment, EXTRAS="s3,ray", PIP_OPTIONS="-q -q").returncode
        == 0
    )
    common = "--disable-pip-version-check --no-input"
    constraints = f"-c {ROOT}/constraints.txt -e {ROOT}"
    assert log.read_text().splitlines() == [
        f"python3 -m venv {tmp_path}/venv",
        f"python -m pip install {common} {constraints}",
        f"python -m pip install {common} -q -q {constraints}[s3,ray]",
    ]


def test_make_installs_with_the_script() -> None:
    for target, extras in [("install", ""), ("test", "EXTRAS=test "), ("bench", "EXTRAS=bench ")]:
        result = run(["make", "-n", "-B", "-C", ROOT, target, "PYTHON=python3"])
        assert result.returncode == 0, result.stderr
        assert f'{extras}VENV=".venv" PIP_OPTIONS=-q deploy/install.sh python' in result.stdout
        assert "pip install" not in result.stdout


def test_this_environment_is_what_the_script_installs() -> None:
    """With the test above: whatever `make test` runs in is what the image gets."""
    if not (Path(sys.prefix) / "bin/python").exists():
        pytest.skip("no virtual environment")
    result = run([DEPLOY / "install.sh", "check"], VENV=sys.prefix, EXTRAS="test")
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_version_that_constraints_do_not_allow_is_found(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    (tmp_path / "constraints.txt").write_text("# none\nnumpy==1.0\nnobody-has-this==1.0\n")
    python = f'[ "$2" = pip ] || exec "{sys.executable}" "$@"'
    executable(tmp_path / "venv/bin", "python", python)
    result = run([tmp_path / "deploy/install.sh", "check"], VENV=str(tmp_path / "venv"))
    assert result.returncode == 1 and "numpy is" in result.stderr and "expected ==1.0" in result.stderr
    assert "nobody" not in result.stderr


def apex_machine(tmp_path: Path, nvcc: str) -> dict[str, str]:
    """Stand-ins for git, nvcc and Python that write down what they are called with."""
    executable(tmp_path / "bin", "git", STAND_IN)
    executable(tmp_path / "bin", "nvcc", f"echo 'Cuda compilation tools, release {nvcc}, V{nvcc}.48'")
    executable(tmp_path / "venv/bin", "python", f'{STAND_IN}case "$2" in *version.cuda*) echo 13.0 ;; esac')
    return {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "VENV": str(tmp_path / "venv"),
        "LOG": str(tmp_path / "log"),
        "SHOW": "cpp $APEX_CPP_EXT cuda $APEX_CUDA_EXT for $TORCH_CUDA_ARCH_LIST",
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "CUDA_HOME": "",
    }


def test_apex_is_built_from_the_pinned_commit_for_the_given_gpus(tmp_path: Path) -> None:
    result = run([DEPLOY / "install.sh", "apex"], **apex_machine(tmp_path, "13.0"))
    assert result.returncode == 0, result.stderr
    log = (tmp_path / "log").read_text()
    commit = re.search(r"APEX_COMMIT:-([0-9a-f]{40})", (DEPLOY / "install.sh").read_text())[1]
    assert re.search(rf"git -C \S+ fetch -q --depth 1 https://github.com/NVIDIA/apex {commit}\n", log)
    built = re.search(r"pip install .*--no-build-isolation --no-deps (\S+)\n(.*)\n", log)
    assert built[2] == "cpp 1 cuda 1 for 9.0"
    assert "import torch, amp_C" in log and not Path(built[1]).exists()


def test_apex_is_not_built_with_another_cuda_than_torchs(tmp_path: Path) -> None:
    result = run([DEPLOY / "install.sh", "apex"], **apex_machine(tmp_path, "12.8"))
    assert result.returncode == 1
    assert "nvcc is of CUDA 12.8, expected 13.0" in result.stderr and "CUDA_HOME" in result.stderr
    assert "git" not in (tmp_path / "log").read_text()


def test_unknown_steps_are_refused() -> None:
    result = run([DEPLOY / "install.sh", "everything"])
    assert result.returncode == 2 and "everything is no step, expected system-build" in result.stderr
    assert run([DEPLOY / "install.sh"]).returncode == 2


def entrypoint(tmp_path: Path, gpus: int, *arguments: str, **environment: str) -> str:
    for name in ("torchrun", "python"):
        executable(tmp_path / "bin", name, STAND_IN)
    executable(
        tmp_path / "bin",
        "nvidia-smi",
        "printf 'GPU %s: x\\n' " + " ".join(map(str, range(gpus))) if gpus else "exit 9",
    )
    (tmp_path / "log").unlink(missing_ok=True)
    environment |= {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    result = run([DEPLOY / "entrypoint.sh", *arguments], **environment)
    assert result.returncode == 0, result.stderr
    return (tmp_path / "log").read_text().strip()


def test_the_container_trains_on_all_gpus_or_runs_a_command(tmp_path: Path) -> None:
    preset = ("pretrain-k400", "--epochs", "2")
    line = entrypoint(tmp_path, 4, *preset)
    assert line.startswith("torchrun --standalone") and "--nproc-per-node 4 " in line and "SIGUSR1" in line
    assert line.endswith("/opt/cmac/train.py pretrain-k400 --epochs 2")
    assert "--nproc-per-node 2 " in entrypoint(tmp_path, 4, *preset, RANKS="2")
    assert entrypoint(tmp_path, 0, *preset) == "python /opt/cmac/train.py pretrain-k400 --epochs 2"
    assert entrypoint(tmp_path, 4, "torchrun", "--nnodes", "2", "x") == "torchrun --nnodes 2 x"
    assert entrypoint(tmp_path, 4, "python", "-m", "tools.plan") == "python -m tools.plan"
    assert entrypoint(tmp_path, 4) == "python /opt/cmac/train.py --help"


def compose() -> dict:
    """With the defaults of its variables."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (DEPLOY / "compose.yaml").read_text())
    return yaml.safe_load(text)


def test_the_compose_file_asks_for_eight_gpus_and_keeps_what_is_trained() -> None:
    services = compose()["services"]
    assert set(services) == {"train", "shards"}
    train = services["train"]
    (device,) = train["deploy"]["resources"]["reservations"]["devices"]
    # Further capabilities here would take the place of the image's NVIDIA_DRIVER_CAPABILITIES.
    assert device == {"driver": "nvidia", "count": 8, "capabilities": ["gpu"]}
    assert int(train["shm_size"].rstrip("g")) >= 16 and train["ulimits"]["memlock"] == -1
    assert train["init"] and train["stop_grace_period"] == "2m"
    for service in services.values():
        assert service["read_only"] and service["image"] == "cmac" and service["build"]["context"] == ".."
        assert set(service["build"]["args"]) <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
        mounts = {volume.split(":")[1]: volume for volume in service["volumes"]}
        assert "/var/cache/cmac" in mounts
        for path in mounts:
            assert path == "/videos" or path in DOCKERFILE
    assert train["volumes"][1].endswith(":/workspace/runs")


def test_commands_of_the_compose_file_are_valid() -> None:
    services = compose()["services"]
    config = parse(services["train"]["command"])
    assert config.run_dir == "runs/pretrain-k400" and config.loader.shards == "data/shards"
    command = services["shards"]["command"]
    assert (
        command[:3] == ["python", "-m", "tools.make_shards"] and build_parser().parse_args(command[3:]).videos
    )


def slurm_machine(tmp_path: Path, torchrun: str) -> dict[str, str]:
    """srun as Slurm has it: runs the command and passes SIGUSR1 on to all processes of the step. PREEMPTED is when the
    job was pre-empted."""
    executable(
        tmp_path / "bin",
        "srun",
        f"""{STAND_IN}
while [[ $1 == --* ]]; do shift; done
set -m
trap 'kill -USR1 -- -$!' USR1 # before the step, which may be ready to get it first
"$@" &
step=$!
while wait $step; status=$?; kill -0 $step 2>/dev/null; do :; done
exit $status""",
    )
    executable(
        tmp_path / "bin",
        "scontrol",
        f"""{STAND_IN}
case "$1 $2" in
    "show hostnames") printf "node07\\nnode08\\n" ;;
    "show job") printf '   PreemptEligibleTime=2026-01-02T03:04:05 PreemptTime=%s\\n' "${{PREEMPTED:-None}}" ;;
esac""",
    )
    executable(
        tmp_path / "checkout/.venv/bin",
        "torchrun",
        f'[ "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" = 1 ] || exit 99\n{STAND_IN}{torchrun}',
    )
    executable(tmp_path / "checkout/.venv/bin", "python", STAND_IN)
    (tmp_path / "checkout/train.py").write_text("")
    (tmp_path / "checkout/tools").mkdir()
    (tmp_path / "checkout/tools/make_shards.py").write_text("")
    return {
        **os.environ,
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "SLURM_SUBMIT_DIR": str(tmp_path / "checkout"),
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "node[07-08]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "64",
    }


def test_slurm_starts_one_torchrun_per_node_that_meet_at_the_first(tmp_path: Path) -> None:
    environment = slurm_machine(tmp_path, "exit 3")
    command = [DEPLOY / "train.slurm", "pretrain-k400", "--run-dir", "/runs/a b"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 3, result.stderr  # the status of the step
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0] == "scontrol show hostnames node[07-08]"
    assert lines[1].startswith("srun --kill-on-bad-exit=1 --cpus-per-task=64 bash -c")
    port = 20000 + 1234567 % 20000
    assert lines[-2] == (
        f"torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint node07:{port} "
        f"--rdzv-id 1234567-0 {tmp_path}/checkout/train.py pretrain-k400 --run-dir /runs/a b"
    )
    assert lines[-1] == "scontrol show job 1234567"  # which was not pre-empted


def test_a_pre_empted_slurm_job_saves_and_is_queued_again(tmp_path: Path) -> None:
    """torchrun must outlive the signal, its ranks get it, and the job goes back into the queue when they have ended."""
    rank = (
        "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0)); print(1, flush=True); "
        "time.sleep(60)"
    )
    ranks = f"""coproc {{ exec "{sys.executable}" -c '{rank}'; }}
read -r _ <&"${{COPROC[0]}}"
touch "$LOG.ready"
wait "$COPROC_PID"
status=$?
echo "rank ended with $status" >> "$LOG"
exit $status"""
    environment = slurm_machine(tmp_path, ranks)
    command = [DEPLOY / "train.slurm", "pretrain-k400"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "log.ready").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)  # B: to the batch script alone
        out, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0 and "all ranks save" in out and "queued again" in out
    lines = (tmp_path / "log").read_text().splitlines()
    assert "rank ended with 0" in lines and lines[-1] == "scontrol requeue 1234567"


@pytest.mark.parametrize(
    "status, preempted, queued",
    [
        (1, "2026-01-02T05:00:00", True),
        (0, "2026-01-02T05:00:00", False),
        (1, "None", False),
        (1, "Unknown", False),
    ],
)
def test_a_slurm_job_that_is_pre_empted_without_notice_to_the_script_is_queued_again(
    tmp_path: Path, status: int, preempted: str, queued: bool
) -> None:
    """The step got SIGTERM, of which torchrun ends with status 1 though its ranks have saved."""
    environment = slurm_machine(tmp_path, f"exit {status}") | {"PREEMPTED": preempted}
    command = [DEPLOY / "train.slurm", "pretrain-k400"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == (0 if queued else status), result.stderr
    assert ("scontrol requeue 1234567" in (tmp_path / "log").read_text().splitlines()) == queued


def test_a_slurm_job_whose_ranks_do_not_end_is_queued_again_in_time(tmp_path: Path) -> None:
    """They wait for another in a collective, where no signal is seen."""
    stalls = """trap '' USR1
echo $$ > "$LOG.pid"
while [ ! -e "$LOG.end" ]; do sleep 0.2; done"""
    environment = slurm_machine(tmp_path, stalls) | {"CMAC_SAVE_SECONDS": "2"}
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(
            [DEPLOY / "train.slurm", "pretrain-k400"], env=environment, stdout=out, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "log.pid").exists():
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
            for _ in range(2):  # a second one changes nothing
                process.send_signal(signal.SIGUSR1)
                time.sleep(0.5)
            assert process.wait(timeout=20) == 0
        finally:
            (tmp_path / "log.end").touch()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "log").read_text().splitlines()[-1] == "scontrol requeue 1234567"
    said = (tmp_path / "out").read_text()
    assert said.count("all ranks save") == 1 and "still run; the job is queued again" in said


def test_slurm_directives_give_time_to_save_and_one_task_per_node() -> None:
    directives = re.findall(r"^#SBATCH (--\S+)", (DEPLOY / "train.slurm").read_text(), re.MULTILINE)
    for directive in ("--signal=B:USR1@120", "--requeue", "--ntasks-per-node=1", "--gpus-per-node=8"):
        assert directive in directives
    seconds = re.search(r"CMAC_SAVE_SECONDS:-(\d+)", (DEPLOY / "train.slurm").read_text())[1]
    assert 60 < int(seconds) <= 100  # within the 120
    assert "--open-mode=append" in directives  # the log of a job that is queued again stays


def test_slurm_makes_shards_in_jobs_that_do_not_inherit_this_ones_settings(tmp_path: Path) -> None:
    environment = slurm_machine(tmp_path, "")
    environment |= {
        "SHOW": "settings ${!SLURM_@} $SLURM_CONF",
        "SLURM_CONF": "here",
        "PARTITION": "cpu",
        "JOBS": "9",
    }
    command = [DEPLOY / "shards.slurm", "--videos", "/v", "--out", "/o", "--slurm-option", "time=60"]
    subprocess.run(command, env=environment, timeout=60, check=True)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[1] == "settings SLURM_CONF here"
    arguments = lines[0].split()
    assert arguments[:3] == ["python", "-m", "tools.make_shards"]
    parsed = build_parser().parse_args(arguments[3:])
    assert parsed.engine == "slurm" and parsed.workers == 9 and parsed.videos == "/v"
    given = dict(option.split("=") for option in parsed.slurm_option)
    assert given == {"time": "60", "cpus-per-task": "4", "partition": "cpu"}  # the user's win


@pytest.mark.parametrize("script", ["train.slurm", "shards.slurm"])
def test_slurm_scripts_say_what_they_miss(script: str, tmp_path: Path) -> None:
    result = run([DEPLOY / script])
    assert result.returncode == 2 and "usage: sbatch" in result.stderr
    result = run([DEPLOY / script, "x"], SLURM_SUBMIT_DIR=str(tmp_path))
    assert (
        result.returncode == 2 and "expected the checkout" in result.stderr and "CMAC_ROOT" in result.stderr
    )


def test_the_image_knows_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMAC_COMMIT", "abc123+changes")
    assert git_commit() != "abc123+changes" or not (ROOT / ".git").exists()
    monkeypatch.setenv("PATH", "")
    assert git_commit() == "abc123+changes"
    monkeypatch.setenv("CMAC_COMMIT", "")
    assert git_commit() == "unknown"


def test_examples_name_presets_that_exist() -> None:
    for path in [*SCRIPTS, ROOT / "Dockerfile", DEPLOY / "compose.yaml"]:
        for name in re.findall(r"pretrain-\w[\w-]*", path.read_text()):
            assert name in PRESETS, f"{path}: {name}"
