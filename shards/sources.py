"""Which videos go into the shards: a folder, an annotation csv (Kinetics, AudioSet, VGGSound) with a folder, or a
list file. Each of them can be a local path or an fsspec URL (`s3://bucket/videos`)."""

import csv
import errno
import functools
import hashlib
import io
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote

from shards import storage
from shards.schema import video_hash

Needs = Literal["both", "video", "audio"]
"""Which streams of a file are used."""

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .flv .wmv .asf .mpg .mpeg .m2ts .mts .ts .vob .ogv .ogg .3gp .3g2 .mxf "
    ".rm .wtv .dv".split()
)
"""Files with other suffixes are not looked at when a folder is searched; a list may name any file."""
KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
AUDIOSET_COLUMNS = ("YTID", "start_seconds", "end_seconds", "positive_labels")
CLASS_NAME_COLUMNS = ("mid", "display_name")
LABEL_SEPARATOR = "; "
"""Between the labels of a video that has several. AudioSet's names have commas in them."""
VGGSOUND_SECONDS = 10.0
"""Length of a VGGSound segment, of which the csv has the start alone."""
NOTHING_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
"""What a link to nothing, or to itself, gives."""
SPLIT_NAMES = ({"train"}, {"val", "validate", "validation"}, {"test"})
"""Names that mean the same split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceVideo:
    """One video of the input."""

    video_id: str
    """Path relative to the folder of videos, with `/`; surrogate escapes where it is not UTF-8."""
    path: str | None
    """Path or URL of the file; None if the csv or list names a video that is not there. What a list names behind a
    URL may not be there all the same: it is not asked before it is read."""
    label: str | None
    key_hash: str
    """First part of the clips' keys, unique in the input."""
    start_seconds: float | None = None
    """Where the annotated segment starts in the file, on the clock that starts with its container; None if the
    whole file is used."""
    end_seconds: float | None = None
    """Where it ends; None if and only if `start_seconds` is."""

    @property
    def window(self) -> tuple[float, float] | None:
        """(start, end) of the segment in the file, in seconds; None if the whole file is used."""
        if self.start_seconds is None or self.end_seconds is None:
            return None
        return self.start_seconds, self.end_seconds


