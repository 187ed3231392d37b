"""One damaged clip costs exactly one clip: it is counted by reason, its row is grey and not valid, and every
other row is bit for bit what it would have been. For every backend that decodes on the CPU."""

import json
import math
import random
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from damaged_clips import (
    EditableShard,
    Member,
    box,
    edit_shard,
    encode_clip,
    flip_bits,
    overwrite,
    patch_box,
    rename_box,
    wav_file,
)
from loaders_media import remuxed, write_shards

import train
from loaders import build_loader
from loaders.batch import BadClipRecord, ClipBatch
from loaders.config import LoaderConfig, VideoConfig
from shards.manifest import read_manifest

BACKENDS = ["portable", "dali-cpu-decode"]
NUM_CLIPS = 8
BATCH_SIZE = 4
POSITION = 2  # of the damaged clip; clip 5 has frames of the same size and comes after it
SEEDS = 8  # different pictures
GREY = round(255 * VideoConfig().mean)
SHARD = "train-slot00-000000.tar"
VIDEO = VideoConfig(num_frames=8, crop_size=112, color_jitter=True)

pytestmark = pytest.mark.timeout(60)  # a loader that hangs


@dataclass(frozen=True)
class Case:
    damage: Callable[[EditableShard, int], None]
    """Changes the clip at a position."""
    reasons: str
    """What it may be counted as, separated by spaces. With `fine`, its row may also be as if undamaged, with
    `similar`, nearly so (another coding of the same pictures), with `hidden`, valid and anything."""


# Videos.


def video(
    change: Callable[[bytes], bytes], fix_checksum: bool = True
) -> Callable[[EditableShard, int], None]:
    """Damage to key.mp4; the checksum in key.json fits it."""

    def damage(shard: EditableShard, position: int) -> None:
        shard.put(position, "mp4", change(shard.data(position, "mp4")), fix_checksum=fix_checksum)

    return damage


def encoded(
    change: Callable[[bytes], bytes] = lambda data: data, **options: object
) -> Callable[[EditableShard, int], None]:
    """The same pictures, encoded otherwise, then damaged."""

    def damage(shard: EditableShard, position: int) -> None:
        info = shard.info(position)
        size = {"width": info["frame_width"], "height": info["frame_height"]}
        shard.put(position, "mp4", change(encode_clip(**{**size, "seed": position % SEEDS, **options})))

    return damage


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(len(data) * share)]


def in_mdat(data: bytes) -> tuple[int, int]:
    """The middle fifth of the coded frames."""
    start, end = box(data, "mdat")
    return start + 2 * (end - start) // 5, start + 3 * (end - start) // 5


def zeros_in_mdat(data: bytes) -> bytes:
    start, end = in_mdat(data)
    return overwrite(data, start, bytes(end - start))


def noise_in_mdat(data: bytes) -> bytes:
    start, end = in_mdat(data)
    return overwrite(data, start, random.Random(0).randbytes(end - start))


def noise(data: bytes) -> bytes:
    return random.Random(0).randbytes(len(data))


def many_samples(data: bytes) -> bytes:
    """A sample table of 8 million frames of one byte: half a gigabyte, were it written out."""
    data = patch_box(data, "stsz", 12, 1, 8_000_000)
    data = patch_box(data, "stts", 16, 8_000_000)
    return patch_box(data, "stsc", 20, 8_000_000)


def table(name: str, offset: int, *words: int) -> Callable[[EditableShard, int], None]:
    """Words of a sample table overwritten (offset from the box's start: 8 version, 12 first field ...)."""
    return video(lambda data: patch_box(data, name, offset, *words))


