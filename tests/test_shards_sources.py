"""Inputs: folders, annotation csv files and lists, on disks and behind URLs, give the same videos in every run, and
odd ones are noticed."""

import contextlib
import errno
import functools
import http.server
import os
import tarfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shards.sources
from shards.make import ShardConfig, make_shards
from shards.order import hash_fraction, shuffled
from shards.schema import ClipInfo
from shards.slicing import SliceSettings
from shards.sources import (
    SourceVideo,
    csv_format,
    video_list_sha256,
    videos_of_audioset,
    videos_of_csv,
    videos_of_folder,
    videos_of_kinetics,
    videos_of_list,
)
from tools.make_synthetic_videos import make_flash_beep_video


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


class _NoAnswer:
    """An entry of a folder of which the file system does not tell what it is."""

    def __init__(self, entry: os.DirEntry) -> None:
        self.name, self.path = entry.name, entry.path

    def stat(self) -> os.stat_result:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), self.path)


def test_files_that_the_file_system_does_not_tell_of_are_not_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.mp4", "b.mp4")
    for name, target in (("nowhere", "nothing"), ("below", "a.mp4/b"), ("circle.mp4", "circle.mp4")):
        (tmp_path / name).symlink_to(target)
    assert ids(videos_of_folder(str(tmp_path))) == ["a.mp4", "b.mp4"]
    scandir = os.scandir

    @contextlib.contextmanager
    def failing(folder: str) -> Iterator[list[object]]:
        with scandir(folder) as entries:
            yield [_NoAnswer(entry) if entry.name == "a.mp4" else entry for entry in entries]

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", failing)
        with pytest.raises(OSError, match=r"a\.mp4 cannot be looked at \(Stale file handle\).*run the same"):
            videos_of_folder(str(tmp_path))


