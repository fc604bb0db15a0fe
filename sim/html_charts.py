"""Charts: plotly figures, as plain data, of finished runs.

Each chart has its heading and caption in HTML, so that they wrap on a phone; axes carry units.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.metrics import Averaged, averaged, metric_named
from sim.report import Record
from sim.runs import Group, Load, loads_of, policies_of

Figure = dict[str, Any]
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a6d3b")
"""Okabe and Ito's, which colour-blind people can tell apart; dashes tell the rest."""
DASHES = ("solid", "dash", "dot", "dashdot")
HEIGHT_PX = 340
LEGEND_BELOW_PX = 56
LEGEND_ROW_PX, LEGEND_ROW_NAMES = 20, 4
CURVE_POINTS = 240
"""Of a distribution: more cannot be seen, and the file stays small."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure with its heading and a caption that says how to read it."""

    title: str
    caption: str
    figure: Figure


def line_of(at: int) -> dict[str, Any]:
    """Colour and dash of the policy at this place; all charts of a report use the same."""
    return {
        "color": COLOURS[at % len(COLOURS)],
        "dash": DASHES[at // len(COLOURS) % len(DASHES)],
        "width": 2,
    }


def layout_of(x_title: str, y_title: str, **more: Any) -> dict[str, Any]:
    """The look that all charts share."""
    axis = {"gridcolor": "#e4e7eb", "linecolor": "#9aa5b1", "zeroline": False, "automargin": True}
    layout: dict[str, Any] = {
        "height": HEIGHT_PX,
        "margin": {"l": 60, "r": 12, "t": 30, "b": 48},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#1f2933"},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "hovermode": "closest",
        "showlegend": True,
        "legend": {"orientation": "h", "yanchor": "top", "x": 0},
        "xaxis": {**axis, "title": {"text": x_title, "standoff": 8}},
        "yaxis": {**axis, "title": {"text": y_title, "standoff": 8}},
    }
    for name, value in more.items():
        layout[name] = {**layout[name], **value} if isinstance(layout.get(name), dict) else value
    margin = layout["margin"]
    # Below the axis title: so many pixels, as a share of the plot.
    layout["legend"]["y"] = -LEGEND_BELOW_PX / (layout["height"] - margin["t"] - margin["b"])
    return layout


def against_load(groups: Sequence[Group], name: str, axis: str, title: str, caption: str) -> Chart:
    """One metric of each policy against the load; bars show the range over the seeds."""
    metric = metric_named(name)
    closed = any(load.kind == "clients" for load in loads_of(groups))
    traces = []
    for at, policy in enumerate(policies_of(groups)):
        own = sorted(
            (group for group in groups if group.policy == policy), key=lambda g: g.load.position
        )
        points = [(g.load.position, mean) for g in own if (mean := averaged(g.reports, metric))]
        traces.append(_curve(policy, at, points, max(len(group.runs) for group in own) > 1))
    if metric.unit == "requests/s" and not closed:
        ends = [load.position for load in loads_of(groups)]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "all that is offered",
                "x": [min(ends), max(ends)],
                "y": [min(ends), max(ends)],
                "line": {"color": "#9aa5b1", "dash": "dot", "width": 1},
                "hoverinfo": "skip",
            }
        )
    x_title = "clients in a closed loop" if closed else "offered load, requests/s"
    latency = metric.unit == "s"
    values = [y for trace in traces for y in trace["y"] if y]
    layout = layout_of(
        x_title,
        f"{axis} (logarithmic)" if latency else axis,
        height=_height(len(traces)),
        xaxis={"rangemode": "tozero"},
        yaxis=_logarithmic(values, 0) if latency else {"rangemode": "tozero"},
    )
    return Chart(title, caption, {"data": traces, "layout": layout})


def latency_curves(groups: Sequence[Group], load: Load) -> list[Chart]:
    """The distribution over requests of the three latencies, one curve a policy."""
    charts = []
    for title, values_of, limit, caption in _LATENCIES:
        traces: list[Figure] = []
        limits: set[float] = set()
        for at, policy in enumerate(policies_of(groups)):
            own = [g for g in groups if g.policy == policy and g.load.label == load.label]
            runs = [run for group in own for run in group.runs]
            sent = sum(len(run.records) for run in runs)
            values = [v for run in runs for v in values_of(run.records)]
            if values:
                x, y = cumulative(values, max(sent, len(values)))
                traces.append(
                    {
                        "type": "scatter",
                        "mode": "lines",
                        "name": policy,
                        "x": x,
                        "y": y,
                        "line": {**line_of(at), "shape": "hv"},
                        "hovertemplate": "%{y:.1f} % within %{x:.3~g} s<extra>"
                        + policy
                        + "</extra>",
                    }
                )
            limits |= {run.report.slo[limit] for run in runs if limit in run.report.slo}
        layout = layout_of(
            "seconds (logarithmic)",
            "share of all requests, %",
            height=_height(len(traces)),
            xaxis=_logarithmic([x for trace in traces for x in trace["x"]]),
            yaxis={"range": [0, 101]},
            **_limit_lines(limits),
        )
        if traces:
            charts.append(Chart(title, caption, {"data": traces, "layout": layout}))
    return charts


