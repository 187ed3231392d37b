"""Labelled datasets in their official layout: which files are for training, which for test, and of which class.

Paper section 4.2: UCF101 and HMDB51 (actions), ESC-50 and the DCASE scenes (sounds). Only names are read here;
`loaders.listed` reads the files. Names are compared as they are, never as patterns: HMDB51's hold `#`, `[`, `(`
and `!`.
"""

import csv
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from shards.sources import SourceVideo, with_hashes

UCF101_LISTS = ("ucfTrainTestlist", "splits", "annotations", "")
UCF101_VIDEOS = ("UCF-101", "UCF101", "videos", "")
HMDB51_LISTS = ("testTrainMulti_7030_splits", "splits", "annotations", "")
HMDB51_VIDEOS = ("hmdb51_org", "hmdb51", "videos", "")
"""Folders that are looked in, below the dataset's own, in this order; the first is the official name."""
DCASE_SCENES = (
    "bus busystreet office openairmarket park quietstreet restaurant supermarket tube tubestation".split()
)
DCASE_FOLDS = 5
HMDB51_LIST = re.compile(r"(?s)(.+)_test_split([123])\.txt")
ESC_LISTS = ("meta", "")
ESC_COLUMNS = ("filename", "fold", "target", "category", "esc10")
ESC_FOLDS = ("1", "2", "3", "4", "5")


@dataclass(frozen=True, kw_only=True)
class ClassificationSplit:
    """One split of a labelled dataset."""

    name: str
    """Of the dataset: a key of `DATASETS`."""
    split: str
    """Of the dataset's splits (`1`) or folds, whose files are `test`."""
    folder: str
    """The dataset's root; `video_id` is relative to it."""
    classes: tuple[str, ...]
    """Names, in the dataset's own order: the position is the class's number. A class may have no file (see
    `empty_classes`)."""
    train: tuple[SourceVideo, ...]
    """In the lists' order. `label` is one of `classes`; `path` is None where there is no such file."""
    test: tuple[SourceVideo, ...]
    """As `train`."""
    missing: tuple[str, ...]
    """`video_id` of the files of `train` and `test` that are listed but not there, in their order."""

    def empty_classes(self) -> dict[Literal["train", "test"], tuple[str, ...]]:
        """Classes without a single file that is there, for training and for test, in the order of `classes`."""
        present = {
            part: {video.label for video in videos if video.path is not None}
            for part, videos in (("train", self.train), ("test", self.test))
        }
        return {
            part: tuple(name for name in self.classes if name not in found) for part, found in present.items()
        }


class _Listed(NamedTuple):
    """A file that an annotation names."""

    name: str
    """Below the folder of videos, with `/`."""
    label: str
    place: str
    """Where it is named, for messages."""


def ucf101(folder: str | os.PathLike[str], split: str | int) -> ClassificationSplit:
    """UCF101: `ucfTrainTestlist/{classInd,trainlist0N,testlist0N}.txt` and `UCF-101/<Class>/*.avi`.

    The classes are those of classInd.txt, all 101, whatever the lists have. Folders by other names are found too
    (`UCF101_LISTS`, `UCF101_VIDEOS`).

    Args:
        split: 1, 2 or 3; complete they have 9537/3783, 9586/3734 and 9624/3696 videos.

    Raises:
        ValueError: no such folder, split or annotation; a malformed line; a class that classInd.txt does not have; a
            video listed twice; none of the videos is there.
    """
    root, split = _check_root(folder, "UCF101"), _check_split("UCF101", split, ("1", "2", "3"))
    lists = _find_annotation(root, UCF101_LISTS, "classInd.txt")
    numbers: dict[str, str] = {}  # class -> number as written
    for place, line in _lines(lists / "classInd.txt"):
        match = re.fullmatch(r"(\d+)[ \t]+([^/]+)", line)
        if match is None:
            raise ValueError(f"{place}: {line!r}, expected a number and a class, such as '1 ApplyEyeMakeup'")
        number, label = match.groups()
        if label in numbers or number in numbers.values():
            raise ValueError(
                f"{place}: {line!r}, expected each number and class once; remove one of the lines"
            )
        numbers[label] = number
    if not numbers:
        raise ValueError(
            f"{lists / 'classInd.txt'} has no classes, expected lines such as '1 ApplyEyeMakeup'"
        )
    train, test = (
        _read_ucf101(lists / f"{part}list0{split}.txt", numbers, part) for part in ("train", "test")
    )
    classes = sorted(numbers, key=lambda label: int(numbers[label]))
    return _split("ucf101", split, root, classes, train, test, UCF101_VIDEOS)