UNDECODABLE = "decode-error frame-count"
VIDEO_CASES = {
    "garbage": Case(video(noise), "decode-error"),
    "empty": Case(video(lambda data: b""), "decode-error"),
    "one byte": Case(video(lambda data: b"\0"), "decode-error"),
    "zeros": Case(video(lambda data: bytes(len(data))), "decode-error"),
    "web page": Case(video(lambda data: b"<html>" * 99), "decode-error"),
    "cut at 33 %, moov last": Case(video(cut(0.33)), "decode-error"),
    "cut at 70 %, moov last": Case(video(cut(0.70)), "decode-error"),
    "cut at 33 %, moov first": Case(encoded(cut(0.33), movflags="+faststart"), UNDECODABLE),
    "cut at 40 %, moov first": Case(encoded(cut(0.40), movflags="+faststart"), UNDECODABLE),
    "cut at 70 %, moov first": Case(encoded(cut(0.70), movflags="+faststart"), UNDECODABLE),
    "cut by 10 bytes, moov first": Case(encoded(lambda d: d[:-10], movflags="+faststart"), UNDECODABLE),
    "cut after moov": Case(
        encoded(lambda data: data[: box(data, "moov")[1]], movflags="+faststart"), UNDECODABLE
    ),
    "moov first": Case(video(lambda data: remuxed(data, {"movflags": "+faststart"})), "fine"),
    "zeros in the frames": Case(video(zeros_in_mdat), UNDECODABLE),
    "noise in the frames": Case(video(noise_in_mdat), UNDECODABLE),
    "flipped bits in the frames": Case(
        video(lambda data: flip_bits(data, *in_mdat(data), 20)), f"{UNDECODABLE} hidden"
    ),
    "flipped bits everywhere": Case(video(lambda data: flip_bits(data, 0, len(data), 500)), UNDECODABLE),
    "flipped bits in moov": Case(
        video(lambda data: flip_bits(data, *box(data, "moov"), 30)), f"{UNDECODABLE} frame-size hidden"
    ),
    "first frame zeros": Case(
        video(lambda data: overwrite(data, box(data, "mdat")[0] + 8, bytes(1500))), UNDECODABLE
    ),
    "old checksum, zeros in the frames": Case(video(zeros_in_mdat, fix_checksum=False), "checksum"),
    "old checksum, one bit": Case(
        video(lambda data: flip_bits(data, *in_mdat(data), 1), fix_checksum=False), "checksum"
    ),
    "old checksum, cut": Case(video(cut(0.4), fix_checksum=False), "checksum"),
    "old checksum, empty": Case(video(lambda data: b"", fix_checksum=False), "checksum"),
    "1 frame": Case(encoded(num_frames=1), "frame-count"),
    "31 frames": Case(encoded(num_frames=31), "frame-count"),
    "33 frames": Case(encoded(num_frames=33), "frame-count"),
    "64 frames": Case(encoded(num_frames=64), "frame-count"),
    "wider than key.json says": Case(encoded(width=192), "frame-size"),
    "turned by 90 degrees": Case(encoded(width=192, height=144), "frame-size"),
    "larger than key.json says": Case(encoded(width=480, height=640), "frame-size"),
    "smaller than the crop": Case(encoded(width=48, height=64), "frame-size"),
    "sound only": Case(encoded(with_video=False, with_audio=True), UNDECODABLE),
    "sound beside the frames": Case(encoded(with_audio=True), f"{UNDECODABLE} similar"),
    "HEVC": Case(encoded(codec="libx265"), "decode-error"),
    "VP9": Case(encoded(codec="libvpx-vp9"), "decode-error"),
    "MPEG-4": Case(encoded(codec="mpeg4"), "decode-error"),
    "MJPEG": Case(encoded(codec="mjpeg", pix_fmt="yuvj420p"), "decode-error"),
    "H.264 without a container": Case(encoded(container_format="h264"), "decode-error"),
    "matroska": Case(encoded(container_format="matroska"), "decode-error"),
    "fragments": Case(encoded(movflags="empty_moov+frag_keyframe"), f"{UNDECODABLE} similar"),
    "fragments, cut": Case(encoded(cut(0.6), movflags="empty_moov+frag_keyframe"), UNDECODABLE),
    "B-frames": Case(encoded(x264=(("bf", "3"),)), f"{UNDECODABLE} similar"),
    "a key frame every 8": Case(encoded(x264=(("g", "8"),)), "similar"),
    "4:4:4": Case(encoded(pix_fmt="yuv444p"), f"{UNDECODABLE} similar"),
    "10 bits": Case(encoded(pix_fmt="yuv420p10le"), f"{UNDECODABLE} similar"),
    "no moov": Case(video(lambda data: rename_box(data, "moov", "xxxx")), "decode-error"),
    "no stbl": Case(video(lambda data: rename_box(data, "stbl", "free")), UNDECODABLE),
    "no stsz": Case(video(lambda data: rename_box(data, "stsz", "free")), UNDECODABLE),
    "no avcC": Case(video(lambda data: data.replace(b"avcC", b"free")), UNDECODABLE),
    "unknown codec": Case(video(lambda data: data.replace(b"avc1", b"xxxx")), UNDECODABLE),
    "avcC of zeros": Case(
        video(lambda data: overwrite(data, data.index(b"avcC") + 4, bytes(30))), f"{UNDECODABLE} hidden"
    ),
}
SAMPLE_TABLE_CASES = {
    "a frame of 2 GB": Case(table("stsz", 20 + 4 * 5, 0x7FFFFFFF), UNDECODABLE),
    "a frame of 0 bytes": Case(table("stsz", 20 + 4 * 5, 0), UNDECODABLE),
    "frames of 4 GB": Case(table("stsz", 12, 0xFFFFFFFF), UNDECODABLE),
    "4 billion sizes": Case(table("stsz", 16, 0xFFFFFFFF), UNDECODABLE),
    "4 billion frames of a byte": Case(table("stsz", 12, 1, 0xFFFFFFFF), UNDECODABLE),
    "8 million frames of a byte": Case(video(many_samples), UNDECODABLE),
    "4 billion durations": Case(table("stts", 12, 0xFFFFFFFF), f"{UNDECODABLE} fine"),
    "4 billion frames in the durations": Case(table("stts", 16, 0xFFFFFFFF), f"{UNDECODABLE} fine"),
    "durations of 0": Case(table("stts", 20, 0), f"{UNDECODABLE} fine"),
    "4 billion frames in a chunk": Case(table("stsc", 20, 0xFFFFFFFF), f"{UNDECODABLE} fine"),
    "4 billion chunks": Case(table("stco", 12, 0xFFFFFFFF), f"{UNDECODABLE} fine"),
    "no sizes": Case(table("stsz", 16, 0), UNDECODABLE),
    "chunk before the first": Case(table("stsc", 16, 0), f"{UNDECODABLE} fine"),
    "chunk beyond the file": Case(table("stco", 16, 0x7FFFFFFF), UNDECODABLE),
    "chunk in the header": Case(table("stco", 16, 0), f"{UNDECODABLE}"),
    "moov of 4 bytes": Case(table("moov", 0, 4), UNDECODABLE),
    "trak of 4 bytes": Case(table("trak", 0, 4), UNDECODABLE),
    "trak of 0 bytes": Case(table("trak", 0, 0), f"{UNDECODABLE} fine"),
    "trak of 4 GB": Case(table("trak", 0, 0xFFFFFFFF), f"{UNDECODABLE} fine"),
    "mdat of 4 GB": Case(table("mdat", 0, 0xFFFFFFFF), UNDECODABLE),
    "stsd of 9 bytes": Case(table("stsd", 0, 9), UNDECODABLE),
    "4 billion descriptions": Case(table("stsd", 12, 0xFFFFFFFF), f"{UNDECODABLE} fine"),
    "no seconds per tick": Case(table("mdhd", 20, 0), f"{UNDECODABLE} fine"),
    "edit list that starts late": Case(table("elst", 20, 1 << 20), f"{UNDECODABLE} fine"),
}

