"""Ablation tables: what several seeds of every variant say about the order that the paper reports."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cmac.config import VARIANTS
from cmac.evaluation.intervals import mean_interval
from cmac.evaluation.metrics import mean_over_splits
from cmac.evaluation.paper import LAMBDA, TABLES, PaperTable
from cmac.evaluation.results import Metric

FULL, SCRATCH = "full", "scratch"
"""Names of what is no variant: a preset as it is, and its network with fresh weights."""

Verdict = Literal["holds", "reversed", "not distinguishable", "one seed", "not measured"]

Measurements = Mapping[str, Mapping[int, Mapping[str, Metric]]]
"""Variant -> seed -> figure -> what was measured."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of an ablation table."""

    variant: str
    """A name of `cmac.config.VARIANTS`, `full` or `scratch`."""
    method: str
    """As the paper names it."""
    settings: tuple[str, ...]
    """As the paper prints them, one per name in `PaperTable.settings`."""
    paper_percents: tuple[float | None, ...]
    """The paper's own figures, one per column; None where it prints none."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A column of figures of ours."""

    name: str
    """As in the measurements."""
    heading: str
    """For a table's head."""
    paper_column: int | None = None
    """Column of the paper's table whose order this figure puts to the test; None: none, it is only shown."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two variants on the same seeds."""

    better: str
    """The variant that the paper has ahead."""
    worse: str
    """The other one."""
    figure: str
    """What is compared."""
    paper_points: float | None
    """By how much the paper has it ahead, in percentage points; None where it says so in words only."""
    difference: float | None
    """Mean over seeds of (better - worse), a fraction; None where they have no seed in common."""
    interval: tuple[float, float] | None
    """95 % t interval of it; None for fewer than two seeds or no spread."""
    seeds: tuple[int, ...]
    """Those that both were measured on."""
    verdict: Verdict
    """What the interval says: all of it above zero (holds), below (reversed), or around it."""


def table_rows(table: PaperTable) -> list[Row]:
    """The rows that can be trained here, in the paper's order; Fig. 4 with weights of which it tells no figure."""
    rows = [
        Row(variant=row.variant, method=row.method, settings=row.settings, paper_percents=row.percents)
        for row in table.rows
        if row.variant is not None
    ]
    if table.name == "fig4":
        known = {row.variant for row in rows}
        blank = (None,) * len(table.columns)
        rows += [
            Row(
                variant=name,
                method=rows[0].method,
                settings=(name.removeprefix(LAMBDA),),
                paper_percents=blank,
            )
            for name in VARIANTS
            if name.startswith(LAMBDA) and name not in known
        ]
        rows.sort(key=lambda row: float(row.settings[0]))
    return rows


def paper_order(table: PaperTable, column: int) -> list[tuple[str, str, float | None]]:
    """(better, worse, points between them) of neighbors in the paper's order by one of its columns.

    Variants with equal figures are no pair. Fig. 4's order is told in words: rising up to 1.5, falling after it.
    """
    rows = table_rows(table)
    if table.name == "fig4":
        peak = next(index for index, row in enumerate(rows) if row.variant == FULL)
        names = [row.variant for row in rows]
        rising = [(after, before, None) for before, after in itertools.pairwise(names[: peak + 1])]
        return rising + [(before, after, None) for before, after in itertools.pairwise(names[peak:])]
    known = [
        (row.paper_percents[column], row.variant) for row in rows if row.paper_percents[column] is not None
    ]
    known.sort(key=lambda item: -item[0])
    return [
        (better, worse, round(high - low, 2))
        for (high, better), (low, worse) in itertools.pairwise(known)
        if high > low
    ]


def paper_lead(table: PaperTable, row: Row, column: int) -> tuple[str, str, float | None] | None:
    """(better, worse, points) of a row and the full model in the paper; None where it claims no difference."""
    if row.variant == FULL:
        return None
    if table.name == "fig4":
        return FULL, row.variant, None
    full = next((other for other in table_rows(table) if other.variant == FULL), None)
    percents = (None if full is None else full.paper_percents[column]), row.paper_percents[column]
    if None in percents or percents[0] == percents[1]:
        return None
    points = round(abs(percents[0] - percents[1]), 2)
    return (FULL, row.variant, points) if percents[0] > percents[1] else (row.variant, FULL, points)


