"""Fixtures of the end-to-end tests: one shared mesh, and torch on one thread."""

from collections.abc import Iterator

import pytest

from tests.e2e.live_mesh import LiveMesh, live_mesh


@pytest.fixture(scope="session")
def torch_on_one_thread() -> Iterator[None]:
    """Tests run side by side on few cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRANCHE_WORKER_TORCH_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def shared_mesh(torch_on_one_thread: None) -> Iterator[LiveMesh]:
    """One worker, in-memory bus, the demo model; for tests that leave it as they found it."""
    with live_mesh() as mesh:
        yield mesh
