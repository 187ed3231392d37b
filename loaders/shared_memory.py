"""Memory that the training process lends to its workers and gets back filled.

A batch that a worker puts into fresh shared memory costs more in page faults (about 1.3 ms per clip) than
anything but the decoding. These buffers are used again and again: their pages are there already. They are
anonymous files (memfd): nothing is left behind when a process is killed, and the size of /dev/shm (64 MB in a
container by default) does not matter.
"""

import itertools
import mmap
import os
import sys
import weakref
from collections import deque
from dataclasses import dataclass

import numpy as np

_numbers = itertools.count()
_mappings: dict["SharedBuffer", mmap.mmap] = {}  # of this process; workers keep theirs as long as they live


@dataclass(frozen=True)
class SharedBuffer:
    """Name of a buffer, the same in all processes."""

    process: int
    """Process that made it."""
    descriptor: int
    """Its file descriptor there."""
    number: int
    """Tells buffers apart whose descriptor is the same because one was closed."""
    num_bytes: int
    """Size."""

    def open(self) -> np.ndarray:
        """uint8 (num_bytes,): the memory itself. Written by one process at a time."""
        if self not in _mappings:
            descriptor = os.open(f"/proc/{self.process}/fd/{self.descriptor}", os.O_RDWR | os.O_CLOEXEC)
            try:
                _mappings[self] = mmap.mmap(descriptor, self.num_bytes)
            finally:
                os.close(descriptor)
        return np.frombuffer(_mappings[self], dtype=np.uint8)


class BufferPool:
    """Buffers of one size. There are as many as were ever in use at once."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._all: list[SharedBuffer] = []
        self._free: deque[SharedBuffer] = deque()

    @staticmethod
    def is_supported() -> bool:
        """Whether this system has what the pool needs: Linux with /proc."""
        return sys.platform == "linux" and os.path.isdir("/proc/self/fd")

    def __len__(self) -> int:
        return len(self._all)

    def acquire(self) -> SharedBuffer:
        """A buffer that nobody uses."""
        try:
            return self._free.popleft()
        except IndexError:
            descriptor = os.memfd_create("clip-batch", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, self.num_bytes)
            buffer = SharedBuffer(os.getpid(), descriptor, next(_numbers), self.num_bytes)
            self._all.append(buffer)
            buffer.open()
            return buffer

    def lend(self, buffer: SharedBuffer) -> np.ndarray:
        """uint8 (num_bytes,): the buffer's memory; taken back when all arrays and tensors on it are gone."""
        memory = buffer.open()
        weakref.finalize(memory, self._free.append, buffer).atexit = False
        return memory

    def close(self) -> None:
        """Gives the memory back to the system, what is lent as soon as it is no longer used."""
        for buffer in self._all:
            os.close(buffer.descriptor)
            _mappings.pop(buffer, None)
        self._all = []
        self._free = deque()
