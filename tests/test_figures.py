"""Charts: geometry against known pixels, ticks by property, text escaped."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from u2a.figures import (
    INSET,
    LEFT,
    RIGHT,
    Frame,
    Level,
    Series,
    bar_chart,
    histogram,
    interval_glyph,
    layout,
    nice_ticks,
    scale,
    tick_label,
    xy_chart,
)

FRAME = Frame("Title", "step", "value")
EVIL = '</svg><script>alert(1)</script>"&'
NUMBERS = st.floats(-1e9, 1e9, allow_subnormal=False)


def parsed(svg: str) -> ET.Element:
    """Parse as XML: fails on anything unescaped."""
    return ET.fromstring(svg)


def path_of(svg: str, group: str, kind: str) -> list[str]:
    """Return the commands of one series' path."""
    for node in parsed(svg).iter("g"):
        if node.get("class") == group:
            for child in node.iter("path"):
                if child.get("class") == kind:
                    return re.findall(r"[A-Za-z][^A-Za-z]*", child.get("d", ""))
    return []


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0.13, 0.87, False, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)),
        (-3.0, 7.0, False, (-4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0)),
        (1.0, 3.0, True, (1.0, 2.0, 3.0)),
        (0.0, 12.0, True, (0.0, 5.0, 10.0, 15.0)),
        (5.0, 5.0, False, (4.7, 4.8, 4.9, 5.0, 5.1, 5.2, 5.3)),
        (0.0, 0.0, True, (-1.0, 0.0, 1.0)),
    ],
)
def test_ticks_known(low: float, high: float, whole: bool, expected: tuple[float, ...]) -> None:
    assert nice_ticks(low, high, whole=whole) == expected


@given(NUMBERS, NUMBERS, st.integers(1, 30), st.booleans())
def test_ticks_cover_and_can_be_labelled(a: float, b: float, count: int, whole: bool) -> None:
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high, count, whole)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step
    assert ticks[-1] >= high - 1e-6 * step
    assert 2 <= len(ticks) <= 3 * count + 3
    assert len({tick_label(tick, step) for tick in ticks}) == len(ticks) or step < 1e-4 or abs(high) + abs(low) > 1e6
    if whole:
        assert all(tick == round(tick) for tick in ticks)


@pytest.mark.parametrize(
    ("value", "step", "expected"),
    [(0.25, 0.25, "0.25"), (1200.0, 200.0, "1,200"), (2e-5, 1e-5, "2e−05"), (-1.5, 0.5, "−1.5"), (0.0, 0.1, "0")],
)
def test_tick_labels(value: float, step: float, expected: str) -> None:
    assert tick_label(value, step) == expected


def test_tick_label_survives_cancellation() -> None:
    ticks = nice_ticks(100000.0, 100000.004)
    assert tick_label(ticks[1], ticks[1] - ticks[0]).startswith("100,000.00")


@given(NUMBERS, st.tuples(NUMBERS, NUMBERS).filter(lambda ends: abs(ends[0] - ends[1]) > 1e-3))
def test_scale_keeps_the_ends(value: float, domain: tuple[float, float]) -> None:
    assert scale(domain[0], domain, (10, 90)) == pytest.approx(10)
    assert scale(domain[1], domain, (10, 90)) == pytest.approx(90)
    mirrored = scale(value, domain, (10, 90)) + scale(value, domain, (90, 10))
    assert mirrored == pytest.approx(100, abs=1e-6 * (1 + abs(value)))


def test_line_stands_at_the_known_pixels() -> None:
    svg = xy_chart(FRAME, [Series("a", [0.0, 10.0], [0.0, 1.0])])
    left, right = LEFT + INSET, FRAME.width - RIGHT - INSET
    plot = layout(FRAME, [Series("a", [0.0, 10.0], [0.0, 1.0])])
    assert path_of(svg, "s1", "line") == [f"M{left} {plot.box[3]}", f"L{right} {plot.box[1]}"]


def test_a_missing_value_breaks_the_line() -> None:
    svg = xy_chart(FRAME, [Series("a", [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, None, math.nan, 3.0])])
    assert [command[0] for command in path_of(svg, "s1", "line")] == ["M", "L", "M"]
    assert len(path_of(svg, "s1", "dots")) == 2 * 3


def test_error_bars_are_symmetric_and_only_where_defined() -> None:
    series = Series("a", [1.0, 2.0], [0.5, 0.7], error=[0.1, None], joined=False)
    svg = xy_chart(FRAME, [series])
    plot = layout(FRAME, [series])
    start, end = path_of(svg, "s1", "error")
    middle = (float(start.split()[1]) + float(end[1:])) / 2
    assert middle == pytest.approx(plot.y(0.5), abs=0.1)
    assert path_of(svg, "s1", "line") == []


