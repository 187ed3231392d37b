"""Work done ahead in a thread, a bounded number of results at a time."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


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