def _read_ucf101(path: Path, numbers: dict[str, str], part: str) -> list[_Listed]:
    expected = "'Class/video.avi' and the class's number" if part == "train" else "'Class/video.avi'"
    videos = []
    for place, line in _lines(path):
        # Choice: some copies of the test lists repeat the number; it is checked where it is there.
        match = re.fullmatch(r"([^/]+)/([^/]+?\.\w+)(?:[ \t]+(\d+))?", line)
        if match is None or (part == "train" and match[3] is None):
            raise ValueError(f"{place}: {line!r}, expected {expected}")
        label, file, number = match.groups()
        if label not in numbers:
            raise ValueError(f"{place}: {line!r} is of class {label!r}, expected one of classInd.txt")
        if number not in (None, numbers[label]):
            raise ValueError(
                f"{place}: {line!r} has number {number}, expected {numbers[label]} as in classInd.txt"
            )
        videos.append(_Listed(f"{label}/{file}", label, place))
    return videos


def hmdb51(folder: str | os.PathLike[str], split: str | int) -> ClassificationSplit:
    """HMDB51: `testTrainMulti_7030_splits/{class}_test_split{1,2,3}.txt` and `hmdb51_org/<class>/*.avi`.

    A line is `file.avi 1` (training), `2` (test) or `0` (not used). The classes are those that have lists, in
    alphabetical order. Folders by other names are found too (`HMDB51_LISTS`, `HMDB51_VIDEOS`).

    Args:
        split: 1, 2 or 3; complete each has 3570/1530 videos.

    Raises:
        ValueError: no such folder, split or annotation; a class with lists for other splits only; a malformed line; a
            video listed twice; none of the videos is there.
    """
    root, split = _check_root(folder, "HMDB51"), _check_split("HMDB51", split, ("1", "2", "3"))
    found: dict[str, set[str]] = {}
    for below in HMDB51_LISTS:
        for match in map(HMDB51_LIST.fullmatch, _names(root / below)):
            if match is not None:
                found.setdefault(match[1], set()).add(match[2])
        if found:
            break
    else:
        looked = ", ".join(str(root / name) for name in HMDB51_LISTS)
        raise ValueError(f"{root} has no lists: looked for <class>_test_split{split}.txt in {looked}")
    classes = sorted(found)
    videos: dict[str, list[_Listed]] = {"0": [], "1": [], "2": []}
    for label in classes:
        path = root / below / f"{label}_test_split{split}.txt"
        if split not in found[label]:
            raise ValueError(
                f"{path} does not exist, expected it beside the lists of the class's other splits"
            )
        for place, line in _lines(path):
            # The name may hold spaces and any other character; the last word is its use.
            match = re.fullmatch(r"([^/]+?\.\w+)\s+([012])", line)
            if match is None:
                raise ValueError(
                    f"{place}: {line!r}, expected 'file.avi' and 1 (train), 2 (test) or 0 (unused)"
                )
            videos[match[2]].append(_Listed(f"{label}/{match[1]}", label, place))
    _check_once("hmdb51", videos["0"] + videos["1"] + videos["2"])
    return _split("hmdb51", split, root, classes, videos["1"], videos["2"], HMDB51_VIDEOS)