def test_listed_files_that_the_file_system_does_not_tell_of_are_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.mp4")
    (tmp_path / "list").write_text(f"a.mp4\nb.mp4\na.mp4/c.mp4\n{'x' * 300}\n")
    videos, _ = videos_of_list(str(tmp_path), str(tmp_path / "list"))
    assert [video.video_id for video in videos if video.path is not None] == ["a.mp4"] and len(videos) == 4
    stat = os.stat

    def failing(path: object, **options: object) -> os.stat_result:
        if path == str(tmp_path / "a.mp4"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", failing)
    with pytest.raises(OSError, match=r"a\.mp4 cannot be looked at \(Input/output error\)"):
        videos_of_list(str(tmp_path), str(tmp_path / "list"))


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


AUDIOSET = """# Segments csv created on Sun Mar  5 10:54:31 2017
# num_ytids=5, num_segs=5, num_unique_labels=3, num_positive_labels=7
# YTID, start_seconds, end_seconds, positive_labels
--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
a_b_c_d_e_f, 0.000, 10.000, "/m/05zppz"
Yyyyyyyyyyy, 21.600, 31.600, "/m/09x0r"
ccccccccccc, 500.000, 510.000, "/m/09x0r"
ddddddddddd, 1230.000, 1240.000, "/m/09x0r"
"""
CLASS_NAMES = """index,mid,display_name
0,/m/09x0r,"Speech"
1,/m/05zppz,"Male speech, man speaking"
2,/t/dd00088,"Gush"
"""


def audioset(folder: Path, *names: str, csv: str = AUDIOSET) -> list[SourceVideo]:
    touch(folder / "v", *names)
    (folder / "v").mkdir(exist_ok=True)
    (folder / "a.csv").write_text(csv)
    return videos_of_csv(str(folder / "v"), str(folder / "a.csv"), "train")


def test_audioset_segments_without_a_file_keep_their_row(tmp_path: Path) -> None:
    videos = audioset(tmp_path)
    assert [(video.video_id, video.label, video.path, video.window) for video in videos] == [
        ("--PJHxphWEs_30_40.mp4", "/m/09x0r; /t/dd00088", None, None),
        ("Yyyyyyyyyyy_21.6_31.6.mp4", "/m/09x0r", None, None),
        ("a_b_c_d_e_f_0_10.mp4", "/m/05zppz", None, None),
        ("ccccccccccc_500_510.mp4", "/m/09x0r", None, None),
        ("ddddddddddd_1230_1240.mp4", "/m/09x0r", None, None),
    ]


@pytest.mark.parametrize(
    "names",
    [
        [
            "--PJHxphWEs_30_40.mp4",
            "a_b_c_d_e_f_0_10.mp4",
            "Yyyyyyyyyyy_21.6_31.6.mp4",
            "ccccccccccc_500.mp4",
            "ddddddddddd_1230.webm",
        ],
        [
            "x/--PJHxphWEs_30.000_40.000.mp4",
            "x/a_b_c_d_e_f_0.0-10.0.mkv",
            "YYyyyyyyyyyy_21.600.mp4",
            "z/ccccccccccc_500.0.mp4",
            "ddddddddddd_1230000_1240000.mp4",
        ],
        [
            "Y--PJHxphWEs_30000_40000.mp4",
            "a_b_c_d_e_f_0.mp4",
            "Yyyyyyyyyyy_21600_31600.mp4",
            "Yccccccccccc_000500_000510.mp4",
            "ddddddddddd_001230.mp4",
        ],
    ],
)
def test_files_whose_names_have_the_times_are_used_whole(names: list[str], tmp_path: Path) -> None:
    others = ["--PJHxphWEs_40_50.mp4", "ccccccccccc_30_40.mp4", "eeeeeeeeeee.mp4", "a_b_c_d_e_.mp4"]
    videos = audioset(tmp_path, *names, *others)
    assert {video.video_id: video.window for video in videos} == dict.fromkeys(names)
    assert all(video.path == str(tmp_path / "v" / video.video_id) for video in videos)


def test_whole_youtube_videos_are_cut_to_the_segment(tmp_path: Path) -> None:
    names = ["--PJHxphWEs.mp4", "Ya_b_c_d_e_f.mkv", "Yyyyyyyyyyy.mp4", "d/ccccccccccc.webm"]
    videos = {video.video_id: video for video in audioset(tmp_path, *names)}
    assert {name: videos[name].window for name in names} == {
        "--PJHxphWEs.mp4": (30.0, 40.0),
        "Ya_b_c_d_e_f.mkv": (0.0, 10.0),
        "Yyyyyyyyyyy.mp4": (21.6, 31.6),
        "d/ccccccccccc.webm": (500.0, 510.0),
    }
    assert videos["ddddddddddd_1230_1240.mp4"].path is None


def test_the_file_whose_name_says_most_is_taken(tmp_path: Path) -> None:
    names = ["a/ccccccccccc.mp4", "b/ccccccccccc_500.mp4", "c/ccccccccccc_500_510.mp4"]
    row = AUDIOSET.splitlines()[6] + "\n"
    for taken in reversed(names):
        assert ids(audioset(tmp_path, *names, csv=row)) == [taken]
        (tmp_path / "v" / taken).unlink()
        names.remove(taken)


def test_segments_of_one_file_have_ids_of_their_own(tmp_path: Path) -> None:
    csv = "# YTID, start_seconds, end_seconds, positive_labels\n" + "".join(
        f'ccccccccccc, {start}, {start + 10}, "{label}"\n'
        for start, label in [(0, "x"), (20.5, "y"), (0, "x")]
    )
    videos = audioset(tmp_path, "ccccccccccc.mp4", csv=csv)
    assert [(video.video_id, video.window, video.label) for video in videos] == [
        ("ccccccccccc.mp4#t=0,10", (0.0, 10.0), "x"),
        ("ccccccccccc.mp4#t=20.5,30.5", (20.5, 30.5), "y"),
    ]
    assert {video.path for video in videos} == {str(tmp_path / "v" / "ccccccccccc.mp4")}
    assert len({video.key_hash for video in videos}) == 2


def test_audioset_labels_can_be_names(tmp_path: Path) -> None:
    audioset(tmp_path, "--PJHxphWEs.mp4")
    (tmp_path / "names.csv").write_text(CLASS_NAMES)
    paths = str(tmp_path / "v"), str(tmp_path / "a.csv")
    videos = videos_of_csv(*paths, "train", class_names=str(tmp_path / "names.csv"))
    assert [video.label for video in videos][:3] == ["Speech; Gush", "Speech", "Male speech, man speaking"]
    (tmp_path / "names.csv").write_text(CLASS_NAMES.rpartition("2,")[0])
    with pytest.raises(ValueError, match="has no name for '/t/dd00088'.*--class-names"):
        videos_of_audioset(*paths, str(tmp_path / "names.csv"))
    (tmp_path / "names.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="columns 'a', 'b', expected index,mid,display_name"):
        videos_of_audioset(*paths, str(tmp_path / "names.csv"))
    (tmp_path / "a.csv").write_text(CSV)
    with pytest.raises(ValueError, match="a csv of kinetics.*leave --class-names away"):
        videos_of_csv(*paths, "train", class_names=str(tmp_path / "names.csv"))


VGGSOUND = """---g-f_I2yQ,1,people marching,test
--0PQM4-hqg,30,"waterfall, burbling",train
--56QUhyDQM,185,playing tennis,train
"""


def test_vggsound_csv_has_starts_alone(tmp_path: Path) -> None:
    touch(tmp_path / "v", "train/--0PQM4-hqg_000030.mp4", "--56QUhyDQM.mp4", "---g-f_I2yQ_000001.mp4")
    (tmp_path / "g.csv").write_text(VGGSOUND)
    videos = videos_of_csv(str(tmp_path / "v"), str(tmp_path / "g.csv"), "train")
    assert [(video.video_id, video.label, video.window) for video in videos] == [
        ("--56QUhyDQM.mp4", "playing tennis", (185.0, 195.0)),
        ("train/--0PQM4-hqg_000030.mp4", "waterfall, burbling", None),
    ]
    with pytest.raises(ValueError, match="no rows of split 'val', expected one of 'test', 'train'"):
        videos_of_csv(str(tmp_path / "v"), str(tmp_path / "g.csv"), "val")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (CSV, "kinetics"),
        ("\ufeff" + CSV, "kinetics"),
        (AUDIOSET, "audioset"),
        (AUDIOSET.partition("\n# num")[2].partition("\n")[2], "audioset"),
        ("YTID,start_seconds,end_seconds,positive_labels\n", "audioset"),
        ('\n--PJHxphWEs, 30.000, 40.000, "/m/09x0r"\n', "audioset"),
        (VGGSOUND, "vggsound"),
        ("", None),
        ("# nothing\n", None),
        ("id,1,2\n", None),
        ("a,30,label,here\n", None),
    ],
)
def test_csv_formats_are_told_apart(text: str, kind: str | None, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(text)
    if kind is not None:
        assert csv_format(str(tmp_path / "x.csv")) == kind
        return
    with pytest.raises(ValueError, match="expected the header of Kinetics .* or AudioSet .* VGGSound.*--csv"):
        csv_format(str(tmp_path / "x.csv"))


@pytest.mark.parametrize("row", ["abc, 10, 10, x", "abc, 10", "abc, ten, 20, x", "abc, 10, 20, x, y"])
def test_damaged_rows_of_audioset_are_named(row: str, tmp_path: Path) -> None:
    header = "# YTID, start_seconds, end_seconds, positive_labels\n"
    (tmp_path / "a.csv").write_text(f"{header}q, 1, 2, x\n{row}\n")
    with pytest.raises(ValueError, match=f"row 3 of .* is '{row.partition(',')[0]}.*expected YTID, .*--csv"):
        videos_of_audioset(str(tmp_path), str(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text(header + 'q, 1, 2, "x\nr, 1, 2, x\n')
    with pytest.raises(ValueError, match="not a csv .unexpected end of data"):  # of a quote that never ends
        videos_of_audioset(str(tmp_path), str(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text(header)
    with pytest.raises(ValueError, match="has no rows"):
        videos_of_audioset(str(tmp_path), str(tmp_path / "a.csv"))


def test_audioset_is_read_in_time_that_grows_with_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundredth of the 2.08 million rows, all with a file: a search among files for each row would take minutes."""
    names = [f"{number:011d}" for number in range(20_000)]
    monkeypatch.setattr(shards.sources, "find_files", lambda *_: (f"{name}.mp4" for name in names))
    rows = "".join(f'{name}, 30.000, 40.000, "/m/09x0r,/t/dd00088"\n' for name in names)
    begin = time.process_time()
    videos = audioset(tmp_path, csv=AUDIOSET.partition("--PJ")[0] + rows)
    assert len(videos) == 20_000 and all(video.window == (30.0, 40.0) for video in videos)
    assert time.process_time() - begin < 30
    assert videos[0].label is videos[1].label  # one string for all


def test_list_hash_has_the_window_where_there_is_one(tmp_path: Path) -> None:
    def sha(**window: float) -> str:
        return video_list_sha256([SourceVideo(video_id="a", path=None, label="b", key_hash="", **window)])

    # Of folders of shards that exist: must never change.
    assert sha() == "3c9d591045bc8876f9d0399bbfb05c6a412096e906f73278f98406cd5dca86df"
    hashes = {
        sha(),
        *(sha(start_seconds=a, end_seconds=b) for a, b in [(0, 10), (0, 11), (1, 10), (1.5, 10)]),
    }
    assert len(hashes) == 5


ODD_NAME = "a b/100% #1?&é+'x'.mp4"


def test_videos_below_a_url_are_listed(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    root = f"memory://{tmp_path}"
    names = [ODD_NAME, "x.MKV", "note.txt", ".hidden/z.mp4", "a/.z.mp4", "out/y.mp4"]
    for name in names:
        memory.pipe(f"{tmp_path}/{name}", name.encode())
    videos = videos_of_folder(f"{root}/", leave_out=f"{root}/out")
    assert ids(videos) == [ODD_NAME, "x.MKV"] and videos[0].label == "a b"
    for video in videos:
        assert video.path is not None and video.path.startswith(root)
        with fsspec.open(video.path) as file:
            assert file.read() == video.video_id.encode()
    assert [video.key_hash for video in videos] == [
        video.key_hash for video in videos_of_folder(_copy(tmp_path, *ids(videos)))
    ]
    with pytest.raises(ValueError, match="nothing is listed below .*--videos"):
        videos_of_folder(f"{root}-nothing")


def _copy(folder: Path, *names: str) -> str:
    touch(folder / "copy", *names)
    return str(folder / "copy")


def test_csv_and_list_can_be_behind_a_url(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    root = f"memory://{tmp_path}"
    for name in ["v/-aaaaaaaaaa_000010_000020.mp4", "v/ccccccccccc.mp4"]:
        memory.pipe(f"{tmp_path}/{name}", b"")
    memory.pipe(f"{tmp_path}/k.csv", CSV.encode())
    memory.pipe(f"{tmp_path}/a.csv", AUDIOSET.encode())
    memory.pipe(f"{tmp_path}/names.csv", CLASS_NAMES.encode())
    memory.pipe(f"{tmp_path}/list", f"./ccccccccccc.mp4\tx\n{root}/v/gone.mp4\n".encode())
    kinetics = videos_of_csv(f"{root}/v", f"{root}/k.csv", "train")
    assert [video.path for video in kinetics if video.path] == [f"{root}/v/-aaaaaaaaaa_000010_000020.mp4"]
    sounds = videos_of_csv(f"{root}/v", f"{root}/a.csv", "train", f"{root}/names.csv")
    assert [(video.path, video.window, video.label) for video in sounds if video.path] == [
        (f"{root}/v/ccccccccccc.mp4", (500.0, 510.0), "Speech")
    ]
    listed, _ = videos_of_list(f"{root}/v", f"{root}/list")
    assert [(video.video_id, video.path) for video in listed] == [
        (name, f"{root}/v/{name}") for name in ("ccccccccccc.mp4", "gone.mp4")
    ]
    local, _ = videos_of_list(str(tmp_path), f"{root}/list")
    assert local[1].video_id == local[1].path == f"{root}/v/gone.mp4"
    with pytest.raises(ValueError, match="no such file.*--list"):
        videos_of_list(str(tmp_path), f"{root}/none")


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *args: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_names_are_quoted_in_http_addresses(tmp_path: Path) -> None:
    touch(tmp_path, ODD_NAME)
    (tmp_path / ODD_NAME).write_bytes(b"video")
    with served(tmp_path) as root:
        (video,) = videos_of_folder(root)
        assert video.video_id == ODD_NAME and video.path is not None
        with urllib.request.urlopen(video.path, timeout=10) as answer:
            assert answer.read() == b"video"
        (tmp_path / "list").write_text(f"{video.path}\n")
        listed, _ = videos_of_list(root, f"{root}/list")
        assert [(line.video_id, line.path) for line in listed] == [(ODD_NAME, video.path)]


def test_a_file_url_is_a_local_path(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.mp4", "out/y.mp4")
    videos = videos_of_folder(f"file://{tmp_path}", leave_out=f"file://{tmp_path}/out")
    assert [(video.video_id, video.path) for video in videos] == [("a/x.mp4", str(tmp_path / "a/x.mp4"))]


def test_clips_of_audioset_lie_in_the_annotated_segments(tmp_path: Path) -> None:
    """Of a whole YouTube video, of one that was cut without saying so, and of one whose name says that it is cut."""
    (tmp_path / "v").mkdir()
    for name, seconds in [
        ("aaaaaaaaaaa.mp4", 16.0),
        ("bbbbbbbbbbb.mp4", 4.2),
        ("ccccccccccc_60_64.mp4", 4.2),
    ]:
        make_flash_beep_video(tmp_path / "v" / name, seconds=seconds)
    rows = "aaaaaaaaaaa, 9.000, 13.000, x\nbbbbbbbbbbb, 30.000, 34.000, y\nccccccccccc, 60.000, 64.000, z\n"
    (tmp_path / "a.csv").write_text(AUDIOSET.partition("--PJ")[0] + rows)
    slicing = SliceSettings(max_clips=6, max_seconds=20, silence_dbfs=-120.0, preset="ultrafast")
    config = ShardConfig(
        videos=str(tmp_path / "v"),
        out=str(tmp_path / "o"),
        csv=str(tmp_path / "a.csv"),
        workers=1,
        slicing=slicing,
    )
    manifest = make_shards(config)
    assert manifest.num_videos == 3 and not manifest.skipped
    starts: dict[str, set[float]] = {}
    for path in (tmp_path / "o").glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    info = ClipInfo.from_json(tar.extractfile(member).read())
                    starts.setdefault(info.label, set()).add(info.start_seconds)
    assert len(starts["x"]) in (3, 4) and all(
        9 <= start and start + 1 <= 13 + 1 / 32 for start in starts["x"]
    )
    assert {label: min(starts[label]) < 1 for label in "yz"} == {"y": True, "z": True}


def test_files_that_downloaders_left_are_found(real_data: Path, tmp_path: Path) -> None:
    rows = [
        ("00W1lcxW-WU", 40, "audioset_vggsound/00W1lcxW-WU_40.000.mp4"),
        ("-1pRmoJIGQc", 10, "vggsound/-1pRmoJIGQc_10000_20000.mp4"),
        ("-26aVYRtEAc", 30, "vggsound/-26aVYRtEAc_000030.mp4"),
        ("6zlMP_kQ_-w", 30, "vggsound/6zlMP_kQ_-w_30000_40000.mp4"),
        ("R6llTwEh07w", 5, "kinetics/R6llTwEh07w.mp4"),
    ]
    text = "".join(f'{video_id}, {start}.000, {start + 10}.000, "/m/09x0r"\n' for video_id, start, _ in rows)
    (tmp_path / "a.csv").write_text(AUDIOSET.partition("--PJ")[0] + text)
    videos = videos_of_csv(str(real_data / "av_videos"), str(tmp_path / "a.csv"), "train")
    assert {video.video_id: video.window for video in videos if video.path} == {
        name: (5.0, 15.0) if name == rows[-1][2] else None for *_, name in rows
    }
