"""Which videos go into the shards: a folder, a Kinetics csv with a folder, or a list file."""

import csv
import hashlib
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from shards.schema import video_hash

Needs = Literal["both", "video", "audio"]
"""Which streams of a file are used."""

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .flv .wmv .asf .mpg .mpeg .m2ts .mts .ts .vob .ogv .ogg .3gp .3g2 .mxf "
    ".rm .wtv .dv".split()
)
"""Files with other suffixes are not looked at when a folder is searched; a list may name any file."""
KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
SPLIT_NAMES = ({"train"}, {"val", "validate", "validation"}, {"test"})
"""Names that mean the same split."""


@dataclass(frozen=True, kw_only=True)
class SourceVideo:
    """One video of the input."""

    video_id: str
    """Path relative to the folder of videos, with `/`; surrogate escapes where it is not UTF-8."""
    path: str | None
    """Where the file is; None if the csv or list names a video that is not there."""
    label: str | None
    key_hash: str
    """First part of the clips' keys, unique in the input."""


def videos_of_folder(folder: str, leave_out: str | None = None) -> list[SourceVideo]:
    """All video files below `folder`, by suffix, sorted by path. Hidden files and folders are not looked at.

    The label is the name of the folder that the video is in, None directly in `folder`.

    Args:
        leave_out: a folder that is not searched (the output, if it is inside).

    Raises:
        ValueError: `folder` is no folder or has no video files.
    """
    names = sorted(find_files(folder, leave_out), key=os.fsencode)
    if not names:
        raise ValueError(
            f"{folder} has no video files ({', '.join(sorted(VIDEO_SUFFIXES))}), expected at least one; "
            f"check --videos, or name files of other suffixes with --list"
        )
    return with_hashes((name, os.path.join(folder, name), _folder_label(name)) for name in names)


def videos_of_list(folder: str, list_path: str) -> tuple[list[SourceVideo], int]:
    """Videos named in a file, one path per line, relative to `folder` or absolute; and the number of repeated
    lines.

    A label may follow the path after a tab. A file that contains NUL bytes is taken as NUL-separated (for
    names with newlines: `find . -print0`). Without a label, it is the name of the video's folder, as in
    `videos_of_folder`.

    Raises:
        ValueError: no such file or folder, or nothing in it.
    """
    _check_folder(folder)
    try:
        with open(list_path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise ValueError(
            f"{list_path} cannot be read ({error.strerror}), expected a list of videos; check --list"
        ) from error
    lines = data.split(b"\0") if b"\0" in data else data.replace(b"\r\n", b"\n").split(b"\n")
    rows: dict[str, tuple[str, str | None, str | None]] = {}
    repeated = 0
    for line in lines:
        text, tab, label = os.fsdecode(line).partition("\t")
        if not text.strip():
            continue
        path = os.path.join(folder, text)  # an absolute path stays as it is
        name = os.path.relpath(path, folder)
        if name.startswith(os.pardir + os.sep):
            name = os.path.abspath(path)
        name = name.replace(os.sep, "/")
        if name in rows:
            repeated += 1
            continue
        found = path if os.path.exists(path) else None
        rows[name] = (name, found, label.strip() if tab and label.strip() else _folder_label(name))
    if not rows:
        raise ValueError(f"{list_path} names no videos, expected one path per line")
    return with_hashes(rows[name] for name in sorted(rows, key=os.fsencode)), repeated


def videos_of_kinetics(
    folder: str, csv_path: str, split: str, leave_out: str | None = None
) -> list[SourceVideo]:
    """Videos of a Kinetics csv (`label,youtube_id,time_start,time_end,split`) that are of `split`.

    Looked for anywhere below `folder`, as `<id>_<start, 6 digits>_<end, 6 digits>`, `<id>_<start>_<end>` or
    `<id>`, with any video suffix; of several, the one in a folder named after the label wins, then after the
    split, then the first by path. A file named by its id alone is taken to be cut to the annotated seconds
    already. A video that is not there keeps its row, with the path that the usual layout would have.

    Raises:
        ValueError: no such file, columns missing, or no row of this split.
    """
    rows = _read_kinetics(csv_path)
    splits = sorted({row["split"] for row in rows})
    same = next((names for names in SPLIT_NAMES if split in names), {split})
    wanted = [row for row in rows if row["split"] in same] if splits != [""] else rows
    if not wanted:
        raise ValueError(
            f"{csv_path} has no rows of split {split!r}, expected one of {', '.join(map(repr, splits))}; "
            f"check --split"
        )
    by_stem: dict[str, list[str]] = {}
    for name in sorted(find_files(folder, leave_out), key=os.fsencode):
        by_stem.setdefault(os.path.splitext(os.path.basename(name))[0], []).append(name)
    videos: dict[str, tuple[str, str | None, str | None]] = {}
    for row in wanted:
        start, end = (_whole_seconds(row[column]) for column in ("time_start", "time_end"))
        stems = [row["youtube_id"]]
        if start is not None and end is not None:
            stems = [f"{stems[0]}_{start:06d}_{end:06d}", f"{stems[0]}_{start}_{end}", *stems]
        candidates = next((by_stem[stem] for stem in stems if stem in by_stem), None)
        label = row["label"] or None
        if candidates is None:
            name = f"{row['label'] or row['split']}/{stems[0]}.mp4"
            videos.setdefault(name, (name, None, label))
            continue
        folders = {row["label"], row["label"].replace(" ", "_")}
        name = min(candidates, key=lambda name: _kinetics_rank(name, folders, same))
        videos.setdefault(name, (name, os.path.join(folder, name), label))
    return with_hashes(videos[name] for name in sorted(videos, key=os.fsencode))


def _kinetics_rank(name: str, label_folders: set[str], split_folders: set[str]) -> tuple[bool, bool, bytes]:
    parts = name.split("/")[:-1]
    in_split = any(part in split_folders or part.rpartition("_")[0] in split_folders for part in parts)
    return (not label_folders & set(parts), not in_split, os.fsencode(name))


def _whole_seconds(text: str) -> int | None:
    return round(float(text)) if re.fullmatch(r"\s*\d+(\.\d*)?\s*", text) else None


def _read_kinetics(path: str) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if not {"youtube_id"} <= set(columns):
                raise ValueError(
                    f"{path} has the columns {', '.join(map(repr, columns)) or 'none'}, "
                    f"expected {','.join(KINETICS_COLUMNS)}"
                )
            rows = [{name: (row.get(name) or "").strip() for name in KINETICS_COLUMNS} for row in reader]
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}), expected a Kinetics csv; check --csv"
        ) from error
    return [row for row in rows if row["youtube_id"]]


