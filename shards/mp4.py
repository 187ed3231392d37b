"""Where the coded frames of a clip lie in its mp4 file.

A clip is 32 frames in one piece; opening it as a container costs libav about a quarter of what decoding does.
The sample table says all that is needed. Only what shards hold is understood (one H.264 track, no B-frames, no
fragments, no edits): anything else is not a clip, and a ValueError.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import av

_CONTAINERS = frozenset((b"moov", b"trak", b"mdia", b"minf", b"stbl"))
MAX_SAMPLES = 1000
MAX_BOXES = 1000
"""Side by side; shards' files have at most ten."""
MAX_UNITS = 256
"""NAL units in a sample; shards' have one or two."""
MAX_EXTRADATA_BYTES = 4096
"""Of the parameter sets; shards' have about 50."""
MAX_PIXELS = 1 << 20
"""Of a frame: the decoder allocates what the parameter sets say. The largest of a shard has 48,384."""
NAL_SLICE, NAL_IDR_SLICE = 1, 5  # H.264 NAL unit types: a slice of a picture, of one that starts anew
NAL_PARAMETERS = frozenset((7, 8, 13, 15))  # sequence and picture parameter sets
_VISUAL_ENTRY_BYTES = 78  # a VisualSampleEntry's own fields, before its boxes (ISO/IEC 14496-12, 12.1.3)


@dataclass(frozen=True)
class VideoTrack:
    """The one H.264 track of an mp4 file."""

    extradata: bytes
    """Contents of `avcC`: the parameter sets that the decoder is opened with."""
    samples: tuple[tuple[int, int], ...]
    """(first byte, end) of each coded frame in the file, in decoding order, which is the order of display."""


def read_video_track(video: bytes) -> VideoTrack:
    """Sample table of an mp4 file's H.264 track: every sample a picture, whole NAL units and no parameter sets.

    A file with more than MAX_SAMPLES samples has that many here: it is no clip, and is not worth the memory.

    Raises:
        ValueError: the file is damaged, or not of the form that shards hold.
    """
    boxes: dict[bytes, tuple[int, int]] = {}
    try:
        for name, start, end in _walk(video, 0, len(video)):
            if name in (b"moof", b"ctts"):
                raise ValueError("fragments or reordered frames")
            if name in boxes and name not in (b"free", b"udta", b"meta", b"mdat"):
                raise ValueError(f"two {name!r} boxes: more than one track")
            boxes[name] = (start, end)
        if not _shows_all(video, boxes.get(b"elst")):
            raise ValueError("an edit list that leaves out or repeats frames")
        extradata = _avc_configuration(video, *boxes[b"stsd"])
        sizes = _sample_sizes(video, *boxes[b"stsz"])
        if len(sizes) > MAX_SAMPLES:
            return VideoTrack(extradata, ((0, 0),) * MAX_SAMPLES)
        samples = _sample_ranges(video, boxes, sizes)
        _check_durations(video, *boxes[b"stts"], num_samples=len(sizes))
        _check_units(video, extradata, samples)
    except KeyError as error:
        raise ValueError(f"no {error} box") from error
    except struct.error as error:
        raise ValueError(f"a box ends too early ({error})") from error
    return VideoTrack(extradata, samples)


def _walk(data: bytes, start: int, end: int, deep: bool = True) -> Iterator[tuple[bytes, int, int]]:
    """(name, first byte, end) of the boxes from start to end; deep: those inside containers too."""
    num_boxes = 0
    while start < end:
        num_boxes += 1
        if num_boxes > MAX_BOXES:
            raise ValueError(f"more than {MAX_BOXES} boxes side by side")
        size, name = struct.unpack_from(">I4s", data, start)
        header = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, start + 8)
            header = 16
        elif size == 0:
            size = end - start
        if size < header or start + size > end:
            raise ValueError(f"box {name!r} of {size} bytes at {start}, expected it to end by {end}")
        yield name, start + header, start + size
        if deep and (name in _CONTAINERS or name == b"edts"):
            yield from _walk(data, start + header, start + size)
        start += size


def _table(data: bytes, start: int, end: int, offset: int, words: int) -> tuple[int, ...]:
    """The rows of a table box as one tuple: `words` 32-bit words a row, their number at `offset`."""
    (count,) = struct.unpack_from(">I", data, start + offset)
    first = start + offset + 4
    if first + 4 * words * count > end:
        raise ValueError(f"a table of {count} rows is longer than its box")
    if count > MAX_SAMPLES:
        raise ValueError(f"a table of {count} rows, expected at most {MAX_SAMPLES}")
    return struct.unpack_from(f">{words * count}I", data, first)


def _shows_all(data: bytes, box: tuple[int, int] | None) -> bool:
    """Whether the edit list, if any, shows the track from its first frame on, once."""
    if box is None:
        return True
    version, count = struct.unpack_from(">B3xI", data, box[0])
    media_time = struct.unpack_from(">q" if version else ">i", data, box[0] + (16 if version else 12))[0]
    return count == 1 and media_time == 0


