"""The process that a contender lives in, and how the benchmark speaks with it.

Each contender has a process of its own, below the benchmark's, and everything it starts is below that: its CPU time
and memory are its own, libraries with different FFmpegs never meet, a crash costs one row. All of a contender's
processes are one process group, which is stopped (SIGSTOP) while others have their turn: it is idle, whatever it
would have liked to fetch ahead.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MAX_STRETCH = 4.0  # a turn lasts at most so many times the seconds asked for, plus one batch


class ContenderFailed(Exception):
    """The contender's process died, raised or did not answer; the message says what is known."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        """Name of the exception that was raised there."""


class HostedContender:
    """A contender in its process, stopped except while a method runs.

    Args:
        module: of `benchmarks.contenders`.
        log: file that takes what the process prints.
        cores: to be pinned to; None: all that this process may use.
        timeout_seconds: an answer that takes longer counts as failure.
    """

    def __init__(
        self, module: str, log: Path, cores: list[int] | None = None, timeout_seconds: float = 300.0
    ) -> None:
        self._log = log
        self._timeout = timeout_seconds
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.contenders.host", module, json.dumps(cores)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
            )
        self.pid = self._process.pid
        try:
            self._answer()  # it leads its process group from here on
        except ContenderFailed:
            self.close()
            raise
        self._freeze()

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        """What the process answers to a command (see `_Host`).

        Raises:
            ContenderFailed: it did not answer, or with an error.
        """
        self._thaw()
        try:
            try:
                self._process.stdin.write((json.dumps({"command": command, **arguments}) + "\n").encode())
                self._process.stdin.flush()
            except OSError as error:
                raise ContenderFailed(self._last_words()) from error
            return self._answer()
        finally:
            self._freeze()

    def close(self) -> None:
        """Ends all its processes."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        # What it started and left behind is in its group, too.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()

    def _answer(self) -> dict[str, Any]:
        ready, _, _ = select.select([self._process.stdout], [], [], self._timeout)
        if not ready:
            raise ContenderFailed(f"no answer within {self._timeout:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise ContenderFailed(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise ContenderFailed(answer["error"], answer["kind"])
        return answer

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        code = self._process.poll()
        lines = self._log.read_text(errors="replace").strip().splitlines()
        how = "gone" if code is None else f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return f"its process ended ({how}): {lines[-1] if lines else 'no message'}"

    def _freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def _thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


class _Host:
    """The other side: commands from standard input, answers to what standard output was."""

    def __init__(self, module: str) -> None:
        import torch

        torch.set_num_threads(1)
        self._torch = torch
        self._module_name = module
        self._stream: Iterator[Any] | None = None

    def check(self, workload: dict[str, Any], reference: str, content: str) -> dict[str, Any]:
        """Compares one batch without augmentation with the reference; {"problem": None or text, measures}."""
        from benchmarks.contenders.content import compare

        batch = next(iter(self._open(workload)))
        result = compare(batch, reference, content)
        self._stream = None
        return asdict(result)

    def start(self, workload: dict[str, Any]) -> dict[str, Any]:
        """Opens the stream for the turns; {"first_batch_seconds": from nothing to the first batch}."""
        begin = time.perf_counter()
        self._stream = iter(self._open(workload))
        batch = self._next()
        return {"first_batch_seconds": time.perf_counter() - begin, "num_clips": batch.num_clips}

    def turn(
        self, seconds: float, drain_batches: int, multiple: int, paths_to_drop: list[str]
    ) -> dict[str, Any]:
        """Takes drain_batches without counting, then batches for at least so many seconds, a multiple of `multiple`.

        Workers that make whole batches end them almost at once: only multiples of their number end a turn in the
        state it began in.
        """
        from benchmarks.process_tree import drop_from_page_cache, machine_cpu_seconds, tree_memory, tree_usage

        drop_from_page_cache(paths_to_drop)
        for _ in range(drain_batches):
            self._next()
        pid = os.getpid()
        used, machine = tree_usage(pid), machine_cpu_seconds()
        num_clips = num_bad = num_batches = 0
        waited = 0.0
        batch = None
        begin = time.perf_counter()
        while True:
            batch = self._next()
            num_batches += 1
            num_clips += batch.num_clips
            num_bad += batch.num_bad
            waited += batch.wait_seconds
            elapsed = time.perf_counter() - begin
            if elapsed >= seconds and (num_batches % multiple == 0 or elapsed >= MAX_STRETCH * seconds):
                break
        now, machine_now = tree_usage(pid), machine_cpu_seconds()
        problem = _shape_problem(batch)
        if problem:
            raise ValueError(problem)
        cpu = now.cpu_seconds - used.cpu_seconds
        both_known = now.read_bytes is not None and used.read_bytes is not None
        return {
            "num_clips": num_clips,
            "num_bad": num_bad,
            "num_batches": num_batches,
            "seconds": elapsed,
            "cpu_seconds": cpu,
            "read_bytes": now.read_bytes - used.read_bytes if both_known else None,
            "wait_seconds": waited,
            "foreign_cpu_seconds": max(0.0, machine_now[0] - machine[0] - cpu),
            "stolen_cpu_seconds": machine_now[1] - machine[1],
            "memory_bytes": tree_memory(pid),
        }

    def _open(self, workload: dict[str, Any]) -> Iterator[Any]:
        from benchmarks.contenders.base import Workload

        module = importlib.import_module(f"benchmarks.contenders.{self._module_name}")
        return module.open_stream(Workload(**workload))

    def _next(self) -> Any:
        batch = next(self._stream)
        if self._torch.cuda.is_available() and self._torch.cuda.is_initialized():
            self._torch.cuda.synchronize()
        return batch


def _shape_problem(batch: Any) -> str | None:
    """What is wrong with a batch at first sight: shape, type, or a picture without content."""
    if batch.frames is None:
        return None
    num_rows = batch.num_clips + batch.num_bad
    if batch.frames.shape[:2] != (num_rows, 3) or str(batch.frames.dtype) != "torch.uint8":
        return f"frames are {batch.frames.dtype} {tuple(batch.frames.shape)}, expected uint8 ({num_rows}, 3, ...)"
    if batch.log_mel is None or len(batch.log_mel) != num_rows:
        return "the batch has no log-mel for each clip"
    if batch.frames[:, :, ::8, ::8, ::8].float().std() < 1:
        return "all pixels are alike"
    return None


def main(module: str, cores: str) -> None:
    os.setpgid(0, 0)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if json.loads(cores) is not None:
        os.sched_setaffinity(0, json.loads(cores))
    host = _Host(module)
    print(json.dumps({}), file=answers, flush=True)
    # Ends with the benchmark, too: then the input ends, and the system wakes and hangs up what was stopped.
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(host, request.pop("command"))(**request)
        except Exception as error:
            name = type(error).__name__
            answer = {"error": str(error) if name == "NotAvailable" else f"{name}: {error}", "kind": name}
            if name != "NotAvailable":
                import traceback

                traceback.print_exc()
        print(json.dumps(answer), file=answers, flush=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
