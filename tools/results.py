"""Results of evaluations as Markdown tables beside the paper's numbers.

    python -m tools.results runs/results.jsonl --table 5 --markdown results.md

prints what it writes. A row of the paper is marked "(paper)"; the others are what the files hold, numbered, with
interval, chance, values per fold, weights, commit, videos and skips in the table below. Of several results of the
same evaluation the newest is shown.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cmac.evaluation.paper import LAMBDA, TABLES, PaperTable
from cmac.evaluation.results import Metric, Result, latest, read_results
from shards.manifest import write_atomically

DEFAULT_FILE = Path("runs/results.jsonl")
TABLE_ORDER = ("4", "5", "6", "1", "2", "3", "fig4")
NOTHING = "-"

COMMANDS = {
    (
        "action-recognition",
        "ucf101",
    ): "python -m tools.finetune finetune-ucf101 --checkpoint CHECKPOINT --data UCF101",
    (
        "action-recognition",
        "hmdb51",
    ): "python -m tools.finetune finetune-hmdb51 --checkpoint CHECKPOINT --data HMDB51",
    ("video-retrieval", "ucf101"): "python -m tools.retrieve CHECKPOINT --data UCF101",
    ("video-retrieval", "hmdb51"): "python -m tools.retrieve CHECKPOINT --data HMDB51",
    (
        "audio-classification",
        "esc50",
    ): "python -m tools.classify_audio CHECKPOINT --dataset esc50 --data ESC-50",
    (
        "audio-classification",
        "dcase2013",
    ): "python -m tools.classify_audio CHECKPOINT --dataset dcase2013 --data DCASE",
    (
        "audio-classification",
        "dcase2014",
    ): "python -m tools.classify_audio CHECKPOINT --dataset dcase2014 --data DCASE",
}
"""What makes the results of a paper table's columns, by task and dataset. Ablations: `ablation_command`."""

TEST_VIDEOS = {
    ("ucf101", "1"): 3783,
    ("ucf101", "2"): 3734,
    ("ucf101", "3"): 3696,
    ("ucf101", "1-3 mean"): 3783 + 3734 + 3696,
    ("hmdb51", "1"): 1530,
    ("hmdb51", "2"): 1530,
    ("hmdb51", "3"): 1530,
    ("hmdb51", "1-3 mean"): 3 * 1530,
    ("esc50", "folds 1-5"): 2000,
    ("esc10", "folds 1-5"): 400,
    ("dcase2013", "folds 1-5"): 100,
    ("dcase2014", "test"): 100,
    ("flickr-soundnet", "test"): 250,
}
"""Test videos (or sounds) of the complete datasets by dataset and split, to say where only a part was evaluated."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A result and the number by which the tables refer to it."""

    number: int
    result: Result


def ablation_command(table: PaperTable) -> str:
    """What makes the results of an ablation table."""
    return f"python -m tools.reproduce --table {table.name} --data FOLDER"


def ablation_settings(result: Result, table: PaperTable) -> tuple[str, tuple[str, ...]] | None:
    """(method, settings) of the row of an ablation table that a result is another measurement of; None for no row.

    What was trained is `config["variant"]`: a name of `cmac.config.VARIANTS`, `full` or `scratch`. Any weight of the
    consistency loss belongs to Fig. 4, of which the paper tells two.
    """
    variant = result.config.get("variant")
    if result.task != "ablation" or not isinstance(variant, str):
        return None
    for row in table.rows:
        if row.variant == variant:
            return row.method, row.settings
    if table.name == "fig4" and variant.startswith(LAMBDA):
        return table.rows[0].method, (variant.removeprefix(LAMBDA),)
    return None


def belongs_to(result: Result, table: PaperTable) -> bool:
    """Whether a result is a row of this paper table."""
    if result.task != table.task:
        return False
    if table.task == "ablation":
        return ablation_settings(result, table) is not None
    datasets = {column.dataset for column in table.columns}
    return result.dataset in datasets and result.split == table.split_of(result.dataset)


