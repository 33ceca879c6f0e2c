"""Line charts whose marks are SVG and whose text is HTML: the marks stretch with the page, the text never does.

The SVG of a chart is a square of SIDE units, pulled to the size of the plot (preserveAspectRatio="none", strokes that
do not scale). Labels and ticks are placed over it in percent of the width and pixels of the height.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llmctl.reporting.markup import Html, data, tag

SIDE = 1000
MOST = 480  # points drawn of a line: one for every two or three pixels
LABEL = 17  # pixels between two labels at the right edge
LOG_FROM = 100.0  # largest to smallest: from there on a logarithmic axis

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A measured quantity by step."""

    name: str
    points: Sequence[Point]
    tone: str = "model"  # its colour: a class of page.css
    dots: bool = False


@dataclass(frozen=True)
class Level:
    """A value that does not change with the steps: something to compare with."""

    name: str
    value: float
    tone: str = "reference"


class Bucket(NamedTuple):
    """Points that are drawn as one."""

    x: float
    low: float
    mean: float
    high: float


def thin(points: Sequence[Point], most: int = MOST) -> list[Bucket]:
    """At most `most` points: neighbours become their mean, and the lowest and highest are kept so that no spike is
    lost.
    """
    size = max(1, math.ceil(len(points) / most))
    buckets = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        values = [y for _, y in group]
        buckets.append(Bucket(group[-1][0], min(values), sum(values) / len(values), max(values)))
    return buckets


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) between `low` and `high`, about as many as asked."""
    span = high - low
    if span <= 0 or about < 1:
        return [low]
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= 0.75 * rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def figure(value: float) -> str:
    """A value with three or four digits that mean something: `1.374`, `50.6k`, `0.0057`, `5.8e−7`."""
    size = abs(value)
    if size >= 10_000:
        for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if size >= limit:
                return _minus(f"{value / limit:.3g}{unit}")
    if size >= 1_000:
        return _minus(f"{value:,.0f}")
    if size == 0 or size >= 1e-3:
        return _minus(f"{value:.3f}".rstrip("0").rstrip(".") if size >= 1 else f"{value:.3g}")
    digits, _, exponent = f"{value:.2g}".partition("e")
    return _minus(f"{digits}e{int(exponent)}" if exponent else digits)


def small(value: float) -> str:
    """An error far below one: `5.8e−7`."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{_minus(str(int(exponent)))}"


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _ticked(value: float, step: float) -> str:
    """A tick with the digits that its distance to the next one asks for, and no more."""
    if abs(value) >= 10_000 or step >= 1_000:
        return figure(value) if value else "0"
    if step < 1e-2 and value:
        digits, _, exponent = f"{value:.1e}".partition("e")
        return _minus(f"{digits.removesuffix('.0')}e{int(exponent)}")
    return _minus(f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}") if value else "0"


class Scale(NamedTuple):
    """From a value to its place in the square, and the ticks of its axis."""

    place: Callable[[float], float]
    marks: list[tuple[float, str]]


def scale(low: float, high: float, about: int, *, down: bool = False) -> Scale:
    """A linear axis from `low` to `high`; `down` for y, which SVG counts from the top."""
    span = (high - low) or 1.0

    def place(value: float) -> float:
        share = (value - low) / span
        return SIDE * (1 - share if down else share)

    found = ticks(low, high, about)
    step = found[1] - found[0] if len(found) > 1 else span
    return Scale(place, [(place(value), _ticked(value, step)) for value in found])


def log_scale(low: float, high: float) -> Scale:
    """A logarithmic y axis over whole powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    span = max(1, last - first)

    def place(value: float) -> float:
        return SIDE * (1 - (math.log10(max(value, 10.0**first)) - first) / span)

    every = max(1, math.ceil(span / 4))
    return Scale(place, [(place(10.0**power), figure(10.0**power)) for power in range(first, last + 1, every)])


def chart(
    title: str,
    lines: Sequence[Line],
    levels: Sequence[Level] = (),
    *,
    unit: str = "",
    height: int = 260,
    zero: bool = False,
    end: float | None = None,
    written: Callable[[float], str] = figure,
    note: str | None = None,
) -> Html:
    """A chart with ticks and labels of its own; nothing where no line has a point.

    Args:
        height: of the plot, in pixels.
        zero: whether the y axis begins at zero; else it holds what was measured, with some air.
        end: the last step of the x axis; else the last that was measured.
        written: how the values are written.
        note: a figure for the caption of a chart of one line, which is not named at its end then.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return Html("")
    xs = [x for line in lines for x, _ in line.points]
    across = scale(min(0.0, *xs), max(1.0, end or 0.0, *xs), 5)
    up = _y_scale(lines, levels, zero, height)
    marks = [tag("path", d="".join(f"M0 {place:.1f}H{SIDE}" for place, _ in up.marks), class_="grid")]
    marks += [_level(level, up) for level in levels] + [_line(line, across, up) for line in lines]
    svg = tag(
        "svg",
        *marks,
        viewBox=f"0 0 {SIDE} {SIDE}",
        preserveAspectRatio="none",
        role="img",
        aria_label=_in_words(title, unit, lines, levels, written),
    )
    y_ticks = [
        tag("span", text, class_="y", style=f"top:{place / SIDE * height:.0f}px", aria_hidden="true")
        for place, text in up.marks
    ]
    x_ticks = [
        tag("span", text if index else f"step {text}", class_="x", style=f"left:{place / SIDE:.2%}", aria_hidden="true")
        for index, (place, text) in enumerate(across.marks)
    ]
    named = _labels(lines, levels, up, height, written) if note is None else []
    plot = tag(
        "div", svg, *y_ticks, *x_ticks, *named, tag("i", class_="cursor"), class_="plot", style=f"height:{height}px"
    )
    caption = tag("figcaption", tag("b", title), f" {unit}", tag("span", note or "", class_="readout"))
    kind = "chart" if note is None else "chart bare"
    return tag("figure", caption, plot, _data(lines, across, written), class_=kind)