def cumulative(values: Sequence[float], of: int) -> tuple[list[float], list[float]]:
    """The empirical distribution as a curve: values, and per cent of `of` that are not above.

    It ends below 100 % if some requests never got there.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    count = len(ordered)
    at = np.unique(np.linspace(0, count - 1, min(count, CURVE_POINTS)).round().astype(int))
    xs = np.maximum(ordered[at], 1e-4)  # a logarithmic axis has no zero
    return rounded(xs), rounded(100.0 * (at + 1) / of)


def rounded(values: Sequence[float] | NDArray[np.float64]) -> list[float]:
    """Five significant digits; not-a-number becomes a gap."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values]  # type: ignore[misc]


def _curve(
    policy: str, at: int, points: Sequence[tuple[float, Averaged]], ranges: bool
) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": policy,
        "x": [x for x, _ in points],
        "y": rounded([value.mean for _, value in points]),
        "line": line_of(at),
        "marker": {"size": 7, "symbol": at % 8},
        "hovertemplate": "%{y:.4~g} at %{x:.3~g}<extra>" + policy + "</extra>",
    }
    if ranges:
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": rounded([value.high - value.mean for _, value in points]),
            "arrayminus": rounded([value.mean - value.low for _, value in points]),
            "thickness": 1,
        }
    return trace


def _height(names: int) -> int:
    """In pixels, with room for a legend of so many names."""
    return HEIGHT_PX + LEGEND_ROW_PX * max(0, -(-names // LEGEND_ROW_NAMES) - 1)


def _logarithmic(values: Sequence[float], percentile: float = 1) -> dict[str, Any]:
    """An axis from this percentile of the values to the largest: of a distribution, what is
    fastest hardly matters."""
    if not values:
        return {"type": "log"}
    low, high = np.log10(np.percentile(values, percentile)), np.log10(max(values))
    middle, half = (low + high) / 2, max((high - low) / 2 * 1.04, 0.15)
    decades = range(int(np.floor(middle - half)), int(np.ceil(middle + half)) + 1)
    steps = (1, 2, 3, 4, 5, 6, 8) if half < 0.6 else (1, 2, 5) if half < 1.6 else (1,)
    ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
    return {
        "type": "log",
        "range": rounded([middle - half, middle + half]),
        "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks],
    }


def _limit_lines(limits: set[float]) -> dict[str, Any]:
    """A vertical line at each objective."""
    lines = [
        {
            "type": "line",
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            "x0": limit,
            "x1": limit,
            "line": {"color": "#ba2525", "width": 1.5, "dash": "dot"},
        }
        for limit in sorted(limits)
    ]
    notes = [
        {
            "x": float(np.log10(limit)),
            "y": 1,
            "yref": "paper",
            "text": f"SLO {limit:g} s",
            "showarrow": False,
            "xanchor": "right",
            "yanchor": "top",
            "bgcolor": "rgba(255,255,255,0.8)",
            "font": {"color": "#ba2525", "size": 11},
        }
        for limit in sorted(limits)
    ]
    return {"shapes": lines, "annotations": notes} if limits else {}


def _first_tokens(records: Sequence[Record]) -> list[float]:
    return [record.ttft_s for record in records if record.first_token_s is not None]


def _per_token(records: Sequence[Record]) -> list[float]:
    return [r.tpot_s for r in records if r.outcome == "completed" and r.output_tokens > 1]


def _gaps(records: Sequence[Record]) -> list[float]:
    return [r.gap_max_s for r in records if r.outcome == "completed" and r.output_tokens > 1]


def _to_the_end(records: Sequence[Record]) -> list[float]:
    return [record.e2e_s for record in records if record.outcome == "completed"]


_READING = "A curve further left is better. "
_LATENCIES = (
    (
        "Time to first token (TTFT), seconds",
        _first_tokens,
        "ttft",
        _READING + "It shows which share of all requests that were sent had their first token "
        "within so many seconds; it ends below 100 % if some never got one.",
    ),
    (
        "Time per output token (TPOT), seconds",
        _per_token,
        "tpot",
        _READING + "The mean time between two tokens of a request. Requests of a single token have "
        "none and count as missing.",
    ),
    (
        "Longest gap between two tokens, seconds",
        _gaps,
        "gap",
        _READING + "How long an answer stood still at worst.",
    ),
    (
        "End-to-end time, seconds",
        _to_the_end,
        "e2e",
        _READING + "From sending a request to its last token.",
    ),
)
