"""Curves for the report, as numbers in a box of 100 × 100 that the page stretches to its width."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

MOST_POINTS = 500
"""Points of a curve; longer histories are thinned evenly."""

_LEAST, _MOST = 1e-290, 1e290
"""Magnitudes beyond which what is computed from two values may be none that a float holds."""

_SMOOTH_FROM = 50
"""Points from which a moving average helps the eye."""


@dataclass(frozen=True)
class Tick:
    """A mark of an axis: its place in per cent from the left or the top, and its text."""

    percent: float
    text: str


@dataclass(frozen=True)
class Strip:
    """The part of a chart that belongs to one point, and what is said when a pointer rests on it."""

    left: float
    width: float
    text: str


@dataclass(frozen=True)
class Dot:
    """A point that is drawn by itself, in per cent from the upper left corner."""

    left: float
    top: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A curve over the steps."""

    title: str
    lines: tuple[str, ...]
    """SVG path data; more than one where values that cannot be drawn break the curve."""
    smooth: str
    """Path data of the moving average; '' for short and for broken curves."""
    strips: tuple[Strip, ...]
    """One for each point."""
    dots: tuple[Dot, ...]
    steps: tuple[Tick, ...]
    values: tuple[Tick, ...]
    missing: int
    """Points whose value cannot be drawn."""


@dataclass(frozen=True)
class Curve:
    """One of several curves that share a box."""

    name: str
    lines: tuple[str, ...]
    """SVG path data; more than one where values that cannot be drawn break the curve."""
    last: str
    """The last value."""


@dataclass(frozen=True)
class Overlay:
    """Several curves over the steps in one box."""

    title: str
    curves: tuple[Curve, ...]
    steps: tuple[Tick, ...]
    values: tuple[Tick, ...]


@dataclass(frozen=True)
class _Axis:
    """Maps `first` … `last` to 0 … 100."""

    first: float
    last: float

    def percent(self, value: float) -> float:
        return 100 * (value - self.first) / ((self.last - self.first) or 1)


def chart(title: str, history: Sequence[Mapping[str, Any]], key: str, *, dots: str | None = None) -> Chart:
    """A curve of `key` over the steps of a history, with dots where its entries hold the key `dots`.

    The axis of values begins at zero, or at the least value below it.
    """
    kept = [history[index] for index in thin(len(history), MOST_POINTS)]
    marked = [entry for entry in history if dots in entry]
    marked = [marked[index] for index in thin(len(marked), MOST_POINTS)]
    numbers = [float(entry[key]) for entry in kept]
    marks = [(entry["step"], float(entry[dots])) for entry in marked] if dots else []
    values = nice_ticks(*_span([*numbers, *(value for _, value in marks)]))
    x = _Axis(kept[0]["step"], kept[-1]["step"]) if kept else _Axis(0, 1)
    y = _Axis(values[-1], values[0])
    lefts = [x.percent(entry["step"]) for entry in kept]
    drawn = [value if can_be_drawn(value) else math.nan for value in numbers]
    missing = sum(map(math.isnan, drawn))
    smooth = smoothed(numbers) if len(numbers) >= _SMOOTH_FROM and not missing else []
    return Chart(
        title=title,
        lines=tuple(_paths((left, y.percent(value)) for left, value in zip(lefts, drawn, strict=True))),
        smooth="".join(_paths((left, y.percent(value)) for left, value in zip(lefts, smooth, strict=False))),
        strips=tuple(
            Strip(left, width, f"step {entry['step']:,}: {short_text(value)}")
            for (left, width), entry, value in zip(_cells(lefts), kept, numbers, strict=True)
        ),
        dots=tuple(
            Dot(x.percent(step), y.percent(value), f"step {step:,}: {short_text(value)}")
            for step, value in marks
            if can_be_drawn(value)
        ),
        steps=tuple(Tick(x.percent(at), f"{at:,.0f}") for at in _step_ticks(x)),
        values=tuple(Tick(y.percent(at), short_text(at)) for at in values),
        missing=missing,
    )