# Sound, description, tar.


def audio(data: bytes | Callable[[bytes], bytes], fix_checksum: bool = True):
    """Damage to key.wav; the checksum in key.json fits it."""

    def damage(shard: EditableShard, position: int) -> None:
        new = data(shard.data(position, "wav")) if callable(data) else data
        shard.put(position, "wav", new, fix_checksum=fix_checksum)

    return damage


def text(data: bytes | Callable[[bytes], bytes]):
    """Damage to key.json."""

    def damage(shard: EditableShard, position: int) -> None:
        shard.put(position, "json", data(shard.data(position, "json")) if callable(data) else data)

    return damage


def described(**fields: object):
    """key.json with other values."""
    return lambda shard, position: shard.put_fields(position, **fields)


def without_field(shard: EditableShard, position: int) -> None:
    info = shard.info(position)
    del info["video_crc32"]
    shard.put(position, "json", json.dumps(info).encode())


def of_another_clip(suffix: str):
    def damage(shard: EditableShard, position: int) -> None:
        shard.put(position, suffix, shard.data(position - 1, suffix), fix_checksum=False)

    return damage


def swapped(shard: EditableShard, position: int) -> None:
    frames, sound = shard.data(position, "mp4"), shard.data(position, "wav")
    shard.put(position, "mp4", sound)
    shard.put(position, "wav", frames)