def _avc_configuration(data: bytes, start: int, end: int) -> bytes:
    (count,) = struct.unpack_from(">I", data, start + 4)
    size, name = struct.unpack_from(">I4s", data, start + 8)
    if count != 1 or name != b"avc1" or start + 8 + size > end:
        raise ValueError(f"{count} sample descriptions, the first {name!r}, expected one avc1")
    for box, first, last in _walk(data, start + 16 + _VISUAL_ENTRY_BYTES, start + 8 + size, deep=False):
        if box == b"avcC":
            if last - first > MAX_EXTRADATA_BYTES:
                raise ValueError(f"avcC of {last - first} bytes, expected at most {MAX_EXTRADATA_BYTES}")
            return data[first:last]
    raise ValueError("avc1 has no avcC")


def _sample_sizes(data: bytes, start: int, end: int) -> tuple[int, ...]:
    size, count = struct.unpack_from(">II", data, start + 4)
    if size == 0:
        return (
            (0,) * (MAX_SAMPLES + 1)
            if MAX_SAMPLES < count <= (end - start) // 4
            else _table(data, start, end, 8, 1)
        )
    if size * count > len(data):
        raise ValueError(f"{count} samples of {size} bytes in a file of {len(data)}")
    return (size,) * min(count, MAX_SAMPLES + 1)


def _sample_ranges(
    data: bytes, boxes: dict[bytes, tuple[int, int]], sizes: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    chunk_offsets = _table(data, *boxes[b"stco"], 4, 1)
    runs = _table(data, *boxes[b"stsc"], 4, 3)  # (first chunk, samples a chunk, description) per run
    ranges = []
    for index in range(0, len(runs), 3):
        first_chunk, per_chunk, description = runs[index : index + 3]
        next_run = runs[index + 3] if index + 3 < len(runs) else len(chunk_offsets) + 1
        if description != 1 or not 1 <= first_chunk < next_run <= len(chunk_offsets) + 1:
            raise ValueError(f"chunks {first_chunk} to {next_run} of {len(chunk_offsets)}")
        for chunk in range(first_chunk, next_run):
            position = chunk_offsets[chunk - 1]
            for size in sizes[len(ranges) : len(ranges) + per_chunk]:
                if size == 0 or position + size > len(data):
                    raise ValueError(f"a sample of {size} bytes at {position} of a file of {len(data)}")
                ranges.append((position, position + size))
                position += size
    if len(ranges) != len(sizes):
        raise ValueError(f"{len(sizes)} sample sizes for {len(ranges)} places")
    return tuple(ranges)


def _check_durations(data: bytes, start: int, end: int, num_samples: int) -> None:
    """ValueError unless each sample comes after the one before."""
    table = _table(data, start, end, 4, 2)  # (samples, duration) per run
    if sum(table[0::2]) != num_samples or 0 in table[1::2]:
        raise ValueError(f"durations of {sum(table[0::2])} samples, expected {num_samples}, none 0")


def _check_units(data: bytes, extradata: bytes, samples: tuple[tuple[int, int], ...]) -> None:
    """ValueError unless each sample is a row of whole NAL units with a slice among them, the first one that of a
    picture which needs no other. Parameter sets belong into avcC: in a sample they would stay in a decoder that is
    kept, and spoil the clips after this one."""
    if len(extradata) < 5:
        raise ValueError(f"avcC of {len(extradata)} bytes")
    length_bytes = 1 + extradata[4] % 4
    for number, (start, end) in enumerate(samples):
        kinds, num_units = set(), 0
        while start < end and num_units <= MAX_UNITS:
            num_units += 1
            first = start + length_bytes
            start = first + int.from_bytes(data[start:first], "big")
            if not first < start <= end:
                raise ValueError(f"sample {number} does not end with a NAL unit")
            kinds.add(data[first] & 31)
        if num_units > MAX_UNITS:
            raise ValueError(f"sample {number} has more than {MAX_UNITS} NAL units")
        slices = kinds & {NAL_SLICE, NAL_IDR_SLICE}
        if not slices or kinds & NAL_PARAMETERS or (number == 0 and slices != {NAL_IDR_SLICE}):
            raise ValueError(f"sample {number} has NAL units of types {sorted(kinds)}")


def open_decoder(track: VideoTrack) -> av.VideoCodecContext:
    """A decoder for `decode`, on one thread. It stops at the first error and at frames of more than MAX_PIXELS."""
    decoder = av.CodecContext.create("h264", "r")
    decoder.extradata = track.extradata
    decoder.thread_count = 1
    decoder.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
    return decoder


def decode(decoder: av.VideoCodecContext, video: bytes, track: VideoTrack) -> Iterator[av.VideoFrame]:
    """Frames of a track, pts from 0 on; the decoder can then take another one with the same extradata.

    Raises:
        av.error.FFmpegError: a frame does not decode. The decoder must not be used again then.
    """
    bytes_of = memoryview(video)
    for number, (start, end) in enumerate(track.samples):
        # Memory of its own, with zeros behind it: libav reads past the end of a packet.
        packet = av.Packet(end - start)
        packet.update(bytes_of[start:end])
        packet.pts = packet.dts = number
        yield from decoder.decode(packet)
    yield from decoder.decode(None)
    decoder.flush_buffers()
