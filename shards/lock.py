"""A lock between processes, which the system gives up when its process ends, however that is."""

import errno
import fcntl
import logging
from pathlib import Path
from typing import IO

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
"""What file systems without locks answer."""

log = logging.getLogger(__name__)
_said: set[Path] = set()


def try_lock(file: IO | int, *, wait: bool = False) -> bool:
    """Lock an open file until it is closed.

    Args:
        file: the file, or its descriptor.
        wait: for the process that has it.

    Returns:
        Whether no other process, and no other opening of the file in this one, has it.

    Raises:
        OSError: the file system fails, or has no locks (NO_LOCKS).
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def take_lock(file: IO | int, path: Path, *, wait: bool = False) -> bool:
    """Lock an open file as `try_lock` does.

    Where the file system has no locks this is said aloud, once per process, and the work goes on without: it
    may be the end of hours.

    Args:
        file: the file, or its descriptor.
        path: what to name when it cannot be locked.
        wait: for the process that has it.

    Returns:
        Whether no other process has it.

    Raises:
        OSError: the file system fails.
    """
    try:
        return try_lock(file, wait=wait)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        if path not in _said:
            _said.add(path)
            log.warning(
                "%s cannot be locked (%s); let one process at a time work there", path, error.strerror
            )
    return True
