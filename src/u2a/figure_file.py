"""Charts as SVG files that stand alone, with colours of their own."""

from __future__ import annotations

from pathlib import Path

from u2a.record import write_whole

STYLE = """<style>
svg { background: #ffffff; } svg text { font: 12px system-ui, "DejaVu Sans", sans-serif; fill: #4c5661; }
svg text.title { font-size: 14px; font-weight: 600; fill: #1b2530; } svg path { fill: none; stroke: currentColor; }
svg .line { stroke-width: 2; } svg .dots { stroke-width: 6.5; stroke-linecap: round; }
svg .error { stroke-width: 1.3; opacity: .55; } svg .area { fill: currentColor; stroke: none; }
svg .grid { stroke: #e3e6ea; } svg .axis { stroke: #8a929c; }
svg .zero { stroke: #8a929c; stroke-dasharray: 4 3; stroke-width: 1.3; }
.s0 { color: #8a929c; } .s1 { color: #2667ad; } .s2 { color: #c05a14; }
.s3 { color: #23805a; } .s4 { color: #7c4fa8; } .s5 { color: #b0306a; }
</style>"""


def save_figure(svg: str, path: Path) -> None:
    """Write a chart as a file with its own colours.

    Args:
        svg: a chart of :mod:`u2a.figures`.
        path: target.
    """
    head, _, rest = svg.partition(">")
    if "xmlns=" not in head:
        head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"{head}>{STYLE}{rest}\n")