def _y_scale(lines: Sequence[Line], levels: Sequence[Level], zero: bool, height: int) -> Scale:
    values = [y for line in lines for _, y in line.points]
    if min(values) > 0 and max(values) / min(values) >= LOG_FROM and not zero:
        return log_scale(min(values), max(values))
    values += [level.value for level in levels]
    low, high = min(values), max(values)
    air = 0.06 * ((high - low) or abs(high) or 1.0)
    bottom = 0.0 if zero and low >= 0 else low - air
    return scale(bottom, high + air, max(3, height // 45), down=True)


def _line(line: Line, across: Scale, up: Scale) -> Html:
    """The line through the means, over a band from the lowest to the highest where points were drawn as one."""
    buckets = thin(line.points)
    marks = []
    if any(bucket.high > bucket.low for bucket in buckets):
        upper = [(bucket.x, bucket.high) for bucket in buckets]
        lower = [(bucket.x, bucket.low) for bucket in reversed(buckets)]
        marks.append(tag("path", d=_path([*upper, *lower], across, up) + "Z", class_=f"band {line.tone}"))
    points = [(bucket.x, bucket.mean) for bucket in buckets]
    marks.append(tag("path", d=_path(points, across, up), class_=f"line {line.tone}"))
    if (line.dots and len(points) <= 60) or len(points) == 1:  # a path without length and with round ends is a dot
        dots = "".join(f"M{across.place(x):.1f} {up.place(y):.1f}h0" for x, y in points)
        marks.append(tag("path", d=dots, class_=f"dots {line.tone}"))
    return tag("g", *marks)


def _path(points: Sequence[Point], across: Scale, up: Scale) -> str:
    return "M" + "L".join(f"{across.place(x):.1f} {up.place(y):.1f}" for x, y in points)


def _level(level: Level, up: Scale) -> Html:
    return tag("path", d=f"M0 {up.place(level.value):.1f}H{SIDE}", class_=f"level {level.tone}")


def _labels(
    lines: Sequence[Line], levels: Sequence[Level], up: Scale, height: int, written: Callable[[float], str]
) -> list[Html]:
    """Names and last values at the right edge, moved apart where they would lie on each other."""
    ends = [(up.place(line.points[-1][1]), line.name, line.points[-1][1], line.tone) for line in lines]
    ends += [(up.place(level.value), level.name, level.value, level.tone) for level in levels]
    ends.sort(key=lambda end: end[0])
    wanted = [end[0] / SIDE * height for end in ends]
    return [
        tag("span", name, " ", tag("b", written(value)), class_=f"label {tone}", style=f"top:{top:.0f}px")
        for (_, name, value, tone), top in zip(ends, spread(wanted, LABEL, height - LABEL / 2), strict=True)
    ]


def spread(wanted: Sequence[float], gap: float, height: float) -> list[float]:
    """Ascending places at least `gap` apart, as near to the wanted ones as going down, then up again allows."""
    places: list[float] = []
    for want in wanted:
        places.append(max(want, places[-1] + gap) if places else want)
    limit = height
    for index in range(len(places) - 1, -1, -1):
        places[index] = min(places[index], limit)
        limit = places[index] - gap
    return places


def _data(lines: Sequence[Line], across: Scale, written: Callable[[float], str]) -> Html:
    """What the page's script shows where a reader points: for each line its places, steps and values."""
    shown = []
    for line in lines:
        buckets = thin(line.points)
        shown.append(
            {
                "name": line.name,
                "at": [round(across.place(bucket.x) / SIDE, 4) for bucket in buckets],
                "x": [round(bucket.x) for bucket in buckets],
                "y": [written(bucket.mean) for bucket in buckets],
            }
        )
    return data(shown)


def _in_words(
    title: str, unit: str, lines: Sequence[Line], levels: Sequence[Level], written: Callable[[float], str]
) -> str:
    """What a reader who can't see the chart is told."""
    said = [
        f"{line.name} from {written(line.points[0][1])} at step {line.points[0][0]:,.0f} "
        f"to {written(line.points[-1][1])} at step {line.points[-1][0]:,.0f}"
        for line in lines
    ]
    said += [f"{level.name} {written(level.value)}" for level in levels]
    return f"{title}{f' ({unit})' if unit else ''}: {'; '.join(said)}"
