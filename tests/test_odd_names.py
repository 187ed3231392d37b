"""Names of files are bytes: whatever they hold, they come out of shards, loaders, reports and results as they are, and
nothing takes them for anything but names."""

import csv
import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from narrow_run import save_narrow_run

import tools.check_shards
import tools.make_shards
import tools.retrieve
from cmac.evaluation.results import read_results
from cmac.pretrain import record_bad_clips
from loaders import build_loader
from loaders.config import LoaderConfig, VideoConfig
from loaders.datasets import hmdb51, ucf101
from shards.make import read_report
from shards.manifest import read_manifest
from shards.sources import videos_of_folder, videos_of_list
from tools.make_synthetic_videos import make_flash_beep_video

CLASS = os.fsdecode(b"cl\xffass <b>'\"[b]\n%s {} \xe2\x80\xae")
STEMS = [
    b"-rf", b"--out=pwned", b"a b  c", b" first and last ", b"'single' \"double\"", b"$(touch pwned)", b"`touch pwned`",
    b";touch pwned&|>pwned", b"*?[a-z]{1,2}!", b"%s%d%n%03d%", b"{}{0}{video_id}", b"new\nline\r\nand\ttab",
    b"not \xff\xfe utf-8", "\N{PILE OF POO}".encode(), "\N{RIGHT-TO-LEFT OVERRIDE}gpj.exe".encode(), b"[bold]red",
    b"<script>document.title='ran'<!--", b"\"><img src=x onerror=alert(1)>", b"x" * 251, b"back\\slash", b"http:a",
    b"concat:a|b", b"#t=1,2", b"\x1b[31mred\x07", b"~", b"=1+1", b"a,b;c", b"CON",
    "e\N{COMBINING ACUTE ACCENT}".encode(), "\N{LATIN SMALL LETTER E WITH ACUTE}".encode(),
]  # fmt: skip
NAMES = [os.fsdecode(stem + b".mp4") for stem in STEMS]
IDS = sorted((f"{CLASS}/{name}" for name in NAMES), key=os.fsencode)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    return make_flash_beep_video(path, seconds=1.3, size=(48, 36), fps="25").read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose own name is odd, too; the working directory of all tests here."""
    place = tmp_path_factory.mktemp("odd") / os.fsdecode(b"[red] \xff 'a'\n<i>")
    place.mkdir()
    return place


@pytest.fixture(scope="module")
def videos(place: Path, video: bytes) -> Path:
    folder = place / os.fsdecode(b"-vi de\xffos")
    (folder / CLASS).mkdir(parents=True)
    for name in NAMES:
        (folder / CLASS / name).write_bytes(video)
    (folder / CLASS / "broken\n\udcff.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(autouse=True)
def surroundings(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.fixture(scope="module")
def shards(place: Path, videos: Path) -> Path:
    """Made by the tool from a list, as `find . -type f -print0` writes it."""
    out = place / os.fsdecode(b"sh\xffards")
    names = [os.fsencode(f"{CLASS}/{name}") for name in [*NAMES, "broken\n\udcff.mp4"]]
    (place / "list").write_bytes(b"".join(name + b"\0" for name in reversed(names)))
    previous = os.getcwd()
    os.chdir(place)
    try:
        arguments = f"--videos=./{videos.name}", "--out", out.name, "--list", "list", "--preset", "ultrafast"
        assert tools.make_shards.main([*arguments, "--max-clips", "1", "--workers", "2"]) == 0
    finally:
        os.chdir(previous)
    return out


def test_no_name_was_taken_for_a_command_or_an_option(shards: Path, place: Path, videos: Path) -> None:
    assert {entry.name for entry in place.iterdir()} <= {
        videos.name,
        shards.name,
        "list",
        "cache",
        "run",
        "data",
    }
    assert len(os.listdir(videos / CLASS)) == len(NAMES) + 1


def test_a_folder_and_a_list_name_the_same_videos(videos: Path, place: Path, shards: Path) -> None:
    of_list, repeated = videos_of_list(str(videos), str(place / "list"))
    assert repeated == 0 and of_list == videos_of_folder(str(videos))
    assert {video.label for video in of_list} == {CLASS}


def test_the_report_has_each_name_in_a_row_of_its_own(shards: Path) -> None:
    rows = {row.path: (row.status, row.reason) for row in read_report(shards / "report.csv")}
    assert rows == {
        **{name: ("kept", "") for name in IDS},
        f"{CLASS}/broken\n\udcff.mp4": ("skipped", "undecodable"),
    }
    with open(shards / "report.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert len(list(csv.reader(file))) == len(rows) + 1, "any reader of csv files sees the same"
    assert read_manifest(shards).skipped == {"undecodable": 1}


def test_a_batch_has_the_names(shards: Path) -> None:
    config = LoaderConfig(
        shards=str(shards),
        backend="portable",
        global_batch_size=len(IDS),
        num_workers=0,
        video=VideoConfig(num_frames=4, short_side=36, crop_size=32),
    )
    batch = next(iter(build_loader(config)))
    assert batch.valid.all() and batch.bad == ()
    assert sorted((clip.video_id for clip in batch.clips), key=os.fsencode) == IDS
    assert {clip.label for clip in batch.clips} == {CLASS}
    assert len(set(batch.keys)) == len(IDS) and all(key.isascii() for key in batch.keys)


def test_shards_of_odd_names_are_checked_and_shown(shards: Path, tmp_path: Path) -> None:
    sheet = tmp_path / os.fsdecode(b"sh\xffeet.png")
    assert tools.check_shards.main([str(shards), "--contact-sheet", str(sheet)]) == 0
    assert sheet.stat().st_size > 0


def test_bad_clips_are_listed_by_name(videos: Path, tmp_path: Path) -> None:
    config = LoaderConfig(
        shards=str(videos),
        backend="raw",
        global_batch_size=len(IDS),
        num_workers=0,
        max_bad_fraction=1.0,
        video=VideoConfig(num_frames=4, short_side=36, crop_size=32),
    )
    loader = build_loader(config)
    kept = (videos / CLASS / NAMES[0]).read_bytes()
    for name in NAMES:
        os.truncate(videos / CLASS / name, 1000)
    try:
        batch = next(iter(loader))
    finally:
        for name in NAMES:
            (videos / CLASS / name).write_bytes(kept)
    record_bad_clips(tmp_path / "bad_clips.jsonl", batch)
    lines = (tmp_path / "bad_clips.jsonl").read_text(encoding="ascii").splitlines()
    assert sorted((json.loads(line)["shard"] for line in lines), key=os.fsencode) == IDS


@pytest.fixture(scope="module")
def checkpoint(place: Path) -> Path:
    save_narrow_run(place / "run" / "[/b]\udcff")
    return place / "run" / "[/b]\udcff"


def retrieve(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[list, list, str]:
    """(results, features, what was printed) of the tool, in a UTF-8 terminal, which refuses what is no text."""
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="utf-8", errors="strict"))
    extracted = []
    extract = tools.retrieve.extract
    monkeypatch.setattr(
        tools.retrieve, "extract", lambda *given: extracted.append(extract(*given)) or extracted[-1]
    )
    options = [
        "--out",
        "run/out\udcff",
        "--results",
        "run/results\udcff.jsonl",
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    assert tools.retrieve.main([*arguments, *options, "--no-baseline-random"]) == 0
    sys.stdout.flush()
    return read_results(Path("run/results\udcff.jsonl")), extracted, terminal.getvalue().decode("utf-8")


def test_names_reach_the_result_of_retrieval(
    videos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, (extracted,), shown = retrieve(
        monkeypatch, str(checkpoint), f"--data=./{videos.name}", "--cross-modal", "--clips", "1"
    )
    assert sorted(set(extracted.features.video_ids), key=os.fsencode) == IDS
    assert extracted.skipped == {f"{CLASS}/broken\n\udcff.mp4": "undecodable"}
    assert results[-1].dataset == videos.name
    assert results[-1].counts["num_videos"] == len(IDS) and results[-1].counts["skipped undecodable"] == 1
    assert results[-1].config["weights"].startswith(str(checkpoint))
    assert "[/b]\\udcff" in shown, "brackets are no markup, and bytes that are no text are shown as such"


LABELS = [os.fsdecode(b"$(touch pwned)'\""), os.fsdecode(b"a b \xff <i>[x] %s")]


def test_classes_and_lists_of_odd_names_are_read_as_they_are(
    place: Path, video: bytes, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = place / "data" / "ucf"
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    train, test = [], []
    stems = [stem for stem in STEMS if b"\n" not in stem and stem.strip() == stem][:8]  # a line is a name
    for number, label in enumerate(LABELS, 1):
        (root / "UCF-101" / label).mkdir(parents=True)
        for index, stem in enumerate(stems):
            name = f"{label}/{os.fsdecode(stem)}.avi"
            (root / "UCF-101" / name).write_bytes(video)
            (train if index % 2 else test).append(f"{name} {number}")
    for name, lines in (
        ("classInd", [f"{number} {label}" for number, label in enumerate(LABELS, 1)]),
        ("trainlist01", train),
        ("testlist01", [line.rpartition(" ")[0] for line in test]),
    ):
        (lists / f"{name}.txt").write_bytes(os.fsencode("".join(f"{line}\n" for line in lines)))
    split = ucf101(root, 1)
    assert split.missing == () and split.classes == tuple(LABELS)
    assert [
        f"{video.video_id.removeprefix('UCF-101/')} {LABELS.index(video.label) + 1}" for video in split.train
    ] == train
    assert len(split.test) == len(test)
    results, (extracted,), _ = retrieve(
        monkeypatch, str(checkpoint), "--data", str(root), "--clips", "1", "--ks", "1"
    )
    assert set(extracted.features.video_ids) == {video.video_id for video in split.train + split.test}
    assert results[-1].counts["num_videos"] == len(test)
    assert set(extracted.features.labels) == set(LABELS)


def test_lists_of_hmdb51_name_files_of_any_name(place: Path, video: bytes) -> None:
    root = place / "data" / "hmdb"
    lists = root / "testTrainMulti_7030_splits"
    lists.mkdir(parents=True)
    for label in [*LABELS, "new\nline"]:
        (root / "hmdb51_org" / label).mkdir(parents=True)
        names = [os.fsdecode(stem) + ".avi" for stem in STEMS if b"\n" not in stem and stem.strip() == stem]
        for name in names:
            (root / "hmdb51_org" / label / name).write_bytes(video)
        text = "".join(f"{name} {1 + index % 2} \n" for index, name in enumerate(names))
        (lists / f"{label}_test_split1.txt").write_bytes(os.fsencode(text))
    split = hmdb51(root, 1)
    assert split.missing == () and split.classes == tuple(sorted([*LABELS, "new\nline"]))
    assert len(split.train) + len(split.test) == 3 * len(names)
