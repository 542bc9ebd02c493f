"""A forecast for people: one table of phases, the verdict on memory, and the files."""

from __future__ import annotations

from collections.abc import Sequence

from u2a.forecast.phases import Forecast, PhaseCost

UNCERTAINTY = 0.25  # relative, of measured times and of the peak memory; tested on the demo
FORMULA_UNCERTAINTY = 0.4  # of memory by formula alone: an assumption, not measured


def size_text(size: float | None) -> str:
    """Write a number of bytes.

    Args:
        size: bytes, or None.

    Returns:
        Text with a unit, or a dash.

    >>> size_text(2048), size_text(3 * 2**30), size_text(None)
    ('2 KiB', '3.0 GiB', '-')
    """
    if size is None:
        return "-"
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            value = size / 2**power
            return f"{value:.1f} {unit}" if power == 30 else f"{value:.0f} {unit}"
    return f"{size:.0f} B"


def time_text(seconds: float | None) -> str:
    """Write a duration.

    Args:
        seconds: or None where it was not measured.

    Returns:
        Text.

    >>> time_text(0.04), time_text(75.0), time_text(7300.0), time_text(None)
    ('< 0.1 s', '1 min 15 s', '2 h 02 min', 'not measured')
    """
    if seconds is None:
        return "not measured"
    if 0 < seconds < 0.1:
        return "< 0.1 s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def flops_text(flops: float | None) -> str:
    """Write a number of floating-point operations.

    Args:
        flops: or None where it is not known.

    Returns:
        Text in units of 10^9, 10^12 or 10^15.

    >>> flops_text(2.5e12), flops_text(3e7), flops_text(None)
    ('2.5 T', '0.030 G', '-')
    """
    if flops is None:
        return "-"
    for unit, size in (("P", 1e15), ("T", 1e12)):
        if flops >= size:
            return f"{flops / size:.1f} {unit}"
    return f"{flops / 1e9:.3g} G" if flops >= 1e8 else f"{flops / 1e9:.3f} G" if flops else "0"


def forecast_text(forecast: Forecast) -> str:
    """Write a forecast as plain text.

    Args:
        forecast: what a run will cost.

    Returns:
        Lines without a last line feed.
    """
    shared = 100.0 * forecast.trainable / forecast.parameters
    lines = [
        f"Dry run: {forecast.model} on {forecast.device}; nothing is written",
        f"  parameters           {forecast.parameters:>15,}",
        f"  trainable parameters {forecast.trainable:>15,}  ({shared:.2f} %)",
        "",
        f"  {'phase':<28}{'time':>14}{'memory':>12}{'FLOPs':>10}",
        *(_line(phase.name, phase) for phase in forecast.phases),
    ]
    flops = sum(phase.flops or 0.0 for phase in forecast.phases)
    total = PhaseCost(name="in all", seconds=forecast.seconds, flops=flops, peak_bytes=forecast.peak_bytes)
    lines += [_line("in all", total), "", f"Memory: {_verdict(forecast)}"]
    if forecast.advice:
        lines += ["What to change:", *(f"  {line}" for line in forecast.advice)]
    lines += ["", *(f"note: {note}" for note in forecast.notes), "", f"Files in {forecast.output_dir}:"]
    lines += [f"  {file.path:<44}{size_text(file.bytes):>10}" for file in forecast.files]
    return "\n".join([*lines, f"  {'in all':<44}{size_text(sum(file.bytes or 0 for file in forecast.files)):>10}"])


def _line(name: str, cost: PhaseCost) -> str:
    return f"  {name:<28}{time_text(cost.seconds):>14}{size_text(cost.peak_bytes):>12}{flops_text(cost.flops):>10}"


def _verdict(forecast: Forecast) -> str:
    need = f"{size_text(forecast.peak_bytes)} at the peak"
    if forecast.fits is None:
        return f"{need}; how much is free on {forecast.device} is not known here"
    share = UNCERTAINTY if forecast.measured else FORMULA_UNCERTAINTY
    word = "does not fit" if not forecast.fits else "fits" if _safe(forecast, share) else "fits narrowly"
    return f"{word}: {need} (within about {share:.0%}), {size_text(forecast.free_bytes)} free"


def _safe(forecast: Forecast, share: float) -> bool:
    return forecast.peak_bytes * (1 + share) <= (forecast.free_bytes or 0)


def notes_on(why_not: str, phases: Sequence[PhaseCost]) -> list[str]:
    """Say what the figures assume.

    Args:
        why_not: why nothing was measured, or an empty text.
        phases: costs of the phases.

    Returns:
        Sentences.
    """
    if why_not:
        first = f"formulas alone, no time: {why_not}; memory within {FORMULA_UNCERTAINTY:.0%} is assumed"
    else:
        first = (
            f"times are told from a probe of a few steps on this machine, as busy as it is now: the whole "
            f"within about {UNCERTAINTY:.0%}, single phases more"
        )
    notes = [first]
    unknown = [phase.name for phase in phases if phase.seconds is None]
    if unknown and not why_not:
        notes.append(f"not measured, and not in the sum: {', '.join(unknown)}")
    notes.append(
        "the longest course is counted: all rounds and steps, answers of the full length, no fallback, no line "
        "search of the guard; stages finished in an earlier run cost nothing again"
    )
    notes.append("checkpoints are left out: they are gone when the run ends")
    return notes