def without(suffix: str):
    def damage(shard: EditableShard, position: int) -> None:
        shard.clips[position].remove(shard.member(position, suffix))

    return damage


def header_of(suffix: str, change: Callable[[bytes], bytes]):
    """Damage to the tar's header of a member."""

    def damage(shard: EditableShard, position: int) -> None:
        member = shard.member(position, suffix)
        header = tarfile.TarInfo(member.name)
        header.size = len(member.data)
        member.header = change(header.tobuf(tarfile.USTAR_FORMAT))

    return damage


WAV_REASONS = "sample-count decode-error"
OTHER_CASES = {
    "wav of 7980 samples": Case(audio(wav_file(7980)), WAV_REASONS),
    "wav cut to 7980 samples": Case(audio(lambda data: data[: 44 + 2 * 7980]), WAV_REASONS),
    "wav without its last byte": Case(audio(lambda data: data[:-1]), WAV_REASONS),
    "wav of 24001 samples": Case(audio(wav_file(24_001)), WAV_REASONS),
    "wav of no samples": Case(audio(wav_file(0)), WAV_REASONS),
    "wav that promises 4 GB": Case(audio(wav_file(24_000, declared_bytes=0xFFFFFFFF)), WAV_REASONS),
    "wav at 48 kHz": Case(audio(wav_file(24_000, sample_rate=48_000)), WAV_REASONS),
    "wav of a second at 48 kHz": Case(audio(wav_file(48_000, sample_rate=48_000)), WAV_REASONS),
    "stereo wav": Case(audio(wav_file(24_000, num_channels=2)), WAV_REASONS),
    "stereo wav of the right length": Case(audio(wav_file(12_000, num_channels=2)), WAV_REASONS),
    "8-bit wav": Case(audio(wav_file(48_000, sample_bytes=1)), WAV_REASONS),
    "floating-point wav": Case(audio(wav_file(24_000, sample_bytes=4, kind=3)), WAV_REASONS),
    "mu-law wav": Case(audio(wav_file(24_000, sample_bytes=1, kind=7)), WAV_REASONS),
    "wav of garbage": Case(audio(noise), WAV_REASONS),
    "empty wav": Case(audio(b""), WAV_REASONS),
    "wav with its header alone": Case(audio(lambda data: data[:44]), WAV_REASONS),
    "mp4 for a wav": Case(swapped, WAV_REASONS),
    "old checksum, wav of 7980 samples": Case(audio(wav_file(7980), fix_checksum=False), "checksum"),
    "old checksum, one sample": Case(
        audio(lambda data: flip_bits(data, 20_000, 20_001, 1), fix_checksum=False), "checksum"
    ),
    "json of garbage": Case(text(noise), "bad-json"),
    "empty json": Case(text(b""), "bad-json"),
    "json cut": Case(text(lambda data: data[:-20]), "bad-json"),
    "json of zeros": Case(text(lambda data: bytes(len(data))), "bad-json"),
    "json that is a list": Case(text(b"[1, 2]"), "bad-json"),
    "json without a field": Case(without_field, "bad-json"),
    "json of another clip": Case(of_another_clip("json"), "bad-json"),
    "json with another key": Case(described(key="000000000000_00"), "bad-json"),
    "json nested without end": Case(text(b"[" * 100_000), "bad-json"),
    "json with a number of 5000 digits": Case(
        text(lambda data: data.replace(b'"slot":0', b'"slot":' + b"1" * 5000)), "bad-json"
    ),
    "json with words for numbers": Case(described(frame_width="192"), "bad-json"),
    "json with numbers that are none": Case(described(start_seconds=math.nan), "bad-json"),
    "json with a start after the end of time": Case(described(start_seconds=10**400), "bad-json"),
    "json with a video number of 71 bits": Case(described(video_number=2**70), "bad-json"),
    "json with a negative video number": Case(described(video_number=-(2**63) - 1), "bad-json"),
    "json with frames of no size": Case(described(frame_width=0, frame_height=0), "frame-size bad-json"),
    "json with frames of negative size": Case(described(frame_width=-144), "frame-size bad-json"),
    "json with another frame size": Case(described(frame_width=192), "frame-size"),
    "json with giant frames": Case(described(frame_width=10**9, frame_height=10**9), "frame-size bad-json"),
    "json with frames of one row": Case(
        described(frame_width=2**63 - 1, frame_height=1), "frame-size bad-json"
    ),
    "json with a frame size of 400 digits": Case(described(frame_width=10**399), "frame-size bad-json"),
    "json with a checksum of zero": Case(described(video_crc32=0), "checksum"),
    "json with a field of a later version": Case(described(added_later=[1]), "fine"),
    "video of another clip": Case(of_another_clip("mp4"), "checksum"),
    "sound of another clip": Case(of_another_clip("wav"), "checksum"),
    "no mp4": Case(without("mp4"), "missing-member"),
    "no wav": Case(without("wav"), "missing-member"),
    "no json": Case(without("json"), "missing-member"),
    "members in another order": Case(lambda shard, position: shard.clips[position].reverse(), "fine"),
    "zeros for a header": Case(header_of("wav", lambda header: bytes(512)), "stale-index"),
    "garbage for a header": Case(header_of("mp4", noise), "stale-index"),
    "header of another name": Case(
        header_of("json", lambda header: b"f" * 12 + b"_00.json" + header[20:]), "stale-index"
    ),
    "header of another size": Case(
        header_of("wav", lambda header: overwrite(header, 124, b"00000000017\0")), "stale-index"
    ),
}
CASES = {**VIDEO_CASES, **SAMPLE_TABLE_CASES, **OTHER_CASES}


