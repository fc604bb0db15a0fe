"""Thousands of broken requests against a real mesh; it serves the right text afterwards."""

from collections.abc import Iterator

import pytest

from tests.api import test_malformed
from tests.api.conftest import LiveGateway
from tests.e2e.asking import Question, ask_all
from tests.e2e.live_mesh import LiveMesh

raw = test_malformed.raw
test_mutations = test_malformed.test_mutations
test_broken_http = test_malformed.test_broken_http
test_schema_of_the_api = test_malformed.test_schema_of_the_api
test_sequences_of_calls = test_malformed.test_sequences_of_calls


@pytest.fixture(scope="module")
def live_gateway(shared_mesh: LiveMesh) -> Iterator[LiveGateway]:
    """The same name as the scripted one, so the same tests run here."""
    question = Question((1, 5, 6), 12)
    before = ask_all(shared_mesh.url, [question])
    yield LiveGateway(f"{shared_mesh.url}/v1", "demo_model")
    assert ask_all(shared_mesh.url, [question]) == before
