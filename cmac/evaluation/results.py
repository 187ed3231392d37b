"""The one format of every evaluation's result: one JSON line per evaluation in a `results.jsonl`.

    {"task": "video-retrieval", "dataset": "ucf101", "split": "1", ..., "metrics": {"R@1": {"value": 0.42, ...}}}

Values are fractions (0.42, not 42 %). Names of metrics that tools.results lays beside the paper's: `top1` (accuracy
of whole videos or sound files), `top5`, `R@1`, `R@5`, `R@10`, `cIoU@0.5`, `AUC`.
"""

import dataclasses
import json
import logging
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from shards.lock import take_lock

SCHEMA_VERSION = 1
MEAN_OF_THREE_SPLITS = "1-3 mean"
"""`split` of a mean over the three official splits of UCF101 or HMDB51."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure of an evaluation. All of it in fractions, 0..1; a difference of two figures is -1..1."""

    value: float
    """The figure itself."""
    interval: tuple[float, float] | None = None
    """95 % confidence interval (low, high); how it was made is the protocol's (docs/EVALUATION.md)."""
    per_fold: tuple[float, ...] | None = None
    """The figure of each split, fold or seed that `value` is the mean of, in their order."""
    chance: float | None = None
    """What guessing gives."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one evaluation found, and what it was found with. Raises ValueError for what no line may hold."""

    task: str
    """`action-recognition`, `linear-probe`, `video-retrieval`, `cross-modal-retrieval`, `audio-classification`,
    `localisation` or `ablation`."""
    dataset: str
    """`ucf101`, `hmdb51`, `esc50`, `esc10`, `dcase2013`, `dcase2014`, `flickr-soundnet`, `vggss` or `world`."""
    split: str
    """`1`, `2`, `3`, `1-3 mean`, `folds 1-5` or `test`."""
    protocol: str
    """Named variant, e.g. `finetune-ucf101`."""
    checkpoint: str
    """Where the weights came from; `random` for fresh weights, `none` where no weights are used."""
    checkpoint_digest: str | None
    """16 hex digits over names and values of the weights; null without weights."""
    config: dict[str, Any]
    """Resolved configuration."""
    metrics: dict[str, Metric]
    """By name, at least one."""
    counts: dict[str, int] = field(default_factory=dict)
    """`num_videos`, `num_clips`, and what was left out by reason, e.g. `skipped too-short`."""
    commit: str
    """Of the code that evaluated."""
    hardware: str
    """Processor and GPUs."""
    time: str
    """When it was finished: ISO 8601 with its offset from UTC."""
    seconds: float
    """How long it took, over all starts where it was resumed."""
    schema_version: int = SCHEMA_VERSION
    """Of this format."""

    def __post_init__(self) -> None:
        check_result(self)

    def to_json(self) -> str:
        """One line of ASCII without its newline. A file name that is not UTF-8 (surrogate escapes) survives."""
        # dataclasses.asdict copies values with deepcopy, which _plain does anyway while it checks them.
        record = {item.name: _plain(getattr(self, item.name), item.name) for item in fields(self)}
        return json.dumps(record, allow_nan=False)