def compare(
    measured: Measurements, better: str, worse: str, figure: str, paper_points: float | None = None
) -> Comparison:
    """Paired difference of two variants over the seeds that both were measured on.

    Choice: pairs, because a seed fixes the initial weights, the order of the clips and what is done to them for both
    variants, so that what the seed brings along cancels out; and a t interval over seeds, because the question is
    whether a training with the variant is better, not whether these networks differ on these videos.
    """
    values = [
        {seed: metrics[figure].value for seed, metrics in measured.get(name, {}).items() if figure in metrics}
        for name in (better, worse)
    ]
    seeds = tuple(sorted(values[0].keys() & values[1].keys()))
    differences = [values[0][seed] - values[1][seed] for seed in seeds]
    interval = mean_interval(differences) if differences else None
    return Comparison(
        better=better,
        worse=worse,
        figure=figure,
        paper_points=paper_points,
        difference=sum(differences) / len(differences) if differences else None,
        interval=interval,
        seeds=seeds,
        verdict=judge(len(seeds), interval),
    )


def judge(num_seeds: int, interval: tuple[float, float] | None) -> Verdict:
    """What the interval of (better - worse) says about the paper's claim.

    Without an interval although there are seeds enough, all seeds gave the same difference; that shows no spread to
    judge by.
    """
    if num_seeds == 0:
        return "not measured"
    if num_seeds == 1:
        return "one seed"
    if interval is None or interval[0] <= 0 <= interval[1]:
        return "not distinguishable"
    return "holds" if interval[0] > 0 else "reversed"


def summarize(measured: Measurements) -> dict[str, dict[str, Metric]]:
    """Variant -> figure -> mean over its seeds with t interval, chance, and the seeds' own values in `per_fold`.

    A figure that some seed of the variant lacks is left out.
    """
    summary = {}
    for variant, by_seed in measured.items():
        if not by_seed:
            continue
        common = set.intersection(*(set(metrics) for metrics in by_seed.values()))
        names = [name for name in next(iter(by_seed.values())) if name in common]
        per_seed = [{name: by_seed[seed][name] for name in names} for seed in sorted(by_seed)]
        summary[variant] = mean_over_splits(per_seed) if names else {}
    return summary


@dataclass(frozen=True, kw_only=True)
class AblationTable:
    """A finished table: everything that its JSON and its Markdown show."""

    table: str
    """Name in `cmac.evaluation.paper.TABLES`."""
    scale: str
    """`paper` or `demo`."""
    figures: tuple[Figure, ...]
    """Columns of ours."""
    measured: Measurements
    """What was measured."""
    failed: Mapping[str, str]
    """Variant -> what went wrong; its other seeds may be there."""
    notes: tuple[str, ...] = ()
    """Lines about how it was made."""

    @property
    def paper(self) -> PaperTable:
        """The paper's table."""
        return TABLES[self.table]

    def rows(self) -> list[Row]:
        """Those of the paper that can be trained here. At demo scale fresh weights are among them in every table."""
        rows = table_rows(self.paper)
        if self.scale == "demo" and all(row.variant != SCRATCH for row in rows):
            blank = ("",) * len(self.paper.settings), (None,) * len(self.paper.columns)
            rows.insert(
                0, Row(variant=SCRATCH, method="fresh weights", settings=blank[0], paper_percents=blank[1])
            )
        return rows

    def order(self) -> list[Comparison]:
        """Every pair of neighbors in the paper's order, for each figure that it is tested by."""
        return [
            compare(self.measured, better, worse, figure.name, points)
            for figure in self.figures
            if figure.paper_column is not None
            for better, worse, points in paper_order(self.paper, figure.paper_column)
        ]

    def lead(self, row: Row, figure: Figure) -> Comparison | None:
        """A row and the full model; None where the paper claims no difference between them."""
        if figure.paper_column is None:
            return None
        claim = paper_lead(self.paper, row, figure.paper_column)
        return None if claim is None else compare(self.measured, claim[0], claim[1], figure.name, claim[2])


def to_json(table: AblationTable) -> dict[str, Any]:
    """All of a table as plain values."""
    summary = summarize(table.measured)
    rows = []
    for row in table.rows():
        by_seed = table.measured.get(row.variant, {})
        leads = {
            figure.name: comparison
            for figure in table.figures
            if (comparison := table.lead(row, figure)) is not None
        }
        rows.append(
            {
                **asdict(row),
                "failed": table.failed.get(row.variant),
                "seeds": sorted(by_seed),
                "figures": {name: asdict(metric) for name, metric in summary.get(row.variant, {}).items()},
                "against_full": {name: asdict(comparison) for name, comparison in leads.items()},
            }
        )
    return {
        "table": table.table,
        "title": table.paper.title,
        "scale": table.scale,
        "notes": list(table.notes),
        "paper_columns": [column.heading for column in table.paper.columns],
        "rows": rows,
        "order": [asdict(comparison) for comparison in table.order()],
    }


