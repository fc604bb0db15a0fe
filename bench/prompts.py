"""Prompts of a wanted length: seeded plain words, so that no two requests share a long prefix."""

from dataclasses import dataclass
from random import Random

WORDS = (
    "the of and to in that was his he it with is for as had you not be her on at by which have or "
    "from this him but all she they were my are me one their so an said them we who would been "
    "will no when there if more out up into do any your what has man could other than our some "
    "very time upon about may its only now like little then can should made did us such great "
    "before must two these see know over much down after first good men own never most old shall "
    "day where those came come himself way work life without go make well through being long say"
).split()


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """Makes prompts by the server's own count: `tokens_per_word` and `overhead_tokens` (begin
    tokens) are measured by two probing requests."""

    tokens_per_word: float = 1.0
    overhead_tokens: float = 0.0

    def prompt(self, tokens: int, rng: Random) -> str:
        """Words that are about `tokens` tokens long on this server."""
        words = round((tokens - self.overhead_tokens) / self.tokens_per_word)
        return " ".join(rng.choice(WORDS) for _ in range(max(1, words)))


def fitted(short: tuple[int, int], long: tuple[int, int]) -> PromptMaker:
    """A maker from two probes, each (words sent, prompt tokens counted by the server)."""
    per_word = (long[1] - short[1]) / (long[0] - short[0])
    if per_word <= 0:
        return PromptMaker()
    return PromptMaker(per_word, max(0.0, short[1] - per_word * short[0]))