def render(results: Sequence[Result], tables: Sequence[str] | None = None, notes: Iterable[str] = ()) -> str:
    """The Markdown page.

    Args:
        results: of any tasks; of the same evaluation the newest is taken.
        tables: names of paper tables; None for all of them and one table for each task with other results.
        notes: lines for the page's head.
    """
    newest = latest(results)
    entries = [Entry(number=number, result=result) for number, result in enumerate(newest, start=1)]
    older = len(results) - len(newest)
    head = f"{_count(len(newest), 'result')}"
    if older:
        head += f"; {_count(older, 'older one')} of the same evaluations left out"
    parts = [
        "# Results beside the paper's",
        "\n".join([*notes, f"{head}. Figures in %, 95 % intervals in brackets."]),
    ]
    for name in TABLE_ORDER if tables is None else tables:
        table = TABLES[name]
        parts += _paper_section(table, [entry for entry in entries if belongs_to(entry.result, table)])
    if tables is None:
        others = [
            entry
            for entry in entries
            if not any(belongs_to(entry.result, table) for table in TABLES.values())
        ]
        for task in dict.fromkeys(entry.result.task for entry in others):
            own = [entry for entry in others if entry.result.task == task]
            parts += [f"## {task}: not in the paper's tables", _details(own)]
    return "\n\n".join(parts) + "\n"


def _paper_section(table: PaperTable, entries: Sequence[Entry]) -> list[str]:
    """Heading, the table with our rows above the paper's, details of ours, what is missing, what is misprinted."""
    known = [(column.dataset, column.metric) for column in table.columns]
    # An ablation at small scale is measured by other figures on another dataset; they get columns of their own.
    extra = []
    if table.task == "ablation":
        extra = [
            (entry.result.dataset, name)
            for entry in entries
            for name in entry.result.metrics
            if (entry.result.dataset, name) not in known
        ]
    columns = [*known, *dict.fromkeys(extra)]
    heads = [column.heading for column in table.columns] + [
        f"{dataset} {metric}" for dataset, metric in columns[len(known) :]
    ]
    lines = []
    several_protocols = len({_protocol(entry.result) for entry in entries}) > 1
    for group in _rows_of_ours(table, entries):
        settings = ("",) * len(table.settings)
        name = " ".join(f"#{entry.number}" for entry in group) + " " + _code(group[0].result.checkpoint)
        ablation = ablation_settings(group[0].result, table)
        if ablation is not None:
            settings, name = ablation[1], f"{name} {ablation[0]}"
        elif several_protocols:
            name += " " + " / ".join(dict.fromkeys(_protocol(entry.result) for entry in group))
        if any(_is_part(entry.result) for entry in group):
            name += ", a part of the test videos"
        found = {
            (entry.result.dataset, metric): value
            for entry in group
            for metric, value in entry.result.metrics.items()
        }
        cells = [_figure(found[column]) if column in found else NOTHING for column in columns]
        lines.append([name, *settings, *cells])
    chances = [_shared_chance(entries, column) for column in columns]
    if any(chance is not None for chance in chances):
        cells = [NOTHING if chance is None else _percent(chance) for chance in chances]
        lines.append(["chance", *("" for _ in table.settings), *cells])
    for row in table.rows:
        cells = []
        for column in table.columns:
            value = table.value(row.key, column.dataset, column.metric)
            cell = NOTHING if value.percent is None else f"{value.percent:.{column.decimals}f}"
            if value.likely_percent != value.percent:
                cell += f" (likely {value.likely_percent:.{column.decimals}f})"
            cells.append(cell)
        method = row.method + ("" if row.citation is None else f" [{row.citation}]")
        lines.append([f"{method} (paper)", *row.settings, *cells, *(NOTHING for _ in columns[len(known) :])])
    where = "Fig. 4" if table.name == "fig4" else f"Table {table.name}"
    parts = [
        f"## {where}: {table.title}",
        f"{table.protocol} Paper section {table.section}.",
        _markdown_table(["Method", *table.settings, *heads], lines),
    ]
    if entries:
        parts.append(_details(entries))
    missing = _missing(table, entries)
    if missing:
        parts.append("\n".join(["Not measured here yet:", "", *(f"- {line}" for line in missing)]))
    remarks = [f"{row.method}: {row.note}" for row in table.rows if row.note] + list(table.known_errors)
    if remarks:
        parts.append("\n".join(["About the paper's rows:", "", *(f"- {line}" for line in remarks)]))
    return parts


