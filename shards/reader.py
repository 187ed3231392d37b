"""Read clips of a shard by number, checked against their checksums. The index says where bytes are."""

import os
import stat
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shards.schema import MEMBER_SUFFIXES, SAMPLES_PER_CLIP, WAV_HEADER, BadClip, ClipInfo, video_number
from shards.writer import INDEX_VERSION

MAX_CLIP_BYTES = 16 << 20
"""A clip's members lie within so many bytes of the tar: no more is read for one clip, whatever the index says. The
frames of the largest one have 2.3 MB before they are compressed."""
MAX_INDEX_BYTES = 64 << 20
"""An index of 400,000 clips has so many."""


@dataclass(frozen=True, kw_only=True)
class RawClip:
    """One clip as it is on disk."""

    info: ClipInfo
    video: bytes
    """`key.mp4`."""
    audio: bytes
    """`key.wav`: 44 bytes of header, then 24,000 little-endian 16-bit samples."""
    shard: str
    """File name of the tar."""


@dataclass(frozen=True)
class _Member:
    offset: int
    size: int
    name: str


class ShardReader:
    """Random access to the clips of one tar file. Can be shared by threads and survives fork and pickling.

    Args:
        path: the tar; the index is beside it, with the suffix `.idx`.

    Raises:
        ValueError: no tar, no index, or an index that does not fit the tar.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.shard = self.path.name
        self._descriptor = -1
        try:
            with _open_plain_file(self.path) as file:
                self._descriptor = os.dup(file.fileno())
        except _UnreadableError as error:
            raise ValueError(
                f"{error.path} {error}, expected a tar; copy it again or re-run make_shards"
            ) from None
        size = os.fstat(self._descriptor).st_size
        self._samples = _read_index(self.path.with_suffix(".idx"), size)
        end = max(member.offset + member.size for sample in self._samples for member in sample.values())
        if size % tarfile.BLOCKSIZE or size < end + 2 * tarfile.BLOCKSIZE:
            self.close()
            raise ValueError(
                f"{self.path} has {size} bytes, expected more than {end} by its index: the tar was cut or "
                f"the index is of another tar; copy both again or re-run make_shards"
            )

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, position: int) -> str:
        """Key of the clip at `position`, from the index."""
        return next(iter(self._samples[position].values())).name.partition(".")[0]

    def read(self, position: int) -> RawClip:
        """Clip number `position`, 0 <= position < len.

        Raises:
            BadClip: this clip is damaged: `missing-member`, `stale-index`, `bad-json`, `checksum`,
            `sample-count`.
            IndexError: no such position.
        """
        sample = self._samples[position]
        key = self.key(position)
        if set(MEMBER_SUFFIXES) - set(sample):
            raise BadClip(key, self.shard, "missing-member")
        # One read for the whole clip, headers included: members are adjacent.
        first = min(member.offset for member in sample.values()) - tarfile.BLOCKSIZE
        last = max(member.offset + member.size for member in sample.values())
        if last - first > MAX_CLIP_BYTES:
            raise BadClip(key, self.shard, "stale-index")
        data = self._pread(first, last - first, key)
        members = {}
        for suffix in MEMBER_SUFFIXES:
            member = sample[suffix]
            start = member.offset - first
            if not _header_fits(data[start - tarfile.BLOCKSIZE : start], member):
                raise BadClip(key, self.shard, "stale-index")
            members[suffix] = data[start : start + member.size]
        try:
            info = ClipInfo.from_json(members["json"])
        except ValueError as error:
            raise BadClip(key, self.shard, "bad-json") from error
        if info.key != key or not key.endswith(f"_{info.slot:02d}"):
            raise BadClip(key, self.shard, "bad-json")
        if info.video_number != video_number(info.video_id):  # batches know a video by it
            raise BadClip(key, self.shard, "bad-json")
        crcs = (zlib.crc32(members["mp4"]), zlib.crc32(members["wav"]))
        if crcs != (info.video_crc32, info.audio_crc32):
            raise BadClip(key, self.shard, "checksum")
        audio = members["wav"]
        if len(audio) != len(WAV_HEADER) + 2 * SAMPLES_PER_CLIP or not audio.startswith(WAV_HEADER):
            raise BadClip(key, self.shard, "sample-count")
        return RawClip(info=info, video=members["mp4"], audio=audio, shard=self.shard)

    def find_stray_bytes(self) -> str | None:
        """What the tar holds besides its index's members, one after the other, in words; None: nothing.

        Python's tarfile is not asked: a header can make it read for ever (sizes below zero, CVE-2025-8194).
        """
        end = 0
        for position, sample in enumerate(self._samples):
            key = self.key(position)
            members = [(suffix, sample.get(suffix)) for suffix in MEMBER_SUFFIXES]
            for suffix, member in members:
                if member is None or len(sample) > len(members) or member.name != f"{key}.{suffix}":
                    return f"clip {key}: members {', '.join(sample)}, expected {', '.join(MEMBER_SUFFIXES)} of one key"
                if member.offset != end + tarfile.BLOCKSIZE:
                    return f"clip {key}: {suffix} at byte {member.offset}, expected {end + tarfile.BLOCKSIZE}"
                end = member.offset + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        length = os.fstat(self._descriptor).st_size - end
        if not 2 * tarfile.BLOCKSIZE <= length <= 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE:
            return f"{length} bytes after its last clip, expected the two blocks of zeros that end a tar"
        if any(os.pread(self._descriptor, length, end)):
            return f"more after its last clip, at byte {end}, expected zeros"
        return None

    def _pread(self, offset: int, length: int, key: str) -> bytes:
        parts = []
        while length:
            part = os.pread(self._descriptor, length, offset)
            if not part:
                raise BadClip(key, self.shard, "stale-index")
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Close the file; reading afterwards is an error. Calling it twice is not."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()

    def __getstate__(self) -> dict:
        return {"path": self.path}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["path"])


def _header_fits(header: bytes, member: _Member) -> bool:
    """True if the 512 bytes before a member are a tar header of a plain file of its name and size."""
    name = header[:100].rstrip(b"\0")
    digits = header[124:136].strip(b" \0")
    return (
        name == member.name.encode("ascii")
        and header[156:157] in (tarfile.REGTYPE, tarfile.AREGTYPE)
        and digits.isdigit()
        and all(digit in b"01234567" for digit in digits)
        and int(digits, 8) == member.size
    )


def _read_index(path: Path, tar_bytes: int) -> list[dict[str, _Member]]:
    """Per clip: suffix -> member. ValueError if there is no index or it is not one."""
    again = "copy it again, re-run make_shards, or write it with wds2idx"
    try:
        with _open_plain_file(path) as file:
            fault = _index_size_fault(file, tar_bytes)
            if fault is not None:
                raise ValueError(f"{path} {fault}; {again}")
            lines = file.read().decode("ascii").splitlines()
    except _UnreadableError as error:
        raise ValueError(f"{path} {error}, expected DALI's index beside the tar; {again}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not an index ({error.reason} at {error.start}); {again}") from error
    head = lines[0].split() if lines else []
    if len(head) != 2 or head[0] != INDEX_VERSION or head[1] != str(len(lines) - 1) or len(lines) < 2:
        raise ValueError(
            f"{path} starts with {lines[0] if lines else ''!r:.100} and has {len(lines)} lines, expected "
            f"'{INDEX_VERSION} <number of clips>' and one line per clip; copy it again or re-run make_shards"
        )
    samples = []
    for number, line in enumerate(lines[1:], start=2):
        sample = _parse_row(line)
        if sample is None:
            raise ValueError(
                f"{path}, line {number} is {line!r:.200}, expected 'suffix offset size name' per member"
            )
        samples.append(sample)
    return samples


def _parse_row(line: str) -> dict[str, _Member] | None:
    """Suffix -> member of one clip's line of an index; None if it is no such line."""
    words = line.split(" ")
    try:
        sample = {
            words[i]: _Member(int(words[i + 1]), int(words[i + 2]), words[i + 3])
            for i in range(0, len(words), 4)
        }
    except (ValueError, IndexError):
        return None
    good = all(member.offset >= tarfile.BLOCKSIZE and member.size >= 0 for member in sample.values())
    return sample if good else None


