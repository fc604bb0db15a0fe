"""Charts of the inside: memory, batches and worker timelines of one run, from its series."""

from typing import Any

import numpy as np

from sim.html_charts import COLOURS, Chart, layout_of, rounded
from sim.series import Floats, Series

POINTS_MAX = 400
"""Samples over time in a picture: more than a screen has room for."""
SPANS_SHOWN_MAX = 4000
"""Bars that a browser draws without making people wait; beyond, only the first are shown."""
SPANS_EDGED_MAX = 400
"""With more of them, white edges would hide the bars."""
KINDS = {
    "prefill": ("#d55e00", "prefill"),
    "decode": ("#56b4e9", "decode"),
    "mixed": ("#e69f00", "prefill and decode"),
    "closed": ("#0072b2", "closed batch"),
}
TIME = "seconds from the start"


def inside_charts(series: Series) -> list[Chart]:
    """Memory, running and waiting requests, and what each worker did."""
    charts = [_memory(series), _requests(series), _batches(series)]
    return [*charts, _timeline(series)] if series.spans else charts


def _memory(series: Series) -> Chart:
    share = 100 * series.kv_used / series.kv_total[:, None]
    foreseen = 100 * series.kv_predicted / series.kv_total[:, None]
    times, used_low = _thinned(series.times_s, _over_workers(share, "min"))
    traces = [
        _line(times, used_low, "", width=0),
        _line(
            times,
            _thinned(series.times_s, _over_workers(share, "max"))[1],
            "in use: least to most of the workers",
            width=0,
            fill="tonexty",
            fillcolor="rgba(0,114,178,0.22)",
        ),
        _line(
            times,
            _thinned(series.times_s, _over_workers(share, "mean"))[1],
            "in use, mean",
            color=COLOURS[0],
        ),
    ]
    traces[0]["showlegend"] = False
    if np.isfinite(foreseen).any():
        curve = _thinned(series.times_s, _over_workers(foreseen, "mean"))[1]
        traces.append(
            _line(times, curve, "predicted future peak, mean", color=COLOURS[1], dash="dash")
        )
    layout = layout_of(TIME, "% of a worker's KV cache", yaxis={"rangemode": "tozero"})
    layout["shapes"] = [
        {
            "type": "line",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": 100,
            "y1": 100,
            "line": {"color": "#ba2525", "width": 1.5, "dash": "dot"},
        }
    ]
    return Chart(
        "KV cache in use, and its predicted future peak, % of capacity",
        "The red line is all there is. The predicted peak is the most memory that the requests now "
        "on a worker will need at once, if each makes as many tokens as is expected of it by the "
        "scheduler's history of lengths. Far above the line, requests will have to be evicted; "
        "far below it, memory lies idle. Closed batches take all their memory at once.",
        {"data": traces, "layout": layout},
    )


def _requests(series: Series) -> Chart:
    bound = np.nansum(series.waiting, axis=0)
    times, running = _thinned(series.times_s, np.nansum(series.running, axis=0))
    waiting = _thinned(series.times_s, bound + np.nan_to_num(series.waiting_centre))[1]
    traces = [
        _line(times, running, "running", color=COLOURS[2]),
        _line(times, waiting, "waiting", color=COLOURS[1], dash="dash"),
    ]
    layout = layout_of(TIME, "requests, all workers", yaxis={"rangemode": "tozero"})
    return Chart(
        "Requests that run and that wait, all workers together",
        "A waiting line that keeps rising means that more is offered than the workers can do.",
        {"data": traces, "layout": layout},
    )


