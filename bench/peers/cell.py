"""Figures of one cell (one system, one number of clients, one round) from what its clients saw."""

import math
from collections.abc import Iterable, Sequence

import msgspec

from bench.peers.clients import Trace


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine spent in the counted time."""

    server_cores: float = 0.0
    """CPU seconds of the server's process tree per second."""
    foreign_cores: float = 0.0
    """On the server's core: busy or taken by the hypervisor, but not by the server."""
    client_core: float = 0.0
    """Busy share of the client's core, background included."""
    rss_mb: float = 0.0
    """Resident memory, summed over the tree, at the end."""


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One cell. Times in milliseconds; NaN where nothing was seen."""

    system: str
    clients: int
    round: int
    seconds: float
    output_tps: float
    """Tokens that came within the counted time, of finished and unfinished requests alike."""
    rps: float
    """Requests that ended well within it."""
    completed: int
    errors: int
    error: str = ""
    """The first one's text."""
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    itl_p50: float
    """Between two reads that held tokens; a server may put several tokens in one."""
    itl_p99: float
    e2e_p50: float
    e2e_p99: float
    tokens_per_read: float
    usage: Usage = Usage()


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the neighbours, as numpy's default; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def make_cell(
    system: str,
    clients: int,
    number: int,
    traces: Iterable[Trace],
    window_s: tuple[float, float],
    usage: Usage,
) -> Cell:
    """Figures of the traces within [begin, end) of time.monotonic.

    A first token counts if its request was sent in the window; a gap, if both its reads are in it;
    the time per token and the whole answer, if the answer ended in it.
    """
    begin, end = window_s
    traces = list(traces)
    ended = [t for t in traces if t.ended_s is not None and begin <= t.ended_s < end]
    done = [trace for trace in ended if trace.complete]
    failed = [trace for trace in ended if not trace.complete]
    reads = [(at, tokens) for trace in traces for at, tokens in trace.arrivals if begin <= at < end]
    first = [
        trace.arrivals[0][0] - trace.sent_s
        for trace in traces
        if trace.arrivals and trace.sent_s >= begin and trace.arrivals[0][0] < end
    ]
    gaps = [
        later - earlier
        for trace in traces
        for (earlier, _), (later, _) in zip(trace.arrivals, trace.arrivals[1:], strict=False)
        if earlier >= begin and later < end
    ]
    whole = [t.ended_s - t.sent_s for t in done if t.ended_s is not None]
    per_token = [value for value in map(_tpot_s, done) if value is not None]
    tokens = sum(count for _, count in reads)
    seconds = end - begin
    ms = _percentile_ms
    return Cell(
        system=system,
        clients=clients,
        round=number,
        seconds=seconds,
        output_tps=tokens / seconds,
        rps=len(done) / seconds,
        completed=len(done),
        errors=len(failed),
        error=failed[0].error if failed else "",
        ttft_p50=ms(first, 0.5),
        ttft_p99=ms(first, 0.99),
        tpot_p50=ms(per_token, 0.5),
        tpot_p99=ms(per_token, 0.99),
        itl_p50=ms(gaps, 0.5),
        itl_p99=ms(gaps, 0.99),
        e2e_p50=ms(whole, 0.5),
        e2e_p99=ms(whole, 0.99),
        tokens_per_read=tokens / len(reads) if reads else math.nan,
        usage=usage,
    )


def _percentile_ms(values: Sequence[float], share: float) -> float:
    return percentile(values, share) * 1e3


def _tpot_s(trace: Trace) -> float | None:
    """Seconds per token after the first read; none where one read held all."""
    if len(trace.arrivals) < 2:
        return None
    (first_s, first_tokens), (last_s, _) = trace.arrivals[0], trace.arrivals[-1]
    return (last_s - first_s) / (trace.tokens - first_tokens)
