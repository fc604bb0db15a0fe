"""Homes: a prompt goes where its beginning was computed lately, unless others wait there."""

from services.scheduler.core.policies.homes import CHUNK_TOKENS, CHUNKS_MAX, Homes, keys_of
from shared import tokens
from shared.messages import (
    RunSlice,
    SchedulerCommand,
    SliceDone,
    SliceResult,
    SliceTimings,
    WorkerMemory,
)
from tests.core.seam import LIVE, Bench, beat_of, submit

CAPACITY = 4_000
INSTRUCTIONS = range(5 * CHUNK_TOKENS)


def prompt(*parts: range) -> bytes:
    return tokens.pack([token for part in parts for token in part])


def test_equal_beginnings_have_equal_names_as_far_as_they_are_equal() -> None:
    one = keys_of(prompt(INSTRUCTIONS, range(1000, 1100)))
    other = keys_of(prompt(INSTRUCTIONS, range(2000, 2100)))
    assert one[:5] == other[:5]
    assert one[5] != other[5]
    shifted = keys_of(prompt(range(1), INSTRUCTIONS))
    assert not set(shifted) & set(one)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    assert keys_of(prompt(range(CHUNK_TOKENS))) == ()
    assert len(keys_of(prompt(range(CHUNK_TOKENS + 1)))) == 1
    assert len(keys_of(prompt(range(2 * CHUNKS_MAX * CHUNK_TOKENS)))) == CHUNKS_MAX


def test_what_others_have_displaced_is_no_home_any_more() -> None:
    homes = Homes()
    first, second = (keys_of(prompt(range(at, at + 129))) for at in (0, 10_000))
    homes.placed(first, "w1", capacity_tokens=3 * CHUNK_TOKENS)
    assert homes.cached_tokens(first) == {"w1": 128}
    homes.placed(second, "w1", capacity_tokens=3 * CHUNK_TOKENS)
    assert homes.cached_tokens(first) == {"w1": 128}
    homes.placed(second, "w1", capacity_tokens=3 * CHUNK_TOKENS)
    assert homes.cached_tokens(first) == {}
    assert homes.cached_tokens(second) == {"w1": 128}
    homes.gone("w1")
    assert homes.cached_tokens(second) == {}


def test_a_later_part_counts_only_behind_all_before_it() -> None:
    homes = Homes()
    keys = keys_of(prompt(range(3 * CHUNK_TOKENS + 1)))
    homes.placed(keys, "w1", CAPACITY)
    homes.placed(keys[:1], "w2", CAPACITY)
    assert homes.cached_tokens(keys) == {"w1": 192, "w2": 64}
    homes.placed(keys[2:], "w3", CAPACITY)
    assert "w3" not in homes.cached_tokens(keys)


class Two:
    """Two workers that share prefixes, or do not."""

    def __init__(self, *, sharing: bool, policy: str = "tranche") -> None:
        self.bench = Bench(policy, LIVE)
        self.at: dict[str, str] = {}
        for name in ("w1", "w2"):
            self.bench.say(
                beat_of(name, forms=("leased",), capacity=CAPACITY, shares_prefixes=sharing)
            )

    def ask(self, request_id: str, packed: bytes) -> str:
        """Submit; the worker that got it."""
        said = self.bench.say(submit(request_id, prompt=packed)) + self.bench.after(0.01)
        return self._heard(said)[request_id]

    def finish(self, request_id: str) -> None:
        """Its prefill and its output are over."""
        result = SliceResult(
            request_id=request_id,
            attempt=self.attempts[request_id],
            position=0,
            tokens=tokens.pack(range(3)),
            finish_reason="stop",
        )
        memory = WorkerMemory(kv_tokens_capacity=CAPACITY)
        done = SliceDone(
            epoch=1,
            worker=self.at[request_id],
            batch_id="",
            form="leased",
            results=(result,),
            timings=SliceTimings(),
            memory=memory,
        )
        self._heard(self.bench.say(done))

    def _heard(self, said: list[SchedulerCommand]) -> dict[str, str]:
        orders = [(o, run.worker) for run in said if isinstance(run, RunSlice) for o in run.orders]
        self.at |= {order.spec.request_id: worker for order, worker in orders}
        self.attempts = {**getattr(self, "attempts", {})} | {
            order.spec.request_id: order.attempt for order, _ in orders
        }
        return self.at


def turns(two: Two) -> list[str]:
    """Workers of one conversation, between whose turns one or two others come."""
    places = []
    for number in range(4):
        said = prompt(INSTRUCTIONS, range(5_000, 5_000 + 70 * (number + 1)))
        places.append(two.ask(f"turn-{number}", said))
        two.finish(f"turn-{number}")
        for other in range(1 + number % 2):
            name, begin = f"other-{number}-{other}", 10_000 * (2 * number + other + 1)
            two.ask(name, prompt(range(begin, begin + 300)))
            two.finish(name)
    return places


def test_a_conversation_stays_where_its_beginning_is() -> None:
    assert len(set(turns(Two(sharing=True)))) == 1


def test_where_nothing_is_shared_beginnings_do_not_matter() -> None:
    """The same stream goes to the workers in turn."""
    assert len(set(turns(Two(sharing=False)))) == 2


def test_nobody_waits_for_a_home_when_more_prefill_is_queued_there_than_it_saves() -> None:
    two = Two(sharing=True)
    home = two.ask("first", prompt(INSTRUCTIONS, range(5_000, 5_010)))
    two.finish("first")
    again = two.ask("second", prompt(INSTRUCTIONS, range(6_000, 6_600)))
    assert again == home  # which now has 920 tokens to prefill, against 320 that it would save
    assert two.ask("third", prompt(INSTRUCTIONS, range(7_000, 7_010))) != home


def test_a_lost_worker_is_nobodys_home() -> None:
    two = Two(sharing=True)
    home = two.ask("first", prompt(INSTRUCTIONS, range(5_000, 5_010)))
    two.finish("first")
    two.bench.say(
        beat_of(home, forms=("leased",), capacity=CAPACITY, shares_prefixes=True, leaving=True)
    )
    assert two.ask("second", prompt(INSTRUCTIONS, range(6_000, 6_010))) != home