def find_shard_fault(path: str | os.PathLike, num_clips: int, num_bytes: int) -> str | None:
    """What is wrong with a shard's tar or index, in words with path, value, expected and way out; else None.

    Cheap (0.3 ms with 1,000 clips where the files are cached), so it looks at little: the size of the tar; of
    the index that it is text, its number of lines, the first one and those of the first and the last clip; that
    the last clip ends where the tar does; and the tar's headers of both. Damage between them is found by
    `ShardReader.read`, clip by clip.

    Args:
        path: the tar.
        num_clips: clips that it holds by the manifest.
        num_bytes: size that it has by the manifest.
    """
    tar, index = Path(path), Path(path).with_suffix(".idx")
    again = "copy it again or re-run make_shards"
    try:
        with _open_plain_file(tar) as file:
            size = os.fstat(file.fileno()).st_size
            if size != num_bytes:
                return f"{tar} has {size} bytes, expected {num_bytes} bytes by its manifest; {again}"
            with _open_plain_file(index) as index_file:
                fault = _index_size_fault(index_file, size)
                data = b"" if fault is not None else index_file.read()
            fault = fault or index_fault(data, num_clips)
            if fault is not None:
                return f"{index} {fault}; {again}"
            rows = []
            for line in (data.split(b"\n", 2)[1], data.rsplit(b"\n", 2)[1]):  # of the first and the last clip
                row = _parse_row(line.decode("ascii"))
                if row is None:
                    return (
                        f"{index} has {line!r:.200}, expected 'suffix offset size name' per member; {again}"
                    )
                rows.append(row)
            end = max(member.offset + member.size for row in rows for member in row.values())
            if not 0 <= size - end - 2 * tarfile.BLOCKSIZE < tarfile.BLOCKSIZE + tarfile.RECORDSIZE:
                return (
                    f"{index} ends at byte {end}, expected the end of the tar's {size} bytes (and at most "
                    f"{tarfile.RECORDSIZE} of padding): it is of another tar; {again}, or write it with wds2idx"
                )
            for row in rows:
                for member in row.values():
                    header = os.pread(file.fileno(), tarfile.BLOCKSIZE, member.offset - tarfile.BLOCKSIZE)
                    if not _header_fits(header, member):
                        return (
                            f"{tar} has {header[:16]!r} at byte {member.offset - tarfile.BLOCKSIZE}, expected "
                            f"the header of {member.name} by its index: one of them is damaged or of another "
                            f"shard; copy both again or re-run make_shards"
                        )
    except _UnreadableError as error:
        expected = f"a tar of {num_bytes} bytes" if error.path == tar else "DALI's index beside the tar"
        return f"{error.path} {error}, expected {expected}; {again}"
    except OSError as error:
        return f"{tar} cannot be read ({error}); {again}"
    return None