def esc50(folder: str | os.PathLike[str], fold: str | int, *, esc10: bool = False) -> ClassificationSplit:
    """ESC-50: `meta/esc50.csv` and `audio/*.wav`; one of the five given folds is for test, the others for training.

    Complete: 2000 clips of 5 s, 50 classes, folds of 400; of these 400 are ESC-10. The classes are those of the csv,
    in the order of their numbers (`target`).

    Args:
        fold: 1 to 5.
        esc10: only the clips and the ten classes of ESC-10.

    Raises:
        ValueError: no such folder or fold; no csv or columns missing; a malformed row; a class with two numbers or a
            number with two classes; a clip listed twice; none of the clips is there.
    """
    name = "esc10" if esc10 else "esc50"
    root, fold = _check_root(folder, "ESC-50"), _check_split("ESC-50", fold, ESC_FOLDS)
    path = _find_annotation(root, ESC_LISTS, "esc50.csv") / "esc50.csv"
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if not set(ESC_COLUMNS) <= set(columns):
                raise ValueError(
                    f"{path} has the columns {', '.join(map(repr, columns)) or 'none'}, "
                    f"expected {','.join(ESC_COLUMNS)}"
                )
            rows = [(f"{path}, line {reader.line_num}", row) for row in reader]
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}), expected ESC-50's csv") from error
    train, test = [], []
    numbers: dict[str, int] = {}
    labels: dict[int, str] = {}
    for place, row in rows:
        file, in_fold, target, label, in_esc10 = (row[column] or "" for column in ESC_COLUMNS)
        ok = (
            _plain_name(file)
            and in_fold in ESC_FOLDS
            and re.fullmatch(r"\d+", target)
            and label
            and in_esc10 in ("True", "False")
        )
        if not ok:
            raise ValueError(
                f"{place}: {','.join(map(str, row.values()))!r}, expected a file, a fold of 1 to 5, a number, a "
                f"class, and True or False for ESC-10"
            )
        if (
            numbers.setdefault(label, int(target)) != int(target)
            or labels.setdefault(int(target), label) != label
        ):
            raise ValueError(
                f"{place}: class {label!r} has number {target}, expected one number per class as in the lines before"
            )
        if esc10 and in_esc10 == "False":
            continue
        (test if in_fold == fold else train).append(_Listed(file, label, place))
    present = {video.label for video in train + test}
    if not present:
        raise ValueError(f"{path} lists no clips{' of ESC-10' if esc10 else ''}, expected at least one")
    classes = [labels[number] for number in sorted(labels) if labels[number] in present]
    return _split(name, fold, root, classes, train, test, ("audio", ""))


def dcase(
    folder: str | os.PathLike[str],
    reading: Literal["dev-test", "5-fold"] = "dev-test",
    fold: str | int | None = None,
) -> ClassificationSplit:
    """DCASE 2013 scenes: `scenes_stereo/*.wav` (development) and `scenes_stereo_testset/*.wav`; a file's class is its
    name without the two digits at its end (`busystreet01.wav`). Complete: 10 classes, 100 files of 30 s in each.

    Choice: the paper has a column "DCASE2013" and one "DCASE2014", but there was one set of files and no challenge
    in 2014. Both readings that these files allow are here:

    - `dev-test`: development files train, test files test. What the literature calls DCASE2014: `dcase2014`.
    - `5-fold`: cross-validation on the development files alone, as the challenge of 2013 gave them out:
      `dcase2013`. Folds are stratified: of a class's files, sorted by name, each is dealt to the next fold.

    Args:
        fold: 1 to 5 with `5-fold`, the one that is for test; None with `dev-test`.

    Raises:
        ValueError: no such folder, reading or fold; no files; a file whose name is not a scene and two digits.
    """
    if reading not in ("dev-test", "5-fold"):
        raise ValueError(f"reading is {reading!r}, expected 'dev-test' or '5-fold'")
    if reading == "dev-test" and fold is not None:
        raise ValueError(f"fold is {fold!r}, expected None with dev-test, which has no folds")
    root = _check_root(folder, "DCASE 2013's scenes")
    folds = tuple(str(number + 1) for number in range(DCASE_FOLDS))
    development = _read_dcase(root, "scenes_stereo")
    if reading == "dev-test":
        test = _read_dcase(root, "scenes_stereo_testset")
        return _split("dcase2014", "test", root, _scenes(development + test), development, test, ("",))
    split = _check_split("DCASE 2013 in 5 folds", "None" if fold is None else fold, folds)
    dealt: dict[str, int] = {}
    train, test = [], []
    for video in development:
        turn = dealt.get(video.label, 0)
        dealt[video.label] = turn + 1
        (test if folds[turn % DCASE_FOLDS] == split else train).append(video)
    return _split("dcase2013", split, root, _scenes(development), train, test, ("",))


