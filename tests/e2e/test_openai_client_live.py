"""The official client's suite of `tests/api` against a real mesh: two workers, slices of 16."""

from collections.abc import Iterator

import pytest

from tests.api import test_openai_client
from tests.api.conftest import LiveGateway
from tests.e2e.live_mesh import live_mesh


@pytest.fixture(scope="module")
def live_gateway() -> Iterator[LiveGateway]:
    """The same name as the scripted one, so the same tests run here."""
    with live_mesh(workers=2, slice_tokens=16) as mesh:
        yield LiveGateway(f"{mesh.url}/v1", "demo_model")


def _the_suite() -> dict[str, object]:
    """Tests and fixtures of the other module."""
    names = vars(test_openai_client)
    return {name: value for name, value in names.items() if name not in globals()}


globals().update(_the_suite())


def test_the_suite_is_large_enough() -> None:
    tests = [name for name in globals() if name.startswith("test_")]
    assert len(tests) > 40
