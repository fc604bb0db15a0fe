"""Service-level objectives: the limits under which a request counts as good."""

from dataclasses import dataclass

NAMES = ("ttft", "tpot", "gap", "e2e")


class SloError(Exception):
    """The text is no list of objectives."""


@dataclass(frozen=True, slots=True)
class Slo:
    """Seconds; None: no limit. `ttft`: time to first token, `tpot`: mean time per further token,
    `gap`: longest time between two tokens, `e2e`: from sending to the last token."""

    ttft: float | None = None
    tpot: float | None = None
    gap: float | None = None
    e2e: float | None = None

    def as_dict(self) -> dict[str, float]:
        """The limits that are set."""
        limits = {name: getattr(self, name) for name in NAMES}
        return {name: limit for name, limit in limits.items() if limit is not None}

    def met(self, ttft_s: float, tpot_s: float, gap_s: float, e2e_s: float) -> bool:
        """True if no limit is exceeded."""
        pairs = ((self.ttft, ttft_s), (self.tpot, tpot_s), (self.gap, gap_s), (self.e2e, e2e_s))
        return all(limit is None or value <= limit for limit, value in pairs)


def parse_slo(text: str) -> Slo:
    """`ttft=10,gap=1.5` as an Slo. Raises SloError."""
    limits: dict[str, float] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or name not in NAMES:
            raise SloError(f"{part!r}: give {', '.join(f'{n}=SECONDS' for n in NAMES)}")
        try:
            limits[name] = float(value)
        except ValueError as error:
            raise SloError(f"{part!r}: {value!r} is no number of seconds") from error
        if not limits[name] > 0:
            raise SloError(f"{part!r}: must be above 0")
    return Slo(**limits)
