"""What is asked in a comparison: an endless seeded sequence of prompts with the lengths wanted.

Request k of a seed is the same for every system. Different seeds share no prompt, so a prefix cache
helps nobody from one round to the next.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from bench.prompts import WORDS


@dataclass(frozen=True, slots=True)
class Lengths:
    """A lognormal length in tokens, cut at both ends."""

    median: float
    sigma: float
    most: int
    least: int = 1

    def draw(self, rng: Random) -> int:
        """One length."""
        drawn = round(self.median * rng.lognormvariate(0.0, self.sigma))
        return max(self.least, min(self.most, drawn))


PROMPTS = Lengths(median=100, sigma=0.6, most=512, least=4)
"""Mean 119 tokens."""
OUTPUTS = Lengths(median=60, sigma=0.9, most=512)
"""Mean 89 tokens, a tenth of them over 193."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    prompt: str
    prompt_tokens: int
    """Exact: each word, with the space before it, is one token of `bench.peers.model`."""
    output_tokens: int


def asks(
    seed: int, prompts: Lengths = PROMPTS, outputs: Lengths = OUTPUTS, words: Sequence[str] = WORDS
) -> Iterator[Ask]:
    """The requests of a seed, in order, without end."""
    rng = Random(seed)
    while True:
        prompt_tokens = prompts.draw(rng)
        prompt = "".join(f" {rng.choice(words)}" for _ in range(prompt_tokens))
        yield Ask(prompt, prompt_tokens, outputs.draw(rng))
