"""Ending a run when it is asked to: pre-emption (SIGTERM, SIGUSR1), Ctrl-C (SIGINT), a terminal or an ssh session that
is gone (SIGHUP). Needs the standard library."""

import errno
import os
import signal
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""What asks a run to stop; SIGHUP does not where it is ignored already (nohup). SIGQUIT (Ctrl-\\) and SIGKILL end a run
at once, without a checkpoint."""


class Stopped(BaseException):
    """A signal came where nothing is lost by giving up at once. Not an Exception: nobody is to take it for a fault."""


class StopSignals:
    """Inside `with`, notes the first of `SIGNALS`; a further one changes nothing, so no saving is ever broken off.

    To be entered in the main thread, where Python runs signal handlers.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interruptible = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def ignore(self) -> None:
        """For the way out of the program, where Python takes its handlers back: signals change nothing any more."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self._before.clear()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a signal (also one that came before) raises Stopped at once: for what may wait for long and keeps
        nothing that would be missed."""
        self._interruptible = True
        try:
            if self.received is not None:
                raise Stopped
            yield
        finally:
            self._interruptible = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, self.received or signal.Signals(number)
        if number == signal.SIGHUP:
            _leave_lost_terminal()
        if first and not self._interruptible:
            # Not print: the handler may run in the middle of one.
            with suppress(OSError):
                os.write(2, f"{self.received.name}: the run stops after this step and saves it\n".encode())
        if self._interruptible:
            self._interruptible = False
            raise Stopped


def _leave_lost_terminal() -> None:
    """Has what goes to a terminal that is gone go nowhere: a print would fail, and with it what is left to do."""
    for descriptor in (1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] == errno.EIO:  # of a file or a pipe ENOTTY
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
