"""What the server itself counted during a run, from its Prometheus endpoints.

Servers that are not ours, or that were not asked, leave these fields of the report empty.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from sim.report import Report

SCRAPE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ServerCounts:
    """Sample name to its sum over all labels and endpoints."""

    sums: dict[str, float] = field(default_factory=dict)

    def since(self, before: Self) -> "ServerCounts":
        """What was added after `before`."""
        return ServerCounts(
            {name: value - before.sums.get(name, 0.0) for name, value in self.sums.items()}
        )

    def get(self, name: str) -> float | None:
        """The sum, or None if no endpoint has it."""
        return self.sums.get(name)

    def ratio(self, numerator: str, denominator: str) -> float | None:
        """One sum over another; None if either is missing or the second is 0."""
        top, bottom = self.get(numerator), self.get(denominator)
        return None if top is None or not bottom else top / bottom


async def scrape(urls: Sequence[str]) -> ServerCounts:
    """The sums over these endpoints. One that does not answer counts as empty: the client's own
    figures do not depend on it."""
    async with httpx.AsyncClient(timeout=SCRAPE_TIMEOUT_S) as client:
        texts = await asyncio.gather(*(_text(client, url) for url in urls))
    sums: dict[str, float] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if "le" not in sample.labels and "quantile" not in sample.labels:
                    sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return ServerCounts(sums)


async def _text(client: httpx.AsyncClient, url: str) -> str:
    try:
        response = await client.get(url)
    except httpx.HTTPError:
        return ""
    return response.text if response.status_code == httpx.codes.OK else ""


def with_server_counts(report: Report, counts: ServerCounts) -> Report:
    """The report with the fields that only the server knows."""
    return msgspec.structs.replace(
        report,
        invalid_tokens=_whole(counts.get("tranche_invalid_tokens_total")),
        pad_tokens=_whole(counts.get("tranche_pad_tokens_total")),
        slices_per_request=_per(counts.get("tranche_dispatched_orders_total"), report.completed),
        batch_size_mean=counts.ratio(
            "tranche_batch_size_requests_sum", "tranche_batch_size_requests_count"
        ),
        scheduler_cpu_s=counts.get("tranche_decision_seconds_sum"),
        decisions=_whole(counts.get("tranche_decision_seconds_count")),
    )


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _per(value: float | None, count: int) -> float | None:
    return None if value is None or not count else value / count
