"""The zip files of torch.save: written with a checksum, and judged without unpickling.

    zip as torch.save writes it, but for its last two bytes | length of the comment | b"cmac sha256 " + 64 hex digits

The checksum is of what torch.save wrote. It is the zip file's comment, so every reader of such files still takes them.
"""

import hashlib
import io
import os
import pickletools
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

COMMENT = b"cmac sha256 "
_COMMENT_BYTES = len(COMMENT) + 64
_CHUNK_BYTES = 1 << 20

LARGEST_PICKLE_BYTES = 2 << 20
"""Of `data.pkl` in a checkpoint; the paper's full model has 0.12 MB."""
DEEPEST_TUPLE = 10
"""Levels of tuples in tuples; torch.save makes three."""
REBUILD = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
"""What may be called to make a tensor: views of the file's own storages."""
EMPTY_CONTAINERS = ("collections.OrderedDict",)
"""What may be called without arguments."""
_OLD_FORMAT_PICKLES = 5
"""Magic number, version, system, content, names of storages; the storages follow."""
_NOTHING = -1
"""Depth of the empty tuple."""


class NotWritten(OSError):
    """A file could not be written. `num_bytes`: how large it would have been."""

    def __init__(self, error: OSError, num_bytes: int) -> None:
        super().__init__(error.errno, error.strerror)
        self.num_bytes = num_bytes


class _Output:
    """What torch.save writes to: hashes and counts, and after an error of the file goes on counting.

    torch's zip writer would answer an exception with one of its own, about positions, that hides it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Returns the number of bytes, as files do."""
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self.num_bytes += len(view)
        self._put(view)
        return len(view)

    def flush(self) -> None:
        """Asked for by torch.save; the file has no buffer."""

    def finish(self) -> None:
        """Append the checksum and wait for the disk."""
        comment = COMMENT + self._digest.hexdigest().encode("ascii")
        self.num_bytes += len(comment)
        if self.error is None:
            self._file.seek(-2, os.SEEK_END)
            self._put(memoryview(struct.pack("<H", len(comment)) + comment))
        if self.error is not None:
            raise self.error
        os.fsync(self._file.fileno())

    def _put(self, view: memoryview) -> None:
        try:
            while view and self.error is None:
                view = view[self._file.write(view) :]
        except OSError as error:
            self.error = error


def write_archive(content: Any, path: Path) -> None:
    """torch.save with a checksum, on the disk when this returns.

    content: tensors, numbers, strings, lists, tuples and dictionaries.

    Raises:
        NotWritten: the disk is full, or whatever else the file system says; `path` may hold a part.
        ValueError: content asks for more than `find_problem` lets pass.
    """
    with open(path, "wb", buffering=0) as file:
        output = _Output(file)
        torch.save(content, output)
        try:
            output.finish()
        except OSError as error:
            raise NotWritten(error, output.num_bytes) from error
    with zipfile.ZipFile(path) as archive:
        problem = _pickle_problem(archive, strict=True)
    if problem is not None:
        raise ValueError(f"what is to be saved could not be read again: {problem}")


def has_checksum(path: Path) -> bool:
    """Whether a file ends in a checksum, right or wrong; False of one that cannot be read."""
    try:
        with open(path, "rb") as file:
            return _written_checksum(file) is not None
    except OSError:
        return False


