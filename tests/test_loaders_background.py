"""Results made ahead in a thread: in order, bounded, with errors in their turn. Calls in threads that may hang."""

import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from itertools import count
from pathlib import Path

import pytest

from loaders.background import Background, DaemonThreads


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_results_come_in_order_and_no_more_than_depth_are_made_ahead():
    made = []
    numbers = count()

    def make() -> int:
        made.append(next(numbers))
        return made[-1]

    ahead = Background(make, depth=2)
    assert [ahead.take() for _ in range(5)] == [0, 1, 2, 3, 4]
    wait_until(lambda: len(made) == 7)
    time.sleep(0.05)
    assert len(made) == 7  # five taken, two ready
    ahead.close()


def test_an_error_comes_after_the_results_before_it_and_again():
    numbers = count()

    def make() -> int:
        number = next(numbers)
        if number == 2:
            raise ValueError("no more")
        return number

    ahead = Background(make, depth=4)
    assert [ahead.take(), ahead.take()] == [0, 1]
    for _ in range(2):
        with pytest.raises(ValueError, match="no more"):
            ahead.take()
    ahead.close()


def test_close_ends_the_thread_and_wakes_who_waits():
    release = threading.Event()
    ahead = Background(lambda: release.wait(10), depth=1)
    errors = []

    def wait_for_a_result() -> None:
        try:
            ahead.take()
        except RuntimeError as error:
            errors.append(str(error))

    waiting = threading.Thread(target=wait_for_a_result)
    waiting.start()
    closing = threading.Thread(target=ahead.close)
    closing.start()
    waiting.join(10)
    assert errors == ["the loader was closed while a batch was waited for"]
    release.set()
    closing.join(10)
    assert not closing.is_alive() and not waiting.is_alive()


def test_calls_give_what_they_return_or_raise_each_in_its_turn():
    threads = DaemonThreads(3, "test")
    results = [threads.submit(divmod, number, 7) for number in range(50)]
    assert [result.result(10) for result in results] == [divmod(number, 7) for number in range(50)]
    with pytest.raises(ZeroDivisionError):
        threads.submit(divmod, 1, 0).result(10)
    assert threads.submit(divmod, 8, 7).result(10) == (1, 1)  # the thread goes on
    threads.close()
    wait_until(lambda: not any(thread.is_alive() for thread in threads._threads))


def test_closing_threads_lets_go_of_whoever_waits_for_a_call_that_hangs():
    release, made = threading.Event(), []
    threads = DaemonThreads(1, "test")
    hangs, waits = threads.submit(release.wait), threads.submit(made.append, 1)
    threading.Timer(0.1, threads.close).start()
    for future in (hangs, waits):
        with pytest.raises(CancelledError):
            future.result(10)
    with pytest.raises(CancelledError):
        threads.submit(made.append, 2).result(10)
    release.set()
    wait_until(lambda: not any(thread.is_alive() for thread in threads._threads))
    assert made == []


def test_a_program_ends_though_a_call_hangs():
    program = (
        "import threading, time; from loaders.background import DaemonThreads; begun = threading.Event(); "
        "threads = DaemonThreads(2, 'test'); threads.submit(lambda: (begun.set(), time.sleep(300))); "
        "begun.wait(); threads.close()"
    )
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", program], cwd=root, timeout=60, check=True)