def test_stems_reach_zero_and_the_level_is_inside() -> None:
    series = Series("a", [1.0, 2.0], [3.0, 4.0], stems=True)
    plot = layout(FRAME, [series], Level("budget", 9.0))
    assert plot.y_range[0] == 0
    assert plot.y_range[1] >= 9
    assert "budget" in xy_chart(FRAME, [series], Level("budget", 9.0))


@pytest.mark.parametrize("series", [[], [Series("a", [], [])], [Series("a", [1.0], [None])]])
def test_nothing_to_draw_gives_no_chart(series: list[Series]) -> None:
    assert xy_chart(FRAME, series) == ""


def test_a_single_point_is_drawn_inside_the_frame() -> None:
    series = [Series("a", [3.0], [7.0])]
    plot = layout(FRAME, series)
    assert plot.box[0] < plot.x(3.0) < plot.box[2]
    assert plot.x_ticks == (3.0,)
    assert path_of(xy_chart(FRAME, series), "s1", "line")


@given(
    st.lists(st.floats(-5, 5, allow_subnormal=False), min_size=1, max_size=60),
    st.lists(st.floats(-5, 5, allow_subnormal=False), max_size=60),
)
def test_histogram_areas_are_the_counts(first: list[float], second: list[float]) -> None:
    svg = histogram(FRAME, [("chosen", first, 1), ("rest", second, 0)])
    heights: dict[str, float] = {}
    for group, values in (("s1", first), ("s0", second)):
        boxes = path_of(svg, group, "area")
        rows = [float(c.split()[1]) - float(boxes[i + 1][1:]) for i, c in enumerate(boxes) if c[0] == "M"]
        heights[group] = sum(rows)
        assert bool(rows) == bool(values)
    if second:  # pixel heights of both layers are on one scale
        unit = heights["s1"] / len(first)
        assert heights["s0"] / len(second) == pytest.approx(unit, rel=0.05, abs=0.2)
    assert f"chosen ({len(first)})" in svg or not second


def test_histogram_layers_stand_on_each_other() -> None:
    values = [0.0, 0.5, 0.5, 1.0]
    svg = histogram(FRAME, [("a", values, 1), ("b", values, 2), ("c", values, 3)])
    layers = [path_of(svg, group, "area") for group in ("s1", "s2", "s3")]
    tops = [[command[1:] for command in layer[1::5]] for layer in layers]
    floors = [[command.split()[1] for command in layer[0::5]] for layer in layers]
    assert floors[1:] == tops[:-1]


def test_histogram_of_nothing() -> None:
    assert histogram(FRAME, []) == ""
    assert histogram(FRAME, [("a", [None, math.inf], 1)]) == ""


def test_bars_are_proportional() -> None:
    svg = bar_chart("Time", [("solve", 20.0), ("reward", 5.0), ("tiny", 0.01)], "s")
    widths = [float(node.get("width", "nan")) for node in parsed(svg).iter("rect")]
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.01)
    assert "20.0 s" in svg
    assert "&lt; 0.1 s" in svg
    assert bar_chart("Time", [], "s") == ""


def test_glyph_puts_zero_in_the_middle_and_shares_a_scale() -> None:
    node = parsed(interval_glyph(1.0, 0.5, 2.0, "good"))
    circle = next(node.iter("circle"))
    assert float(circle.get("cx", "nan")) == 60 + 54 / 2
    wide = next(parsed(interval_glyph(1.0, 0.5, 2.0, "good", span=4.0)).iter("circle"))
    assert float(wide.get("cx", "nan")) == 60 + 54 / 4
    parsed(interval_glyph(0.0, 0.0, 0.0, "unclear"))


def test_labels_are_escaped_everywhere() -> None:
    frame = Frame(EVIL, EVIL, EVIL)
    drawings = [
        xy_chart(frame, [Series(EVIL, [1.0], [1.0]), Series(EVIL, [1.0], [2.0])], Level(EVIL, 1.0)),
        histogram(frame, [(EVIL, [1.0, 2.0], 1), (EVIL, [1.0], 0)]),
        bar_chart(EVIL, [(EVIL, 1.0)], EVIL),
        interval_glyph(1.0, 0.0, 2.0, EVIL),
    ]
    for svg in drawings:
        assert {node.tag for node in parsed(svg).iter()} <= {"svg", "title", "text", "g", "path", "rect", "circle"}


def test_long_labels_are_cut() -> None:
    svg = bar_chart("Time", [("x" * 500, 1.0)], "s")
    assert "x" * 36 not in svg
    assert all(float(node.get("width", "nan")) > 100 for node in parsed(svg).iter("rect"))
