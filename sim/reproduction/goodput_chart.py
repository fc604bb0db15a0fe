"""The goodput picture: one small chart for each length set, goodput over the number of clients."""

from html import escape

from sim.reproduction.goodput_claims import Grid
from sim.reproduction.goodput_runs import PAST_FUTURE

PANEL_W, PANEL_H = 360, 250
LEFT, TOP, RIGHT, BOTTOM = 50, 34, 12, 40
LEGEND_H = 62
COLUMNS = 2
TICKS = 4
INK = ("#1f6fb2", "#c4520a", "#d9822b", "#e9b872", "#2d7d46", "#6bab7f", "#a9cdb3", "#8b3a9c")


def small_multiples(grid: Grid) -> str:
    """As SVG; the same colours in each chart, Past-Future's line the thickest."""
    rows = -(-len(grid.sets) // COLUMNS)
    width, height = COLUMNS * PANEL_W, rows * PANEL_H + LEGEND_H
    title = "Goodput over the number of clients"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{title}" font-family="sans-serif" font-size="11" fill="#222222">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, lengths in enumerate(grid.sets):
        x, y = number % COLUMNS * PANEL_W, number // COLUMNS * PANEL_H
        parts.append(f'<g transform="translate({x} {y})">')
        parts += _panel(grid, lengths)
        parts.append("</g>")
    parts += _legend(grid, rows * PANEL_H)
    return "\n".join((*parts, "</svg>")) + "\n"


def _panel(grid: Grid, lengths: str) -> list[str]:
    low, high = grid.clients[0], grid.clients[-1]
    top = 1.1 * max(grid.best(lengths, clients, grid.policies) for clients in grid.clients)

    def at_x(clients: float) -> float:
        return LEFT + (clients - low) / max(1, high - low) * (PANEL_W - LEFT - RIGHT)

    def at_y(value: float) -> float:
        return PANEL_H - BOTTOM - value / top * (PANEL_H - TOP - BOTTOM)

    parts = [_text(LEFT, 20, lengths, "start", 'font-weight="bold" font-size="13"')]
    for step in range(TICKS + 1):
        value = top / 1.1 * step / TICKS
        y = at_y(value)
        parts.append(
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{PANEL_W - RIGHT}" y2="{y:.1f}" stroke="#dddddd"/>'
        )
        parts.append(_text(LEFT - 5, y + 4, f"{value:.2f}", "end"))
    foot = PANEL_H - BOTTOM + 15
    parts += [_text(at_x(clients), foot, str(clients), "middle") for clients in grid.clients]
    middle = (LEFT + PANEL_W - RIGHT) / 2
    parts.append(_text(middle, PANEL_H - 8, "clients; y: requests/s within the SLA", "middle"))
    for number, policy in reversed(list(enumerate(grid.policies))):
        points = " ".join(
            f"{at_x(n):.1f},{at_y(grid.at(lengths, n, policy).goodput_rps):.1f}"
            for n in grid.clients
        )
        ink, wide = INK[number % len(INK)], 3 if policy == PAST_FUTURE else 1.5
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{ink}" stroke-width="{wide}">'
            f"<title>{escape(policy)}</title></polyline>"
        )
    return parts


def _legend(grid: Grid, top: int) -> list[str]:
    parts = []
    for number, policy in enumerate(grid.policies):
        x, y = LEFT + number % 4 * 165, top + 18 + number // 4 * 22
        ink = INK[number % len(INK)]
        parts.append(f'<rect x="{x}" y="{y - 9}" width="12" height="10" fill="{ink}"/>')
        parts.append(_text(x + 17, y, policy, "start"))
    return parts


def _text(x: float, y: float, words: str, anchor: str, more: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place} {more}>{escape(words)}</text>"
