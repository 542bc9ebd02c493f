"""Charts as inline SVG text: pure functions of numbers, no plotting library, no script.

Colours come from the page: every series is a group of class ``s0`` .. ``s5`` drawn in ``currentColor``, so one
drawing serves a light page, a dark page and paper. Labels are escaped here; points that are None or not finite
are left out (a line breaks there).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeGuard

LEFT, RIGHT, BOTTOM = 68, 14, 46
TITLE_HEIGHT, LEGEND_HEIGHT = 34, 20
INSET = 12  # pixels between the frame and the first and last x position
CHAR = 6.6  # mean width of a character of the 12 px label font
LONGEST = 36  # characters of a legend entry or bar label
BINS = 24  # intervals aimed at in a histogram

Value = float | None


@dataclass(frozen=True)
class Frame:
    """Title, axis labels and outer size (pixels) of a chart."""

    title: str
    x_label: str
    y_label: str
    width: int = 560
    height: int = 310


@dataclass(frozen=True)
class Series:
    """One named set of points.

    Attributes:
        label: name in the legend.
        x: positions.
        y: values of the same length; None leaves a gap.
        colour: palette index, 0 to 5.
        error: half-length of each error bar in the unit of y, or None for no bars.
        stems: draw a line from each point to y = 0.
        joined: connect neighbouring points.
    """

    label: str
    x: Sequence[float]
    y: Sequence[Value]
    colour: int = 1
    error: Sequence[Value] | None = None
    stems: bool = False
    joined: bool = True

    @property
    def points(self) -> list[tuple[float, float]]:
        """The finite points."""
        return [(x, y) for x, y in zip(self.x, self.y, strict=True) if _finite(y)]


@dataclass(frozen=True)
class Level:
    """A horizontal reference line, for example a budget."""

    label: str
    y: float


@dataclass(frozen=True)
class Plot:
    """Where values stand on the page: data ranges, their ticks and the pixel box of the plot area."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    box: tuple[float, float, float, float]  # left, top, right, bottom
    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]

    def x(self, value: float) -> float:
        """Pixel column of a value."""
        return scale(value, self.x_range, (self.box[0] + INSET, self.box[2] - INSET))

    def y(self, value: float) -> float:
        """Pixel row of a value (rows count downwards)."""
        return scale(value, self.y_range, (self.box[3], self.box[1]))


def scale(value: float, domain: tuple[float, float], pixels: tuple[float, float]) -> float:
    """Map a value linearly from a data range to a pixel range.

    Args:
        value: the value.
        domain: data values of the two ends (different).
        pixels: pixels of the two ends.

    Returns:
        The pixel.

    >>> scale(5.0, (0.0, 10.0), (100.0, 0.0))
    50.0
    """
    share = (value - domain[0]) / (domain[1] - domain[0])
    return pixels[0] + share * (pixels[1] - pixels[0])


