"""The KV block pool against a model of its own, and what is kept beside it in host memory.

The model writes texts into blocks as an engine would: a lease first holds what is known of its
text, takes blocks for the rest, and publishes those that are full. Whoever finds a block must find
its own text in it.
"""

import numpy as np
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.worker.paged.host import HostBlocks
from services.worker.paged.pool import BlockPool, ChainKeys, PoolExhausted, chain_keys

BLOCK = 2
TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=14)
"""Few different ones, so that beginnings are shared."""


class Lease:
    """A text and its blocks."""

    def __init__(self, text: list[int], blocks: list[int]) -> None:
        self.text, self.blocks = text, blocks


class PoolMachine(RuleBasedStateMachine):
    """Leases come, grow and go; `written`, `known` and `line` are the model's own truth."""

    @initialize(blocks=st.integers(0, 12))
    def make(self, blocks: int) -> None:
        self.pool = BlockPool(blocks, BLOCK, on_evict=self.evicted)
        self.leases: list[Lease] = []
        self.written: dict[int, tuple[int, ...]] = {}
        """Block -> the text up to its end."""
        self.known: dict[bytes, int] = {}
        self.line: list[int] = []
        """Cached blocks, the next to be evicted first."""

    # ------------------------------------------------------------------------------ the rules

    @rule(text=TEXTS)
    def admit(self, text: list[int]) -> None:
        keys = chain_keys(text, BLOCK)
        found = self.pool.match(keys)
        self.pool.hold(found)
        self.line = [block for block in self.line if block not in found]
        lease = Lease([], found)
        self.leases.append(lease)
        if not self.write(lease, text):
            self.leases.remove(lease)
            self.let_go(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), more=TEXTS)
    def grow(self, data: st.DataObject, more: list[int]) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        self.write(lease, lease.text + more)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        self.leases.remove(lease)
        self.let_go(lease)

    @rule(count=st.integers(0, 20))
    def take_too_many(self, count: int) -> None:
        before = (self.pool.free_blocks, self.pool.cached_blocks)
        with pytest.raises(PoolExhausted):
            self.pool.take(self.pool.free_blocks + 1 + count)
        assert (self.pool.free_blocks, self.pool.cached_blocks) == before

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.known, self.line = {}, []

    # ---------------------------------------------------------------------- how an engine does

    def write(self, lease: Lease, text: list[int]) -> bool:
        """The lease's text is this now; False if there is no room for it."""
        need = -(-len(text) // BLOCK) - len(lease.blocks)
        free = self.pool.free_blocks
        try:
            taken = self.pool.take(need)
        except PoolExhausted:
            assert free < need
            return False
        assert len(taken) == need == len(set(taken))
        assert not set(taken) & self.held()
        before = len(lease.text)
        lease.text, lease.blocks = text, lease.blocks + taken
        for index, key in enumerate(chain_keys(text, BLOCK)):
            block, end = lease.blocks[index], (index + 1) * BLOCK
            if end > before and self.known.get(key) != block:
                self.written[block] = tuple(text[:end])
                carrier = self.known.setdefault(key, block)
                assert self.pool.publish(block, key) == carrier
        return True

    def let_go(self, lease: Lease) -> None:
        self.pool.release(lease.blocks)
        still_held, carriers = self.held(), set(self.known.values())
        for block in reversed(lease.blocks):
            if block not in still_held and block in carriers:
                self.line.append(block)

    def evicted(self, block: int, key: object) -> None:
        assert block == self.line.pop(0), "the longest unused goes first"
        assert isinstance(key, bytes)
        assert self.known.pop(key) == block
        assert self.pool.match([key]) == [block], "its content is still there to be copied"

    def held(self) -> set[int]:
        return {block for lease in self.leases for block in lease.blocks}

    # ------------------------------------------------------------------------ what always holds

    @invariant()
    def counts_add_up(self) -> None:
        held = self.held()
        assert self.pool.used_blocks == len(held)
        assert self.pool.free_blocks == self.pool.blocks - len(held)
        assert self.pool.cached_blocks == len(self.line)
        assert held.isdisjoint(self.line)
        assert held <= set(range(self.pool.blocks))

    @invariant()
    def every_lease_finds_its_own_text(self) -> None:
        for lease in self.leases:
            assert len(lease.blocks) == -(-len(lease.text) // BLOCK)
            for index in range(len(lease.text) // BLOCK):
                assert self.written[lease.blocks[index]] == tuple(lease.text[: index * 2 + 2])
            for block in lease.blocks:
                sharers = sum(block in other.blocks for other in self.leases)
                assert self.pool.holders(block) == sharers

    @invariant()
    def a_match_is_what_its_key_says(self) -> None:
        for text in [[0] * 14, [1] * 14, [0, 1] * 7, *(lease.text for lease in self.leases)]:
            keys = chain_keys(text, BLOCK)
            found = self.pool.match(keys)
            assert found == [self.known[key] for key in keys[: len(found)]]
            assert len(found) == len(keys) or keys[len(found)] not in self.known
            for index, block in enumerate(found):
                assert self.written[block] == tuple(text[: index * 2 + 2])

    def teardown(self) -> None:
        """Nothing leaks."""
        if not hasattr(self, "pool"):
            return
        while self.leases:
            self.let_go(self.leases.pop())
        assert (self.pool.used_blocks, self.pool.free_blocks) == (0, self.pool.blocks)
        assert sorted(self.pool.take(self.pool.blocks)) == list(range(self.pool.blocks))


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_of_one_text_the_end_goes_first() -> None:
    pool = BlockPool(4, 16)
    blocks = pool.take(4)
    for block, key in zip(blocks, "abcd", strict=True):
        pool.publish(block, key)
    pool.release(blocks)
    pool.take(2)
    assert pool.match("abcd") == blocks[:2]


def test_a_pool_that_does_not_share_finds_nothing() -> None:
    pool = BlockPool(2, 16, share=False)
    (block,) = pool.take(1)
    assert pool.publish(block, "a") == block
    assert pool.match("a") == []
    pool.release([block])
    assert (pool.cached_blocks, pool.free_blocks) == (0, 2)


def test_if_a_block_cannot_be_saved_nothing_was_taken() -> None:
    def full(block: int, key: object) -> None:
        raise OSError("no room")

    pool = BlockPool(2, 16, on_evict=full)
    blocks = pool.take(2)
    pool.publish(blocks[0], "a")
    pool.release(blocks)
    with pytest.raises(OSError, match="no room"):
        pool.take(2)
    assert (pool.used_blocks, pool.cached_blocks) == (0, 1)
    assert pool.match("a") == blocks[:1]


@pytest.mark.parametrize("wrong", ["hold", "release", "publish"])
def test_blocks_that_nobody_holds_are_left_alone(wrong: str) -> None:
    pool = BlockPool(2, 16)
    with pytest.raises(AssertionError):
        {
            "hold": lambda: pool.hold([0]),
            "release": lambda: pool.release([0]),
            "publish": lambda: pool.publish(0, "a"),
        }[wrong]()


# ------------------------------------------------------------------------------- chain keys


def test_a_key_stands_for_all_before_it() -> None:
    text = [*range(40), *range(40)]
    keys = chain_keys(text, 8)
    assert len(set(keys)) == len(keys) == 10
    assert chain_keys(text[:39], 8) == keys[:4]
    assert chain_keys([1, *text[1:]], 8) != keys
    assert not set(chain_keys([99, *text[1:]], 8)) & set(keys)
    assert not set(chain_keys(text, 8, salt=b"tenant")) & set(keys)


@pytest.mark.parametrize("steps", [1, 3, 8, 17, 100])
def test_a_growing_text_gets_the_same_keys(steps: int) -> None:
    text = [n * n for n in range(99)]
    chain = ChainKeys(8)
    new = [chain.extend(text[at : at + steps]) for at in range(0, len(text), steps)]
    assert [key for keys in new for key in keys] == chain.keys == chain_keys(np.array(text), 8)


# ------------------------------------------------------------------------- blocks in the host


def test_the_host_keeps_what_was_wanted_last() -> None:
    host: HostBlocks[str] = HostBlocks(2)
    assert host.put("a", "A", 10) is None
    assert host.put("b", "B", 20) is None
    assert host.get("a") == "A"
    assert host.put("c", "C", 30) == "B", "its memory can be used again"
    assert host.get("b") is None
    assert ("b" in host, len(host)) == (False, 2)
    assert (host.hits, host.misses) == (1, 1)
    assert (host.bytes_held, host.bytes_in, host.bytes_out) == (40, 60, 10)
    assert host.put("a", "A2", 11) == "A"
    assert host.bytes_held == 41
    assert host.pop("a") == "A2"
    assert host.pop("a") is None
    assert (host.bytes_held, len(host)) == (30, 1)
    host.clear()
    assert (host.bytes_held, len(host)) == (0, 0)


def test_of_a_chain_the_host_knows_the_beginning() -> None:
    host: HostBlocks[int] = HostBlocks(9)
    for key in (1, 2, 4):
        host.put(key, key, 1)
    assert [host.known(keys) for keys in ([1, 2, 3, 4], [3, 4], [1, 2], [])] == [2, 0, 2, 0]
    assert (host.hits, host.misses) == (0, 0)


def test_a_host_without_room_keeps_nothing() -> None:
    host: HostBlocks[str] = HostBlocks(0)
    assert host.put("a", "A", 10) == "A"
    assert (len(host), host.get("a"), host.bytes_held) == (0, None, 0)
