"""A pretend worker's KV pool: how many blocks its seats fill, to the block, without touching them.

A running seat fills one slot a step and begins a new block every `size` steps. So it is enough to
know how many seats begin one at each step modulo the block.
"""

from services.worker.core.pretend_prefix import FreedBlocks
from services.worker.core.pretend_seats import Seat, Stage
from shared.memory import leased_blocks


class BlockPool:
    """Counts of blocks. Seats tell when they begin and end to run."""

    def __init__(self, kv_tokens: int, size: int, prefix_cache: bool = False) -> None:
        """`prefix_cache`: freed blocks can be found by who comes back, until they are taken."""
        self.size = size
        self.most = kv_tokens // size
        self.used = 0
        self.freed = FreedBlocks(self.most) if prefix_cache else None
        self.reserved = 0
        """What all leases together may fill. While it is within `most`, nothing can go wrong."""
        self._phase = [0] * size
        self._running = 0

    def take(self, blocks: int) -> None:
        """So many more are in use."""
        self.used += blocks
        if self.freed is not None:
            self.freed.take(blocks)

    def give_back(self, seat: Seat, position: int) -> None:
        """All blocks of a seat that leaves with so many output tokens."""
        blocks = self.held(seat, position)
        self.used -= blocks
        if self.freed is not None:
            computed = self._computed(seat, position)
            self.freed.free(seat.request_id, blocks, computed // self.size)
            if position >= seat.length:
                self.freed.forget(seat.request_id)

    def find(self, seat: Seat) -> int:
        """Tokens of its input that a seat finds computed; their blocks are in use again. At least
        one token is left to compute: the next token comes of it."""
        if self.freed is None:
            return 0
        blocks = self.freed.reuse(seat.request_id, (seat.input_tokens - 1) // self.size)
        self.used += blocks
        return blocks * self.size

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

    @staticmethod
    def _computed(seat: Seat, position: int) -> int:
        """Tokens of a seat whose keys and values are there: all but its newest."""
        if seat.stage is Stage.PREFILLING:
            return seat.filled
        return seat.prompt_tokens + position - 1