def stamp(seconds: float) -> dict[str, Any]:
    """`commit`, `hardware`, `time` (now) and `seconds` of a Result: `Result(..., **stamp(seconds))`."""
    from cmac.provenance import describe_hardware, git_commit  # torch, which readers of results do without

    return {
        "commit": git_commit(),
        "hardware": describe_hardware(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": seconds,
    }


def check_result(result: Result) -> None:
    """Raises ValueError, naming the field, for a result that no line may hold: NaN and infinity, percentages, names
    that are empty, an interval that is upside down, a time without its offset."""
    for name in ("task", "dataset", "split", "protocol", "checkpoint", "commit", "hardware"):
        value = getattr(result, name)
        if not isinstance(value, str) or not value:
            raise ValueError(f"{name} is {value!r}, expected a text that is not empty")
    digest = result.checkpoint_digest
    if digest is not None and not (isinstance(digest, str) and digest):
        raise ValueError(f"checkpoint_digest is {digest!r}, expected hex digits or null")
    if result.schema_version != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {result.schema_version!r}, expected {SCHEMA_VERSION}")
    if not isinstance(result.config, Mapping):
        raise ValueError(f"config is {result.config!r}, expected names and values")
    _plain(result.config, "config")
    parse_time(result.time)
    if _number(result.seconds, "seconds") < 0:
        raise ValueError(f"seconds is {result.seconds}, expected at least 0")
    if not isinstance(result.metrics, Mapping) or not result.metrics:
        raise ValueError(f"metrics is {result.metrics!r}, expected at least one, by name")
    for name, metric in result.metrics.items():
        _check_metric(metric, f"metrics.{name}")
    if not isinstance(result.counts, Mapping):
        raise ValueError(f"counts is {result.counts!r}, expected numbers by name")
    for name, count in result.counts.items():
        if not isinstance(count, numbers.Integral) or isinstance(count, bool) or count < 0:
            raise ValueError(f"counts.{name} is {count!r}, expected a whole number of at least 0")


def parse_time(time: str) -> datetime:
    """The moment that a result's `time` names. Raises ValueError for anything but ISO 8601 with an offset."""
    try:
        # Python 3.10 does not read the Z that later ones do.
        moment = datetime.fromisoformat(time[:-1] + "+00:00" if time.endswith("Z") else time)
    except (AttributeError, TypeError, ValueError):
        moment = None
    if moment is None or moment.utcoffset() is None:
        raise ValueError(
            f"time is {time!r}, expected ISO 8601 with its offset, e.g. 2024-05-17T09:30:00+00:00"
        )
    return moment


def append_result(path: str | os.PathLike, result: Result) -> None:
    """Add one line to a file of results, which with its folders is made where it is missing.

    The line is on disk when this returns. Several evaluations may append to one file at once, and a line that
    another one left unfinished (it was killed) does not swallow this one.

    Raises:
        ValueError: the result holds NaN or another value that no line may hold; nothing was written.
    """
    check_result(result)
    line = (result.to_json() + "\n").encode("ascii")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        take_lock(descriptor, path, wait=True)  # nobody's half-written line is taken for a torn one
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        written = os.write(descriptor, line)
        if written != len(line):
            raise OSError(f"{path}: {written} of {len(line)} bytes were written; is the disk full?")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_results(path: str | os.PathLike) -> list[Result]:
    """Results of a file in its order; [] for an empty file. Fields that a later version added are left out.

    A line that was torn (its evaluation was killed or the disk was full while it was written) is left out with a
    warning in the log: it cannot be told what it held, and the lines behind it are worth as much as before.

    Raises:
        ValueError: there is no such file, or a line is not a result. File, line and field are named.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(
            f"{path}: {error.strerror}; expected a file that an evaluation wrote with --results"
        ) from None
    results = []
    for number, raw in enumerate(content.split(b"\n"), start=1):
        if not raw.strip():
            continue
        where = f"{path}, line {number}"
        try:
            line = raw.decode("utf-8").strip()
            record = json.loads(line, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            # A whole line ends in the brace that closes it; cut behind an inner one, something is missing at the end.
            if line.startswith("{") and (not line.endswith("}") or error.pos >= len(line)):
                _log.warning("%s: torn after %d characters, left out", where, len(line))
                continue
            raise ValueError(f"{where}: not JSON ({error}); remove the line or the file") from None
        except ValueError as error:  # not UTF-8, or NaN
            raise ValueError(f"{where}: {error}; remove the line or the file") from None
        try:
            results.append(_result_from_record(record))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return results


def latest(results: Sequence[Result]) -> list[Result]:
    """The newest result of each (task, dataset, split, protocol, weights), in the order in which they were given.

    Newest by its time; among equal times the later one in the list. Weights are told apart by their digest, so the
    same weights under another path replace each other; without a digest by the name of the checkpoint.
    """
    newest: dict[tuple, int] = {}
    for index, result in enumerate(results):
        weights = result.checkpoint_digest or f"no digest: {result.checkpoint}"
        key = (result.task, result.dataset, result.split, result.protocol, weights)
        if key not in newest or parse_time(result.time) >= parse_time(results[newest[key]].time):
            newest[key] = index
    return [results[index] for index in sorted(newest.values())]


def _check_metric(metric: Metric, where: str) -> None:
    if not isinstance(metric, Metric):
        raise ValueError(f"{where} is {metric!r}, expected a Metric")
    figures = [("value", metric.value)]
    if metric.chance is not None:
        figures.append(("chance", metric.chance))
    if metric.per_fold is not None:
        if not isinstance(metric.per_fold, Sequence) or not metric.per_fold:
            raise ValueError(f"{where}.per_fold is {metric.per_fold!r}, expected at least one figure or null")
        figures += [(f"per_fold[{index}]", value) for index, value in enumerate(metric.per_fold)]
    for name, value in figures:
        if not -1 - 1e-9 <= _number(value, f"{where}.{name}") <= 1 + 1e-9:
            raise ValueError(f"{where}.{name} is {value}, expected a fraction (0.5 for 50 %)")
    if metric.interval is not None:
        if not isinstance(metric.interval, Sequence) or len(metric.interval) != 2:
            raise ValueError(f"{where}.interval is {metric.interval!r}, expected (low, high) or null")
        low, high = (
            _number(value, f"{where}.interval[{index}]") for index, value in enumerate(metric.interval)
        )
        if low > high:
            raise ValueError(f"{where}.interval is ({low}, {high}), expected low <= high")


def _number(value: Any, where: str) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ValueError(f"{where} is {value!r}, expected a number")
    if not math.isfinite(value):
        raise ValueError(
            f"{where} is {value}, expected a finite number; did an encoder or a classifier diverge?"
        )
    return float(value)


def _plain(value: Any, where: str) -> Any:
    """What JSON has a form for, as the json module knows it. NumPy's numbers and paths have one, too."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            item.name: _plain(getattr(value, item.name), f"{where}.{item.name}") for item in fields(value)
        }
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ValueError(f"{where} has the name {name!r}, expected a text")
        return {name: _plain(inner, f"{where}.{name}") for name, inner in value.items()}
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, (list, tuple)):
        return [_plain(inner, f"{where}[{index}]") for index, inner in enumerate(value)]
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return _number(value, where)
    raise ValueError(f"{where} is a {type(value).__name__}, expected something that JSON has a form for")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"holds {name}, expected finite numbers")


def _result_from_record(record: Any) -> Result:
    """A Result from what a line held."""
    if not isinstance(record, dict):
        raise ValueError(f"is a {type(record).__name__}, expected a result with its fields by name")
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"schema_version is {version!r}, expected {SCHEMA_VERSION}; a newer checkout may have written it"
        )
    values = _known(Result, record, "")
    metrics = values["metrics"]
    if not isinstance(metrics, dict):
        raise ValueError(f"metrics is {metrics!r}, expected at least one, by name")
    values["metrics"] = {
        name: _metric_from_record(inner, f"metrics.{name}") for name, inner in metrics.items()
    }
    return Result(**values)


def _metric_from_record(record: Any, where: str) -> Metric:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {record!r}, expected a value and what belongs to it, by name")
    values = _known(Metric, record, f"{where}.")
    return Metric(
        **{name: tuple(inner) if isinstance(inner, list) else inner for name, inner in values.items()}
    )


def _known(kind: type, record: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The record's fields that the dataclass has; ValueError for one that is missing."""
    for item in fields(kind):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in record:
            raise ValueError(f"{prefix}{item.name} is missing")
    return {item.name: record[item.name] for item in fields(kind) if item.name in record}
