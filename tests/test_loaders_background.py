"""Results made ahead in a thread: in order, bounded, with errors in their turn."""

import threading
import time
from itertools import count

import pytest

from loaders.background import Background


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