def to_markdown(table: AblationTable) -> str:
    """The table as a page: ours beside the paper's figures, the paper's order put to the test, all other figures."""
    paper, summary = table.paper, summarize(table.measured)
    rows = table.rows()
    judged = [figure for figure in table.figures if figure.paper_column is not None]
    shown = [figure for figure in table.figures if figure.paper_column is None]
    name = "Fig. 4" if paper.name == "fig4" else f"Table {paper.name}"
    parts = [
        f"# {name}: {paper.title} ({table.scale} scale)",
        "\n".join(f"- {note}" for note in table.notes),
        'Figures in %. Ours: mean over seeds with its 95 % t interval. "- full": the variant minus the full model over '
        "the same seeds. A verdict says whether the paper's difference to the full model holds: *holds* or *reversed* "
        "where the interval of the paired difference excludes zero, else *not distinguishable*.",
    ]
    heads = ["Method", "Variant", *paper.settings, *(f"{column.heading} (paper)" for column in paper.columns)]
    for figure in judged:
        heads += [figure.heading, "- full", "verdict"]
    lines = []
    for row in rows:
        cells = [row.method, f"`{row.variant}`", *row.settings, *map(_percent, row.paper_percents)]
        for figure in judged:
            cells.append(_cell(table, summary, row.variant, figure.name))
            comparison = compare(table.measured, row.variant, FULL, figure.name)
            lead = table.lead(row, figure)
            shows = row.variant != FULL and comparison.difference is not None
            cells += [_difference(comparison) if shows else "", "" if lead is None else lead.verdict]
        lines.append(cells)
    chances = _chances(table, [figure.name for figure in judged])
    if any(chances):
        blank = [""] * (len(paper.settings) + len(paper.columns) + 1)
        lines.append(["chance", *blank, *itertools.chain(*([chance, "", ""] for chance in chances))])
    parts.append(markdown_table(heads, lines))

    order = table.order()
    if order:
        parts.append("## The paper's order, neighbor by neighbor")
        headings = {figure.name: figure.heading for figure in table.figures}
        parts.append(
            markdown_table(
                ["Paper: better", "than", "by (points)", "figure", "ours", "seeds", "verdict"],
                [
                    [
                        f"`{pair.better}`",
                        f"`{pair.worse}`",
                        _percent(pair.paper_points) if pair.paper_points is not None else "in words",
                        headings[pair.figure],
                        _difference(pair) if pair.difference is not None else "-",
                        str(len(pair.seeds)),
                        pair.verdict,
                    ]
                    for pair in order
                ],
            )
        )
    if shown and summary:
        parts.append("## Other figures")
        lines = [
            [f"`{row.variant}`", *(_cell(table, summary, row.variant, figure.name) for figure in shown)]
            for row in rows
        ]
        chances = _chances(table, [figure.name for figure in shown])
        if any(chances):
            lines.append(["chance", *chances])
        parts.append(markdown_table(["Variant", *(figure.heading for figure in shown)], lines))
    if table.failed:
        parts.append("## Failed")
        parts += [f"`{variant}`:\n\n```\n{reason.rstrip()}\n```" for variant, reason in table.failed.items()]
    remarks = [paper.protocol, *paper.known_errors]
    parts.append("About the paper's figures:\n\n" + "\n".join(f"- {line}" for line in remarks))
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars within cells are escaped."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _cell(table: AblationTable, summary: dict[str, dict[str, Metric]], variant: str, figure: str) -> str:
    """Mean and interval, or why there is none. What failed is said also where other seeds have a figure."""
    metric = summary.get(variant, {}).get(figure)
    if metric is None:
        return "failed" if variant in table.failed else "-"
    text = _percent(100 * metric.value)
    if metric.interval is not None:
        text += f" [{100 * metric.interval[0]:.1f}, {100 * metric.interval[1]:.1f}]"
    return f"{text} (a seed failed)" if variant in table.failed else text


def _difference(comparison: Comparison) -> str:
    text = f"{100 * comparison.difference:+.1f}"
    if comparison.interval is not None:
        text += f" [{100 * comparison.interval[0]:+.1f}, {100 * comparison.interval[1]:+.1f}]"
    return text


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _chances(table: AblationTable, names: Sequence[str]) -> list[str]:
    """Chance of each figure where all measurements agree on it, else nothing."""
    cells = []
    for name in names:
        found = {
            None if metrics[name].chance is None else round(metrics[name].chance, 6)
            for by_seed in table.measured.values()
            for metrics in by_seed.values()
            if name in metrics
        }
        chance = found.pop() if len(found) == 1 else None
        cells.append("" if chance is None else _percent(100 * chance))
    return cells
