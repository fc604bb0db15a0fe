"""Fixtures of the end-to-end tests."""

from collections.abc import Iterator

import pytest

from tests.e2e.live_mesh import LiveMesh, live_mesh


@pytest.fixture(scope="session")
def shared_mesh() -> Iterator[LiveMesh]:
    """One worker, in-memory bus, the demo model; for tests that leave it as they found it."""
    with live_mesh() as mesh:
        yield mesh
