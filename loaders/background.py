"""Work done ahead in a thread, a bounded number of results at a time, and calls made in threads.

All threads are daemons: the end of the program does not wait for one that hangs, in a read of a dead file system say.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class DaemonThreads:
    """Make calls, in the order in which they are given. A ThreadPoolExecutor would be waited for when the program ends,
    whatever its `shutdown` was told."""

    def __init__(self, num_threads: int, name: str) -> None:
        """num_threads: calls made at a time; name: of the threads."""
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._open: set[Future] = set()  # of calls that have not ended
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, daemon=True, name=f"{name}-{number}")
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """What the call will return or raise; cancelled by `close`, also while the call is under way."""
        future: Future[Result] = Future()
        self._open.add(future)
        future.add_done_callback(self._open.discard)
        if self._closed:
            future.cancel()
        self._calls.put(partial(_settle, future, call, *arguments))
        return future

    def close(self) -> None:
        """End each thread once its call returns, and wait for none: whoever waits for a call gets CancelledError."""
        self._closed = True
        for future in list(self._open):
            future.cancel()
        for _ in self._threads:
            self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # and what it returned


def _settle(future: Future[Result], call: Callable[..., Result], *arguments: Any) -> None:
    """Makes a call, unless it is cancelled, and hands over what comes of it, unless that is cancelled meanwhile."""
    if future.cancelled():
        return
    try:
        result = call(*arguments)
    except BaseException as error:  # handed over to the thread that waits
        with suppress(InvalidStateError):
            future.set_exception(error)
    else:
        with suppress(InvalidStateError):
            future.set_result(result)


class Background(Generic[Result]):
    """Calls make() over and over in a daemon thread and keeps up to depth results ready.

    An exception of make ends the thread and is raised by the `take` whose turn it is.
    """

    def __init__(self, make: Callable[[], Result], depth: int) -> None:
        """depth: results kept ready; one more may be in the making."""
        assert depth >= 1
        self._make = make
        self._depth = depth
        self._ready: deque[Result] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True, name="loader-ahead")
        self._thread.start()

    def take(self) -> Result:
        """The next result; waits for it. An error comes after the results that were made before it."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error is not None or self._closed)
            if self._ready:
                result = self._ready.popleft()
                self._changed.notify_all()
                return result
            if self._error is not None:
                raise self._error
            raise RuntimeError("the loader was closed while a batch was waited for")

    def close(self, seconds: float | None = None) -> bool:
        """Ends the thread: waits for the call of make that is under way, for at most so many seconds; None: for as
        long as it takes. Results that are ready are dropped. Whether the thread has ended."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                if self._closed:
                    return
            try:
                result = self._make()
            except BaseException as error:  # handed over to the thread that takes
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                if not self._closed:
                    self._ready.append(result)
                    self._changed.notify_all()
