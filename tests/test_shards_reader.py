"""Shard files: what is written is read back, by other programs too, and damage never goes unseen."""

import hashlib
import io
import json
import os
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import base_256, header, octal

from shards.manifest import Manifest, ShardEntry, read_manifest, write_manifest
from shards.reader import ShardReader
from shards.schema import SAMPLES_PER_CLIP, WAV_HEADER, BadClip, ClipInfo, clip_key, video_hash, video_number
from shards.writer import ShardWriter

NUM_CLIPS = 5


def make_clip(number: int, slot: int = 0) -> tuple[ClipInfo, bytes, bytes]:
    rng = np.random.default_rng(number)
    video = rng.bytes(1000 + 37 * number)
    audio = WAV_HEADER + rng.bytes(2 * SAMPLES_PER_CLIP)
    name = f"class {number}/größe \udcff {number}.mp4"
    info = ClipInfo(
        key=clip_key(video_hash(name), slot),
        video_id=name,
        video_number=video_number(name),
        label=None if number % 2 else "class",
        slot=slot,
        start_seconds=number + 0.25,
        end_seconds=number + 1.25,
        source_fps=29.97,
        source_width=340,
        source_height=256,
        source_crop=(0.0, 1.5, 340.0, 255.0),
        frame_width=192,
        frame_height=144,
        loudness_dbfs=-20.5,
        video_crc32=zlib.crc32(video),
        audio_crc32=zlib.crc32(audio),
    )
    return info, video, audio


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path)


def write_shard(folder: Path, num_clips: int = NUM_CLIPS, index: int = 0) -> Path:
    with ShardWriter(folder, "train", 0, index) as writer:
        for number in range(num_clips):
            writer.write(*make_clip(number))
    assert writer.entry is not None
    return folder / writer.entry.name


def test_round_trip_loses_nothing(shard: Path) -> None:
    with ShardReader(shard) as reader:
        assert len(reader) == NUM_CLIPS
        for number in (3, 0, 4, 1, 2):
            clip = reader.read(number)
            assert (clip.info, clip.video, clip.audio) == make_clip(number)
            assert clip.shard == shard.name and reader.key(number) == clip.info.key
        with pytest.raises(IndexError):
            reader.read(NUM_CLIPS)


def test_entry_tells_size_and_checksum(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "val", 0, 12) as writer:
        writer.write(*make_clip(0))
    data = (tmp_path / "val-slot00-000012.tar").read_bytes()
    assert writer.entry == ShardEntry(
        name="val-slot00-000012.tar",
        slot=0,
        index=12,
        num_clips=1,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def test_tar_is_plain_and_depends_on_its_clips_alone(tmp_path: Path) -> None:
    first, second = write_shard(tmp_path), write_shard(tmp_path, index=1)
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first, "r:") as tar:
        members = list(tar)
    keys = [make_clip(number)[0].key for number in range(NUM_CLIPS)]
    assert [member.name for member in members] == [
        f"{key}.{suffix}" for key in keys for suffix in ("mp4", "wav", "json")
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members} == {
        (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)
    }
    assert first.read_bytes()[257:265] == b"ustar\x0000"


