"""A real run's curves and ours as one SVG: running, waiting, KV in use, one below the other."""

from collections.abc import Sequence
from html import escape

from sim.reproduction.real_run import Floats
from sim.reproduction.reality_compare import Comparison

WIDTH, PANEL, GAP = 760, 150, 46
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 72, 50
REAL, OURS = "#555555", "#c4520a"
STEPS_S = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000)
TICKS_MAX = 8


def curves_svg(comparison: Comparison, title: str) -> str:
    """SVG text. A page shows it as it is."""
    ours, real, times_s = comparison.ours, comparison.real, comparison.times_s
    panels = [("running, requests", ours.running, real.running)]
    panels.append(("waiting, requests", ours.waiting, real.waiting))
    if real.kv_share.any():
        panels.append(("KV in use, %", 100 * ours.kv_share, 100 * real.kv_share))
    height = TOP + len(panels) * (PANEL + GAP) - GAP + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}" font-family="sans-serif" font-size="12" fill="#222222">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(LEFT, 22, title, "start", ' font-weight="bold" font-size="15"'),
        _key(LEFT, "real", REAL, dashed=False),
        _key(LEFT + 90, "ours", OURS, dashed=True),
    ]
    for number, (name, mine, theirs) in enumerate(panels):
        parts += _panel(TOP + number * (PANEL + GAP), name, times_s, mine, theirs)
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 10, "time, s", "middle"))
    return "\n".join((*parts, "</svg>")) + "\n"


def _panel(top: float, name: str, times_s: Floats, ours: Floats, real: Floats) -> list[str]:
    most, end = float(max(ours.max(), real.max(), 1e-9)), float(times_s[-1])
    floor = top + PANEL
    parts = [_text(LEFT, top - 6, name, "start")]
    for share in (0.0, 0.5, 1.0):
        y = floor - share * PANEL
        parts.append(
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#dddddd"/>'
        )
        parts.append(_text(LEFT - 6, y + 4, f"{share * most:.4g}", "end"))
    step = next((s for s in STEPS_S if end / s <= TICKS_MAX), end)
    for tick in range(int(end / step) + 1):
        at = tick * step
        x = LEFT + at / end * (WIDTH - LEFT - RIGHT)
        parts.append(_text(x, floor + 16, f"{at:.0f}", "middle"))
    for values, ink, more in ((real, REAL, ""), (ours, OURS, ' stroke-dasharray="5 3"')):
        points = _points(times_s, values, end, most, floor)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{ink}" stroke-width="1.8"{more}/>'
        )
    return parts


def _points(
    times_s: Floats, values: Sequence[float] | Floats, end: float, most: float, floor: float
) -> str:
    width = WIDTH - LEFT - RIGHT
    return " ".join(
        f"{LEFT + max(0.0, at) / end * width:.1f},{floor - value / most * PANEL:.1f}"
        for at, value in zip(times_s, values, strict=True)
    )


def _key(x: float, name: str, ink: str, *, dashed: bool) -> str:
    dash = ' stroke-dasharray="5 3"' if dashed else ""
    line = f'<line x1="{x}" y1="36" x2="{x + 30}" y2="36" stroke="{ink}" stroke-width="2"{dash}/>'
    return line + _text(x + 36, 40, name, "start")


def _text(x: float, y: float, words: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(words)}</text>'
