"""The plot of how the core's cost grows with its queue, beside lines of n log n."""

from collections.abc import Sequence
from math import log
from typing import Protocol

import plotly.graph_objects as go  # type: ignore[import-untyped]


class Point(Protocol):
    """One measurement of one policy."""

    @property
    def policy(self) -> str: ...
    @property
    def waiting(self) -> int: ...
    @property
    def mean_s(self) -> float: ...
    @property
    def round_s_max(self) -> float: ...


def growth_page(points: Sequence[Point]) -> str:
    """An HTML page, complete in itself: the mean per call, and the longest round's calls together
    (where a policy makes long rounds), each over the queue's length, on logarithmic axes."""
    figure = go.Figure()
    for policy in dict.fromkeys(point.policy for point in points):
        mine = sorted((p for p in points if p.policy == policy), key=lambda p: p.waiting)
        lengths = [point.waiting for point in mine]
        figure.add_scatter(
            x=lengths, y=[1e3 * p.mean_s for p in mine], name=policy, mode="lines+markers"
        )
        if any(point.round_s_max for point in mine):
            figure.add_scatter(
                x=lengths,
                y=[1e3 * p.round_s_max or None for p in mine],
                name=f"{policy}: a whole round",
                mode="lines+markers",
                line={"dash": "dash"},
            )
    lengths = sorted({point.waiting for point in points})
    for start_ms, kind in ((min(1e3 * p.mean_s for p in points), "calls"), (5.0, "rounds")):
        scale = start_ms / (lengths[0] * log(lengths[0]))
        figure.add_scatter(
            x=lengths,
            y=[scale * n * log(n) for n in lengths],
            name=f"n log n, beside {kind}",
            mode="lines",
            line={"color": "black", "dash": "dot"},
        )
    figure.update_layout(
        title="CPU of the scheduler's core against the length of its queue",
        xaxis={"title": "waiting requests", "type": "log"},
        yaxis={"title": "milliseconds of CPU, mean per call", "type": "log"},
        template="plotly_white",
    )
    page: str = figure.to_html(include_plotlyjs=True)
    return page
