"""What an iteration of the paged engine computes, as values."""

from collections.abc import Sequence as Items

from services.worker.paged.plan import plan
from services.worker.paged.sequence import Sequence, make_sequence
from tests.worker.orders import make_order, make_spec

BLOCK = 4


def sequence(name: str, prompt: int, computed: int = 0, output: int = 0) -> Sequence:
    """A lease with much credit left."""
    spec = make_spec(name, [7] * prompt, 100)
    made = make_sequence(make_order(spec, 50, [7] * output), (), 100, 1000, BLOCK)
    made.computed = computed
    return made


def decoding(name: str) -> Sequence:
    return sequence(name, 10, computed=12, output=3)


def planned(
    sequences: Items[Sequence],
    budget: int,
    rows_max: int = 100,
    *,
    prefill_first: bool = False,
    turn: int = 0,
) -> list[tuple[str, int]]:
    """(request, tokens) of the shares, where nothing is shared."""
    shares = plan(
        sequences,
        budget=budget,
        rows_max=rows_max,
        prefill_first=prefill_first,
        find=lambda sequence: None,
        awaited=lambda sequence: (),
        turn=turn,
    )
    return [(share.sequence.request_id, share.tokens) for share in shares]


def test_decodes_go_first_and_prefills_share_what_is_left_in_order() -> None:
    line = [sequence("p", 9), decoding("d"), sequence("q", 9), sequence("r", 9)]
    assert planned(line, 14) == [("d", 1), ("p", 9), ("q", 4)]


def test_prefill_first_leaves_the_decodes_out() -> None:
    line = [decoding("d"), sequence("p", 9)]
    assert planned(line, 14, prefill_first=True) == [("p", 9)]
    assert planned(line[:1], 14, prefill_first=True) == [("d", 1)]


def test_more_decodes_than_there_is_room_for_take_turns() -> None:
    line = [decoding(name) for name in "abcde"]
    seen = [name for turn in range(5) for name, _ in planned(line, 2, turn=turn)]
    assert sorted(seen) == sorted("abcde" * 2)


def test_who_has_no_credit_has_no_row() -> None:
    paused = decoding("paused")
    paused.until = 3
    assert planned([paused, decoding("d")], 14) == [("d", 1)]


def test_equal_beginnings_are_computed_once() -> None:
    first, second, other = sequence("first", 9), sequence("second", 9), sequence("other", 9)
    other.chain.keys[0] = b"another text"
    shares = plan(
        [first, second, other],
        budget=100,
        rows_max=100,
        prefill_first=False,
        find=lambda sequence: None,
        awaited=lambda sequence: sequence.chain.keys,
    )
    assert [share.sequence for share in shares] == [first, other]
