"""Charts as SVG text: lines over an axis, and bars; readable without any package."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 56, 64
INK = ("#1f6fb2", "#c4520a", "#2d7d46", "#8b3a9c", "#555555", "#b08900")
TICKS = 5


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: its name and its points, x ascending."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(title: str, x_label: str, y_label: str, lines: Sequence[Line]) -> str:
    """Curves over a logarithmic x axis from y = 0; every x that occurs is a tick."""
    xs = sorted({x for line in lines for x, _ in line.points})
    top = _top(max(y for line in lines for _, y in line.points))
    low, high = math.log(xs[0]), math.log(xs[-1])

    def at_x(x: float) -> float:
        share = (math.log(x) - low) / ((high - low) or 1.0)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    parts = [*_frame(title, x_label, y_label, top)]
    parts += [_text(at_x(x), HEIGHT - BOTTOM + 18, f"{x:g}", "middle") for x in xs]
    for number, line in enumerate(lines):
        ink = INK[number % len(INK)]
        points = [(at_x(x), _at_y(y, top)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{ink}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{ink}"/>' for x, y in points]
    parts += _legend([line.name for line in lines])
    return _whole(title, parts)


def bar_chart(
    title: str, y_label: str, groups: Sequence[str], series: Sequence[tuple[str, Sequence[float]]]
) -> str:
    """Groups of bars from 0, one bar a series, each with its value on top."""
    top = _top(max(value for _, values in series for value in values))
    parts = [*_frame(title, "", y_label, top)]
    slot = (WIDTH - LEFT - RIGHT) / len(groups)
    width = slot * 0.8 / len(series)
    for place, group in enumerate(groups):
        left = LEFT + slot * (place + 0.1)
        parts.append(_text(left + slot * 0.4, HEIGHT - BOTTOM + 18, group, "middle"))
        for number, (_, values) in enumerate(series):
            x, y = left + number * width, _at_y(values[place], top)
            size = f'width="{width - 2:.1f}" height="{HEIGHT - BOTTOM - y:.1f}"'
            ink = INK[number % len(INK)]
            parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="{ink}"/>')
            parts.append(_text(x + width / 2, y - 4, f"{values[place]:.3g}", "middle"))
    parts += _legend([name for name, _ in series])
    return _whole(title, parts)


def _top(largest: float) -> float:
    """A round number not below the largest value."""
    if largest <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(largest))
    return next(
        unit * step for step in (1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10) if unit * step >= largest
    )


def _at_y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)


def _frame(title: str, x_label: str, y_label: str, top: float) -> list[str]:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts = [
        _text(LEFT, 22, title, "start", 'font-weight="bold" font-size="15"'),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 22, x_label, "middle"),
        _text(18, middle, y_label, "middle", f'transform="rotate(-90 18 {middle:g})"'),
    ]
    for step in range(TICKS + 1):
        value = top * step / TICKS
        y = _at_y(value, top)
        parts.append(
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#dddddd"/>'
        )
        parts.append(_text(LEFT - 8, y + 4, f"{value:g}", "end"))
    return parts


def _legend(names: Sequence[str]) -> list[str]:
    parts, x = [], float(LEFT)
    for number, name in enumerate(names):
        ink = INK[number % len(INK)]
        parts.append(f'<rect x="{x:.1f}" y="32" width="12" height="12" fill="{ink}"/>')
        parts.append(_text(x + 17, 43, name, "start"))
        x += 34 + 7 * len(name)
    return parts


def _text(x: float, y: float, words: str, anchor: str, more: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place} {more}>{escape(words)}</text>"


def _whole(title: str, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}" font-family="sans-serif" font-size="12" fill="#222222">'
    )
    ground = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    return "\n".join((head, ground, *parts, "</svg>")) + "\n"
