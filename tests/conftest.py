"""Fixtures that all tests share: brokers and buses.

One RabbitMQ serves a whole pytest session, all xdist workers included: AMQP_URL if it is set, else
a private server that is started when the first test asks for it and ends with the session. Each
test gets a virtual host of its own. A broker that cannot be had is an error, never a skip.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from shared.bus.api import Bus
from shared.bus.connect import forget_memory_broker, make_bus
from shared.bus.memory import MemoryBroker, MemoryBus
from tests.rabbitmq import (
    BOOT_TIMEOUT_S,
    INSTALL_TIMEOUT_S,
    Management,
    free_ports,
    management_of,
)

SESSION_FOLDER = "PYTEST_BROKER_FOLDER"
SESSION_PID = "PYTEST_BROKER_OWNER"


def pytest_configure(config: pytest.Config) -> None:
    """The first process of the session makes the folder that all its workers share."""
    if SESSION_FOLDER not in os.environ:
        os.environ[SESSION_FOLDER] = tempfile.mkdtemp(prefix="tranche-tests-")
        os.environ[SESSION_PID] = str(os.getpid())


def pytest_unconfigure(config: pytest.Config) -> None:
    """And it removes it; the broker's keeper sees this process end and stops the broker."""
    if os.environ.get(SESSION_PID) == str(os.getpid()):
        shutil.rmtree(os.environ.pop(SESSION_FOLDER), ignore_errors=True)
        del os.environ[SESSION_PID]


@pytest.fixture(scope="session")
def management() -> Management:
    """The session's RabbitMQ."""
    outside = os.environ.get("AMQP_URL")
    if outside:
        return management_of(outside)
    folder = Path(os.environ[SESSION_FOLDER])
    ready = folder / "broker.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists():
            start_broker(ready)
    amqp_url, http_url = json.loads(ready.read_text())
    return Management(amqp_url, http_url)


def start_broker(ready: Path) -> None:
    """Start a private RabbitMQ that ends with the session, whatever ends that."""
    log = ready.with_suffix(".log")
    command = [sys.executable, "-m", "tests.rabbitmq", "run", "--for-pid", os.environ[SESSION_PID]]
    with log.open("wb") as output:
        keeper = subprocess.Popen(
            [*command, "--ready-file", str(ready)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=Path(__file__).parent.parent,
        )
    deadline = time.monotonic() + BOOT_TIMEOUT_S + INSTALL_TIMEOUT_S
    while not ready.exists():
        if keeper.poll() is not None or time.monotonic() > deadline:
            keeper.kill()
            pytest.fail(f"no RabbitMQ for the tests:\n{log.read_text(errors='replace')}")
        time.sleep(0.05)
    keeper.returncode = 0  # it outlives us on purpose: no ResourceWarning when it is collected


@pytest.fixture
def broker_url(management: Management) -> Iterator[str]:
    """The AMQP address of a fresh virtual host."""
    vhost = f"test-{uuid.uuid4().hex}"
    yield management.create_vhost(vhost)
    management.delete_vhost(vhost)


@pytest.fixture(params=["memory", "rabbit"])
def any_bus_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a fresh broker of either kind, for `make_bus`."""
    if request.param == "rabbit":
        yield request.getfixturevalue("broker_url")
        return
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    forget_memory_broker(url)


@pytest.fixture
async def any_bus(any_bus_url: str) -> AsyncIterator[Bus]:
    """An open bus of either kind."""
    bus = make_bus(any_bus_url, service="test")
    await bus.open()
    yield bus
    await bus.close()


@pytest.fixture
def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, below those that clients' sockets are given."""
    return free_ports(1)


@pytest.fixture
async def memory_bus() -> AsyncIterator[MemoryBus]:
    """An open bus on a fresh broker in this process; `.broker` shows depths and dead letters."""
    bus = MemoryBus(MemoryBroker())
    await bus.open()
    yield bus
    await bus.close()
