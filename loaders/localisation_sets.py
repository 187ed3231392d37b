"""Annotations of the test sets for sound localisation: which samples there are, and where their sources are.

Flickr-SoundNet (Senocak et al., CVPR 2018): a folder of XML files, one per pair of still image and sound, each with
the boxes of several annotators in pixels of the image scaled to 256x256. VGG-SS (Chen et al., CVPR 2021): one JSON
list of {file, class, bbox}, boxes relative to width and height. Files of both are looked for by `find_pairs` and
`find_videos`.
"""

import csv
import hashlib
import json
import math
import os
import xml.etree.ElementTree as ElementTree
import xml.parsers.expat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.sources import SourceVideo, with_hashes

FLICKR_SIDE = 256
"""Flickr-SoundNet's boxes are in pixels of an image of this width and height."""
FLICKR_VOTES = 2
"""Of its three annotators so many make a pixel certain: g = min(1, boxes / 2)."""
NON_SOUNDING = "non-sounding"
"""How SLAVC's lists mark a pair without a visible source."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """Where the source of one sample's sound is."""

    sample_id: str
    boxes: tuple[Box, ...]
    """x0, y0, x1, y1 relative to the frame's width and height, as edges; 0 <= x0 < x1 <= 1, likewise y."""
    votes: int
    """So many boxes over a pixel make it certain."""
    label: str | None = None
    """Class name, where the set has one."""


@dataclass(frozen=True, kw_only=True)
class AnnotationSet:
    """Annotations by sample, in the order of their file, and what was wrong with others."""

    annotations: dict[str, Annotation]
    skipped: tuple[tuple[str, str], ...] = ()
    """(sample_id, reason): `no-annotation`, `bad-annotation` (cannot be read), `no-box` (none has an area)."""
    num_boxes: int = 0
    """Boxes read, those without area too."""
    num_clipped_boxes: int = 0
    """Boxes that reached out of the frame; the part inside counts."""
    num_empty_boxes: int = 0
    """Boxes without area (inside the frame); they are left out."""

    @property
    def digest(self) -> str:
        """16 hex digits over all boxes: VGG-SS was revised, and figures on two of its versions differ."""
        boxes = [[row.sample_id, row.boxes, row.votes] for row in self.annotations.values()]
        return hashlib.sha256(json.dumps(boxes).encode()).hexdigest()[:16]


class _Reader:
    """Adds up annotations and what is wrong with them."""

    def __init__(self, votes: int) -> None:
        self._votes = votes
        self._annotations: dict[str, Annotation] = {}
        self._skipped: list[tuple[str, str]] = []
        self._counts = [0, 0, 0]

    def skip(self, sample_id: str, reason: str) -> None:
        self._skipped.append((sample_id, reason))

    def add(self, sample_id: str, boxes: Iterable[Sequence[float]], label: str | None = None) -> None:
        kept: list[Box] = []
        for box in boxes:
            x0, y0, x1, y1 = (min(max(float(edge), 0.0), 1.0) for edge in box)
            self._counts[0] += 1
            self._counts[1] += any(not 0 <= edge <= 1 for edge in box)
            if x0 < x1 and y0 < y1:
                kept.append((x0, y0, x1, y1))
            else:
                self._counts[2] += 1
        if not kept:
            self.skip(sample_id, "no-box")
            return
        self._annotations[sample_id] = Annotation(
            sample_id=sample_id, boxes=tuple(kept), votes=self._votes, label=label
        )

    def result(self) -> AnnotationSet:
        num_boxes, num_clipped, num_empty = self._counts
        return AnnotationSet(
            annotations=self._annotations,
            skipped=tuple(self._skipped),
            num_boxes=num_boxes,
            num_clipped_boxes=num_clipped,
            num_empty_boxes=num_empty,
        )