def overlay(title: str, curves: Mapping[str, Sequence[tuple[int, float]]], most_points: int) -> Overlay:
    """Curves of (step, value) by name, none of them empty; each is thinned to `most_points`.

    The axis of values begins at zero, or at the least value below it.
    """
    kept = {name: [points[at] for at in thin(len(points), most_points)] for name, points in curves.items()}
    steps = [step for points in kept.values() for step, _ in points] or [0]
    values = nice_ticks(*_span([value for points in kept.values() for _, value in points]))
    x, y = _Axis(min(0, *steps), max(steps)), _Axis(values[-1], values[0])

    def drawn(points: Sequence[tuple[int, float]]) -> tuple[str, ...]:
        places = (
            (x.percent(step), y.percent(value if can_be_drawn(value) else math.nan)) for step, value in points
        )
        return tuple(_paths(places))

    return Overlay(
        title=title,
        curves=tuple(Curve(name, drawn(points), short_text(points[-1][1])) for name, points in kept.items()),
        steps=tuple(Tick(x.percent(at), f"{at:,.0f}") for at in _step_ticks(x)),
        values=tuple(Tick(y.percent(at), short_text(at)) for at in values),
    )


def can_be_drawn(value: float) -> bool:
    """Whether a value has a place in a chart: it is finite, and far from what a float can hold."""
    return abs(value) <= _MOST


def thin(count: int, most: int) -> list[int]:
    """At most `most` indices of 0 … count - 1, evenly spaced, the first and the last among them.

    >>> thin(7, 4)
    [0, 2, 4, 6]
    """
    if count <= most:
        return list(range(count))
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values that enclose `low` … `high`, at equal distances of 1, 2 or 5 times a power of ten.

    >>> nice_ticks(0, 0.93)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    largest = max(abs(low), abs(high))
    # Values that differ in their last binary digits only are one value.
    span = high - low if high - low > max(_LEAST, 1e-12 * largest) else largest if largest > _LEAST else 1.0
    exponent = math.floor(math.log10(span / most))
    power = 10.0**exponent
    distance = next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor * most >= span)
    first, last = math.floor(low / distance), math.ceil(high / distance)
    # Rounded, since 3 × 0.2 is not 0.6 in binary.
    return [round(number * distance, -exponent) for number in range(first, max(last, first + 1) + 1)]


def smoothed(values: Sequence[float]) -> list[float]:
    """Moving average over a fortieth of the values to either side, fewer near the ends, none at the ends.

    >>> smoothed([0.0, 3.0, 0.0])
    [0.0, 1.0, 0.0]
    """
    reach = max(1, len(values) // 40)
    reaches = (min(reach, at, len(values) - 1 - at) for at in range(len(values)))
    windows = (values[at - near : at + near + 1] for at, near in enumerate(reaches))
    return [sum(window) / len(window) for window in windows]


def short_text(value: float) -> str:
    """A number in few characters.

    >>> [short_text(value) for value in (0.0, 0.00012, 0.41237, 12.5, 8123.4, float("nan"))]
    ['0', '0.00012', '0.4124', '12.5', '8,123', 'nan']
    """
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"


def _span(values: Sequence[float]) -> tuple[float, float]:
    drawn = [value for value in values if can_be_drawn(value)]
    return min([0.0, *drawn]), max([0.0, *drawn])


def _step_ticks(x: _Axis) -> list[float]:
    return [at for at in nice_ticks(x.first, x.last) if x.first <= at <= x.last and at == int(at)]


def _paths(points: Iterator[tuple[float, float]]) -> Iterator[str]:
    """Path data of each run of points whose values can be drawn."""
    run: list[str] = []
    for left, top in points:
        if math.isfinite(top):
            run.append(f"{left:.2f} {top:.2f}")
        elif run:
            yield _path(run)
            run = []
    if run:
        yield _path(run)


def _path(run: Sequence[str]) -> str:
    # A lone point is drawn as a line of no length, which round caps make visible.
    return "M" + "L".join(run if len(run) > 1 else [*run, *run])


def _cells(lefts: Sequence[float]) -> list[tuple[float, float]]:
    """Left edge and width of the part of 0 … 100 that is nearest to each point."""
    if not lefts:
        return []
    borders = [0.0, *((left + right) / 2 for left, right in pairwise(lefts)), 100.0]
    return [(left, right - left) for left, right in pairwise(borders)]