def _index_size_fault(file: BinaryIO, tar_bytes: int) -> str | None:
    """What is wrong with the size of an index: more than any that belongs to a tar of so many bytes."""
    size, limit = os.fstat(file.fileno()).st_size, min(tar_bytes, MAX_INDEX_BYTES)
    return f"has {size} bytes, expected at most {limit} for a tar of {tar_bytes}" if size > limit else None


def index_fault(data: bytes, num_clips: int) -> str | None:
    """What is wrong with an index, as far as its first line, its number of lines and its letters tell."""
    head, num_lines = data[: data.find(b"\n") + 1], data.count(b"\n")
    expected = f"{INDEX_VERSION} {num_clips}\n".encode("ascii")
    if head != expected or num_lines != num_clips + 1 or not data.endswith(b"\n"):
        return (
            f"starts with {data[:16]!r} and has {num_lines} lines, expected {expected!r} and {num_clips} more "
            f"by its manifest"
        )
    strange = data.translate(None, _INDEX_LETTERS)
    if strange:
        return f"holds {strange[:16]!r}, expected plain text"
    return None


_INDEX_LETTERS = bytes([10, *range(32, 127)])


class _UnreadableError(Exception):
    """A file that is not there or not a plain file; str() goes on after its path."""

    def __init__(self, path: Path, text: str) -> None:
        super().__init__(text)
        self.path = path


def _open_plain_file(path: Path) -> BinaryIO:
    """The open file, unbuffered; _UnreadableError if it is not a plain file that can be read."""
    try:
        # A pipe must not block.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        if path.is_symlink():
            raise _UnreadableError(path, f"is a link to {os.readlink(path)}, which does not exist") from None
        raise _UnreadableError(path, "is missing") from None
    except OSError as error:
        raise _UnreadableError(path, f"cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        kind = "a directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "not a plain file"
        os.close(descriptor)
        raise _UnreadableError(path, f"is {kind}")
    return open(descriptor, "rb", buffering=0)
