"""Finished runs for tests of what shows them: a toy queue in place of a simulation."""

from random import Random

import numpy as np

from sim.report import Record, summarise
from sim.runs import Load, Run
from sim.series import Series, Span
from sim.slo import Slo

WORKERS = 4


def toy_run(policy: str, rate: float, seed: int = 0, count: int = 400) -> Run:
    """One server for all, slower by policy; records, report and series agree with each other."""
    rng, now, free = Random(f"{policy} {rate} {seed}"), 0.0, 0.0
    service_s = {"slow": 0.12, "fast": 0.07}.get(policy, 0.09)
    records: list[Record] = []
    for _ in range(count):
        now += rng.expovariate(rate)
        if free - now > 40:
            records.append(
                Record(now, "rejected", prompt_tokens=9, detail="429: the queue is full")
            )
            continue
        free = max(free, now) + rng.expovariate(1 / service_s)
        tokens = rng.randint(1, 200)
        records.append(
            Record(now, "completed", free, free + 0.03 * tokens, rng.random(), 100, tokens)
        )
    slo = Slo(ttft=2.0, gap=0.9)
    report = summarise(records, policy=policy, workers=WORKERS, slo=slo, workload="toy")
    return Run(report, records, Load("rate", rate, rate), seed, toy_series(records))


def toy_series(records: list[Record]) -> Series:
    """Of the records: so many at once, spread over the workers; each holds its tokens as KV."""
    times = np.linspace(0.0, max(r.last_token_s or 0.0 for r in records), 900)
    first = np.array([r.first_token_s or np.inf for r in records])
    last = np.array([r.last_token_s or np.inf for r in records])
    sent = np.array([r.sent_s for r in records])
    live = (first[:, None] <= times) & (times < last[:, None])
    running = np.stack([live[at::WORKERS].sum(axis=0) for at in range(WORKERS)]).astype(float)
    waiting = ((sent[:, None] <= times) & (times < first[:, None])).sum(axis=0).astype(float)
    spans = tuple(
        Span(at % WORKERS, r.first_token_s or 0.0, r.last_token_s or 0.0, "closed", 1)
        for at, r in enumerate(records)
        if r.first_token_s is not None
    )
    return Series(
        times_s=times,
        workers=tuple(f"worker-{at}" for at in range(WORKERS)),
        kv_total=np.full(WORKERS, 12_000.0),
        kv_used=running * 150,
        kv_predicted=running * 200 + 500,
        running=running,
        waiting=np.zeros_like(running),
        waiting_centre=waiting,
        spans=spans,
    )