def _rows_of_ours(table: PaperTable, entries: Sequence[Entry]) -> list[list[Entry]]:
    """Results that share a row: those of the same weights (and variant), one per dataset.

    Where the weights have several protocols on one dataset, only results whose protocols are the same but for the
    dataset's name share one. Ablations come in the order of the paper's rows, what it has no row for last; others in
    the order of their numbers.
    """
    order = {row.variant: place for place, row in enumerate(table.rows)}

    def variant(entry: Entry) -> tuple[int, str]:
        if table.task != "ablation":
            return 0, ""
        name = entry.result.config["variant"]
        return order.get(name, len(order)), name

    by_weights: dict[tuple, list[Entry]] = {}
    for entry in entries:
        by_weights.setdefault((_weights(entry.result), variant(entry)), []).append(entry)
    rows = []
    for group in by_weights.values():
        if len({entry.result.dataset for entry in group}) == len(group):
            rows.append(group)
            continue
        by_protocol: dict[str, list[list[Entry]]] = {}
        for entry in group:
            same = by_protocol.setdefault(_protocol(entry.result), [])
            for row in same:
                if entry.result.dataset not in {other.result.dataset for other in row}:
                    row.append(entry)
                    break
            else:
                same.append([entry])
        rows += [row for same in by_protocol.values() for row in same]
    return sorted(rows, key=lambda row: (variant(row[0]), row[0].number))


def _weights(result: Result) -> str:
    """What tells weights apart."""
    return result.checkpoint_digest or f"no digest: {result.checkpoint}"


def _protocol(result: Result) -> str:
    """The protocol without the dataset's name."""
    return re.sub(r"\W*" + re.escape(result.dataset), "", result.protocol).strip() or result.protocol


def _missing(table: PaperTable, entries: Sequence[Entry]) -> list[str]:
    """For each dataset (or variant) without a result of ours, the command that makes one."""
    if table.task == "ablation":
        have = {entry.result.config["variant"] for entry in entries}
        lacking = [row.variant for row in table.rows if row.variant not in have]
        command = f"`{ablation_command(table)}`, or with `--scale demo` and no data in minutes"
        return [f"{', '.join(lacking)}: {command}"] if lacking else []
    have = {entry.result.dataset for entry in entries}
    return [
        f"{dataset}, {_split(table.split_of(dataset))}: `{COMMANDS[table.task, dataset]}`"
        for dataset in dict.fromkeys(column.dataset for column in table.columns)
        if dataset not in have
    ]


def _details(entries: Sequence[Entry]) -> str:
    """Two tables: a line per figure, and a line per result with what it was measured with."""
    figures, sources = [], []
    for entry in entries:
        result = entry.result
        for name, metric in result.metrics.items():
            figures.append(
                [
                    f"#{entry.number}",
                    result.dataset,
                    result.split,
                    result.protocol,
                    name,
                    _percent(metric.value),
                    _interval(metric) or NOTHING,
                    NOTHING if metric.per_fold is None else ", ".join(_percent(v) for v in metric.per_fold),
                    NOTHING if metric.chance is None else _percent(metric.chance),
                ]
            )
        sources.append(
            [
                f"#{entry.number}",
                _code(result.checkpoint),
                result.checkpoint_digest or NOTHING,
                result.commit,
                result.time,
                _videos(result),
                _counts(result),
            ]
        )
    heads = ["#", "Dataset", "Split", "Protocol", "Metric", "Value", "Interval", "Per fold", "Chance"]
    return "\n\n".join(
        [
            _markdown_table(heads, figures),
            _markdown_table(
                ["#", "Weights", "Digest", "Commit", "Time", "Videos", "Skipped, other counts"], sources
            ),
        ]
    )