def _read_dcase(root: Path, below: str) -> list[_Listed]:
    if not (root / below).is_dir():
        raise ValueError(
            f"{root / below} is not a folder, expected DCASE 2013's scenes in {root / 'scenes_stereo'} "
            f"(development) and {root / 'scenes_stereo_testset'}"
        )
    videos = []
    for file in sorted(_names(root / below)):
        if file.startswith(".") or not file.lower().endswith(".wav"):
            continue  # lists and what archivers leave behind
        match = re.fullmatch(r"([a-z]+)\d\d\.wav", file)
        if match is None or match[1] not in DCASE_SCENES:
            raise ValueError(
                f"{root / below / file}: expected a name of a scene and two digits, such as busystreet01.wav "
                f"(scenes: {', '.join(DCASE_SCENES)})"
            )
        videos.append(_Listed(f"{below}/{file}", match[1], str(root / below / file)))
    if not videos:
        raise ValueError(f"{root / below} has no scenes, expected files such as busystreet01.wav")
    return videos


def _scenes(videos: Iterable[_Listed]) -> list[str]:
    return sorted({video.label for video in videos})


class Dataset(NamedTuple):
    """How a dataset is read, and what its splits are called."""

    read: Callable[[str, str], ClassificationSplit]
    """(folder, split) -> the split."""
    splits: tuple[str, ...]
    """All there are; a figure over the dataset is the mean over them."""
    streams: Literal["video", "audio"]
    """What the class is told from."""


DATASETS: dict[str, Dataset] = {
    "ucf101": Dataset(ucf101, ("1", "2", "3"), "video"),
    "hmdb51": Dataset(hmdb51, ("1", "2", "3"), "video"),
    "esc50": Dataset(esc50, ESC_FOLDS, "audio"),
    "esc10": Dataset(lambda folder, split: esc50(folder, split, esc10=True), ESC_FOLDS, "audio"),
    "dcase2013": Dataset(
        lambda folder, split: dcase(folder, "5-fold", split),
        tuple(str(number + 1) for number in range(DCASE_FOLDS)),
        "audio",
    ),
    "dcase2014": Dataset(
        lambda folder, split: dcase(folder, "dev-test", _no_fold(split)), ("test",), "audio"
    ),
}
"""By the name that results carry."""


def read_split(name: str, folder: str | os.PathLike[str], split: str | int) -> ClassificationSplit:
    """A split of the dataset called `name` (a key of `DATASETS`); see the dataset's own function.

    Raises:
        ValueError: no such dataset, or what its function raises.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset is {name!r}, expected one of {', '.join(DATASETS)}")
    return DATASETS[name].read(os.fspath(folder), str(split))


def detect_datasets(folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names of the datasets (keys of `DATASETS`) whose annotations or folders are in `folder`; () for a folder of
    other files.

    Raises:
        ValueError: no such folder.
    """
    root = _check_root(folder, "a dataset")
    marks = {
        ("ucf101",): [Path(below, "classInd.txt") for below in UCF101_LISTS],
        ("esc50", "esc10"): [Path(below, "esc50.csv") for below in ESC_LISTS],
        ("dcase2013",): [Path("scenes_stereo")],
        ("dcase2014",): [Path("scenes_stereo_testset")],
    }
    found = {
        name
        for names, paths in marks.items()
        if any((root / path).exists() for path in paths)
        for name in names
    }
    if any(HMDB51_LIST.fullmatch(name) for below in HMDB51_LISTS for name in _names(root / below)):
        found.add("hmdb51")
    return tuple(name for name in DATASETS if name in found)


