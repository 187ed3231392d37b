"""Many fresh processes of train.py from one import of it, to be killed at any moment.

    python tests/lives.py        serves: what it needs is imported once, each life is a fork of it
    Lives(...)                   starts a server, in a mount namespace of its own where a small disk is asked for

A life is `train.main()` with a sys.argv, a session and an output of its own, as if a command had started it.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
LONGEST_SECONDS = 120.0
"""Of a life or of anything waited for here, before it counts as hanging."""


def can_mount() -> bool:
    """Whether this process may make a mount namespace of its own and mount a tmpfs there."""
    try:
        command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
        return subprocess.run(command, capture_output=True, check=False, timeout=30).returncode == 0
    except FileNotFoundError:
        return False


@dataclass
class Life:
    """A process of train.py."""

    pid: int
    """Its session's id as well."""
    output: Path
    """What it and its workers print."""
    lives: "Lives"

    def running(self) -> bool:
        """Whether it has not ended."""
        return self.lives.ask(self.pid) is None

    def wait(self) -> int:
        """Its exit status, negative for a signal; AssertionError if it hangs."""
        deadline = time.monotonic() + LONGEST_SECONDS
        while (status := self.lives.ask(self.pid)) is None:
            assert time.monotonic() < deadline, f"hangs:\n{self.output.read_text()[-3000:]}"
            time.sleep(0.01)
        return status

    def kill(self) -> int:
        """SIGKILL; its exit status, which is another than -9 if it had ended before."""
        os.kill(self.pid, signal.SIGKILL)  # the id stays its own until the server is asked for the status
        return self.wait()

    def wait_for_its_workers(self) -> None:
        """Until no process of its session is left; AssertionError if one stays."""
        deadline = time.monotonic() + 30
        while left := processes_of_session(self.pid):
            assert time.monotonic() < deadline, f"processes {left} outlive the life that started them"
            time.sleep(0.02)


class Lives:
    """Starts lives; a context manager.

    Args:
        folder: for what they print.
        small_disk: a folder on which the server and its lives see a tmpfs of `small_bytes` in place of what is there;
            None for none. `path` leads there from outside.
    """

    def __init__(self, folder: Path, small_disk: Path | None = None, small_bytes: int = 0) -> None:
        self._folder = folder
        self._num_lives = 0
        command = [sys.executable, __file__]
        if small_disk is not None:
            small_disk.mkdir(parents=True)
            script = 'mount -t tmpfs -o size="$1" none "$2" && shift 2 && exec "$@"'
            command = [
                "unshare",
                "-rm",
                "sh",
                "-c",
                script,
                "sh",
                str(small_bytes),
                str(small_disk),
                *command,
            ]
        self._server = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        assert self._server.stdout.readline() == "ready\n", "the server of lives does not start"

    def __enter__(self) -> "Lives":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()  # it ends with the last line
        self._server.wait(30)
        self._server.stdout.close()

    def ask(self, request: dict | str | int) -> Any:
        """The server's answer to: what a life is started with, a command, or the id of a life (for its exit status)."""
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, arguments: list[str], **environment: str) -> Life:
        """A life: train.py with these arguments and more variables."""
        self._num_lives += 1
        output = self._folder / f"life-{self._num_lives:03d}.txt"
        pid = self.ask({"argv": arguments, "output": str(output), "environment": environment})
        return Life(pid, output, self)

    def run(self, arguments: list[str], **environment: str) -> Life:
        """A life that is to end well."""
        life = self.start(arguments, **environment)
        assert life.wait() == 0, life.output.read_text()[-3000:]
        return life

    def shell(self, command: str) -> None:
        """Run a command where the lives are."""
        assert self.ask(command) == 0, command

    def path(self, path: Path) -> Path:
        """A path of the lives, seen from here: through their mounts."""
        return Path(f"/proc/{self._server.pid}/root{path}")


def processes_of_session(session: int) -> list[int]:
    """Ids of the processes of a session that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(") ")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found


def serve() -> None:
    """Answer requests from standard input until it ends; then end all lives."""
    # Beside train itself, what its run imports on the way; 2 s for each life otherwise.
    import torch._dynamo
    import torch.utils.tensorboard
    import torchaudio

    import loaders.portable
    import loaders.workers
    import train

    assert torch._dynamo and torch.utils.tensorboard and torchaudio and loaders.portable and loaders.workers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answers.write("ready\n")
    answers.flush()
    statuses: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, dict):
            answer = _fork(train.main, answers, **request)
            statuses[answer] = None
        elif isinstance(request, str):
            answer = subprocess.run(["sh", "-c", request], check=False).returncode
        else:
            if statuses[request] is None and os.waitid(
                os.P_PID, request, os.WEXITED | os.WNOHANG | os.WNOWAIT
            ):
                statuses[request] = os.waitstatus_to_exitcode(os.waitpid(request, 0)[1])
            answer = statuses[request]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for pid, status in statuses.items():
        if status is None:
            os.killpg(pid, signal.SIGKILL)


def _fork(
    main: Callable[[], None], answers: IO[str], argv: list[str], output: str, environment: dict[str, str]
) -> int:
    """The id of a life that has begun."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.setsid()
        answers.close()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        printed = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        os.environ.update(environment)
        sys.argv = ["train.py", *argv]
        main()
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
