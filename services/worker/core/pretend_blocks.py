"""A pretend worker's KV pool: how many blocks its seats fill, to the block, without touching them.

A running seat fills one slot a step and begins a new block every `size` steps. So it is enough to
know how many seats begin one at each step modulo the block.
"""

from services.worker.core.pretend_seats import Seat, Stage
from shared.memory import leased_blocks


class BlockPool:
    """Counts of blocks. Seats tell when they begin and end to run."""

    def __init__(self, kv_tokens: int, size: int) -> None:
        self.size = size
        self.most = kv_tokens // size
        self.used = 0
        self.reserved = 0
        """What all leases together may fill. While it is within `most`, nothing can go wrong."""
        self._phase = [0] * size
        self._running = 0

    @property
    def promised_too_much(self) -> bool:
        """The leases together reach beyond the pool."""
        return self.reserved > self.most

    def begins(self, seat: Seat) -> None:
        """It runs from the next step on."""
        self._phase[seat.block_phase(self.size)] += 1
        self._running += 1

    def ends(self, seat: Seat) -> None:
        """It does not run any more. `seat.base` is still as it was while it ran."""
        self._phase[seat.block_phase(self.size)] -= 1
        self._running -= 1

    def begun(self, step: int, steps: int) -> int:
        """New blocks of the running seats in the `steps` steps from `step` on."""
        size, phase = self.size, self._phase
        rounds, rest = divmod(steps, size)
        start = step % size
        begun = rounds * self._running
        for at in range(start, start + rest):
            begun += phase[at - size if at >= size else at]
        return begun

    def growth(self, seat: Seat, tokens: int) -> int:
        """New blocks for so many more tokens of its prefill."""
        return -(-(seat.filled + tokens) // self.size) + (-seat.filled // self.size)

    def held(self, seat: Seat, position: int) -> int:
        """Blocks of a seat with so many output tokens."""
        filled = -(-seat.filled // self.size)
        if seat.stage is Stage.PREFILLING:
            return filled
        return max(filled, leased_blocks(seat.prompt_tokens, position, self.size))
