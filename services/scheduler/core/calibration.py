"""Calibration: are predicted quantiles of output lengths what they say?

Of each new request a few quantiles of its output are predicted, by what the policy goes by: with
admission by chance the survival function of its class, else the recent outputs of like prompts.
When it has ended they are compared with what came. Coverage: the share of outputs that were no
longer than the quantile; it should be the quantile's own level. Pinball loss: the mean price of a
miss, level x shortfall or (1 - level) x excess, in tokens; least for the true quantile. An output
that a limit cut is compared as it is: so are its quantiles, which stay within the limit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

LEVELS = (0.5, 0.9, 0.99)


@dataclass(slots=True)
class Calibration:
    """Totals of one leadership, one entry per level."""

    compared: int = 0
    covered: list[int] = field(default_factory=lambda: [0] * len(LEVELS))
    pinball_tokens: list[float] = field(default_factory=lambda: [0.0] * len(LEVELS))

    def ended(self, predicted: Sequence[float], output_tokens: int) -> None:
        """A request came to its end; nothing may have been predicted for it."""
        if len(predicted) != len(LEVELS):
            return
        self.compared += 1
        for at, (level, tokens) in enumerate(zip(LEVELS, predicted, strict=True)):
            self.covered[at] += output_tokens <= tokens
            miss = output_tokens - tokens
            self.pinball_tokens[at] += level * miss if miss > 0 else (level - 1) * miss