def _batches(series: Series) -> Chart:
    columns = [_thinned(series.times_s, row, POINTS_MAX // 2) for row in series.running]
    figure: dict[str, Any] = {
        "type": "heatmap",
        "x": columns[0][0] if columns else [],
        "y": list(series.workers),
        "z": [row for _, row in columns],
        "colorscale": [[0, "#ffffff"], [0.02, "#d7ecf9"], [0.5, "#56b4e9"], [1, "#003f6b"]],
        "zmin": 0,
        "colorbar": {"title": {"text": "requests", "side": "right"}, "thickness": 10},
        "hovertemplate": "%{y} at %{x:.4~g} s: %{z:.3~g} requests<extra></extra>",
    }
    height = 110 + max(90, min(22 * len(series.workers), 600))
    axis = {"type": "category", "autorange": "reversed"}
    layout = layout_of(TIME, "", height=height, yaxis=axis, showlegend=False)
    return Chart(
        "Requests running on each worker",
        "One row a worker; white is idle, dark is a large batch. Rows of different darkness mean "
        "that the load is not balanced.",
        {"data": [figure], "layout": layout},
    )


def _timeline(series: Series) -> Chart:
    spans = sorted(series.spans, key=lambda span: span.start_s)
    shown = spans[:SPANS_SHOWN_MAX]
    edge = 0.5 if len(shown) <= SPANS_EDGED_MAX else 0
    end_s = max(span.end_s for span in shown)
    traces = []
    for kind, (colour, name) in KINDS.items():
        own = [span for span in shown if span.kind == kind]
        if own:
            traces.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": name,
                    "y": [series.workers[span.worker] for span in own],
                    "base": rounded([span.start_s for span in own]),
                    "x": rounded([span.end_s - span.start_s for span in own]),
                    "customdata": [span.requests for span in own],
                    "marker": {"color": colour, "line": {"color": "#ffffff", "width": edge}},
                    "hovertemplate": "%{y}, from %{base:.5~g} s for %{x:.3~g} s: "
                    "%{customdata} requests<extra>" + name + "</extra>",
                }
            )
    height = 150 + max(70, min(24 * len(series.workers), 640))
    layout = layout_of(
        TIME,
        "",
        height=height,
        barmode="overlay",
        bargap=0.25,
        xaxis={"range": [0, rounded([end_s])[0]]},
        yaxis={
            "type": "category",
            "categoryorder": "array",
            "categoryarray": list(reversed(series.workers)),
        },
    )
    cut = f" Only the first {end_s:,.0f} s are shown." if len(shown) < len(spans) else ""
    return Chart(
        "Timeline of each worker",
        "What a worker did when; white is idle time. Point at a bar to see its batch." + cut,
        {"data": traces, "layout": layout},
    )


def _over_workers(values: Floats, how: str) -> Floats:
    """One figure for each moment; not-a-number where no worker is known."""
    known = np.isfinite(values)
    filled = np.where(known, values, {"min": np.inf, "max": -np.inf, "mean": 0.0}[how])
    result: Floats
    if how == "mean":
        result = filled.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    else:
        result = filled.min(axis=0) if how == "min" else filled.max(axis=0)
    return np.where(known.any(axis=0), result, np.nan)


def _thinned(
    times: Floats, values: Floats, points: int = POINTS_MAX
) -> tuple[list[float], list[float]]:
    """At most `points` samples, each the mean of those that it stands for."""
    if len(times) <= points:
        return rounded(times), rounded(values)
    edges = np.unique(np.linspace(0, len(times), points + 1).astype(int))
    counts = np.diff(edges)
    known = np.isfinite(values)
    sums = np.add.reduceat(np.where(known, values, 0.0), edges[:-1])
    number = np.add.reduceat(known.astype(np.float64), edges[:-1])
    means = np.where(number > 0, sums / np.maximum(number, 1), np.nan)
    return rounded(np.add.reduceat(times, edges[:-1]) / counts), rounded(means)


def _line(
    x: list[float], y: list[float], name: str, *, width: float = 2, **more: Any
) -> dict[str, Any]:
    style: dict[str, Any] = {"width": width}
    style |= {key: more.pop(key) for key in ("color", "dash") if key in more}
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": style, **more}