def _no_fold(split: str) -> None:
    _check_split("DCASE 2013 from development to test", split, ("test",))


def _check_root(folder: str | os.PathLike[str], what: str) -> Path:
    if not os.path.isdir(folder):
        raise ValueError(f"{os.fspath(folder)} is not a folder, expected that of {what}; check --data")
    return Path(folder)


def _check_split(what: str, split: str | int, splits: Sequence[str]) -> str:
    if str(split) not in splits:
        raise ValueError(f"split is {str(split)!r}, expected one of {', '.join(splits)} for {what}")
    return str(split)


def _find_annotation(root: Path, folders: Sequence[str], file: str) -> Path:
    """The first of `folders` below root that has `file`."""
    for below in folders:
        if (root / below / file).is_file():
            return root / below
    looked = ", ".join(str(root / below / file) for below in folders)
    raise ValueError(f"{root} has no {file}: looked for {looked}; unpack the dataset's annotations there")


def _lines(path: Path) -> list[tuple[str, str]]:
    """(place, line) of the lines of a file that are not blank, without white space around them."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}), expected it among the dataset's annotations"
        ) from error
    # Not splitlines(), which would also end a line at characters that a name may hold.
    lines = ((number, line.strip(" \t\r")) for number, line in enumerate(text.split("\n"), 1))
    return [(f"{path}, line {number}", line) for number, line in lines if line]


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _files(folder: Path, parent: str) -> list[str]:
    """Files in `parent` below folder, relative to folder; none if it is no folder."""
    if not (folder / parent).is_dir():
        return []
    with os.scandir(folder / parent) as entries:
        return [f"{parent}/{entry.name}" if parent else entry.name for entry in entries if entry.is_file()]


def _plain_name(name: str) -> bool:
    return bool(name) and "/" not in name and name not in (".", "..") and "\0" not in name


def _check_once(name: str, videos: Iterable[_Listed]) -> None:
    places: dict[str, str] = {}
    for video in videos:
        if video.name in places:
            raise ValueError(
                f"{video.place}: {name}'s {video.name} is listed twice, also in {places[video.name]}; expected each "
                f"file once, either for training or for test"
            )
        places[video.name] = video.place


def _split(
    name: str,
    split: str,
    root: Path,
    classes: Sequence[str],
    train: Sequence[_Listed],
    test: Sequence[_Listed],
    folders: Sequence[str],
) -> ClassificationSplit:
    """The split, with its files looked for in the first of `folders` below root that has any."""
    listed = [*train, *test]
    _check_once(name, listed)
    if not listed:
        raise ValueError(f"{root}: split {split} of {name} lists no files, expected at least one")
    present: set[str] = set()
    for below in folders:
        # One listing per folder instead of a question per file: much the faster on network file systems.
        parents = sorted({os.path.dirname(video.name) for video in listed})
        present = {name for parent in parents for name in _files(root / below, parent)}
        present &= {video.name for video in listed}
        if present:
            break
    else:
        looked = ", ".join(str(root / below / listed[0].name) for below in folders)
        raise ValueError(
            f"{root}: none of the {len(listed)} files of {name}, split {split}, is there; the first was looked "
            f"for as {looked}; check --data"
        )
    prefix = f"{below}/" if below else ""
    videos = {
        video.video_id: video
        for video in with_hashes(
            (prefix + row.name, str(root / below / row.name) if row.name in present else None, row.label)
            for row in sorted(listed, key=lambda row: os.fsencode(row.name))
        )
    }
    return ClassificationSplit(
        name=name,
        split=split,
        folder=str(root),
        classes=tuple(classes),
        train=tuple(videos[prefix + row.name] for row in train),
        test=tuple(videos[prefix + row.name] for row in test),
        missing=tuple(prefix + row.name for row in listed if row.name not in present),
    )
