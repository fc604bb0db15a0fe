"""Items: the requests of a workload, and the error of what makes none."""

from dataclasses import dataclass


class WorkloadError(Exception):
    """The file or the options do not make a workload; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Item:
    """One request to come. Lengths are in tokens; `output_tokens` is the recorded truth, which a
    scheduler must never see."""

    arrival_s: float | None
    prompt_tokens: int
    output_tokens: int
    prompt: str | None = None
    tenant: str = ""
    service_class: str = ""
    priority: int = 0
    session_id: str = ""
    ttft_deadline_ms: int | None = None
    deadline_ms: int | None = None
    """Wishes of its client: its first token, its end, from sending on."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Items in order of arrival. With `clients`, each of so many clients sends its next request
    when its last one has ended, and arrival times do not count."""

    name: str
    items: tuple[Item, ...]
    clients: int | None = None

    @property
    def offered_rps(self) -> float | None:
        """Requests per second over the span of arrivals; None in a closed loop."""
        if self.clients is not None or len(self.items) < 2:
            return None
        first, last = self.items[0].arrival_s or 0.0, self.items[-1].arrival_s or 0.0
        return (len(self.items) - 1) / (last - first) if last > first else None
