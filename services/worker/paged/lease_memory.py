"""The memory of leases: blocks are set aside when a lease is granted, and found again by content.

Theory of operation. A lease up to `until` owns `leased_blocks(prompt, until)` blocks from the
moment it is granted, so nothing that runs can be refused memory. Full blocks are published under
the key of their text: another request with the same beginning holds the same blocks instead of
computing them. What nobody holds stays until its room is wanted. Then a block of a parked request
moves to host memory if copying it back is cheaper than computing it again, by what both took.
"""

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np

from services.worker.paged.cache import KvCache, SavedBlock
from services.worker.paged.host import HostBlocks
from services.worker.paged.iteration import Ints
from services.worker.paged.pool import BlockPool, Key, PoolExhausted
from services.worker.paged.sequence import Sequence
from shared.memory import leased_blocks

SEATS_FIRST = 64
WORTH_MAX = 65_536
"""Keys that are remembered as worth a copy; more than host memory will ever hold."""
MEMORY = 0.2
"""Weight of the newest measurement in a mean."""


@dataclass(slots=True)
class Cost:
    """Seconds a unit, as a running mean."""

    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Another measurement."""
        self.seconds += (seconds - self.seconds) * (MEMORY if self.seconds else 1.0)


class LeaseMemory:
    """See the module's text."""

    def __init__(
        self,
        cache: KvCache,
        *,
        blocks: int,
        context_tokens_max: int,
        host_blocks: int = 0,
        block_bytes: int = 0,
        share: bool = True,
    ) -> None:
        self._cache = cache
        self._block_bytes = block_bytes
        self._width = -(-context_tokens_max // cache.block_tokens)
        self._tables = np.zeros((SEATS_FIRST, self._width), dtype=np.int32)
        self._seats = list(range(SEATS_FIRST - 1, -1, -1))
        self._worth: dict[Key, None] = {}
        self.host: HostBlocks[SavedBlock] = HostBlocks(host_blocks)
        self.pool = BlockPool(
            blocks,
            cache.block_tokens,
            share=share,
            on_evict=self._save if host_blocks else None,
        )
        self.token_cost, self.copy_cost = Cost(), Cost()
        """Of computing a token, and of copying a block in."""

    @property
    def tables(self) -> Ints:
        """[seats, blocks] int32."""
        return self._tables

    def need(self, sequence: Sequence, until: int) -> int:
        """Blocks of a lease up to `until`; at least those of the text that is there."""
        prompt = len(sequence.prompt)
        return leased_blocks(prompt, max(until, len(sequence.output), 1), self._cache.block_tokens)

    def grant(self, sequence: Sequence) -> None:
        """Set aside what its first lease may use; begin where a known text ends. Raises
        PoolExhausted; then nothing was taken."""
        known = self._usable(sequence)
        shared = self.pool.match(known)
        self.pool.hold(shared)
        try:
            private = self.pool.take(self.need(sequence, sequence.until) - len(shared))
        except PoolExhausted:
            self.pool.release(shared)
            raise
        sequence.seat = self._seat()
        sequence.blocks = shared + private
        self._tables[sequence.seat, : len(sequence.blocks)] = sequence.blocks
        self._skip(sequence, len(shared))
        self._restore(sequence, known[len(shared) :])

    def extend(self, sequence: Sequence, until: int) -> None:
        """Set aside what a longer lease may use beside. Raises PoolExhausted."""
        more = self.need(sequence, until) - len(sequence.blocks)
        if more > 0:
            begin = len(sequence.blocks)
            sequence.blocks += self.pool.take(more)
            self._tables[sequence.seat, begin : begin + more] = sequence.blocks[begin:]

    def find(self, sequence: Sequence) -> None:
        """Before a chunk: take over blocks that others have computed meanwhile."""
        size, known = self._cache.block_tokens, self._usable(sequence)
        begin = sequence.computed // size
        if sequence.computed % size or begin >= len(known):
            return
        shared = self.pool.match(known[begin:])
        if not shared:
            return
        end = begin + len(shared)
        self.pool.hold(shared)
        self.pool.release(sequence.blocks[begin:end])
        sequence.blocks[begin:end] = shared
        self._tables[sequence.seat, begin:end] = shared
        self._skip(sequence, end)

    def awaited(self, sequence: Sequence) -> Items[Key]:
        """Keys of the full blocks that it has yet to compute."""
        return self._usable(sequence)[sequence.computed // self._cache.block_tokens :]

    def publish(self, sequence: Sequence) -> None:
        """Its full blocks are computed: others may find them."""
        full = min(sequence.computed // self._cache.block_tokens, len(sequence.chain.keys))
        for index in range(sequence.published, full):
            self.pool.publish(sequence.blocks[index], sequence.chain.keys[index])
        sequence.published = max(sequence.published, full)

    def release(self, sequence: Sequence, *, keep: bool = False) -> None:
        """Its lease is over. `keep`: it is likely to come back, so that its blocks are worth a
        copy."""
        if sequence.seat < 0:
            return
        if keep and self.host.capacity:
            self._worth.update(dict.fromkeys(sequence.chain.keys[: sequence.published]))
            while len(self._worth) > WORTH_MAX:
                del self._worth[next(iter(self._worth))]
        self.pool.release(sequence.blocks)
        self._seats.append(sequence.seat)
        sequence.blocks, sequence.seat = [], -1

    def forget(self) -> None:
        """The device failed: no content is trusted any more."""
        self.pool.forget()
        self.host.clear()

    def _usable(self, sequence: Sequence) -> list[Key]:
        """Keys that it may use of others: not while all its prompt is to be scored, and never for
        its last token, whose logits are wanted."""
        if not self.pool.share or (sequence.scores_prompt and not sequence.told_prompt):
            return []
        return list(sequence.chain.keys[: (sequence.tokens - 1) // self._cache.block_tokens])

    def _skip(self, sequence: Sequence, blocks: int) -> None:
        tokens = blocks * self._cache.block_tokens
        sequence.computed, sequence.published = tokens, blocks

    def _seat(self) -> int:
        if not self._seats:
            seats = len(self._tables)
            more = np.zeros_like(self._tables)
            self._tables = np.concatenate([self._tables, more])
            self._seats = list(range(2 * seats - 1, seats - 1, -1))
        return self._seats.pop()

    # ------------------------------------------------------------------------ host memory

    def _save(self, block: int, key: Key) -> None:
        if key in self._worth:
            del self._worth[key]
            self.host.put(key, self._cache.save(block), self._block_bytes)

    def _restore(self, sequence: Sequence, keys: Items[Key]) -> None:
        """Copy back what host memory has of its text, if that is cheaper than to compute it."""
        count = self.host.known(keys) if self.host.capacity else 0
        if self.copy_cost.seconds > self.token_cost.seconds * self._cache.block_tokens > 0:
            return
        first = sequence.computed // self._cache.block_tokens
        for index in range(first, first + count):
            saved = self.host.pop(keys[index - first])
            if saved is None:
                return
            began = time.perf_counter()
            self._cache.restore(sequence.blocks[index], saved)
            self.copy_cost.add(time.perf_counter() - began)
            self._worth[keys[index - first]] = None
            self.pool.publish(sequence.blocks[index], keys[index - first])
            self._skip(sequence, index + 1)