def test_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, "train", 0, 0) as writer:
        writer.write(*make_clip(0))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_webdataset_reads_it(shard: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    for number, sample in enumerate(samples):
        info, video, audio = make_clip(number)
        assert (sample["__key__"], sample["mp4"], sample["wav"]) == (info.key, video, audio)
        assert json.loads(sample["json"])["start_seconds"] == info.start_seconds
    assert len(samples) == NUM_CLIPS


def test_index_is_the_one_that_dali_writes(shard: Path, tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    # Its other method calls GNU tar; this is the one that works everywhere.
    with wds2idx.IndexCreator(str(shard), str(tmp_path / "theirs"), verbose=False) as creator:
        creator._get_data = creator._get_data_tarfile
        creator.create_index()
    assert (tmp_path / "theirs").read_text() == shard.with_suffix(".idx").read_text()


@pytest.mark.dali
def test_dali_reads_it_by_its_index(shard: Path) -> None:
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=NUM_CLIPS, num_threads=1, device_id=None)
    def pipeline():
        return tuple(
            fn.readers.webdataset(
                paths=[str(shard)],
                index_paths=[str(shard.with_suffix(".idx"))],
                ext=["mp4", "wav", "json"],
                name="clips",
            )
        )

    built = pipeline()
    built.build()
    assert built.reader_meta("clips")["epoch_size"] == NUM_CLIPS
    outputs = built.run()
    for number in range(NUM_CLIPS):
        info, video, audio = make_clip(number)
        assert [np.asarray(output[number]).tobytes() for output in outputs] == [video, audio, info.to_json()]


def test_reader_survives_pickling_and_two_closings(shard: Path) -> None:
    reader = ShardReader(shard)
    copy = pickle.loads(pickle.dumps(reader))
    reader.close()
    reader.close()
    assert copy.read(1).info == make_clip(1)[0]
    copy.close()


# Damage.


def damage(path: Path, offset: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


def offsets(path: Path, number: int) -> dict[str, int]:
    """Suffix -> where the member's data begin."""
    words = path.with_suffix(".idx").read_text().splitlines()[1 + number].split()
    return {words[i]: int(words[i + 1]) for i in range(0, len(words), 4)}


@pytest.mark.parametrize(
    "suffix, shift, reason",
    [
        ("mp4", 500, "checksum"),
        ("wav", 500, "checksum"),
        ("wav", 10, "checksum"),
        ("json", 0, "bad-json"),
        ("mp4", -512, "stale-index"),
        ("json", -512 + 124 + 9, "stale-index"),
    ],
)
def test_flipped_bit_makes_one_bad_clip(suffix: str, shift: int, reason: str, shard: Path) -> None:
    damage(shard, offsets(shard, 2)[suffix] + shift)
    with ShardReader(shard) as reader:
        with pytest.raises(BadClip) as caught:
            reader.read(2)
        assert (caught.value.key, caught.value.shard, caught.value.reason) == (
            reader.key(2),
            shard.name,
            reason,
        )
        for number in (0, 1, 3, 4):
            assert reader.read(number).info == make_clip(number)[0]


@contextmanager
def edited_json(path: Path) -> Iterator[dict]:
    """key.json of a shard of one clip, written back in place with spaces behind it."""
    data = bytearray(path.read_bytes())
    place, size = (
        int(word) for word in path.with_suffix(".idx").read_text().split("json ")[1].split(" ")[:2]
    )
    record = json.loads(data[place : place + size])
    yield record
    new = json.dumps(record, separators=(",", ":")).encode()
    # Shorter or equal, else the header would have to be changed too.
    assert len(new) <= size, (len(new), size)
    data[place : place + size] = new.ljust(size)
    path.write_bytes(data)


@given(position=st.integers(0, 10_000_000), mask=st.integers(1, 255))
def test_no_flipped_byte_gives_wrong_data(
    position: int, mask: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    path = write_shard(folder, 2)
    damage(path, position % path.stat().st_size, mask)
    with ShardReader(path) as reader:
        for number in range(2):
            try:
                clip = reader.read(number)
            except BadClip:
                continue
            info, video, audio = make_clip(number)
            # A changed digit in the JSON that is still a number has no checksum of its own.
            assert (clip.video, clip.audio, clip.info.key) == (video, audio, info.key)


def test_index_of_another_shard_is_noticed(tmp_path: Path) -> None:
    path = write_shard(tmp_path)
    with ShardWriter(tmp_path, "train", 0, 1) as writer:
        for number in (7, 6, 5, 8, 9):
            writer.write(*make_clip(number))
    other = tmp_path / "train-slot00-000001.tar"
    path.with_suffix(".idx").write_bytes(other.with_suffix(".idx").read_bytes())
    try:
        with ShardReader(path) as reader:
            for position in range(len(reader)):
                with pytest.raises(BadClip, match="stale-index"):
                    reader.read(position)
    except ValueError as error:
        assert "index is of another tar" in str(error)


def test_truncated_tar_is_refused_when_opened(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-20480])
    with pytest.raises(ValueError, match="the tar was cut.*re-run make_shards"):
        ShardReader(shard)


def test_missing_files_are_refused_with_the_way_out(shard: Path) -> None:
    index = shard.with_suffix(".idx")
    lines = index.read_text()
    index.unlink()
    with pytest.raises(ValueError, match="idx is missing.*wds2idx"):
        ShardReader(shard)
    index.write_text(lines)
    shard.unlink()
    with pytest.raises(ValueError, match="tar is missing"):
        ShardReader(shard)


@pytest.mark.parametrize(
    "text", ["", "v1.1 5\n", "v1.2 4\nmp4 512 10 a.mp4\n", "v1.2 1\nmp4 x 10 a.mp4\n", "v1.2 1\n\n"]
)
def test_what_is_no_index_is_refused(text: str, shard: Path) -> None:
    shard.with_suffix(".idx").write_text(text)
    with pytest.raises(ValueError, match="idx"):
        ShardReader(shard)


def test_missing_member_is_a_bad_clip(shard: Path) -> None:
    index = shard.with_suffix(".idx")
    lines = index.read_text().splitlines()
    lines[1] = " ".join(lines[1].split()[:4])
    index.write_text("\n".join(lines) + "\n")
    with ShardReader(shard) as reader, pytest.raises(BadClip, match="missing-member"):
        reader.read(0)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("suffix", [".tar", ".idx"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(suffix: str, shard: Path) -> None:
    path = shard.with_suffix(suffix)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is not a plain file"):
        ShardReader(shard)


def test_a_clip_that_its_index_spreads_over_the_tar_is_not_read(shard: Path) -> None:
    # Else a sparse file of a terabyte would be read at once.
    os.truncate(shard, 2**40)
    index = shard.with_suffix(".idx")
    rows = index.read_text().splitlines()
    words = rows[2].split(" ")
    words[9:11] = [str(2**39), "1000"]
    index.write_text("\n".join([*rows[:2], " ".join(words), *rows[3:]]) + "\n")
    with ShardReader(shard) as reader:
        with pytest.raises(BadClip, match="stale-index"):
            reader.read(1)
        assert reader.read(2).info == make_clip(2)[0]


def test_an_index_larger_than_its_tar_is_not_read(shard: Path) -> None:
    os.truncate(shard.with_suffix(".idx"), 2**40)
    with pytest.raises(ValueError, match="idx has 1099511627776 bytes, expected at most"):
        ShardReader(shard)


@pytest.mark.timeout(20)
def test_sizes_below_zero_do_not_keep_the_check_busy(shard: Path) -> None:
    # Python's tarfile goes back by them, for ever.
    data = bytearray(shard.read_bytes())
    data[:512] = header(b"x", base_256(-1024))
    shard.write_bytes(data)
    with ShardReader(shard) as reader:
        assert reader.find_stray_bytes() is None  # each clip by its own header
        with pytest.raises(BadClip, match="stale-index"):
            reader.read(0)


def test_link_in_place_of_a_member_is_a_bad_clip(shard: Path) -> None:
    name = f"{make_clip(0)[0].key}.mp4".encode()
    data = bytearray(shard.read_bytes())
    data[:512] = header(name, octal(len(make_clip(0)[1])), b"2", link=b"/etc/passwd")
    shard.write_bytes(data)
    with ShardReader(shard) as reader, pytest.raises(BadClip, match="stale-index"):
        reader.read(0)


@pytest.mark.parametrize("field, value", [("video_number", 7), ("video_id", "another.mp4"), ("slot", 1)])
def test_description_that_contradicts_itself_is_a_bad_clip(field: str, value: object, tmp_path: Path) -> None:
    info, video, audio = make_clip(0)
    with ShardWriter(tmp_path, "train", 0, 0) as writer:
        writer.write(info, video, audio)
    path = tmp_path / "train-slot00-000000.tar"
    with edited_json(path) as record:
        record[field] = value
    with ShardReader(path) as reader, pytest.raises(BadClip, match="bad-json"):
        reader.read(0)


def test_wrong_number_of_samples_is_a_bad_clip(tmp_path: Path) -> None:
    info, video, audio = make_clip(0)
    short = audio[:-2]
    record = json.loads(info.to_json())
    record["audio_crc32"] = zlib.crc32(short)
    with ShardWriter(tmp_path, "train", 0, 0) as writer:
        writer.write(ClipInfo.from_json(json.dumps(record).encode()), video, short)
    with ShardReader(tmp_path / "train-slot00-000000.tar") as reader:
        with pytest.raises(BadClip, match="sample-count"):
            reader.read(0)


# key.json and manifest.json.


@given(name=st.binary(min_size=1, max_size=40), number=st.floats(0, 1e6), slot=st.integers(0, 98))
def test_clip_info_survives_json(name: bytes, number: float, slot: int) -> None:
    text = name.decode("utf-8", "surrogateescape")
    base = json.loads(make_clip(1)[0].to_json())
    base |= {
        "video_id": text,
        "start_seconds": number,
        "slot": slot,
        "label": text,
        "video_number": video_number(text),
    }
    info = ClipInfo.from_json(json.dumps(base).encode("ascii"))
    assert ClipInfo.from_json(info.to_json()) == info
    assert info.video_id.encode("utf-8", "surrogateescape") == name
    assert 0 <= info.video_number < 2**63


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"{}", b"null", b"[" * 99_999, b"1" * 5000])
def test_what_is_no_clip_info_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="key.json"):
        ClipInfo.from_json(data)


@pytest.mark.parametrize(
    "name, value",
    [
        ("slot", "1"),
        ("source_crop", [1, 2]),
        ("source_crop", [1, 2, 3, 10**400]),
        ("start_seconds", None),
        ("start_seconds", float("nan")),
        ("start_seconds", 10**400),
        ("slot", True),
        ("video_number", 2**63),
        ("frame_width", -(2**63) - 1),
    ],
)
def test_fields_of_another_type_are_refused(name: str, value: object) -> None:
    record = json.loads(make_clip(1)[0].to_json()) | {name: value}
    with pytest.raises(ValueError, match=name):
        ClipInfo.from_json(json.dumps(record).encode())


def test_bad_clip_can_be_sent_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BadClip("k", "s.tar", "checksum")))
    assert (error.key, error.shard, error.reason) == ("k", "s.tar", "checksum")