def find_problem(path: Path) -> str | None:
    """Why a file is not what `write_archive`, or torch.save of such content, wrote; None if it is.

    Reads all of it and unpickles nothing. What passes is whole by its checksum (without one, by the zip file's CRC-32),
    holds stored members of one folder, no larger than the file, and a pickle that makes tensors, numbers, strings and
    containers only: loading it takes memory in proportion to its size.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            return "it is a folder" if stat.S_ISDIR(mode) else "it is no regular file"
        with open(path, "rb") as file:
            written = _written_checksum(file)
            if written is None and not _ends_without_comment(file):
                return "it is cut short, or no checkpoint: neither a checksum nor the end of a zip file is at its end"
            if written is not None and written != _checksum(file):
                return "its SHA-256 is not the one written at its end: bytes of it were changed or lost"
            with zipfile.ZipFile(file) as archive:
                problem = _layout_problem(archive) or _pickle_problem(archive, strict=True)
                if problem is None and written is None:
                    broken = archive.testzip()
                    if broken is not None:
                        problem = f"the CRC-32 of its member {broken!r:.100} is wrong"
                return problem
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # zipfile raises whatever the broken byte provokes
        return f"it is cut short or no checkpoint ({type(error).__name__}: {error!s:.200})"


def is_unchanged(path: Path) -> bool:
    """Whether a file has a checksum and is as it was written; what it holds is not looked at."""
    with open(path, "rb") as file:
        written = _written_checksum(file)
        return written is not None and written == _checksum(file)


def find_hazard(path: Path) -> str | None:
    """Why a file must not be given to torch.load, zip or of the older format; None if it may.

    Neither the checksum nor what the pickle asks for is looked at.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return _layout_problem(archive) or _pickle_problem(archive, strict=False)
        with open(path, "rb") as file:
            for _ in range(_OLD_FORMAT_PICKLES):
                problem = _instructions_problem(file, strict=False)
                if problem is not None or not file.peek(1):
                    return problem
        return None
    except Exception as error:  # zipfile and pickletools raise whatever the broken byte provokes
        return f"it is cut short or was not made by torch.save ({type(error).__name__}: {error!s:.200})"


def _written_checksum(file: BinaryIO) -> str | None:
    """The checksum at a file's end; None if there is none."""
    if file.seek(0, os.SEEK_END) < _COMMENT_BYTES + 2:
        return None
    file.seek(-_COMMENT_BYTES - 2, os.SEEK_END)
    length, comment = struct.unpack(f"<H{_COMMENT_BYTES}s", file.read(_COMMENT_BYTES + 2))
    if length != _COMMENT_BYTES or not comment.startswith(COMMENT):
        return None
    return comment.removeprefix(COMMENT).decode("latin-1")


def _ends_without_comment(file: BinaryIO) -> bool:
    """Whether a file ends as zip files without a comment do; one that has lost its comment does not."""
    if file.seek(0, os.SEEK_END) < zipfile.sizeEndCentDir:
        return False
    file.seek(-zipfile.sizeEndCentDir, os.SEEK_END)
    end = file.read()
    return end.startswith(zipfile.stringEndArchive) and end.endswith(b"\0\0")


def _checksum(file: BinaryIO) -> str:
    digest, left = hashlib.sha256(), file.seek(0, os.SEEK_END) - _COMMENT_BYTES - 2
    file.seek(0)
    while left:
        chunk = file.read(min(left, _CHUNK_BYTES))
        if not chunk:
            break
        digest.update(chunk)
        left -= len(chunk)
    digest.update(b"\0\0")  # the length of the comment as torch.save wrote it
    return digest.hexdigest()


def _layout_problem(archive: zipfile.ZipFile) -> str | None:
    """What torch.save never writes into a zip file's directory, where torch's reader would go astray."""
    members, size = archive.infolist(), os.fstat(archive.fp.fileno()).st_size
    folders, seen = set(), set()
    for member in members:
        name = member.orig_filename
        folder, slash, rest = name.partition("/")
        if not slash or not folder or {"", ".", ".."} & set(rest.split("/")) or "\\" in name or "\0" in name:
            return f"it has a member {name!r:.100}, expected names like archive/data/0"
        folders.add(folder)
        if name.lower() in seen:  # torch's reader ignores case
            return f"it has two members {name!r:.100}"
        seen.add(name.lower())
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            return f"its member {name!r:.100} is compressed, expected stored"
        if member.flag_bits & 1:
            return f"its member {name!r:.100} is encrypted"
        if member.external_attr & 0x10:  # torch's reader would leave memory as it found it
            return f"its member {name!r:.100} is marked as a folder"
    if len(folders) != 1:
        return f"its members lie in {len(folders)} folders, expected one"
    if sum(member.file_size for member in members) > size:
        return f"its members claim to hold more than the file's {size} bytes"
    return None


