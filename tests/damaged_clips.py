"""Damage to single clips of a shard: its tar, index and manifest are rewritten to fit, so that nothing but the
clip itself tells."""

import hashlib
import io
import json
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np

from shards.manifest import MANIFEST_NAME, read_manifest
from shards.reader import ShardReader
from shards.schema import FRAMES_PER_CLIP, MEMBER_SUFFIXES
from shards.writer import INDEX_VERSION


@dataclass
class Member:
    """One file in the tar."""

    name: str
    data: bytes
    header: bytes | None = None
    """512 bytes; None: the right ones."""

    @property
    def suffix(self) -> str:
        return self.name.partition(".")[2]


class EditableShard:
    """The members of a shard in memory, to change and write back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clips: list[list[Member]] = []
        """Per clip, in the order of the index."""
        self.order: list[Member] | None = None
        """Members in the order of the tar; None: clip by clip."""
        with ShardReader(path) as reader:
            for position in range(len(reader)):
                raw = reader.read(position)
                parts = dict(zip(MEMBER_SUFFIXES, (raw.video, raw.audio, raw.info.to_json())))
                self.clips.append([Member(f"{raw.info.key}.{suffix}", parts[suffix]) for suffix in parts])

    def member(self, position: int, suffix: str) -> Member:
        return next(member for member in self.clips[position] if member.suffix == suffix)

    def data(self, position: int, suffix: str) -> bytes:
        return self.member(position, suffix).data

    def info(self, position: int) -> dict:
        """Contents of the clip's key.json."""
        return json.loads(self.data(position, "json"))

    def put(self, position: int, suffix: str, data: bytes, *, fix_checksum: bool = True) -> None:
        """Replace a member; the checksum in key.json follows, unless told not to."""
        self.member(position, suffix).data = data
        field = {"mp4": "video_crc32", "wav": "audio_crc32"}.get(suffix)
        if field is not None and fix_checksum:
            self.put_fields(position, **{field: zlib.crc32(data)})

    def put_fields(self, position: int, **fields: object) -> None:
        """Change fields of key.json."""
        record = self.info(position) | fields
        self.member(position, "json").data = json.dumps(record).encode("ascii")

    def write(self) -> None:
        """Tar, index, and the shard's size and checksum in the manifest."""
        tar, index = pack(self.clips, self.order)
        self.path.write_bytes(tar)
        self.path.with_suffix(".idx").write_bytes(index)
        manifest = read_manifest(self.path.parent)
        fields = {"bytes": len(tar), "sha256": hashlib.sha256(tar).hexdigest()}
        shards = [
            replace(entry, **fields) if entry.name == self.path.name else entry for entry in manifest.shards
        ]
        # Not write_manifest, which waits for the disk.
        path = self.path.with_name(MANIFEST_NAME)
        path.write_bytes(replace(manifest, shards=tuple(shards)).to_json())


def pack(clips: list[list[Member]], order: list[Member] | None = None) -> tuple[bytes, bytes]:
    """(tar, index) of clips; order: the members in the order of the tar, if not clip by clip."""
    tar = bytearray()
    places: dict[int, str] = {}
    for member in order or [member for clip in clips for member in clip]:
        header = member.header
        if header is None:
            fields = tarfile.TarInfo(member.name)
            fields.size, fields.mode = len(member.data), 0o644
            header = fields.tobuf(tarfile.USTAR_FORMAT)
        tar += header
        places[id(member)] = f"{member.suffix} {len(tar)} {len(member.data)} {member.name}"
        tar += member.data + bytes(-len(member.data) % tarfile.BLOCKSIZE)
    tar += bytes(2 * tarfile.BLOCKSIZE)
    tar += bytes(-len(tar) % tarfile.RECORDSIZE)
    rows = [" ".join(places[id(member)] for member in clip) for clip in clips]
    text = "".join(f"{row}\n" for row in [f"{INDEX_VERSION} {len(rows)}", *rows])
    return bytes(tar), text.encode("utf-8", "surrogateescape")


@contextmanager
def edit_shard(path: Path) -> Iterator[EditableShard]:
    """The shard's members, written back at the end."""
    shard = EditableShard(path)
    yield shard
    shard.write()


# Videos.


