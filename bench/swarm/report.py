"""The swarm's report: what a level of load cost by stage, if it was held, and what bound it."""

from collections.abc import Sequence

import msgspec
import psutil  # type: ignore[import-untyped]
from rich.table import Table

from bench.swarm.load import GAP_BUCKET_S
from bench.swarm.watch import Sample, slope_per_minute

OPEN_HELD = 0.9
"""A level is held if this share of its streams were past their first token at any time,"""
RATE_HELD = 0.95
"""if those got this share of their tokens in time,"""
GAP_HELD = 3.0
"""if 99 of 100 gaps between two tokens were no longer than so many times the usual one,"""
QUEUE_HELD_S = 2.0
"""and if no queue at its end held more than the tokens of so many seconds."""
BUSY = 0.9
"""Of a core, for what has one thread."""
OWN_SHARE = 0.8
"""With less than this of the busy time our own, a run says little."""


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """One number of streams, measured over some time."""

    streams: int
    seconds: float
    streams_open: float
    """Mean of those that had their first token."""
    tokens_per_s: float
    tokens_per_s_and_stream: float
    bytes_per_s: float
    lines_per_s: float
    cpu_us_per_token: dict[str, float]
    cores: dict[str, list[float]]
    """Stage to cores used by each of its processes."""
    machine_busy: float
    """Share of all cores, other programs included."""
    gap_s: dict[str, float]
    first_token_s: dict[str, float]
    queues_max: dict[str, int]
    queues_per_minute: dict[str, float]
    rss_mb: dict[str, float]
    rss_mb_per_minute: dict[str, float]
    complete: int
    short: int
    wrong: int
    refused: int
    held: bool
    binds: str


def level_of(streams: int, rate: float, samples: Sequence[Sample], machine_busy: float) -> Level:
    """The figures between the first sample and the last one."""
    first, last = samples[0], samples[-1]
    seconds = last.counts.at - first.counts.at
    tokens = last.counts.tokens - first.counts.tokens
    stage_s = {
        stage: [b - a for a, b in zip(first.cpu_s[stage], last.cpu_s[stage], strict=True)]
        for stage in last.cpu_s
    }
    wall_s = last.at_s - first.at_s
    used = {stage: [round(s / wall_s, 3) for s in ones] for stage, ones in stage_s.items()}
    opened = sum(s.counts.open for s in samples) / len(samples)
    gaps = _quantiles([b - a for a, b in zip(first.counts.gaps, last.counts.gaps, strict=True)])
    wrong = last.counts.wrong - first.counts.wrong
    short = last.counts.short - first.counts.short
    queues_max, growth = _queues(samples)
    per_stream = tokens / seconds / opened if opened else 0.0
    told = opened >= OPEN_HELD * streams and per_stream >= RATE_HELD * rate
    calm = gaps["p99"] <= GAP_HELD / rate
    queued = max(last.queues.values(), default=0) <= QUEUE_HELD_S * streams * rate
    return Level(
        streams=streams,
        seconds=seconds,
        streams_open=opened,
        tokens_per_s=tokens / seconds,
        tokens_per_s_and_stream=per_stream,
        bytes_per_s=(last.counts.bytes - first.counts.bytes) / seconds,
        lines_per_s=(last.counts.lines - first.counts.lines) / seconds,
        cpu_us_per_token={
            stage: 1e6 * sum(ones) / max(1, tokens) * seconds / wall_s
            for stage, ones in stage_s.items()
        },
        cores=used,
        machine_busy=machine_busy,
        gap_s=gaps,
        first_token_s=_quantiles(
            [b - a for a, b in zip(first.counts.first, last.counts.first, strict=True)]
        ),
        queues_max=queues_max,
        queues_per_minute=growth,
        rss_mb=last.rss_mb,
        rss_mb_per_minute={
            stage: slope_per_minute([(s.at_s, s.rss_mb[stage]) for s in samples])
            for stage in last.rss_mb
        },
        complete=last.counts.complete - first.counts.complete,
        short=short,
        wrong=wrong,
        refused=sum(last.counts.refused.values()) - sum(first.counts.refused.values()),
        held=told and calm and queued and not short and not wrong,
        binds=_binds(used, machine_busy, psutil.cpu_count() or 1),
    )


def _queues(samples: Sequence[Sample]) -> tuple[dict[str, int], dict[str, float]]:
    names = sorted({name for sample in samples for name in sample.queues})
    most = {name: max(s.queues.get(name, 0) for s in samples) for name in names}
    growth = {
        name: slope_per_minute([(s.at_s, s.queues.get(name, 0)) for s in samples]) for name in names
    }
    return most, growth


def _quantiles(histogram: Sequence[int]) -> dict[str, float]:
    """Upper ends of the buckets that the quantiles fall in."""
    total, found = sum(histogram), {}
    for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)):
        seen = 0
        for place, count in enumerate(histogram):
            seen += count
            if total and seen >= share * total:
                found[name] = round((place + 1) * GAP_BUCKET_S, 2)
                break
        else:
            found[name] = 0.0
    return found


def _binds(used: dict[str, list[float]], machine_busy: float, cores: int) -> str:
    """What would have to be quicker for more."""
    most = {stage: max(ones) for stage, ones in used.items() if stage != "broker"}
    single = [stage for stage, share in most.items() if share >= BUSY]
    if single:
        return f"a core of its own: {', '.join(single)}"
    shares = {stage: sum(ones) for stage, ones in used.items()}
    largest = max(shares, key=lambda stage: shares[stage])
    if machine_busy >= BUSY and sum(shares.values()) < OWN_SHARE * machine_busy * cores:
        return "other programs, which take a large part of the cores: measure again"
    if machine_busy >= BUSY:
        return f"all cores; the largest share is the {largest}'s"
    return f"nothing yet; the largest share is the {largest}'s"


def level_table(levels: Sequence[Level]) -> Table:
    """One column a level."""
    table = Table(title="The swarm: CPU in microseconds per token")
    table.add_column("streams")
    for level in levels:
        table.add_column(f"{level.streams:,}", justify="right")
    columns = [_cells(level) for level in levels]
    for name in columns[0]:
        table.add_row(name, *(cells[name] for cells in columns))
    return table


def _cells(level: Level) -> dict[str, str]:
    ends = f"{level.complete:,}, {level.short}, {level.wrong}, {level.refused}"
    return {
        "past their first token": f"{level.streams_open:,.0f}",
        "tokens per second": f"{level.tokens_per_s:,.0f}",
        "and stream": f"{level.tokens_per_s_and_stream:.3f}",
        **{f"CPU of {stage}": f"{us:.0f}" for stage, us in level.cpu_us_per_token.items()},
        **{
            f"cores of {stage}": " + ".join(f"{share:.2f}" for share in ones)
            for stage, ones in level.cores.items()
        },
        "machine busy": f"{level.machine_busy:.2f}",
        "gap p50, p99, max": ", ".join(f"{level.gap_s[q]:.2f}" for q in ("p50", "p99", "max")),
        "first token p50, p99": ", ".join(f"{level.first_token_s[q]:.2f}" for q in ("p50", "p99")),
        "longest queue": f"{max(level.queues_max.values(), default=0):,}",
        "complete, short, wrong, refused": ends,
        "held": "yes" if level.held else "no",
        "binds": level.binds,
    }