def nice_ticks(low: float, high: float, count: int = 5, whole: bool = False) -> tuple[float, ...]:
    """Return evenly spaced round numbers that cover a range.

    Args:
        low: smallest value.
        high: largest value (may equal ``low``).
        count: number of intervals aimed at.
        whole: only whole numbers.

    Returns:
        Ticks with step 1, 2, 2.5 (not for whole numbers) or 5 times a power of ten; the first is <= low, the
        last >= high.

    >>> nice_ticks(0.13, 0.87)
    (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        pad = abs(low) * 0.05 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    sizes = (1.0, 2.0, 5.0, 10.0) if whole else (1.0, 2.0, 2.5, 5.0, 10.0)
    step = next(size * power for size in sizes if size * power >= raw * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return tuple(round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1))


def tick_label(value: float, step: float) -> str:
    """Write a tick with as many decimals as its step needs.

    Args:
        value: the tick.
        step: distance between ticks.

    Returns:
        For example ``"0.25"``, ``"1,200"`` or ``"2e−05"``.
    """
    if step < 1e-4 or abs(value) >= 1e7:
        text = f"{value:.3g}"
    else:
        fits = (digits for digits in range(6) if abs(round(step, digits) - step) < 1e-6 * step)
        decimals = next(fits, 6)
        text = f"{value:,.{decimals}f}"
    return text.replace("-", "−") if value else "0"


def xy_chart(frame: Frame, series: Sequence[Series], level: Level | None = None, whole: bool = True) -> str:
    """Draw lines with markers, or points with error bars or stems.

    Args:
        frame: title, labels and size.
        series: what to draw; one without a finite point is left out.
        level: dashed reference line.
        whole: label the x axis with whole numbers only (rounds, steps, ranks).

    Returns:
        SVG text, or an empty string when there is nothing to draw.
    """
    shown = [item for item in series if item.points]
    if not shown:
        return ""
    plot = layout(frame, shown, level, whole)
    return _chart(frame, plot, shown, level, [_marks(plot, item) for item in shown])


def histogram(frame: Frame, groups: Sequence[tuple[str, Sequence[Value], int]]) -> str:
    """Draw stacked counts of one quantity in common bins.

    Args:
        frame: title, labels and size.
        groups: label, values and palette index of each group, the lowest layer first.

    Returns:
        SVG text, or an empty string when there is no finite value.
    """
    found = [(label, [v for v in values if _finite(v)], colour) for label, values, colour in groups]
    found = [group for group in found if group[1]]
    everything = [value for _, values, _ in found for value in values]
    if not everything:
        return ""
    edges = nice_ticks(min(everything), max(everything), BINS)
    layers = []
    for label, values, colour in found:
        places = [min(max(bisect.bisect_right(edges, value) - 1, 0), len(edges) - 2) for value in values]
        layers.append((f"{label} ({len(values)})", [places.count(index) for index in range(len(edges) - 1)], colour))
    totals = [float(sum(column)) for column in zip(*(counts for _, counts, _ in layers), strict=True)]
    outline = [Series(label, edges, [*totals, 0.0], colour, stems=True) for label, _, colour in layers]
    plot = layout(frame, outline, whole=False)
    heights, marks = [0] * len(totals), []
    for _, counts, colour in layers:
        boxes = [_box(plot, edges[i : i + 2], heights[i], n) for i, n in enumerate(counts) if n]
        heights = [below + n for below, n in zip(heights, counts, strict=True)]
        marks.append(f'<g class="s{colour}"><path class="area" d="{"".join(boxes)}"/></g>')
    return _chart(frame, plot, outline, None, marks)


def layout(frame: Frame, series: Sequence[Series], level: Level | None = None, whole: bool = True) -> Plot:
    """Choose data ranges, ticks and the plot area of a chart.

    Args:
        frame: size.
        series: the data, at least one finite point.
        level: reference line; it lies inside the y range.
        whole: whole-numbered x ticks.

    Returns:
        The plot.
    """
    xs = [x for item in series for x, _ in item.points]
    ys = [y for item in series for y in _extents(item)] + ([level.y] if level else [])
    y_ticks = nice_ticks(min(ys), max(ys))
    low, high = min(xs), max(xs)
    if low == high:
        low, high = low - 1, high + 1
    x_ticks = tuple(tick for tick in nice_ticks(low, high, 6, whole) if min(xs) <= tick <= max(xs)) or (xs[0],)
    top = TITLE_HEIGHT + LEGEND_HEIGHT * len(_legend_rows(frame, series, level))
    box = (LEFT, top, frame.width - RIGHT, frame.height - BOTTOM)
    return Plot((low, high), (y_ticks[0], y_ticks[-1]), box, x_ticks, y_ticks)


def bar_chart(title: str, rows: Sequence[tuple[str, float]], unit: str, width: int = 560) -> str:
    """Draw horizontal bars with their values written beside them.

    Args:
        title: title.
        rows: label and value (>= 0), drawn in this order.
        unit: unit written after each value.
        width: outer width in pixels.

    Returns:
        SVG text, or an empty string without rows.
    """
    rows = [(_clip(label), value) for label, value in rows if _finite(value)]
    if not rows:
        return ""
    left = 16 + CHAR * max(len(label) for label, _ in rows)
    room = width - left - 84
    largest = max(value for _, value in rows) or 1.0
    parts = []
    for index, (label, value) in enumerate(rows):
        top, length = TITLE_HEIGHT + 24 * index, max(1.0, room * value / largest)
        parts.append(f'<text x="{_px(left - 8)}" y="{top + 13}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<rect class="s1 area" x="{_px(left)}" y="{top + 1}" width="{_px(length)}" height="16" rx="2"/>')
        amount = f"{value:,.1f}" if value >= 0.05 else "&lt; 0.1"
        parts.append(f'<text x="{_px(left + length + 6)}" y="{top + 13}">{amount} {escape(unit)}</text>')
    return _svg(title, width, TITLE_HEIGHT + 24 * len(rows) + 6, parts)


def interval_glyph(value: float, low: float, high: float, tone: str, span: float | None = None) -> str:
    """Draw one number with its interval against zero, small enough for a table cell.

    Args:
        value: the number.
        low: lower end.
        high: upper end.
        tone: ``good``, ``bad`` or ``unclear`` (the colour).
        span: value at the right end, to share one scale among several glyphs; None fits this one.

    Returns:
        SVG text, 120 x 16 pixels with zero in the middle; ``span`` is 54 pixels long.
    """
    span = span or max(abs(value), abs(low), abs(high)) or 1.0
    at = [_px(scale(number, (-span, span), (6, 114))) for number in (low, value, high)]
    return (
        '<svg class="glyph" width="120" height="16" viewBox="0 0 120 16" aria-hidden="true">'
        '<path class="zero" d="M60 0V16"/>'
        f'<g class="{escape(tone)}"><path class="line" d="M{at[0]} 8H{at[2]}"/>'
        f'<circle class="area" cx="{at[1]}" cy="8" r="4"/></g></svg>'
    )


def _finite(value: Value) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _clip(label: str) -> str:
    return label if len(label) <= LONGEST else label[: LONGEST - 1] + "…"


def _px(value: float) -> str:
    text = f"{value:.1f}"
    return text.removesuffix(".0")


def _errors(item: Series) -> list[tuple[float, float, float]]:
    """Return x, lower and upper end of every error bar that is defined."""
    bars = zip(item.x, item.y, item.error or [None] * len(item.x), strict=True)
    return [(x, y - e, y + e) for x, y, e in bars if _finite(y) and _finite(e)]


def _extents(item: Series) -> list[float]:
    ends = [end for _, low, high in _errors(item) for end in (low, high)]
    return [y for _, y in item.points] + ends + ([0.0] if item.stems else [])


def _box(plot: Plot, edges: Sequence[float], below: int, count: int) -> str:
    left, right = plot.x(edges[0]) + 0.5, plot.x(edges[1]) - 0.5
    return f"M{_px(left)} {_px(plot.y(below))}V{_px(plot.y(below + count))}H{_px(right)}V{_px(plot.y(below))}Z"


def _marks(plot: Plot, item: Series) -> str:
    """Return everything one series draws: error bars, stems, the line and its markers."""
    at = [(_px(plot.x(x)), _px(plot.y(y))) for x, y in item.points]
    parts = []
    if item.error:
        bars = "".join(f"M{_px(plot.x(x))} {_px(plot.y(low))}V{_px(plot.y(high))}" for x, low, high in _errors(item))
        parts.append(f'<path class="error" d="{bars}"/>')
    if item.stems:
        stems = "".join(f"M{x} {_px(plot.y(0))}V{y}" for x, y in at)
        parts.append(f'<path class="error" d="{stems}"/>')
    if item.joined:
        parts.append(f'<path class="line" d="{_path(plot, item)}"/>')
    if not item.joined or len(at) <= 60:
        dots = "".join(f"M{x} {y}h0" for x, y in at)
        parts.append(f'<path class="dots" d="{dots}"/>')
    return f'<g class="s{item.colour}">{"".join(parts)}</g>'


def _path(plot: Plot, item: Series) -> str:
    """Return the path through the points; it breaks where a value is missing."""
    path, pen = "", "M"
    for x, y in zip(item.x, item.y, strict=True):
        path += f"{pen}{_px(plot.x(x))} {_px(plot.y(y))}" if _finite(y) else ""
        pen = "L" if _finite(y) else "M"
    return path


def _legend_rows(frame: Frame, series: Sequence[Series], level: Level | None) -> list[list[tuple[str, str]]]:
    """Break the legend into rows that fit; none for a single line without a level."""
    names = [(f"s{item.colour}", _clip(item.label)) for item in series] + (
        [("level", _clip(level.label))] if level else []
    )
    if len(names) < 2:
        return []
    rows: list[list[tuple[str, str]]] = [[]]
    used = 0.0
    for name in names:
        wide = 40 + CHAR * len(name[1])
        if rows[-1] and used + wide > frame.width - LEFT:
            rows.append([])
            used = 0.0
        rows[-1].append(name)
        used += wide
    return rows


def _legend(frame: Frame, series: Sequence[Series], level: Level | None) -> list[str]:
    parts = []
    for index, row in enumerate(_legend_rows(frame, series, level)):
        x, y = float(LEFT), TITLE_HEIGHT + LEGEND_HEIGHT * index + 4
        for kind, label in row:
            swatch = "zero" if kind == "level" else "line"
            parts.append(f'<g class="{kind}"><path class="{swatch}" d="M{_px(x)} {y}h16"/></g>')
            parts.append(f'<text x="{_px(x + 22)}" y="{y + 4}">{escape(label)}</text>')
            x += 40 + CHAR * len(label)
    return parts


def _chart(frame: Frame, plot: Plot, series: Sequence[Series], level: Level | None, marks: list[str]) -> str:
    left, top, right, bottom = plot.box
    parts = _legend(frame, series, level)
    y_step = plot.y_ticks[1] - plot.y_ticks[0]
    x_step = plot.x_ticks[1] - plot.x_ticks[0] if len(plot.x_ticks) > 1 else 1.0
    for tick in plot.y_ticks:
        row = _px(plot.y(tick))
        parts.append(f'<path class="grid" d="M{left} {row}H{right}"/>')
        label = tick_label(tick, y_step)
        parts.append(f'<text x="{left - 8}" y="{_px(plot.y(tick) + 4)}" text-anchor="end">{label}</text>')
    for tick in plot.x_ticks:
        label = tick_label(tick, x_step)
        parts.append(f'<text x="{_px(plot.x(tick))}" y="{bottom + 18}" text-anchor="middle">{label}</text>')
    middle = _px((left + right) / 2)
    parts.append(f'<text x="{middle}" y="{bottom + 38}" text-anchor="middle">{escape(frame.x_label)}</text>')
    centre = _px((top + bottom) / 2)
    turn = f'transform="translate(14 {centre}) rotate(-90)"'
    parts.append(f'<text {turn} text-anchor="middle">{escape(frame.y_label)}</text>')
    if plot.y_range[0] < 0 < plot.y_range[1]:
        parts.append(f'<path class="axis" d="M{left} {_px(plot.y(0))}H{right}"/>')
    parts += marks
    if level:
        parts.append(f'<path class="zero" d="M{left} {_px(plot.y(level.y))}H{right}"/>')
    return _svg(frame.title, frame.width, frame.height, parts)


def _svg(title: str, width: int, height: int, parts: list[str]) -> str:
    head = f'<svg class="chart" role="img" viewBox="0 0 {width} {height}"><title>{escape(title)}</title>'
    return f'{head}<text class="title" x="0" y="16">{escape(title)}</text>{"".join(parts)}</svg>'
