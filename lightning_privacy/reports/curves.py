"""Line plots as inline SVG: no script, no font, no image, in the colours of the page around them.

A page must be readable on its own, for years, in light and dark; so this draws the little that it
needs itself. Text is as wide as a phone; larger screens show several plots side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_WIDTH, _HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 14, 44
_TICKS = 4
_FEW = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class LinePlot:
    """One curve, with its axes.

    Args:
        name: Short and unique on the page.
        title: What it shows; stands above it.
        x_label: Of the horizontal axis.
        y_label: Of the vertical axis.
        points: Pairs of finite numbers, in order.
        log_x: Whether the horizontal axis is logarithmic; all x are then > 0.
        log_y: The same of the vertical one.
        marked: A point to point out, with its words.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    points: Sequence[tuple[float, float]]
    log_x: bool = False
    log_y: bool = False
    marked: tuple[float, float, str] | None = None

    def svg(self) -> str:
        """Draw it.

        Returns:
            An ``svg`` element with a title and a description for those who do not see it.
        """
        horizontal = _axis([x for x, _ in self.points], self.log_x, _LEFT, _WIDTH - _RIGHT)
        vertical = _axis([y for _, y in self.points], self.log_y, _HEIGHT - _BOTTOM, _TOP)
        path = " ".join(
            f"{'L' if number else 'M'}{horizontal.at(x):.1f} {vertical.at(y):.1f}"
            for number, (x, y) in enumerate(self.points)
        )
        labels = f"{self.name}-title {self.name}-description"
        parts = [
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="{labels}">',
            f'<title id="{self.name}-title">{escape(self.title)}</title>',
            f'<desc id="{self.name}-description">{escape(self._description())}</desc>',
            *self._grid(horizontal, vertical),
            f'<path class="curve" d="{path}"/>',
            *self._dots(horizontal, vertical),
            *self._mark(horizontal, vertical),
            "</svg>",
        ]
        return "\n".join(parts)

    def _description(self) -> str:
        (first, start), (last, end) = self.points[0], self.points[-1]
        return (
            f"{self.y_label} against {self.x_label}: from {short(start)} at {short(first)} to "
            f"{short(end)} at {short(last)}."
        )

    def _grid(self, horizontal: _Axis, vertical: _Axis) -> list[str]:
        bottom, middle = _HEIGHT - _BOTTOM, (_LEFT + _WIDTH - _RIGHT) / 2
        lines = []
        for value in vertical.ticks:
            y = vertical.at(value)
            lines.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
            lines.append(_text(_LEFT - 6, y + 4, short(value), "end"))
        for value in horizontal.ticks:
            x = horizontal.at(value)
            lines.append(f'<path class="grid" d="M{x:.1f} {bottom}v5"/>')
            lines.append(_text(x, bottom + 18, short(value), "middle"))
        lines.append(f'<path class="axis" d="M{_LEFT} {bottom}H{_WIDTH - _RIGHT}"/>')
        lines.append(_text(middle, _HEIGHT - 6, self.x_label, "middle"))
        return lines

    def _dots(self, horizontal: _Axis, vertical: _Axis) -> list[str]:
        if len(self.points) > _FEW:
            return []
        return [
            f'<circle class="dot" cx="{horizontal.at(x):.1f}" cy="{vertical.at(y):.1f}" r="2.5"/>'
            for x, y in self.points
        ]

    def _mark(self, horizontal: _Axis, vertical: _Axis) -> list[str]:
        if self.marked is None:
            return []
        x, y = horizontal.at(self.marked[0]), vertical.at(self.marked[1])
        # ε falls as δ grows: the upper right corner is free.
        return [
            f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="5"/>',
            _text(_WIDTH - _RIGHT, _TOP + 14, self.marked[2], "end", "strong"),
        ]


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        scale = math.log10 if self.log else float
        low, high = scale(self.low), scale(self.high)
        share = (scale(value) - low) / (high - low)
        return self.start + share * (self.end - self.start)


def _axis(values: Sequence[float], log: bool, start: float, end: float) -> _Axis:
    low, high = min(values), max(values)
    if log:
        lower, upper = math.floor(math.log10(low)), math.ceil(math.log10(high))
        upper = max(upper, lower + 1)
        stride = -(-(upper - lower) // _TICKS)
        ticks = tuple(10.0**place for place in range(lower, upper + 1, stride))
        return _Axis(10.0**lower, 10.0**upper, start, end, True, ticks)
    # Quantities that are never negative start at nothing, or differences look larger than they are.
    low = 0.0 if low >= 0 else low
    width = _round_width((high - low) / _TICKS or 1.0)
    lower, upper = math.floor(low / width), max(math.ceil(high / width), 1)
    ticks = tuple(place * width for place in range(lower, upper + 1))
    return _Axis(lower * width, upper * width, start, end, False, ticks)


def _round_width(width: float) -> float:
    unit = 10.0 ** math.floor(math.log10(width))
    return unit * next(step for step in (1, 2, 2.5, 5, 10) if step * unit >= width * (1 - 1e-9))


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def short(value: float) -> str:
    """A number as an axis shows it.

    Args:
        value: Any finite number.

    Returns:
        Three significant digits, without an exponent where that is short.
    """
    if value and not 1e-3 <= abs(value) < 1e6:
        exponent = math.floor(math.log10(abs(value)) + 1e-12)
        mantissa = value / 10.0**exponent
        return f"1e{exponent}" if math.isclose(mantissa, 1) else f"{mantissa:.3g}e{exponent}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