def _pickle_problem(archive: zipfile.ZipFile, strict: bool) -> str | None:
    """What is wrong with `data.pkl`; see `_instructions_problem`."""
    folder = archive.namelist()[0].partition("/")[0] if archive.namelist() else ""
    info = archive.NameToInfo.get(f"{folder}/data.pkl")
    if info is None:
        return "it has no data.pkl"
    if strict and info.file_size > LARGEST_PICKLE_BYTES:
        return f"its data.pkl has {info.file_size} bytes, expected at most {LARGEST_PICKLE_BYTES}"
    return _instructions_problem(io.BytesIO(archive.read(info)), strict)


def _instructions_problem(file: BinaryIO, strict: bool) -> str | None:
    """What is wrong with a pickle, found by following its instructions without carrying them out.

    On the stack that is kept for it an object is the depth of its tuples, a global its name and a mark None.
    strict: only what a checkpoint asks for.
    """
    stack: list[int | str | None] = []
    memo: dict[int, int | str | None] = {}
    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        if name in _PUTS:
            memo[argument] = stack[-1]
            continue
        from_mark, num_taken, num_made = _EFFECTS[name]
        if not from_mark and not num_taken and name in _PLAIN:
            stack.append(0)
            continue
        taken = []
        if from_mark:
            while stack[-1] is not None:
                taken.append(stack.pop())
            stack.pop()
        for _ in range(num_taken):
            taken.append(stack.pop())
        if name in _GETS:
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(None)
        elif name == "EMPTY_TUPLE":
            stack.append(_NOTHING)
        elif name == "GLOBAL":
            called = argument.replace(" ", ".")
            if strict and not _is_known(called):
                return f"it asks for {called!r:.100}, which no checkpoint needs"
            stack.append(called)
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, called = taken
            known = called in REBUILD or (called in EMPTY_CONTAINERS and arguments == _NOTHING)
            if strict and (name == "NEWOBJ" or not known):
                return f"it calls {called!r:.100} in a way that no checkpoint needs"
            stack.append(_depth(arguments) if called == "torch.Size" else 0)
        elif name == "BUILD":
            stack.append(taken[1])
        elif num_made:
            # Hashing a tuple takes all that is in it: deep ones overflow the stack, and those that hold one other many
            # times, level by level, take for ever.
            deepest_key = 0 if strict else _DEEPEST_NAME
            if name in _KEYS_OF and any(_depth(key) > deepest_key for key in taken[_KEYS_OF[name]]):
                return "it uses a tuple as a key, expected names and numbers"
            depth = max(map(_depth, taken), default=0) + name.startswith("TUPLE")
            if name in ("BINPERSID", "PERSID") and depth > _DEEPEST_NAME:
                return "it names a storage by tuples in tuples"
            if depth > DEEPEST_TUPLE:
                return f"it nests tuples more than {DEEPEST_TUPLE} deep"
            stack += [depth] * num_made
    return None


def _depth(entry: int | str | None) -> int:
    """Of an entry of the stack: 0 for what is no tuple and for the empty one."""
    return entry if type(entry) is int and entry > 0 else 0


def _effect(operation: pickletools.OpcodeInfo) -> tuple[bool, int, int]:
    """What a pickle's instruction takes: all down to the mark or not, how many below; and how many entries it makes."""
    before = operation.stack_before
    from_mark = pickletools.markobject in before
    num_taken = before.index(pickletools.markobject) if from_mark else len(before)
    return from_mark, num_taken, len(operation.stack_after)


_EFFECTS = {operation.name: _effect(operation) for operation in pickletools.opcodes}
_PUTS = ("BINPUT", "LONG_BINPUT", "PUT")
_GETS = ("BINGET", "LONG_BINGET", "GET")
_KEYS_OF = {"SETITEM": slice(1, 2), "SETITEMS": slice(1, -1, 2)}
"""Where in what an instruction takes, last first, the keys of a dictionary are."""
_DEEPEST_NAME = 2
"""Levels of tuples in what a storage is called (in the older format a view is part of it), and in a foreign key."""
_PLAIN = (
    "BININT1", "BININT2", "BININT", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "NONE", "NEWTRUE", "NEWFALSE",
    "EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET",
)  # fmt: skip
"""Instructions that make something that holds nothing."""


def _is_known(name: str) -> bool:
    storage = name.startswith("torch.") and name.endswith("Storage") and name.count(".") == 1
    return name in REBUILD or name in EMPTY_CONTAINERS or (storage and name != "torch.UntypedStorage")
