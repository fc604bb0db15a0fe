"""What if: copies of a world tell what would have become of one request, and change nothing."""

from dataclasses import replace

import pytest

from sim.items import Item
from sim.mesh import SimMesh
from sim.run import run_out
from sim.what_if import first_tokens
from tests.sim.worlds import items, setup

NUMBERS = (3, 20, 40)
BUSY = setup("tranche", items(50, rate=40.0), told=True)


def first_of(mesh: SimMesh) -> dict[int, float]:
    return {call.number: (call.first_at or 0.0) - call.sent_at for call in mesh.clients.calls}


def test_a_copy_in_which_nothing_is_changed_comes_to_what_came() -> None:
    plain, copied = SimMesh(BUSY), SimMesh(BUSY)
    plain.start()
    run_out(plain)
    found = first_tokens(copied, NUMBERS, lambda item: item, 600.0)
    assert first_of(copied) == first_of(plain), "the run knows nothing of its copies"
    for number in NUMBERS:
        assert found[number] == pytest.approx(first_of(plain)[number])


def test_what_is_changed_changes_its_own_copy_only() -> None:
    def longer(item: Item) -> Item:
        return replace(item, prompt_tokens=item.prompt_tokens + 1_500)

    mesh = SimMesh(BUSY)
    found = first_tokens(mesh, NUMBERS, longer, 600.0)
    came = first_of(mesh)
    assert all(found[number] > came[number] + 0.1 for number in NUMBERS)


def test_who_gets_no_first_token_in_time_has_waited_for_ever() -> None:
    found = first_tokens(SimMesh(BUSY), (40,), lambda item: item, 0.0)
    assert found[40] == float("inf")
