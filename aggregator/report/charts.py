"""Small figures as SVG text, to stand within a page: curves over versions, bars by name, columns by number.

Colours are the classes ``l0`` to ``l4`` (lines) and ``f0`` to ``f4`` (faces), which the page's style gives by day and
by night. Own drawing of a few lines, so that the aggregator's container needs no library for pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aggregator.report.page import escape

__all__ = ["POINTS", "Curve", "Mark", "bars", "columns", "curves", "thinned"]

#: Points of a curve that are drawn; of more, each stands for several.
POINTS = 400
COLOURS = 5
WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 26, 34
#: A scale is logarithmic if the largest value is so many times the smallest.
WIDE = 100.0
#: Values beyond it are drawn there, and such as differ by less than its inverse are one: a model that diverged has
#: numbers of any size.
HUGE = 1e100
#: Room for names beside bars, in letters and in pixels.
LETTERS, NAMES = 26, 170
ROW = 20

#: x, lowest, middle, highest.
Point = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Curve:
    """A line, and the band from the lowest to the highest that its points stand for."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at ``x``."""

    x: float
    text: str


def thinned(x: Sequence[float], y: Sequence[float], most: int = POINTS) -> list[Point]:
    """``y`` over ``x``, at most ``most`` points, each the lowest, the median and the highest of its stretch.

    Values that are not finite are left out; those beyond ``HUGE`` are there.
    """
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    good = np.isfinite(ys)
    xs, ys = xs[good], np.clip(ys[good], -HUGE, HUGE)
    if len(xs) <= most:
        return [(a, b, b, b) for a, b in zip(xs.tolist(), ys.tolist(), strict=True)]
    pieces = zip(np.array_split(xs, most), np.array_split(ys, most), strict=True)
    return [(float(a[-1]), float(b.min()), float(np.median(b)), float(b.max())) for a, b in pieces]


def curves(lines: Sequence[Curve], *, x_name: str, marks: Sequence[Mark] = (), may_be_wide: bool = False) -> str:
    """``lines`` in one picture, with ``marks`` as upright lines; "" if no line has a point.

    ``may_be_wide``: logarithmic upright if all is positive and the values lie far apart.
    """
    shown = [line for line in lines if line.points][:COLOURS]
    if not shown:
        return ""
    points = [point for line in shown for point in line.points]
    low, high = min(p[1] for p in points), max(p[3] for p in points)
    is_wide = may_be_wide and low > 1 / HUGE and high / low > WIDE
    upright = _Scale.over(low, high, HEIGHT - BOTTOM, TOP, is_wide=is_wide)
    along = _Scale.over(min(p[0] for p in points), max(p[0] for p in points), LEFT, WIDTH - RIGHT, is_tight=True)
    parts = [_grid(upright), _feet(along, x_name)]
    for mark in marks:
        if along.low <= mark.x <= along.high:
            at = _n(along.place(mark.x))
            parts.append(
                f'<line class="mark" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
                f"<title>{escape(mark.text)}</title></line>"
            )
    for colour, line in enumerate(shown):
        parts.append(_line(line, colour, along, upright))
    parts.append(_legend([line.name for line in shown]))
    return _svg(WIDTH, HEIGHT, f"{', '.join(line.name for line in shown)} by {x_name}", parts)


def bars(values: Mapping[str, float], *, colour: int = 0, unit: str = "") -> str:
    """A bar a name, downwards in the order given; below zero they go to the left. "" without values."""
    rows = {name: min(max(value, -HUGE), HUGE) for name, value in values.items() if math.isfinite(value)}
    if not rows:
        return ""
    low, high = min(0.0, *rows.values()), max(0.0, *rows.values())
    # Room at either end for what is written there.
    left = NAMES + (56 if low < 0 else 0)
    scale = _Scale(low, high if high - low > 1 / HUGE else low + 1.0, left, WIDTH - 64)
    zero = scale.place(0.0)
    parts = []
    for row, (name, value) in enumerate(rows.items()):
        top, end = row * ROW + 4, scale.place(value)
        start, width = min(zero, end), max(abs(end - zero), 0.5)
        anchor, text = ("end", end - 5) if value < 0 else ("start", end + 5)
        parts.append(
            f'<g><title>{escape(name)}: {escape(_figure(value))}{escape(unit)}</title><text class="label" '
            f'x="{NAMES - 8}" y="{top + 11}" text-anchor="end">{escape(_short(name))}</text>'
            f'<rect class="f{colour}" x="{_n(start)}" y="{top}" width="{_n(width)}" height="{ROW - 6}" rx="1.5"/>'
            f'<text x="{_n(text)}" y="{top + 11}" text-anchor="{anchor}">{escape(_figure(value))}{escape(unit)}</text>'
            "</g>"
        )
    height = len(rows) * ROW + 6
    parts.append(f'<line class="axis" x1="{_n(zero)}" x2="{_n(zero)}" y1="0" y2="{height}"/>')
    return _svg(WIDTH, height, f"{len(rows)} bars", parts)


