"""Fixtures for the bus's tests: a place of either kind."""

from collections.abc import AsyncIterator

import pytest

from tests.bus.place import MemoryPlace, Place, RabbitPlace


@pytest.fixture
async def place(any_bus_url: str) -> AsyncIterator[Place]:
    """A fresh broker of either kind."""
    kind = MemoryPlace if any_bus_url.startswith("memory") else RabbitPlace
    async with kind(any_bus_url) as made:
        yield made


@pytest.fixture
async def rabbit(broker_url: str) -> AsyncIterator[RabbitPlace]:
    """A fresh virtual host."""
    async with RabbitPlace(broker_url) as made:
        yield made