@cache
def texture(width: int, height: int, seed: int) -> np.ndarray:
    """uint8 (height, width + 64, 3): soft blobs of color."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 12 + 2, (width + 64) // 12 + 2, 3)).astype(np.float64)
    fine = np.kron(coarse, np.ones((12, 12, 1)))
    for axis in (0, 1):
        fine = sum(np.roll(fine, shift, axis) for shift in range(12)) / 12
    return fine[:height, : width + 64].round().astype(np.uint8)


@cache
def encode_clip(
    width: int,
    height: int,
    seed: int,
    *,
    num_frames: int = FRAMES_PER_CLIP,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    container_format: str = "mp4",
    movflags: str = "",
    x264: tuple[tuple[str, str], ...] = (),
    with_video: bool = True,
    with_audio: bool = False,
) -> bytes:
    """A texture that moves to the left, a pixel per frame, coded as shards have it but for what is asked."""
    options = {}
    if codec == "libx264":
        options = {"crf": "20", "preset": "veryfast", "tune": "fastdecode", "bf": "0", "refs": "1", "g": "32"}
    elif codec == "libx265":
        options = {"x265-params": "log-level=none:pools=none", "preset": "ultrafast"}
    elif codec == "libvpx-vp9":
        options = {"cpu-used": "8", "deadline": "realtime", "crf": "20", "b": "0"}
    options |= dict(x264)
    with tempfile.TemporaryDirectory() as folder:  # moving moov to the front needs a file
        path = Path(folder) / "clip"
        with av.open(
            str(path), "w", format=container_format, options={"movflags": movflags} if movflags else {}
        ) as container:
            streams = []
            if with_video:
                stream = container.add_stream(codec, rate=FRAMES_PER_CLIP, options=options)
                stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
                stream.codec_context.thread_count = 1
                streams.append((stream, _frames(width, height, seed, num_frames, pix_fmt)))
            if with_audio:
                sound = container.add_stream("aac", rate=24_000, layout="mono")
                streams.append((sound, _sound()))
            for stream, frames in streams:
                for frame in [*frames, None]:
                    container.mux(stream.encode(frame))
        return path.read_bytes()


def _frames(width: int, height: int, seed: int, num_frames: int, pix_fmt: str) -> Iterator[av.VideoFrame]:
    whole = texture(width, height, seed)
    for step in range(num_frames):
        pixels = np.ascontiguousarray(whole[:, step : step + width])
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        color_range = "JPEG" if pix_fmt.startswith("yuvj") else "MPEG"
        frame = frame.reformat(format=pix_fmt, dst_colorspace="ITU601", dst_color_range=color_range)
        frame.pts, frame.time_base = step, Fraction(1, FRAMES_PER_CLIP)
        yield frame


def _sound() -> Iterator[av.AudioFrame]:
    samples = np.sin(np.arange(24_000) / 20, dtype=np.float32)
    for start in range(0, 24_000, 1_000):
        frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1_000], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 24_000, start, Fraction(1, 24_000)
        yield frame


CONTAINER_BOXES = ("moov", "trak", "mdia", "minf", "stbl", "edts", "moof", "traf")


def boxes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[str, int, int]]:
    """(name, start, end) of an mp4 file's boxes, headers included, those inside containers too."""
    end = len(data) if end is None else end
    while start < end:
        size, name = struct.unpack_from(">I4s", data, start)
        yield name.decode("latin-1"), start, start + size
        if name.decode("latin-1") in CONTAINER_BOXES:
            yield from boxes(data, start + 8, start + size)
        start += size


def box(data: bytes, name: str) -> tuple[int, int]:
    """(start, end) of the first box of that name."""
    return next((start, end) for found, start, end in boxes(data) if found == name)


def overwrite(data: bytes, offset: int, new: bytes) -> bytes:
    assert 0 <= offset <= len(data) - len(new)
    return data[:offset] + new + data[offset + len(new) :]


def patch_box(data: bytes, name: str, offset: int, *words: int) -> bytes:
    """The file with 32-bit words written at an offset from a box's start; 8 is where its contents begin."""
    return overwrite(data, box(data, name)[0] + offset, struct.pack(f">{len(words)}I", *words))


def rename_box(data: bytes, name: str, new: str) -> bytes:
    return overwrite(data, box(data, name)[0] + 4, new.encode("latin-1"))


def flip_bits(data: bytes, start: int, end: int, num_bits: int) -> bytes:
    """data with num_bits random bits flipped between two offsets."""
    changed = np.frombuffer(data, np.uint8).copy()
    rng = np.random.default_rng(0)
    changed[rng.integers(start, end, num_bits)] ^= np.uint8(1) << rng.integers(0, 8, num_bits).astype(
        np.uint8
    )
    return changed.tobytes()


def wav_file(
    num_samples: int,
    *,
    sample_rate: int = 24_000,
    num_channels: int = 1,
    sample_bytes: int = 2,
    kind: int = 1,
    declared_bytes: int | None = None,
) -> bytes:
    """wav with a header that says so, and noise for samples. kind: 1 PCM, 3 floating point, 7 mu-law."""
    frame_bytes = num_channels * sample_bytes
    data = np.random.default_rng(0).bytes(num_samples * frame_bytes)
    declared = len(data) if declared_bytes is None else declared_bytes
    buffer = io.BytesIO()
    buffer.write(struct.pack("<4sI4s4sI", b"RIFF", (36 + declared) % 2**32, b"WAVE", b"fmt ", 16))
    buffer.write(
        struct.pack(
            "<HHIIHH",
            kind,
            num_channels,
            sample_rate,
            sample_rate * frame_bytes,
            frame_bytes,
            8 * sample_bytes,
        )
    )
    buffer.write(struct.pack("<4sI", b"data", declared) + data)
    return buffer.getvalue()
