"""The future peak: the known vector, brute force step by step, and what must be monotone."""

import numpy as np
from hypothesis import given, strategies as st

from services.scheduler.core.policies.future import Future, peak, peaks

BATCHES = 20_000
STEPS_MAX = 24
VECTOR = ([5, 4, 5, 3, 4], [4, 3, 3, 2, 2])
"""LightLLM's documentation of its router: partial values 9, 15, 23, 25, 31."""


def by_steps(held: np.ndarray, remaining: np.ndarray, block: int) -> np.ndarray:
    """Brute force for many batches (N, n): after t steps those with at least t left are there and
    hold their tokens and t more, in blocks; entries that hold -1 do not exist."""
    best = np.zeros(len(held), dtype=np.int64)
    for step in range(STEPS_MAX + 1):
        alive = (remaining >= step) & (held >= 0)
        best = np.maximum(best, (np.ceil((held + step) / block) * alive).sum(axis=1))
    return best.astype(np.int64)


def random_batches(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 9, BATCHES)
    exists = np.arange(8) < sizes[:, None]
    held = np.where(exists, rng.integers(0, 60, (BATCHES, 8)), -1)
    return sizes, held, rng.integers(0, STEPS_MAX + 1, (BATCHES, 8))


def test_the_known_vector_gives_31() -> None:
    assert peak(*VECTOR) == 31
    assert [peak(VECTOR[0][:k], VECTOR[1][:k]) for k in range(1, 6)] == [9, 15, 23, 25, 31]


def test_it_equals_brute_force_on_many_random_batches() -> None:
    sizes, held, remaining = random_batches(1)
    truth = by_steps(held, remaining, 1)
    found = [peak(h[:n], r[:n]) for n, h, r in zip(sizes, held, remaining, strict=True)]
    assert found == truth.tolist()


def test_blocks_equal_brute_force_on_many_random_batches() -> None:
    sizes, held, remaining = random_batches(2)
    for block in (2, 3, 16):  # fewer and more tokens than requests: both ways to count
        some = slice(0, BATCHES // 2)
        truth = by_steps(held[some], remaining[some], block)
        rows = zip(sizes[some], held[some], remaining[some], strict=True)
        assert [peak(h[:n], r[:n], block) for n, h, r in rows] == truth.tolist(), block


def test_several_lists_at_once_equal_one_by_one() -> None:
    rng = np.random.default_rng(3)
    for block in (1, 4, 64):
        held, remaining = rng.integers(1, 900, 40), rng.integers(0, 500, (5, 40))
        alone = [peak(held, row, block) for row in remaining]
        assert peaks(held, remaining, block).tolist() == alone
        assert Future(held, remaining, block).peak() == max(alone)


def test_a_batch_built_one_by_one_has_the_same_peaks() -> None:
    rng = np.random.default_rng(4)
    for block in (1, 3, 16):
        held, remaining = rng.integers(0, 50, 30), rng.integers(0, 20, (3, 30))
        grown = Future(held[:4], remaining[:, :4], block)
        for count in range(4, 30):
            whole = Future(held[: count + 1], remaining[:, : count + 1], block)
            assert grown.peak_with(int(held[count]), remaining[:, count]) == whole.peak()
            grown.add(int(held[count]), remaining[:, count])
            assert grown.peaks.tolist() == whole.peaks.tolist()


def test_nobody_holds_nothing() -> None:
    none = np.empty(0, dtype=np.int64)
    assert peak([], []) == 0
    empty = Future(none, none.reshape(2, 0), 16)
    assert empty.peak() == 0
    assert empty.peak_with(17, np.array([0, 16])) == 3


batches = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 200)), min_size=1, max_size=12)


@given(
    batches, st.integers(0, 11), st.integers(0, 50), st.integers(0, 50), st.sampled_from((1, 16))
)
def test_more_held_or_more_to_come_never_lowers_it(
    batch: list[tuple[int, int]], which: int, held: int, remaining: int, block: int
) -> None:
    before = peak([a for a, _ in batch], [r for _, r in batch], block)
    which %= len(batch)
    batch[which] = (batch[which][0] + held, batch[which][1] + remaining)
    after = peak([a for a, _ in batch], [r for _, r in batch], block)
    assert after >= before
    assert peak([*(a for a, _ in batch), held], [*(r for _, r in batch), remaining], block) >= after


@given(batches, st.sampled_from((1, 16)))
def test_it_lies_between_what_is_held_and_the_sum_of_all_ends(
    batch: list[tuple[int, int]], block: int
) -> None:
    found = peak([a for a, _ in batch], [r for _, r in batch], block)
    assert sum(-(-a // block) for a, _ in batch) <= found
    assert found <= sum(-(-(a + r) // block) for a, r in batch)
