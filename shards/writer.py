"""Write one shard: a plain ustar file that depends on its clips alone, and DALI's index beside it."""

import errno
import hashlib
import os
import tarfile
from pathlib import Path
from typing import BinaryIO

from shards import storage
from shards.manifest import ShardEntry, sync_folder
from shards.schema import MEMBER_SUFFIXES, ClipInfo, shard_stem

INDEX_VERSION = "v1.2"
"""First word of an index as DALI's `wds2idx` writes it."""


class UnexpectedShard(Exception):
    """A shard that was made again has other bytes than before."""


class ShardWriter:
    """Context manager that writes `folder/{split}-slot{slot}-{index}.tar` and `.idx`; `entry` is set on
    leaving.

    Both are written under other names in `work_folder` (default: `folder`), flushed to disk and then renamed,
    index first: where the tar is, it is whole and has its index. If `folder` is a URL or on another file system
    they are uploaded or copied in that order instead, each whole. Leaving by an exception leaves nothing.

    Args:
        expected_sha256: of the tar, hex digits; UnexpectedShard is raised on leaving, and nothing written, if
            it is another one.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        split: str,
        slot: int,
        index: int,
        work_folder: str | os.PathLike | None = None,
        expected_sha256: str | None = None,
    ) -> None:
        self.folder = os.fspath(folder)
        self.expected_sha256 = expected_sha256
        self.slot = slot
        self.index = index
        self.stem = shard_stem(split, slot, index)
        work = Path(work_folder if work_folder is not None else folder)
        self._temporary_tar = work / f".{self.stem}.{os.getpid()}.tar.tmp"
        self._temporary_index = work / f".{self.stem}.{os.getpid()}.idx.tmp"
        self._rows: list[str] = []
        self._keys: set[str] = set()
        self.entry: ShardEntry | None = None

    @property
    def name(self) -> str:
        """File name of the tar."""
        return f"{self.stem}.tar"

    def __enter__(self) -> "ShardWriter":
        self._file = open(self._temporary_tar, "wb")
        self._sink = _HashingSink(self._file)
        return self

    def write(self, info: ClipInfo, video: bytes, audio: bytes) -> None:
        """Append one clip. `info.key` must be new in this shard and `info.slot` the slot of the shard."""
        assert info.slot == self.slot and "." not in info.key and info.key not in self._keys, info.key
        self._keys.add(info.key)
        row = []
        for suffix, data in zip(MEMBER_SUFFIXES, (video, audio, info.to_json())):
            member = tarfile.TarInfo(f"{info.key}.{suffix}")
            member.size = len(data)
            member.mtime = 0
            member.mode = 0o644
            header = member.tobuf(tarfile.USTAR_FORMAT)
            padding = bytes(-len(data) % tarfile.BLOCKSIZE)
            offset = self._sink.tell() + len(header)
            self._sink.write(header)
            self._sink.write(data)
            self._sink.write(padding)
            row.append(f"{suffix} {offset} {len(data)} {member.name}")
        self._rows.append(" ".join(row))

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if kind is not None:
            self._file.close()
            self._temporary_tar.unlink(missing_ok=True)
            return
        assert self._rows, f"{self.stem}: a shard needs at least one clip"
        end = self._sink.tell() + 2 * tarfile.BLOCKSIZE
        self._sink.write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        _flush(self._file)
        sha256 = self._sink.digest.hexdigest()
        if self.expected_sha256 not in (None, sha256):
            self._temporary_tar.unlink()
            raise UnexpectedShard(f"{self.name} has SHA-256 {sha256}, expected {self.expected_sha256}")
        with open(self._temporary_index, "w", encoding="ascii", newline="\n") as file:
            file.write(f"{INDEX_VERSION} {len(self._rows)}\n")
            file.writelines(row + "\n" for row in self._rows)
            file.flush()
            os.fsync(file.fileno())
        self._publish(sha256)
        self.entry = ShardEntry(
            name=self.name,
            slot=self.slot,
            index=self.index,
            num_clips=len(self._rows),
            bytes=self._sink.tell(),
            sha256=sha256,
        )

    def _publish(self, sha256: str) -> None:
        index, tar = (storage.join(self.folder, f"{self.stem}.{suffix}") for suffix in ("idx", "tar"))
        if not storage.is_url(self.folder):
            try:
                os.replace(self._temporary_index, index)
                os.replace(self._temporary_tar, tar)
                sync_folder(Path(self.folder))
                return
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
        storage.upload(self._temporary_index, index)
        storage.upload(self._temporary_tar, tar, sha256=sha256)
        self._temporary_index.unlink()
        self._temporary_tar.unlink()


class _HashingSink:
    """File for appending only, which knows its length and SHA-256 without reading back."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self._length = 0

    def write(self, data: bytes) -> int:
        self.file.write(data)
        self.digest.update(data)
        self._length += len(data)
        return len(data)

    def tell(self) -> int:
        return self._length


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