def columns(counts: Mapping[int, int], *, x_name: str, most: int = 30, colour: int = 0) -> str:
    """The share of each number; numbers from ``most`` on are one column. "" without any."""
    total = sum(counts.values())
    if not total:
        return ""
    kept: dict[int, int] = {}
    for number, count in counts.items():
        kept[min(number, most)] = kept.get(min(number, most), 0) + count
    last = max(*kept, 1)
    upright = _Scale.over(0.0, max(kept.values()) / total * 100, HEIGHT - BOTTOM, TOP)
    step = (WIDTH - RIGHT - LEFT) / (last + 1)
    parts = [_grid(upright, unit=" %")]
    every = max(1, math.ceil((last + 1) / 16))
    for number in range(last + 1):
        middle = LEFT + (number + 0.5) * step
        share = kept.get(number, 0) / total * 100
        top = upright.place(share)
        name = f"{number}+" if number == most and max(counts) > most else str(number)
        if share:
            parts.append(
                f'<rect class="f{colour}" x="{_n(middle - step * 0.4)}" y="{_n(top)}" width="{_n(step * 0.8)}" '
                f'height="{_n(HEIGHT - BOTTOM - top)}"><title>{name}: {kept[number]:,} ({share:.1f} %)</title></rect>'
            )
        if number % every == 0:
            parts.append(f'<text x="{_n(middle)}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{name}</text>')
    parts.append(_x_name(x_name))
    return _svg(WIDTH, HEIGHT, f"shares by {x_name}", parts)


# ------------------------------------------------------------------------------------------------------ scales


@dataclass(frozen=True, slots=True)
class _Scale:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float
    is_wide: bool = False

    @classmethod
    def over(
        cls, low: float, high: float, start: float, end: float, *, is_wide: bool = False, is_tight: bool = False
    ) -> _Scale:
        """One that holds ``low`` to ``high`` with a little room, which ``is_tight`` leaves out."""
        if is_wide:
            return cls(math.log10(low), math.log10(high), start, end, is_wide=True)
        if high - low <= max(abs(low), abs(high)) * 1e-9 + 1 / HUGE:
            room = abs(low) * 0.1 if abs(low) > 1 / HUGE else 1.0
            return cls(low - room, high + room, start, end)
        if is_tight:
            return cls(low, high, start, end)
        # From zero, unless that would press all into one end.
        bottom = 0.0 if 0 <= low < (high - low) * 1.5 else low - (high - low) * 0.05
        return cls(bottom, high + (high - low) * 0.05, start, end)

    def place(self, value: float) -> float:
        """Where ``value`` is."""
        if self.is_wide:
            value = math.log10(value)
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers on it."""
        if self.is_wide:
            first, last = math.ceil(self.low), math.floor(self.high)
            every = max(1, math.ceil((last - first + 1) / 6))
            decades = [10.0**power for power in range(first, last + 1, every)]
            return decades or [10.0**self.low, 10.0**self.high]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next((m for m in (1, 2, 5) if (self.high - self.low) / (step * m) <= 6), 10)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _grid(scale: _Scale, unit: str = "") -> str:
    parts = []
    for tick in scale.ticks():
        at = _n(scale.place(tick))
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>'
            f'<text x="{LEFT - 7}" y="{at}" dy="4" text-anchor="end">{escape(_figure(tick))}{unit}</text>'
        )
    return "".join(parts)


def _feet(scale: _Scale, name: str) -> str:
    base = HEIGHT - BOTTOM
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>']
    parts += [
        f'<text x="{_n(scale.place(tick))}" y="{base + 15}" text-anchor="middle">{escape(_figure(tick))}</text>'
        for tick in scale.ticks()
        if scale.low <= tick <= scale.high
    ]
    return "".join(parts) + _x_name(name)


def _x_name(name: str) -> str:
    return f'<text x="{(LEFT + WIDTH - RIGHT) // 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(name)}</text>'


# ------------------------------------------------------------------------------------------------------- pieces


def _line(line: Curve, colour: int, along: _Scale, upright: _Scale) -> str:
    xs = [_n(along.place(p[0])) for p in line.points]
    parts = []
    if any(p[1] < p[3] for p in line.points):
        up = " ".join(f"{x},{_n(upright.place(p[3]))}" for x, p in zip(xs, line.points, strict=True))
        down = " ".join(f"{x},{_n(upright.place(p[1]))}" for x, p in zip(xs[::-1], line.points[::-1], strict=True))
        parts.append(f'<polygon class="band f{colour}" points="{up} {down}"/>')
    middle = [f"{x},{_n(upright.place(p[2]))}" for x, p in zip(xs, line.points, strict=True)]
    if len(middle) == 1:
        x, y = middle[0].split(",")
        parts.append(f'<circle class="f{colour}" cx="{x}" cy="{y}" r="3"/>')
    else:
        parts.append(f'<polyline class="l{colour}" points="{" ".join(middle)}"/>')
    return "".join(parts)


def _legend(names: Sequence[str]) -> str:
    parts, at = [], float(LEFT)
    for colour, name in enumerate(names):
        short = _short(name)
        parts.append(
            f'<rect class="f{colour}" x="{_n(at)}" y="7" width="12" height="4" rx="1"/>'
            f'<text class="label" x="{_n(at + 17)}" y="13">{escape(short)}</text>'
        )
        at += 17 + len(short) * 6.2 + 16
    return "".join(parts)


def _svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _short(name: str) -> str:
    return name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…"


def _figure(value: float) -> str:
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.3g}"


def _n(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")