def _videos(result: Result) -> str:
    """Number of videos, and of how many where the dataset is not complete."""
    if "num_videos" not in result.counts:
        return NOTHING
    number = result.counts["num_videos"]
    return f"{number} of {TEST_VIDEOS[result.dataset, result.split]}" if _is_part(result) else str(number)


def _is_part(result: Result) -> bool:
    """Whether fewer videos were evaluated than the complete dataset has."""
    complete = TEST_VIDEOS.get((result.dataset, result.split), 0)
    return result.counts.get("num_videos", complete) < complete


def _counts(result: Result) -> str:
    """Everything that was counted besides the videos; what was left out comes first. Zeros are not shown."""
    if not result.counts:
        return NOTHING
    counts = {name: count for name, count in result.counts.items() if count and name != "num_videos"}
    left_out = [name for name in counts if re.search("skipped|bad clips", name)]
    names = left_out + [name for name in counts if name not in left_out]
    shown = [f"{name.removeprefix('num_').replace('_', ' ')}: {counts[name]}" for name in names]
    return ", ".join(shown if left_out else ["nothing skipped", *shown])


def _shared_chance(entries: Sequence[Entry], column: tuple[str, str]) -> float | None:
    """Chance of a column where all our results in it agree, else None (each has its own in the details)."""
    dataset, name = column
    chances = {
        entry.result.metrics[name].chance
        for entry in entries
        if entry.result.dataset == dataset and name in entry.result.metrics
    }
    return chances.pop() if len(chances) == 1 else None


def _figure(metric: Metric) -> str:
    interval = _interval(metric)
    return f"{_percent(metric.value)} {interval}" if interval else _percent(metric.value)


def _interval(metric: Metric) -> str:
    if metric.interval is None:
        return ""
    low, high = metric.interval
    return f"[{_percent(low)}, {_percent(high)}]"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _split(name: str) -> str:
    return f"split {name}" if name[0].isdigit() else name


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _code(text: str) -> str:
    """As code, so that nothing in a name is taken for Markdown: fenced by more backticks than it has in a row."""
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Table whose columns are padded, so that it can be read in a terminal, too."""
    rows = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in [heads, *lines]]
    widths = [max(3, *(len(row[index]) for row in rows)) for index in range(len(heads))]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([padded[0], rule, *padded[1:]])


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 when the page was made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "files", nargs="*", type=Path, help=f"files of results, one JSON line each (default: {DEFAULT_FILE})"
    )
    parser.add_argument(
        "--table", choices=(*sorted(TABLES), "all"), default="all", help="of the paper (default: all)"
    )
    parser.add_argument("--markdown", type=Path, metavar="OUT.md", help="write the page to this file, too")
    args = parser.parse_args(argv)
    try:
        notes = []
        files = args.files or [DEFAULT_FILE]
        if not args.files and not DEFAULT_FILE.exists():
            files, notes = [], [f"{DEFAULT_FILE} does not exist: nothing was measured here yet."]
        results = [result for path in files for result in read_results(path)]
        page = render(results, None if args.table == "all" else [args.table], notes)
        # A file name that is not UTF-8 (surrogate escapes) is shown with question marks.
        data = page.encode("utf-8", "replace")
        if args.markdown is not None:
            args.markdown.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(args.markdown, data)
    except (ValueError, OSError) as error:
        print(f"results: {error}", file=sys.stderr)
        return 1
    print(data.decode("utf-8"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