def find_files(folder: str, leave_out: str | None = None) -> Iterable[str]:
    """Paths of regular video files below `folder`, relative to it, with `/`, in no order. Follows links, once
    each."""
    _check_folder(folder)
    banned = os.path.realpath(leave_out) if leave_out is not None else None
    seen = {os.path.realpath(folder)}
    if banned in seen:
        banned = None
    todo = [""]
    while todo:
        below = todo.pop()
        with os.scandir(os.path.join(folder, below)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = f"{below}{entry.name}"
                try:
                    mode = entry.stat().st_mode  # of what a link points to
                except OSError:
                    continue  # a link to nothing
                if stat.S_ISDIR(mode):
                    real = os.path.realpath(entry.path)
                    if real not in seen and real != banned:
                        seen.add(real)
                        todo.append(name + "/")
                elif stat.S_ISREG(mode) and os.path.splitext(entry.name)[1].lower() in VIDEO_SUFFIXES:
                    yield name


def _check_folder(folder: str) -> None:
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder, expected the folder of videos; check --videos")


def _folder_label(name: str) -> str | None:
    parent = name.rpartition("/")[0]
    return parent.rpartition("/")[2] or None


def with_hashes(rows: Iterable[tuple[str, str | None, str | None]]) -> list[SourceVideo]:
    """Videos with unique key hashes: where two ids collide, the later one's is drawn again."""
    videos, taken = [], set()
    for name, path, label in rows:
        key_hash, attempt = video_hash(name), 0
        while key_hash in taken:
            attempt += 1
            key_hash = video_hash(f"{name}\0{attempt}")
        taken.add(key_hash)
        videos.append(SourceVideo(video_id=name, path=path, label=label, key_hash=key_hash))
    return videos


def video_list_sha256(videos: Iterable[SourceVideo]) -> str:
    """Hash of ids and labels, hex digits: two inputs with the same give the same shards."""
    digest = hashlib.sha256()
    for video in videos:
        for text in (video.video_id, video.label if video.label is not None else "\0"):
            data = text.encode("utf-8", "surrogateescape")
            digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()