def config(folder: Path, backend: str, **changes: object) -> LoaderConfig:
    fields = {
        "shards": str(folder),
        "backend": backend,
        "global_batch_size": BATCH_SIZE,
        "num_workers": 1,
        "prefetch_batches": 2,
        "shuffle": False,
        "max_bad_fraction": 1.0,
        "max_bad_shard_fraction": 1.0,
        "video": VIDEO,
    }
    return LoaderConfig(**fields | changes)


def read_epoch(folder: Path, backend: str, **changes: object) -> tuple[list[ClipBatch], dict[str, int]]:
    """The batches of an epoch, and the loader's bad clips."""
    loader = build_loader(config(folder, backend, **changes))
    try:
        return list(loader), dict(loader.bad_clips)
    finally:
        loader.close()


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory) -> Path:
    """Eight clips of different pictures, three frame sizes in turn."""
    folder = tmp_path_factory.mktemp("undamaged")
    write_shards(folder, [NUM_CLIPS], num_slots=1)
    with edit_shard(folder / SHARD) as shard:
        for position in range(NUM_CLIPS):
            info = shard.info(position)
            shard.put(
                position, "mp4", encode_clip(info["frame_width"], info["frame_height"], position % SEEDS)
            )
    return folder


@pytest.fixture(scope="module")
def undamaged_triples(tmp_path_factory) -> Path:
    """Three clips for each case, all of one frame size."""
    folder = tmp_path_factory.mktemp("triples")
    width, height = 144, 192
    write_shards(folder, [3 * len(CASES)], num_slots=1)
    with edit_shard(folder / SHARD) as shard:
        for position in range(3 * len(CASES)):
            shard.put(position, "mp4", encode_clip(width, height, position % SEEDS))
            shard.put_fields(position, frame_width=width, frame_height=height)
    return folder


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request) -> str:
    if request.param.startswith("dali"):
        pytest.importorskip("nvidia.dali")
    return request.param


@pytest.fixture(scope="module")
def reference(undamaged, backend) -> list[ClipBatch]:
    batches, bad = read_epoch(undamaged, backend)
    assert len(batches) == NUM_CLIPS // BATCH_SIZE and bad == {}
    assert all(batch.valid.all() for batch in batches)
    return batches


