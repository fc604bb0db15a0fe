"""A kit for each engine of the run: all of them, or those of one kind."""

from collections.abc import Iterator

import pytest

from tests.worker.conformance.subjects import Kit, subjects


def _kit(request: pytest.FixtureRequest) -> Iterator[Kit]:
    kit = Kit(request.param)
    yield kit
    kit.close()


@pytest.fixture(params=subjects())
def any_kit(request: pytest.FixtureRequest) -> Iterator[Kit]:
    """Every engine, in each form that it runs."""
    yield from _kit(request)


@pytest.fixture(params=subjects(real_text=True))
def real_kit(request: pytest.FixtureRequest) -> Iterator[Kit]:
    """Those whose text is a model's."""
    yield from _kit(request)


@pytest.fixture(params=subjects(form="leased"))
def leased_kit(request: pytest.FixtureRequest) -> Iterator[Kit]:
    """Those that run leases."""
    yield from _kit(request)


@pytest.fixture(params=subjects(form="leased", real_text=True))
def real_leased_kit(request: pytest.FixtureRequest) -> Iterator[Kit]:
    """Those that run leases of a model's text."""
    yield from _kit(request)


@pytest.fixture(params=subjects(form="leased", sets_aside=True))
def careful_kit(request: pytest.FixtureRequest) -> Iterator[Kit]:
    """Those that set KV aside for a whole lease."""
    yield from _kit(request)


@pytest.fixture(params=subjects(name="paged"))
def paged_kit(request: pytest.FixtureRequest) -> Iterator[Kit]:
    """For what only this one has."""
    yield from _kit(request)


@pytest.fixture(params=subjects(form="closed", real_text=True))
def real_closed_kit(request: pytest.FixtureRequest) -> Iterator[Kit]:
    """Those that run closed batches of a model's text."""
    yield from _kit(request)


@pytest.fixture(params=subjects(form="closed"))
def closed_kit(request: pytest.FixtureRequest) -> Iterator[Kit]:
    """Those that run closed batches."""
    yield from _kit(request)