def test_wav_is_a_wav(shard: Path) -> None:
    import wave

    with ShardReader(shard) as reader, wave.open(io.BytesIO(reader.read(0).audio)) as file:
        assert file.getparams()[:4] == (1, 2, 24000, 24000)


def test_manifest_survives_json(tmp_path: Path) -> None:
    manifest = Manifest(
        split="train",
        seed=3,
        num_slots=2,
        num_videos=4,
        num_clips=8,
        num_distinct_clips=7,
        num_bytes=10,
        settings={"crf": 23},
        video_list_sha256="00",
        skipped={"silent": 2},
        shards=(ShardEntry(name="a.tar", slot=0, index=0, num_clips=4, bytes=5, sha256="11"),),
    )
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest and read_manifest(tmp_path).digest == manifest.digest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_manifest_names_nothing_outside_its_folder(tmp_path: Path) -> None:
    entry = {"slot": 0, "index": 0, "num_clips": 1, "bytes": 5, "sha256": "11"}
    for name in (
        "../a.tar",
        "/etc/passwd",
        "a/b.tar",
        "..",
        "",
        "http://x/a.tar",
        "a.tar\n",
        "\ud800.tar",
        5,
        ".a.tar",
    ):
        with pytest.raises(ValueError, match=r"manifest.json: shards\[0\].name is "):
            read_edited_manifest(tmp_path, shards=[entry | {"name": name}])


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"num_slots": 10**12}, "num_slots is 1000000000000, expected 1 to 99"),
        ({"num_slots": True}, "num_slots is True, expected a whole number"),
        ({"seed": -1}, "seed is -1, expected a whole number"),
        ({"num_bytes": 2**63}, "num_bytes is 9223372036854775808"),
        ({"split": None}, "split is None, expected text"),
        ({"settings": {"a": float("nan")}}, "is not JSON .NaN is no JSON"),
        ({"settings": []}, "settings is .., expected an object"),
        ({"shards": [{"name": "a.tar"}]}, "is not a manifest"),
    ],
)
def test_fields_of_a_manifest_are_checked(fields: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"manifest.json.*{words}"):
        read_edited_manifest(tmp_path, **fields)


def read_edited_manifest(folder: Path, **fields: object) -> Manifest:
    entry = ShardEntry(name="a.tar", slot=0, index=0, num_clips=4, bytes=5, sha256="11")
    manifest = Manifest(
        split="train", seed=3, num_slots=1, num_videos=4, num_clips=4, num_distinct_clips=4, num_bytes=5,
        video_list_sha256="00", shards=(entry,),
    )  # fmt: skip
    record = json.loads(manifest.to_json()) | fields
    (folder / "manifest.json").write_text(json.dumps(record))
    return read_manifest(folder)


@pytest.mark.parametrize(
    "data, words",
    [(b"{", "is not JSON"), (b"{}", "schema version None"), (b'{"schema_version": 1}', "not a manifest")],
)
def test_what_is_no_manifest_is_refused(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(ValueError, match=words):
        read_manifest(tmp_path)