def videos_of_folder(folder: str, leave_out: str | None = None) -> list[SourceVideo]:
    """All video files below `folder` (a path or URL), by suffix, sorted by path. Hidden files and folders are not
    looked at.

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
    location = _locations(folder)
    return with_hashes((name, location(name), _folder_label(name)) for name in names)


def videos_of_list(folder: str, list_path: str) -> tuple[list[SourceVideo], int]:
    """Videos named in a file, one path per line, relative to `folder` or absolute, or a URL; and the number of
    repeated lines.

    A label may follow the path after a tab (unless there is a file whose name has the tab in it). A file that
    contains NUL bytes is taken as NUL-separated (for names with newlines: `find . -print0`). Without a label, it is
    the name of the video's folder, as in `videos_of_folder`.

    Raises:
        ValueError: no such file or folder, or nothing in it.
    """
    if not _is_remote(folder):
        _check_folder(folder)
    data = _read(list_path, "a list of videos; check --list")
    lines = data.split(b"\0") if b"\0" in data else data.replace(b"\r\n", b"\n").split(b"\n")
    rows: dict[str, tuple[str, str | None, str | None]] = {}
    repeated = 0
    for line in lines:
        text, tab, label = os.fsdecode(line).partition("\t")
        if tab and _is_local_file(folder, os.fsdecode(line)):
            text, label = os.fsdecode(line), ""
        if not text.strip():
            continue
        name, found = _listed_file(folder, text)
        if name in rows:
            repeated += 1
            continue
        rows[name] = (name, found, label.strip() if tab and label.strip() else _folder_label(name))
    if not rows:
        raise ValueError(f"{list_path} names no videos, expected one path per line")
    return with_hashes(rows[name] for name in sorted(rows, key=os.fsencode)), repeated


def _is_local_file(folder: str, text: str) -> bool:
    return not _is_remote(folder) and os.path.isfile(os.path.join(_local(folder), text))


def _listed_file(folder: str, text: str) -> tuple[str, str | None]:
    """(video_id, path) of a file that a line of a list names."""
    base = f"{folder.rstrip('/')}/"
    if storage.is_url(text):
        name = text.removeprefix(base)
        quoted = name != text and base.lower().startswith("http")
        return unquote(name) if quoted else name, text
    if _is_remote(folder):
        name = re.sub(r"^(\./+)+", "", text)
        return name, storage.join(folder, name)
    path = os.path.join(_local(folder), text)  # an absolute path stays as it is
    name = os.path.relpath(path, _local(folder))
    if name.startswith(os.pardir + os.sep):
        name = os.path.abspath(path)
    return name.replace(os.sep, "/"), path if _exists(path) else None


def _exists(path: str) -> bool:
    """Whether something is there; OSError where the file system fails to tell."""
    try:
        os.stat(path)
    except ValueError:
        return False
    except OSError as error:
        if error.errno in storage.TRANSIENT_ERRNOS:
            raise _not_looked_at(path, error) from error
        return False
    return True


def _not_looked_at(path: str, error: OSError) -> OSError:
    return OSError(
        f"{path} cannot be looked at ({error.strerror}), and is not left out for that; see whether its file system "
        f"and its folder can be read, then run the same command again"
    )


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
    same = _same_split(split)
    wanted = [row for row in rows if row["split"] in same] if splits != [""] else rows
    if not wanted:
        raise _no_such_split(csv_path, split, splits)
    by_stem: dict[str, list[str]] = {}
    for name in sorted(find_files(folder, leave_out), key=os.fsencode):
        by_stem.setdefault(os.path.splitext(os.path.basename(name))[0], []).append(name)
    location = _locations(folder)
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
        videos.setdefault(name, (name, location(name), label))
    return with_hashes(videos[name] for name in sorted(videos, key=os.fsencode))


def _kinetics_rank(name: str, label_folders: set[str], split_folders: set[str]) -> tuple[bool, bool, bytes]:
    parts = name.split("/")[:-1]
    in_split = any(part in split_folders or part.rpartition("_")[0] in split_folders for part in parts)
    return (not label_folders & set(parts), not in_split, os.fsencode(name))


def _whole_seconds(text: str) -> int | None:
    return round(float(text)) if re.fullmatch(r"\s*\d+(\.\d*)?\s*", text) else None


def _read_kinetics(path: str) -> list[dict[str, str]]:
    reader = csv.DictReader(_csv_lines(path))
    columns = reader.fieldnames or []
    if not {"youtube_id"} <= set(columns):
        raise ValueError(
            f"{path} has the columns {', '.join(map(repr, columns)) or 'none'}, "
            f"expected {','.join(KINETICS_COLUMNS)}"
        )
    rows = [{name: (row.get(name) or "").strip() for name in KINETICS_COLUMNS} for row in reader]
    return [row for row in rows if row["youtube_id"]]


def videos_of_csv(
    folder: str,
    csv_path: str,
    split: str,
    class_names: str | None = None,
    leave_out: str | None = None,
) -> list[SourceVideo]:
    """Videos of an annotation csv, in the format that its first lines have: see `videos_of_kinetics`,
    `videos_of_audioset` and `videos_of_vggsound`.

    Args:
        class_names: AudioSet's `class_labels_indices.csv`.

    Raises:
        ValueError: no such file, none of the formats, or no row for this split.
    """
    kind = csv_format(csv_path)
    if class_names is not None and kind != "audioset":
        raise ValueError(
            f"{csv_path} is a csv of {kind}, whose labels are names already, expected one of AudioSet beside "
            f"{class_names}; leave --class-names away"
        )
    if kind == "audioset":
        return videos_of_audioset(folder, csv_path, class_names, leave_out)
    if kind == "vggsound":
        return videos_of_vggsound(folder, csv_path, split, leave_out)
    return videos_of_kinetics(folder, csv_path, split, leave_out)


def csv_format(csv_path: str) -> Literal["kinetics", "audioset", "vggsound"]:
    """Which data set an annotation csv is of, by its header, or by the first row where it has none.

    Raises:
        ValueError: no such file, or none of them.
    """
    first: list[str] = []
    for cells in _csv_rows(csv_path):
        first = [cell.strip() for cell in cells]
        if "youtube_id" in first:
            return "kinetics"
        if first[0].lstrip("# ") == AUDIOSET_COLUMNS[0]:
            return "audioset"
        if not first[0].startswith("#"):
            break
    if len(first) == 4 and _seconds(first[1]) is not None:
        if _seconds(first[2]) is not None:
            return "audioset"
        if any(first[3] in names for names in SPLIT_NAMES):
            return "vggsound"
    raise ValueError(
        f"{csv_path} starts with {','.join(first)[:200]!r}, expected the header of Kinetics "
        f"({','.join(KINETICS_COLUMNS)}) or AudioSet (# {', '.join(AUDIOSET_COLUMNS)}), or a row of VGGSound "
        f"(id,start,label,split); check --csv"
    )


def videos_of_audioset(
    folder: str, csv_path: str, class_names: str | None = None, leave_out: str | None = None
) -> list[SourceVideo]:
    """Videos of an AudioSet csv (`# YTID, start_seconds, end_seconds, positive_labels`); see `_videos_of_segments`.

    Args:
        class_names: `class_labels_indices.csv` (`index,mid,display_name`), for labels like `Speech; Music` in
            place of `/m/09x0r; /m/04rlf`.

    Raises:
        ValueError: no such file, rows of another form, or a label that `class_names` lacks.
    """
    names = None if class_names is None else _class_names(class_names)

    @functools.cache
    def label_of(text: str) -> str | None:
        labels = [label.strip() for label in text.split(",") if label.strip()]
        if names is not None:
            unknown = [label for label in labels if label not in names]
            if unknown:
                raise ValueError(
                    f"{class_names} has no name for {unknown[0]!r} of {csv_path}, expected one for each; take the "
                    f"file that belongs to the csv, or leave --class-names away"
                )
            labels = [names[label] for label in labels]
        return LABEL_SEPARATOR.join(labels) or None

    def segments() -> Iterator[_Segment]:
        for number, cells in enumerate(_csv_rows(csv_path), 1):
            if cells[0].startswith("#") or cells[0] == AUDIOSET_COLUMNS[0]:
                continue
            start = end = None
            if len(cells) in (3, 4):
                start, end = _seconds(cells[1]), _seconds(cells[2])
            if start is None or end is None or end <= start:
                raise ValueError(
                    f"row {number} of {csv_path} is {','.join(cells)[:200]!r}, expected "
                    f"{', '.join(AUDIOSET_COLUMNS)} with numbers of seconds, the end after the start; check --csv"
                )
            yield cells[0].strip(), start, end, label_of(cells[3] if len(cells) == 4 else "")

    return _videos_of_segments(folder, csv_path, segments(), leave_out)


def videos_of_vggsound(
    folder: str, csv_path: str, split: str, leave_out: str | None = None
) -> list[SourceVideo]:
    """Videos of a VGGSound csv (`id,start_seconds,label,split`, without a header) that are of `split`; see
    `_videos_of_segments`. A segment has 10 seconds.

    Raises:
        ValueError: no such file, rows of another form, or no row of this split.
    """
    same = _same_split(split)
    splits = set()

    def segments() -> Iterator[_Segment]:
        for number, cells in enumerate(_csv_rows(csv_path), 1):
            start = _seconds(cells[1]) if len(cells) == 4 else None
            if start is None:
                raise ValueError(
                    f"row {number} of {csv_path} is {','.join(cells)[:200]!r}, expected id,start_seconds,label,split; "
                    f"check --csv"
                )
            splits.add(cells[3].strip())
            if cells[3].strip() in same:
                yield cells[0].strip(), start, start + VGGSOUND_SECONDS, cells[2].strip() or None

    wanted = list(segments())
    if not wanted and splits:
        raise _no_such_split(csv_path, split, splits)
    return _videos_of_segments(folder, csv_path, wanted, leave_out)


_Segment = tuple[str, float, float, str | None]
"""YouTube id, start and end in seconds, label."""


def _videos_of_segments(
    folder: str, csv_path: str, segments: Iterable[_Segment], leave_out: str | None
) -> list[SourceVideo]:
    """Videos for segments of YouTube videos.

    Looked for anywhere below `folder`, with any video suffix, as `<id>_<start>_<end>`, `<id>_<start>-<end>`,
    `<id>_<start>` or `<id>`, with a `Y` before the id or not; times in seconds, with any decimals or as six
    digits, or in milliseconds. Of several, the one whose name says most wins, then the first by path.

    A file whose name has the times is cut already and used whole. One named by the id alone has `start_seconds`
    and `end_seconds`, to which it is cut if it is longer than the segment. If several segments are of one such
    file, `#t=<start>,<end>` is appended to their ids. A segment without a file keeps its row, with the path that
    it could have.
    """
    rows = list(segments)
    if not rows:
        raise ValueError(f"{csv_path} has no rows, expected one per video; check --csv")
    files: dict[str, list[str] | None] = {row[0]: None for row in rows}
    for name in sorted(find_files(folder, leave_out), key=os.fsencode):
        for video_id in _ids_in(name):
            if video_id in files:
                known = files[video_id]
                if known is None:
                    files[video_id] = [name]
                else:
                    known.append(name)
    location = _locations(folder)
    videos: dict[str, Row] = {}
    shared: dict[str, list[tuple[float, float, str | None]]] = {}
    for video_id, start, end, label in rows:
        ranks = [(_segment_rank(name, video_id, start, end), name) for name in files[video_id] or ()]
        rank, name = min(((rank, name) for rank, name in ranks if rank is not None), default=(None, ""))
        if rank is None:
            name = f"{video_id}_{_seconds_text(start)}_{_seconds_text(end)}.mp4"
            videos.setdefault(name, (name, None, label))
        elif rank < _WHOLE_VIDEO:
            videos.setdefault(name, (name, location(name), label))
        else:
            windows = shared.setdefault(name, [])
            if all(window[:2] != (start, end) for window in windows):
                windows.append((start, end, label))
    del rows, files  # of two million rows, all that is held counts
    while shared:
        name, windows = shared.popitem()
        for start, end, label in windows:
            part = f"#t={_seconds_text(start)},{_seconds_text(end)}" if len(windows) > 1 else ""
            videos[name + part] = (name + part, location(name), label, start, end)
    return with_hashes(videos.pop(name) for name in sorted(videos, key=os.fsencode))


def _ids_in(name: str) -> Iterator[str]:
    """YouTube ids that a file could be of: what is before each `_` of its name, without a first `Y` too."""
    stem = name.rpartition("/")[2].rpartition(".")[0]
    cut = len(stem)
    while cut > 0:
        yield stem[:cut]
        if stem[0] == "Y":
            yield stem[1:cut]
        cut = stem.rfind("_", 0, cut)


_WHOLE_VIDEO = 2


def _segment_rank(name: str, video_id: str, start: float, end: float) -> int | None:
    """0 if the file's name has id, start and end, 1 if id and start, 2 if the id alone, None if it is another's."""
    stem = name.rpartition("/")[2].rpartition(".")[0]
    for prefix in (video_id, f"Y{video_id}"):
        if stem == prefix:
            return _WHOLE_VIDEO
        if stem.startswith(f"{prefix}_"):
            times = stem[len(prefix) + 1 :]
            if times in _time_texts(start):
                return 1
            first, _, last = times.replace("-", "_", 1).partition("_")
            if first in _time_texts(start) and last in _time_texts(end):
                return 0
    return None


@functools.lru_cache(maxsize=4096)
def _time_texts(seconds: float) -> frozenset[str]:
    """How downloaders write a time."""
    return frozenset(
        {
            _seconds_text(seconds),
            f"{seconds:.1f}",
            f"{seconds:.2f}",
            f"{seconds:.3f}",
            f"{int(seconds)}",
            f"{int(seconds):06d}",
            f"{round(seconds * 1000)}",
        }
    )


@functools.lru_cache(maxsize=4096)
def _seconds_text(seconds: float) -> str:
    return f"{seconds:.3f}".rstrip("0").rstrip(".")


@functools.lru_cache(maxsize=4096)
def _seconds(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\s*\d{1,9}(\.\d*)?\s*", text) else None


def _class_names(path: str) -> dict[str, str]:
    rows = _csv_rows(path)
    columns = next(rows, [])
    if not set(CLASS_NAME_COLUMNS) <= set(columns):
        raise ValueError(
            f"{path} has the columns {', '.join(map(repr, columns)) or 'none'}, expected index,mid,display_name; "
            f"check --class-names"
        )
    mid, name = (columns.index(column) for column in CLASS_NAME_COLUMNS)
    return {cells[mid]: cells[name] for cells in rows if len(cells) == len(columns)}


def _csv_rows(path: str) -> Iterator[list[str]]:
    """Rows of a csv that are not empty; a space after a comma is not part of a cell."""
    try:
        for cells in csv.reader(_csv_lines(path), skipinitialspace=True, strict=True):
            if any(cells):
                yield cells
    except csv.Error as error:
        raise ValueError(f"{path} is not a csv ({error}); check --csv and --class-names") from error


def _csv_lines(path: str) -> Iterator[str]:
    text = "a csv; check --csv and --class-names"
    if _is_remote(path):
        file = io.BytesIO(_read(path, text))
    else:
        try:
            file = open(_local(path), "rb")
        except OSError as error:
            raise _unreadable(path, error, text) from error
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        yield from lines


def _read(path: str, expected: str) -> bytes:
    """All bytes of a file at a path or URL; ValueError if there is none."""
    try:
        return storage.read_bytes(path)
    except storage.SourceError:
        raise  # no fault of the input: it says what is wrong
    except OSError as error:
        raise _unreadable(path, error, expected) from error


def _unreadable(path: str, error: OSError, expected: str) -> ValueError:
    reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or error
    return ValueError(f"{path} cannot be read ({reason}), expected {expected}")


def _same_split(split: str) -> set[str]:
    return next((names for names in SPLIT_NAMES if split in names), {split})


def _no_such_split(csv_path: str, split: str, splits: Iterable[str]) -> ValueError:
    return ValueError(
        f"{csv_path} has no rows of split {split!r}, expected one of {', '.join(map(repr, sorted(splits)))}; "
        f"check --split"
    )


def _is_remote(location: str) -> bool:
    """Whether it is a URL of something else than a local file."""
    return storage.is_url(location) and not location.lower().startswith(("file://", "local://"))


def _local(location: str) -> str:
    return location.partition("://")[2] if storage.is_url(location) else location


def _locations(folder: str) -> Callable[[str], str]:
    """Function from the name of a file below `folder` to its path or URL."""
    if _is_remote(folder):
        return functools.partial(storage.join, folder)
    return functools.partial(os.path.join, _local(folder))


def find_files(folder: str, leave_out: str | None = None) -> Iterable[str]:
    """Paths of regular video files below `folder`, relative to it, with `/`, in no order. Follows links, once
    each.

    Raises:
        ValueError: `folder` is no folder, or nothing is listed below a URL.
        SourceError: a URL cannot be listed.
        OSError: the file system does not tell what is there.
    """
    if _is_remote(folder):
        yield from _find_remote_files(folder, leave_out)
        return
    folder = _local(folder)
    if leave_out is not None:
        leave_out = None if _is_remote(leave_out) else _local(leave_out)
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
                except OSError as error:
                    if error.errno in NOTHING_THERE:
                        continue
                    raise _not_looked_at(entry.path, error) from error
                if stat.S_ISDIR(mode):
                    real = os.path.realpath(entry.path)
                    if real not in seen and real != banned:
                        seen.add(real)
                        todo.append(name + "/")
                elif stat.S_ISREG(mode) and os.path.splitext(entry.name)[1].lower() in VIDEO_SUFFIXES:
                    yield name


def _find_remote_files(folder: str, leave_out: str | None) -> Iterator[str]:
    base = f"{folder.rstrip('/')}/"
    banned = f"{leave_out.rstrip('/')}/".removeprefix(base) if (leave_out or "").startswith(base) else None
    names = storage.find_names(folder)
    if not names:
        raise ValueError(
            f"nothing is listed below {folder}, expected the folder of videos; check --videos (over http the server "
            f"has to list its folders; if it does not, name the files with --list)"
        )
    for name in names:
        hidden = any(part.startswith(".") for part in name.split("/"))
        if not hidden and (not banned or not name.startswith(banned)):
            if os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES:
                yield name


def _check_folder(folder: str) -> None:
    if not os.path.isdir(_local(folder)):
        raise ValueError(f"{folder} is not a folder, expected the folder of videos; check --videos")


def _folder_label(name: str) -> str | None:
    parent = name.rpartition("/")[0]
    return parent.rpartition("/")[2] or None


Row = tuple[str, str | None, str | None] | tuple[str, str | None, str | None, float | None, float | None]
"""video_id, path, label, and start and end in seconds where only a part of the file is used."""


def with_hashes(rows: Iterable[Row]) -> list[SourceVideo]:
    """Videos with unique key hashes: where two ids collide, the later one's is drawn again."""
    videos, taken = [], set()
    for name, path, label, *window in rows:
        key_hash, attempt = video_hash(name), 0
        while key_hash in taken:
            attempt += 1
            key_hash = video_hash(f"{name}\0{attempt}")
        taken.add(key_hash)
        start, end = window or (None, None)
        videos.append(
            SourceVideo(
                video_id=name,
                path=path,
                label=label,
                key_hash=key_hash,
                start_seconds=start,
                end_seconds=end,
            )
        )
    return videos


def video_list_sha256(videos: Iterable[SourceVideo]) -> str:
    """Hash of ids, labels and, where only a part of a file is used, its times; hex digits: two inputs with the same
    give the same shards."""
    digest = hashlib.sha256()
    for video in videos:
        texts = [video.video_id, video.label if video.label is not None else "\0"]
        if video.window is not None:
            texts.append("\0{!r},{!r}".format(*video.window))
        for text in texts:
            data = text.encode("utf-8", "surrogateescape")
            digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()