@pytest.fixture
def folder(undamaged, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(undamaged, tmp_path / "shards")


@pytest.mark.parametrize("backend", BACKENDS[:1], indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_damaged_clip_costs_exactly_one_clip(name, folder, backend, reference, request):
    case = CASES[name]
    with edit_shard(folder / SHARD) as shard:
        case.damage(shard, POSITION)
    batches, bad = read_epoch(folder, backend)
    check_epoch(batches, bad, reference, {POSITION: case.reasons})


def test_each_of_many_damaged_clips_costs_exactly_one_clip(undamaged_triples, tmp_path, backend):
    # Every case once, between two whole clips of the same frame size.
    folder = shutil.copytree(undamaged_triples, tmp_path / "shards")
    reasons = {}
    with edit_shard(folder / SHARD) as shard:
        for number, case in enumerate(CASES.values()):
            reasons[3 * number + 1] = case.reasons
            case.damage(shard, 3 * number + 1)
    loaders = [build_loader(config(path, backend, drop_last=False)) for path in (folder, undamaged_triples)]
    try:
        found: Counter[str] = Counter()
        for batch, other in zip(*loaders, strict=True):
            found += check_batch(batch, other, reasons)
        assert loaders[0].bad_clips == found and loaders[1].bad_clips == {}
        assert set(found) == {
            "bad-json", "checksum", "decode-error", "frame-count", "frame-size", "missing-member",
            "sample-count", "stale-index",
        }  # fmt: skip
    finally:
        for loader in loaders:
            loader.close()


def check_epoch(
    batches: list[ClipBatch], bad: dict[str, int], reference: list[ClipBatch], reasons: dict[int, str]
) -> None:
    """The batches are those of the reference but for the rows that `reasons` has by position in the epoch."""
    found: Counter[str] = Counter()
    for batch, other in zip(batches, reference, strict=True):
        found += check_batch(batch, other, reasons)
    assert bad == found


def check_batch(batch: ClipBatch, other: ClipBatch, reasons: dict[int, str]) -> Counter[str]:
    """Number of bad clips by reason; AssertionError unless each is as `reasons` allow (see Case)."""
    assert batch.keys == other.keys and batch.step == other.step
    records = {record.key: record for record in batch.bad}
    assert len(records) == len(batch.bad)
    for row, key in enumerate(batch.keys):
        position = batch.step * BATCH_SIZE + row
        allowed = reasons.get(position, "fine").split()
        record = records.pop(key, None)
        what = f"clip {position}, {allowed}: {record}"
        if record is not None:
            assert record.reason in allowed, what
            assert record == BadClipRecord(key=key, shard=SHARD, reason=record.reason), what
            assert not batch.valid[row] and batch.clips[row] is None and batch.augmentations[row] is None, (
                what
            )
            assert (batch.frames[row] == GREY).all() and (batch.log_mel[row] == 0).all(), what
            continue
        assert {"fine", "similar", "hidden"} & set(allowed), f"{what}: damage was not noticed"
        assert torch.equal(batch.log_mel[row], other.log_mel[row]), what
        assert (
            batch.valid[row] == other.valid[row] and batch.augmentations[row] == other.augmentations[row]
        ), what
        assert batch.video_ids[row] == other.video_ids[row], what
        if "fine" in allowed:
            assert torch.equal(batch.frames[row], other.frames[row]), what
            assert position in reasons or batch.clips[row] == other.clips[row], what
        elif "similar" in allowed:
            difference = (batch.frames[row].float() - other.frames[row].float()).square().mean().sqrt()
            assert difference < 20, f"{what}: frames differ by {difference:.1f}"
    assert records == {}, "bad clips that are not in the batch"
    return Counter(record.reason for record in batch.bad)


def test_members_of_two_clips_that_lie_interleaved_are_read_by_their_index(folder, backend, reference):
    with edit_shard(folder / SHARD) as shard:
        first, second = shard.clips[POSITION], shard.clips[POSITION + 1]
        pairs = [member for pair in zip(first, second) for member in pair]
        before = [member for clip in shard.clips[:POSITION] for member in clip]
        shard.order = before + pairs + [m for clip in shard.clips[POSITION + 2 :] for m in clip]
    batches, bad = read_epoch(folder, backend)
    check_epoch(batches, bad, reference, {})


def test_swapped_sounds_of_two_clips_cost_both(folder, backend, reference):
    with edit_shard(folder / SHARD) as shard:
        sounds = [shard.data(position, "wav") for position in (1, 5)]
        for position, sound in zip((5, 1), sounds):
            shard.put(position, "wav", sound, fix_checksum=False)
    batches, bad = read_epoch(folder, backend)
    assert bad == {"checksum": 2}
    assert [row for batch in batches for row in batch.valid.tolist()] == [p not in (1, 5) for p in range(8)]
    for batch, other in zip(batches, reference):
        assert torch.equal(batch.frames[batch.valid], other.frames[batch.valid])
        assert torch.equal(batch.log_mel[batch.valid], other.log_mel[batch.valid])


def test_clip_that_is_in_the_shard_twice_is_read_twice(folder, backend, reference):
    # Nothing in the clip tells; tools/check_shards.py says "twice".
    with edit_shard(folder / SHARD) as shard:
        shard.clips[POSITION] = [Member(member.name, member.data) for member in shard.clips[0]]
    batches, bad = read_epoch(folder, backend)
    assert bad == {} and batches[0].keys[POSITION] == batches[0].keys[0]
    assert torch.equal(batches[0].frames[POSITION], reference[0].frames[0])
    assert torch.equal(batches[1].frames, reference[1].frames)


def test_zeros_over_a_part_of_the_tar_cost_the_clips_under_them(folder, backend, reference):
    path = folder / SHARD
    data = bytearray(path.read_bytes())
    first, last = (data.index(f"{reference[0].keys[position]}.mp4".encode()) for position in (1, 3))
    data[first + 1000 : last + 1000] = bytes(last - first)
    path.write_bytes(data)
    batches, bad = read_epoch(folder, backend)
    assert [row for batch in batches for row in batch.valid.tolist()] == [
        p not in (1, 2, 3) for p in range(8)
    ]
    assert bad == {"checksum": 1, "stale-index": 2} or bad == {"stale-index": 3}
    assert torch.equal(batches[1].frames, reference[1].frames)


def test_all_clips_bad_make_batches_without_a_valid_row(folder, backend):
    with edit_shard(folder / SHARD) as shard:
        for position in range(NUM_CLIPS):
            shard.put(position, "mp4", b"")
    batches, bad = read_epoch(folder, backend)
    assert bad == {"decode-error": NUM_CLIPS} and len(batches) == 2
    for batch in batches:
        assert not batch.valid.any() and (batch.frames == GREY).all() and (batch.log_mel == 0).all()


def test_epoch_after_a_bad_clip_is_as_if_it_had_not_been(folder, undamaged, backend):
    with edit_shard(folder / SHARD) as shard:
        shard.put(POSITION, "mp4", encode_clip(144, 192, 9, num_frames=31))
    loaders = [build_loader(config(path, backend)) for path in (folder, undamaged)]
    try:
        for epoch in range(3):
            for batch, other in zip(*loaders, strict=True):
                assert batch.epoch == epoch
                assert torch.equal(batch.frames[batch.valid], other.frames[batch.valid])
                assert torch.equal(batch.log_mel[batch.valid], other.log_mel[batch.valid])
            assert loaders[0].bad_clips == {"frame-count": epoch + 1}
    finally:
        for loader in loaders:
            loader.close()


def test_bad_second_clip_is_counted_in_the_second_batch(tmp_path, backend):
    write_shards(tmp_path, [BATCH_SIZE], num_slots=2)
    with edit_shard(tmp_path / "train-slot01-000000.tar") as shard:
        shard.put(POSITION, "wav", wav_file(7980))
    batches, bad = read_epoch(tmp_path, backend, clips_per_video=2)
    (batch,) = batches
    assert batch.valid.all() and batch.bad == () and bad == {"sample-count": 1}
    assert batch.second.valid.tolist() == [position != POSITION for position in range(BATCH_SIZE)]
    assert [record.shard for record in batch.second.bad] == ["train-slot01-000000.tar"]


def test_too_many_bad_clips_stop_the_run_and_name_the_worst_shard(tmp_path, backend):
    write_shards(tmp_path, [40, 40, 40], num_slots=1)
    for index, positions in [(0, (1,)), (1, (3, 17, 39)), (2, ())]:
        with edit_shard(tmp_path / f"train-slot00-{index:06d}.tar") as shard:
            for position in positions:
                shard.put(position, "mp4", b"garbage")
    assert len(read_manifest(tmp_path).shards) == 3
    small = {"global_batch_size": 10, "video": VideoConfig(num_frames=1, short_side=18, crop_size=16)}
    loader = build_loader(config(tmp_path, backend, **small, max_bad_fraction=0.033))
    batches = []
    with pytest.raises(RuntimeError) as caught:
        for batch in loader:
            batches.append(batch.step)
    loader.close()
    assert type(caught.value).__name__ == "TooManyBadClips" and batches == list(range(7))
    message = str(caught.value)
    assert "4 of 80 clips are bad (decode-error 4), expected at most 3.30%" in message
    assert "most are in train-slot00-000001.tar (3), train-slot00-000000.tar (1)" in message
    batches, bad = read_epoch(tmp_path, backend, **small, max_bad_fraction=0.034)
    assert len(batches) == 12 and bad == {"decode-error": 4}


def test_training_stops_over_the_budget_and_lists_every_bad_clip(tmp_path, backend, monkeypatch, capsys):
    # The run's real entry; 4 of an epoch's 120 clips may be bad.
    shards, run_dir = tmp_path / "shards", tmp_path / "run"
    write_shards(shards, [60, 60], num_slots=1)
    damaged = {0: (7, 35), 1: (11, 12, 51)}
    keys = {}
    for index, positions in damaged.items():
        with edit_shard(shards / f"train-slot00-{index:06d}.tar") as shard:
            for position in positions:
                shard.put(position, "mp4", b"garbage")
                keys[shard.info(position)["key"]] = shard.path.name
    options = (
        f"demo --run-dir {run_dir} --loader.shards {shards} --loader.backend {backend} --loader.num-workers 1 "
        "--loader.global-batch-size 10 --loader.no-shuffle --loader.max-bad-fraction 0.04 "
        "--loader.video.num-frames 2 --loader.video.short-side 36 --loader.video.crop-size 32 --cpu-threads 1 "
        "--model.video.widths 8 8 --model.video.blocks 1 1 --model.audio.widths 8 8 --model.audio.blocks 1 1 "
        "--model.filter-channels 8 --model.embedding-dim 8 --model.queue-length 20 --log-every 1 --max-steps 40"
    )
    monkeypatch.setattr("sys.argv", ["train.py", *options.split()])
    with pytest.raises(SystemExit) as caught:
        train.main()
    assert caught.value.code == 1
    message = capsys.readouterr().err
    assert "5 of 120 clips are bad (decode-error 5), expected at most 4.00%" in message
    assert "most are in train-slot00-000001.tar (3), train-slot00-000000.tar (2)" in message
    lines = [json.loads(line) for line in (run_dir / "bad_clips.jsonl").read_text().splitlines()]
    assert {line["key"]: line["shard"] for line in lines} == keys and len(lines) == 5
    assert {line["reason"] for line in lines} == {"decode-error"} and max(
        line["step"] for line in lines
    ) == 11


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc to measure memory")
@pytest.mark.parametrize("backend", BACKENDS[:1], indirect=True)
@pytest.mark.parametrize("name", SAMPLE_TABLE_CASES)
def test_sizes_that_a_damaged_file_promises_are_not_allocated(name, folder, backend, reference, request):
    with edit_shard(folder / SHARD) as shard:
        SAMPLE_TABLE_CASES[name].damage(shard, POSITION)
    before = peak_memory(reset=True)
    batches, _ = read_epoch(folder, backend, num_workers=0)
    assert len(batches) == 2 and peak_memory() - before < 300e6


def peak_memory(reset: bool = False) -> float:
    """Bytes that this process had resident at most, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024.0 * int(status.partition("VmHWM:")[2].split()[0])
