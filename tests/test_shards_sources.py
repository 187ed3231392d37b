"""Inputs: folders, Kinetics csv files and lists give the same videos in every run, and odd ones are
noticed."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shards.sources
from shards.order import hash_fraction, shuffled
from shards.sources import (
    SourceVideo,
    video_list_sha256,
    videos_of_folder,
    videos_of_kinetics,
    videos_of_list,
)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def ids(videos: list[SourceVideo]) -> list[str]:
    return [video.video_id for video in videos]


def test_folder_is_searched_for_video_files(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "b.MP4",
        "a/x.mkv",
        "a/b/y.webm",
        "a/note.txt",
        "a/x.json",
        ".hidden/z.mp4",
        "a/.z.mp4",
        "a/._x.mp4",
    )
    os.mkfifo(tmp_path / "pipe.mp4")
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling.mp4")
    videos = videos_of_folder(str(tmp_path))
    assert ids(videos) == ["a/b/y.webm", "a/x.mkv", "b.MP4"]
    assert [video.label for video in videos] == ["b", "a", None]
    assert all(video.path == os.path.join(tmp_path, video.video_id) for video in videos)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "real/x.mp4", "other/y.mp4")
    (tmp_path / "videos").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "videos" / "linked")
    os.symlink(tmp_path / "videos", tmp_path / "real" / "loop")
    assert ids(videos_of_folder(str(tmp_path / "videos"))) == ["linked/x.mp4"]


def test_output_inside_the_folder_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "out/.work/pass/video0000.mp4", "out/x.mp4")
    assert ids(videos_of_folder(str(tmp_path), leave_out=str(tmp_path / "out"))) == ["a.mp4"]
    assert len(videos_of_folder(str(tmp_path), leave_out=str(tmp_path))) == 2


def test_folder_without_videos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no video files.*--list"):
        videos_of_folder(str(tmp_path))
    with pytest.raises(ValueError, match="not a folder"):
        videos_of_folder(str(tmp_path / "none"))


def test_list_names_videos(tmp_path: Path) -> None:
    touch(tmp_path, "v/a/x.mp4", "v/y.avi", "elsewhere/z.mp4")
    absolute = tmp_path / "elsewhere" / "z.mp4"
    text = f"a/x.mp4\n\n./y.avi\tjumping rope\r\na/x.mp4\nmissing.mp4\n{absolute}\n"
    (tmp_path / "list.txt").write_bytes(text.encode())
    videos, repeated = videos_of_list(str(tmp_path / "v"), str(tmp_path / "list.txt"))
    assert repeated == 1
    found = {video.video_id: video for video in videos}
    assert set(found) == {"a/x.mp4", "y.avi", "missing.mp4", str(absolute)}
    assert found["a/x.mp4"].label == "a" and found["y.avi"].label == "jumping rope"
    assert found["missing.mp4"].path is None and found[str(absolute)].path == str(absolute)


def test_list_may_be_separated_by_nul(tmp_path: Path) -> None:
    name = os.fsdecode(b"new\nline \xff.mp4")
    touch(tmp_path, name, "b.mp4")
    (tmp_path / "list").write_bytes(os.fsencode(name) + b"\0b.mp4\0")
    videos, _ = videos_of_list(str(tmp_path), str(tmp_path / "list"))
    assert ids(videos) == ["b.mp4", name] and all(video.path for video in videos)


def test_empty_or_missing_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"\n \n")
    with pytest.raises(ValueError, match="names no videos"):
        videos_of_list(str(tmp_path), str(tmp_path / "list"))
    with pytest.raises(ValueError, match="cannot be read"):
        videos_of_list(str(tmp_path), str(tmp_path / "none"))


CSV = """label,youtube_id,time_start,time_end,split
riding a bike,-aaaaaaaaaa,10,20,train
riding a bike,bbbbbbbbbbb,0,10,train
abseiling,ccccccccccc,5,15,validate
"abseiling, fast",ddddddddddd,5.0,15.0,train
abseiling,eeeeeeeeeee,7,17,train
"""


@pytest.mark.parametrize(
    "names",
    [
        ["-aaaaaaaaaa_000010_000020.mp4", "bbbbbbbbbbb_000000_000010.mkv"],
        ["riding a bike/-aaaaaaaaaa_000010_000020.mp4", "riding a bike/bbbbbbbbbbb_000000_000010.mp4"],
        [
            "train/riding_a_bike/-aaaaaaaaaa_000010_000020.mp4",
            "train/riding_a_bike/bbbbbbbbbbb_000000_000010.webm",
        ],
        ["train/-aaaaaaaaaa_10_20.mp4", "k400/train/part_0/bbbbbbbbbbb.mp4"],
    ],
)
def test_kinetics_layouts_are_found(names: list[str], tmp_path: Path) -> None:
    touch(tmp_path / "v", *names, "unlisted_000000_000010.mp4", "ccccccccccc_000005_000015.mp4")
    (tmp_path / "k.csv").write_text(CSV)
    videos = videos_of_kinetics(str(tmp_path / "v"), str(tmp_path / "k.csv"), "train")
    found = {video.video_id: video.label for video in videos if video.path}
    assert found == {name: "riding a bike" for name in names}
    missing = {video.video_id: video.label for video in videos if not video.path}
    assert missing == {
        "abseiling, fast/ddddddddddd_000005_000015.mp4": "abseiling, fast",
        "abseiling/eeeeeeeeeee_000007_000017.mp4": "abseiling",
    }


def test_kinetics_split_names_that_mean_the_same(tmp_path: Path) -> None:
    touch(tmp_path, "ccccccccccc_000005_000015.mp4")
    (tmp_path / "k.csv").write_text(CSV)
    for split in ("val", "validate", "validation"):
        assert ids(videos_of_kinetics(str(tmp_path), str(tmp_path / "k.csv"), split)) == [
            "ccccccccccc_000005_000015.mp4"
        ]
    with pytest.raises(ValueError, match="no rows of split 'test', expected one of 'train', 'validate'"):
        videos_of_kinetics(str(tmp_path), str(tmp_path / "k.csv"), "test")


def test_kinetics_prefers_the_copy_in_the_folder_of_the_label(tmp_path: Path) -> None:
    name = "bbbbbbbbbbb_000000_000010.mp4"
    touch(tmp_path, f"a/{name}", f"riding a bike/{name}", f"train/{name}")
    (tmp_path / "k.csv").write_text(CSV)
    videos = videos_of_kinetics(str(tmp_path), str(tmp_path / "k.csv"), "train")
    assert [video.video_id for video in videos if video.path] == [f"riding a bike/{name}"]


def test_other_tables_are_refused(tmp_path: Path) -> None:
    (tmp_path / "k.csv").write_text("name,class\nx,y\n")
    with pytest.raises(ValueError, match="columns 'name', 'class', expected label,youtube_id"):
        videos_of_kinetics(str(tmp_path), str(tmp_path / "k.csv"), "train")


def test_real_kinetics_csv_is_read(real_data: Path, tmp_path: Path) -> None:
    tables = [path for path in (real_data / "annotations_full").rglob("*.csv") if "inetics" in path.name]
    tables = [path for path in tables if path.read_text().startswith("label,youtube_id")]
    if not tables:
        pytest.skip("no Kinetics csv in the real data")
    videos = videos_of_kinetics(str(tmp_path), str(tables[0]), "val")
    assert len(videos) > 10 and all(video.label and video.path is None for video in videos)


def test_keys_stay_unique_where_hashes_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    real = shards.sources.video_hash
    monkeypatch.setattr(shards.sources, "video_hash", lambda name: real(name) if "\0" in name else "0" * 12)
    hashes = [video.key_hash for video in videos_of_folder(str(tmp_path))]
    assert len(set(hashes)) == 3 and hashes[0] == "0" * 12


def test_list_hash_depends_on_ids_and_labels(tmp_path: Path) -> None:
    def sha(*rows: tuple[str, str | None]) -> str:
        return video_list_sha256(
            SourceVideo(video_id=v, path=None, label=label, key_hash="") for v, label in rows
        )

    hashes = {sha(("a", None)), sha(("a", "b")), sha(("a", ""), ("b", None)), sha(("ab", None)), sha()}
    assert len(hashes) == 5


@given(st.lists(st.text(max_size=5), unique=True, max_size=20), st.integers(0, 5))
def test_random_order_does_not_depend_on_the_order_of_the_input(items: list[str], seed: int) -> None:
    order = shuffled(items, seed, "x")
    assert sorted(order) == sorted(items)
    assert order == shuffled(reversed(items), seed, "x")


def test_random_order_is_fair() -> None:
    firsts = [shuffled(range(4), seed, "x")[0] for seed in range(400)]
    assert all(60 < firsts.count(value) < 140 for value in range(4))
    values = [hash_fraction(seed, "y") for seed in range(400)]
    assert 0 <= min(values) < 0.05 and 0.95 < max(values) < 1 and 0.45 < sum(values) / 400 < 0.55
