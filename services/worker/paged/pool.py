"""The KV block pool: which of the device's blocks is free, held, or kept for its content.

Theory of operation. A block is in one of three states. *Blank*: nobody wants it or its content.
*Held*: at least one lease counts on it. *Cached*: nobody holds it, but its content is known under
a key, and whoever has the same beginning may hold it again; it is free all the same, and taken
from its cache when blanks are used up, the one that was let go of longest ago first. Of blocks let
go of together the last goes first: the beginning of a text is worth more than its end.

The key of a full block stands for its tokens and all tokens before them, so equal keys mean equal
keys and values. A block with a key is never written to again while it has it.

Every operation costs O(1) per block. Nothing here is torch's: a block is its number.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

from services.worker.paged.chain import ChainKeys as ChainKeys, chain_keys as chain_keys

Key = Hashable


class PoolExhausted(Exception):
    """Fewer blocks are free than were asked for. Nothing was taken."""


class BlockPool:
    """See the module's text. Blocks are numbered 0 .. blocks - 1.

    `share`: False means that nothing is ever found again; keys are ignored.
    `on_evict`: called with (block, key) before a cached block's content is given up; it must not
    call the pool. If it raises, the pool is as consistent as before, and nothing was taken.
    """

    def __init__(
        self,
        blocks: int,
        block_tokens: int,
        *,
        share: bool = True,
        on_evict: Callable[[int, Key], None] | None = None,
    ) -> None:
        assert blocks >= 0, f"{blocks} blocks"
        assert block_tokens >= 1, f"blocks of {block_tokens} tokens"
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.share = share
        self.on_evict = on_evict
        self.evictions = 0
        """Cached blocks whose content was given up since the start."""
        self._holders = [0] * blocks
        self._blank = list(range(blocks - 1, -1, -1))
        """A stack: what was used last is in the processor's caches."""
        self._key_of: list[Key | None] = [None] * blocks
        self._block_of: dict[Key, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Held by nobody, with a key: the next to go is the first."""

    @property
    def free_blocks(self) -> int:
        """How many `take` can give: blank and cached ones."""
        return len(self._blank) + len(self._cached)

    @property
    def used_blocks(self) -> int:
        """Held by at least one."""
        return self.blocks - self.free_blocks

    @property
    def cached_blocks(self) -> int:
        """Free ones whose content is still known."""
        return len(self._cached)

    def holders(self, block: int) -> int:
        """How many hold it."""
        return self._holders[block]

    def match(self, keys: Sequence[Key]) -> list[int]:
        """The blocks of the longest known beginning of a chain. They are not held by that: hold
        them before anything else is taken."""
        found: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def take(self, count: int) -> list[int]:
        """So many blocks for one holder; their content is nobody's. Raises PoolExhausted."""
        if count > self.free_blocks:
            raise PoolExhausted(f"{count} blocks are wanted, {self.free_blocks} are free")
        while len(self._blank) < count:
            self._evict()
        taken = [self._blank.pop() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def hold(self, blocks: Sequence[int]) -> None:
        """One holder more for each, of blocks that are held or cached."""
        for block in blocks:
            if not self._holders[block]:
                assert block in self._cached, f"block {block} is blank: nothing there to hold"
                del self._cached[block]
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each, in the order of the text. Whose last holder that was becomes
        cached if it has a key, else blank."""
        for block in reversed(blocks):
            assert self._holders[block], f"block {block} is held by nobody"
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._key_of[block] is None:
                self._blank.append(block)
            else:
                self._cached[block] = None

    def publish(self, block: int, key: Key) -> int:
        """The held block is full, and its content is what `key` stands for. Returns the block that
        is found under the key: this one, or one that was there before (this one stays private)."""
        assert self._holders[block], f"block {block} is held by nobody"
        if not self.share:
            return block
        carrier = self._block_of.setdefault(key, block)
        if carrier == block:
            assert self._key_of[block] in (None, key), f"block {block} has another key"
            self._key_of[block] = key
        return carrier

    def forget(self) -> None:
        """No content is trusted any more: nothing is found from now on, and what nobody holds is
        blank. `on_evict` is not called."""
        for block in self._block_of.values():
            self._key_of[block] = None
        self._block_of.clear()
        self._blank += self._cached
        self._cached.clear()

    def _evict(self) -> None:
        """Make the cached block that was let go of longest ago a blank one."""
        block = next(iter(self._cached))
        key = self._key_of[block]
        assert key is not None
        if self.on_evict is not None:
            self.on_evict(block, key)
        del self._cached[block], self._block_of[key]
        self._key_of[block] = None
        self._blank.append(block)
        self.evictions += 1
