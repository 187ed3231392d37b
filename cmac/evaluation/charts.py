"""Line charts as SVG text. Their colors are CSS classes of the page, so they follow light and dark mode."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 480, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 44


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve of a chart."""

    name: str
    """Shown in the legend."""
    xs: Sequence[float]
    """Horizontal positions."""
    ys: Sequence[float]
    """Values; those that are not finite are left out."""
    css_class: str
    """`line-1` ... `line-3` for curves, `line-chance` for a reference line."""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) in [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def smooth(ys: Sequence[float], span: int) -> list[float]:
    """Centered running mean over up to `span` values, shorter at the ends."""
    half = span // 2
    result = []
    for index in range(len(ys)):
        window = [y for y in ys[max(0, index - half) : index + half + 1] if math.isfinite(y)]
        result.append(sum(window) / len(window) if window else math.nan)
    return result


def line_chart(lines: Sequence[Line], title: str, x_name: str, percent: bool = False) -> Markup:
    """SVG of one or more curves over a common axis, all text escaped. `title` is for screen readers."""
    points = [
        (x, y)
        for line in lines
        for x, y in zip(line.xs, line.ys, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    if not points:
        return Markup('<p class="note">Nothing was logged.</p>')
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(0.0, min(y for _, y in points)), max(y for _, y in points)
    x_high = x_high if x_high > x_low else x_low + 1
    y_high = y_high + 0.05 * (y_high - y_low) if y_high > y_low else y_low + 1

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="chart"><title>{escape(title)}</title>']
    for value in ticks(y_low, y_high):
        _, y = place(x_low, value)
        label = f"{value:.0%}" if percent else f"{value:g}"
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4}" text-anchor="end">{label}</text>')
    for value in ticks(x_low, x_high, 6):
        x, _ = place(value, y_low)
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(x_name)}</text>')
    for line in lines:
        path = " ".join(
            "{},{}".format(*place(x, y))
            for x, y in zip(line.xs, line.ys, strict=True)
            if math.isfinite(x) and math.isfinite(y)
        )
        parts.append(f'<polyline class="line {escape(line.css_class)}" points="{path}"/>')
    parts.append("</svg>")
    return Markup("".join(parts))