def read_flickr_annotations(folder: str | os.PathLike, ids: Sequence[str] | None = None) -> AnnotationSet:
    """Boxes of Flickr-SoundNet: `<id>.xml` in folder.

    In a file, the root's children are annotators (or one list of them); each of their `bbox` elements has a name
    first and then xmin, ymin, xmax, ymax as whole pixels of 256x256, told apart by place, as the LVS code does. Of
    Flickr-SoundNet's 5k annotated pairs, 250 are the test set: give their ids.

    Args:
        folder: of the XML files.
        ids: which samples; None: all files there.

    Raises:
        ValueError: no such folder, or no XML file in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder, expected the folder of Flickr-SoundNet's XML files")
    if ids is None:
        ids = sorted(path.stem for path in folder.glob("*.xml"))
    if not ids:
        raise ValueError(f"{folder} has no XML files, expected one per pair")
    reader = _Reader(FLICKR_VOTES)
    for sample_id in dict.fromkeys(ids):
        path = folder / f"{sample_id}.xml"
        if not path.is_file():
            reader.skip(sample_id, "no-annotation")
            continue
        try:
            boxes = _flickr_boxes(path.read_bytes())
        except (ValueError, ElementTree.ParseError, OSError):
            reader.skip(sample_id, "bad-annotation")
            continue
        reader.add(sample_id, [[edge / FLICKR_SIDE for edge in box] for box in boxes])
    return reader.result()


def _flickr_boxes(data: bytes) -> list[list[int]]:
    """Boxes in pixels of 256x256. Raises ValueError or ParseError for anything else."""
    _refuse_declarations(data)
    boxes = []
    for annotator in ElementTree.fromstring(data):
        for element in annotator:
            if element.tag != "bbox":
                continue
            edges = [(child.text or "").strip() for child in element][1:]
            if len(edges) != 4:
                raise ValueError(f"bbox has {len(edges) + 1} elements, expected a name and four edges")
            boxes.append([int(edge) for edge in edges])
    return boxes


def _refuse_declarations(data: bytes) -> None:
    """Raises ValueError for XML with a document type, the place where entities are declared: none of these files has
    one, and entities can be made to grow without end."""

    def refuse(*_: object) -> None:
        raise ValueError("the XML declares a document type, expected none")

    parser = xml.parsers.expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except xml.parsers.expat.ExpatError as error:
        raise ValueError(f"not XML ({error})") from error


def read_vggss_annotations(path: str | os.PathLike, ids: Sequence[str] | None = None) -> AnnotationSet:
    """Boxes of VGG-SS: a JSON list of {file, class, bbox: [[x0, y0, x1, y1], ...]}, relative to the frame.

    The file as published has boxes that begin left of the frame (one of them at -3e16) and boxes without area;
    `AnnotationSet` counts both.

    Args:
        path: `vggss.json`.
        ids: which samples; None: all.

    Raises:
        ValueError: the file cannot be read or is no such list.
    """
    try:
        rows = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}), expected the JSON list of VGG-SS") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "file" in row for row in rows):
        raise ValueError(
            f"{path} is no list of objects with `file`, `class` and `bbox`, expected that of VGG-SS"
        )
    by_id = {str(row["file"]): row for row in rows}
    reader = _Reader(votes=1)
    for sample_id in dict.fromkeys(by_id if ids is None else ids):
        if sample_id not in by_id:
            reader.skip(sample_id, "no-annotation")
            continue
        row = by_id[sample_id]
        boxes = row.get("bbox")
        if not isinstance(boxes, list) or not all(_is_box(box) for box in boxes):
            reader.skip(sample_id, "bad-annotation")
            continue
        reader.add(sample_id, boxes, row.get("class"))
    return reader.result()


def _is_box(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(edge, (int, float)) and math.isfinite(edge) for edge in value)
    )


def read_ids(path: str | os.PathLike) -> list[str]:
    """First column of a CSV file without header (`flickr_test.csv`, `vggss_test.csv`), in its order, once each.

    Raises:
        ValueError: the file cannot be read or has no rows.
    """
    return list(dict.fromkeys(row[0] for row in _rows(path)))


@dataclass(frozen=True, kw_only=True)
class PairNames:
    """A still image, a sound, and whether the source is in sight."""

    image_id: str
    audio_id: str
    sounding: bool = True
    """False: nothing in the image makes the sound (or there is none), so there is no annotation."""

    @property
    def sample_id(self) -> str:
        """The id of both, or the two joined by `+`."""
        return self.image_id if self.image_id == self.audio_id else f"{self.image_id}+{self.audio_id}"


def read_non_sounding(path: str | os.PathLike) -> list[PairNames]:
    """Pairs without a visible source of SLAVC's extended sets (`flickr_test_plus_silent.csv` and the like).

    Its rows are image id, audio id, kind; those of the kind `non-sounding` are returned (the others are the set
    itself).

    Raises:
        ValueError: the file cannot be read or has no such row.
    """
    pairs = [
        PairNames(image_id=row[0], audio_id=row[1], sounding=False)
        for row in _rows(path)
        if len(row) >= 3 and row[2].strip() == NON_SOUNDING
    ]
    if not pairs:
        raise ValueError(f"{path} has no row `image,audio,{NON_SOUNDING}`, expected at least one")
    return pairs


def _rows(path: str | os.PathLike) -> list[list[str]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [[field.strip() for field in row] for row in csv.reader(file)]
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({error}), expected a CSV file of ids") from error
    rows = [row for row in rows if row and row[0]]
    if not rows:
        raise ValueError(f"{path} has no rows, expected one id per line")
    return rows


def file_names(sample_id: str) -> list[str]:
    """Stems that a sample's files may have: its id, and for `<YouTube id>_<second>` (VGG-SS) also the name with
    begin and end of the ten seconds in milliseconds that some copies of VGG-Sound have."""
    youtube_id, _, second = sample_id.rpartition("_")
    if len(youtube_id) == 11 and second.isdecimal():
        begin = int(second)
        return [sample_id, f"{youtube_id}_{begin * 1000}_{(begin + 10) * 1000}"]
    return [sample_id]


def _find(folder: Path, sample_id: str, suffixes: Sequence[str]) -> Path | None:
    paths = (folder / f"{stem}{suffix}" for stem in file_names(sample_id) for suffix in suffixes)
    return next((path for path in paths if path.is_file()), None)


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".m4a", ".ogg")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi")


@dataclass(frozen=True, kw_only=True)
class PairFiles:
    """A still image and a sound that are there."""

    names: PairNames
    image: str
    """Path relative to the folder."""
    audio: str
    """Path relative to the folder."""


def find_pairs(
    folder: str | os.PathLike, names: Sequence[PairNames]
) -> tuple[list[PairFiles], list[tuple[str, str]]]:
    """Files of pairs as LVS lays them out, `frames/<id>.jpg` and `audio/<id>.wav`; and (sample_id, reason) of the
    pairs that are not there: `missing-image`, `missing-audio`.

    Raises:
        ValueError: folder lacks `frames` or `audio`.
    """
    folder = Path(folder)
    for part in ("frames", "audio"):
        if not (folder / part).is_dir():
            raise ValueError(
                f"{folder} has no folder `{part}`, expected frames/<id>.jpg and audio/<id>.wav in it"
            )
    found, missing = [], []
    for pair in names:
        image = _find(folder / "frames", pair.image_id, IMAGE_SUFFIXES)
        audio = _find(folder / "audio", pair.audio_id, AUDIO_SUFFIXES)
        if image is None or audio is None:
            missing.append((pair.sample_id, "missing-image" if image is None else "missing-audio"))
            continue
        found.append(
            PairFiles(names=pair, image=f"frames/{image.name}", audio=f"audio/{audio.name}"),
        )
    return found, missing


def find_videos(folder: str | os.PathLike, ids: Sequence[str]) -> list[tuple[str, SourceVideo]]:
    """(sample id, file) of original videos `<id>.mp4`, in folder or in its `videos` or `video`; the file of one that
    is not there has no path.

    Raises:
        ValueError: no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder, expected the folder of videos `<id>.mp4`")
    below = [part for part in ("", "videos", "video") if (folder / part).is_dir()]
    names: list[tuple[str, str | None]] = []
    for sample_id in ids:
        found = next(
            (
                f"{part}/{path.name}" if part else path.name
                for part in below
                if (path := _find(folder / part, sample_id, VIDEO_SUFFIXES)) is not None
            ),
            None,
        )
        names.append((found or f"{sample_id}.mp4", None if found is None else str(folder / found)))
    return list(zip(ids, with_hashes((name, path, None) for name, path in names), strict=True))
