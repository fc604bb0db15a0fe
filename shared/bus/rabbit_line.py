"""The line to RabbitMQ: connections that come back, and channels that are opened again on them.

aio-pika's robust connection does the reconnecting. Channels are kept here, in one place for
publishing and consuming alike: whatever ends a channel (line cut, broker restart, an error of the
broker, a deleted queue), it is opened anew and `setup` makes it what it was.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

import structlog
from aio_pika.exceptions import (
    CONNECTION_EXCEPTIONS,
    AuthenticationError,
    ChannelPreconditionFailed,
    ProbableAuthenticationError,
)
from aio_pika.robust_connection import RobustConnection
from aiormq import Channel
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    RetryError,
    retry_if_exception_type,
    stop_after_delay,
    wait_random_exponential,
)
from yarl import URL

from shared.bus.api import BusUnavailable

_log = structlog.get_logger(__name__)
for _library in ("aio_pika", "aiormq"):
    # They print a stack for every cut line and a line for every failed attempt; what matters of it
    # is logged here once per loss.
    logging.getLogger(_library).setLevel(logging.CRITICAL)

HEARTBEAT_S = 5
"""RabbitMQ looks once in so long and drops a client at the second look without a byte: after two to
three of these (20 to 30 s were seen with 10). aiormq drops a silent broker after three and 3 s."""
SCHEDULER_HEARTBEAT_S = 2
"""A leader whose line is dead, or that is stopped, keeps the standby waiting until the broker drops
it. One that is dropped without need costs a takeover, a second or two."""
ATTEMPT_TIMEOUT_S = 10.0
"""For one connection attempt or one set-up of a channel: many round trips even on a busy broker."""
CLOSE_TIMEOUT_S = 2.0
"""For a polite goodbye; after it the socket is just dropped."""
BACKOFF = wait_random_exponential(multiplier=0.1, max=2.0)
"""Full jitter, so that a restarted broker is not met by all services at once."""
NOTICE_S = 10.0
"""While there is no broker, the log says so, and why, this often; first after a fifth of it."""


class LineLost(Exception):
    """The channel or connection ended under an operation: its outcome is unknown, try again."""


@contextmanager
def line_errors() -> Iterator[None]:
    """Turn what aio-pika and aiormq raise for a lost line into LineLost.

    Among it are CancelledErrors that nobody asked for: aiormq rejects what still waits with one
    when a connection is torn down. They are told apart by the task's own count of cancellations.
    """
    try:
        yield
    except CONNECTION_EXCEPTIONS as error:
        raise LineLost(f"{type(error).__name__}: {error}") from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise LineLost("the connection was torn down") from error


async def connect(
    url: str,
    name: str,
    deadline_s: float,
    notice_s: float = NOTICE_S,
    heartbeat_s: int = HEARTBEAT_S,
) -> RobustConnection:
    """A connection that reconnects by itself from now on. Raises BusUnavailable, at once if the
    broker does not know the user or the password.

    The first connection has to be retried here: aio-pika only brings back one that was there.
    """
    address = URL(url)
    shown = address.with_password("***") if address.password else address
    notice_at_s = notice_s / 5

    def notice(state: RetryCallState) -> None:
        nonlocal notice_at_s
        waited_s = state.seconds_since_start or 0.0
        if waited_s >= notice_at_s:
            notice_at_s = waited_s + notice_s
            cause = state.outcome.exception() if state.outcome else None
            _log.warning(
                "no broker yet",
                bus=str(shown),
                cause=str(cause),
                waited_s=round(waited_s, 1),
                connection=name,
            )

    query = {"heartbeat": str(heartbeat_s), "name": name, **address.query}
    retrying = AsyncRetrying(
        wait=BACKOFF,
        stop=stop_after_delay(deadline_s),
        retry=retry_if_exception_type(LineLost),
        before_sleep=notice,
    )
    try:
        async for attempt in retrying:
            with attempt:
                return await _connect_once(
                    address.with_query(query), min(ATTEMPT_TIMEOUT_S, deadline_s)
                )
    except RetryError as error:
        cause = error.last_attempt.exception()
        raise BusUnavailable(
            f"no connection to {shown} within {deadline_s:g} s: {cause}"
        ) from cause
    raise AssertionError("tenacity ends by return or RetryError")


async def _connect_once(address: URL, timeout_s: float) -> RobustConnection:
    # A random pause per process keeps many services from coming back in step.
    connection = RobustConnection(address, reconnect_interval=random.uniform(0.25, 0.75))  # noqa: S311
    try:
        with line_errors():
            await connection.connect(timeout=timeout_s)
    except LineLost as error:
        await hang_up(connection)
        if isinstance(error.__cause__, AuthenticationError | ProbableAuthenticationError):
            # Waiting does not help.
            raise BusUnavailable(
                f"the broker at {address.host}:{address.port} refuses user {address.user!r} with "
                f"this password; put --bus right: {error}"
            ) from error
        raise
    except BaseException:
        await hang_up(connection)
        raise
    return connection


async def hang_up(connection: RobustConnection) -> None:
    """Close it for good, within CLOSE_TIMEOUT_S; never raises."""
    with suppress(LineLost, TimeoutError):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            with line_errors():
                await connection.close()


class KeptChannel:
    """A channel with publisher confirms that is opened and set up again whenever it is lost."""

    def __init__(
        self,
        connection: RobustConnection,
        purpose: str,
        setup: Callable[[Channel], Awaitable[None]],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_change` is called after the channel became ready or was lost."""
        self._connection = connection
        self._purpose = purpose
        self._setup = setup
        self._on_change = on_change
        self._ready = asyncio.Event()
        self._renew = asyncio.Event()
        self._channel: Channel | None = None
        self._first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._last_error = "no connection"
        self._closed = False
        self._task: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        """False while the channel is lost."""
        return self._channel is not None

    async def channel(self) -> Channel:
        """The channel, once it is there; it may be lost again at any time. Raises BusUnavailable
        if it was closed."""
        while True:
            await self._ready.wait()
            if self._channel is not None:
                return self._channel
            if self._closed:
                raise BusUnavailable(f"{self._purpose}: the bus was closed")

    async def open(self, deadline_s: float) -> None:
        """Returns when it is set up. Raises BusUnavailable; it is closed then."""
        self._task = asyncio.create_task(self._keep(), name=f"bus channel: {self._purpose}")
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.shield(self._first)
        except TimeoutError as error:
            await self.close()
            raise BusUnavailable(
                f"{self._purpose}: not set up within {deadline_s:g} s: {self._last_error}"
            ) from error
        except BaseException:
            await self.close()
            raise

    def renew(self) -> None:
        """Give the channel up and set up another one."""
        self._renew.set()

    async def close(self) -> None:
        """Close the channel: what it had not settled goes back to its queue."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._first.cancel()
        self._ready.set()  # who waits for a channel is told

    async def _keep(self) -> None:
        failures = 0
        while True:
            channel = None
            try:
                channel = await self._open_once()
                await self._until_lost(channel)
                failures = 0
                _log.warning("bus.channel_lost", purpose=self._purpose, error=_end_of(channel))
            except Exception as error:
                # Whatever it is: a service without its channel is deaf, so it is tried again.
                failures += 1
                self._note(error)
            finally:
                self._ready.clear()
                self._channel = None
                if channel is not None:
                    await _close_channel(channel)
            self._on_change()
            await asyncio.sleep(_pause_s(failures))

    async def _open_once(self) -> Channel:
        await self._connection.connected.wait()
        async with asyncio.timeout(ATTEMPT_TIMEOUT_S):
            with line_errors():
                transport = self._connection.transport
                if transport is None:
                    raise ConnectionError("the connection is being made")
                channel = await transport.connection.channel(on_return_raises=True)
                assert isinstance(channel, Channel)
                try:
                    await self._setup(channel)
                except BaseException:
                    await _close_channel(channel)
                    raise
        return channel

    async def _until_lost(self, channel: Channel) -> None:
        self._renew.clear()
        channel.on_consumer_cancel_callbacks.add(lambda _: self.renew())
        self._channel = channel
        self._ready.set()
        if not self._first.done():
            self._first.set_result(None)
        self._on_change()
        renewal = asyncio.ensure_future(self._renew.wait())
        try:
            await asyncio.wait([channel.closing, renewal], return_when=asyncio.FIRST_COMPLETED)
        finally:
            renewal.cancel()

    def _note(self, error: Exception) -> None:
        self._last_error = str(error) or type(error).__name__
        _log.warning("bus.channel_not_opened", purpose=self._purpose, error=self._last_error)
        if isinstance(error.__cause__, ChannelPreconditionFailed) and not self._first.done():
            # Waiting does not help: the queue exists with other arguments.
            self._first.set_exception(
                BusUnavailable(
                    f"{self._purpose}: {self._last_error}; it exists with other arguments, as "
                    "after an upgrade: stop all services, delete it, start them again"
                )
            )


def _end_of(channel: Channel) -> str:
    """Why it ended, for the log."""
    closing = channel.closing
    if not closing.done():
        return "its consumer was cancelled by the broker"
    error = None if closing.cancelled() else closing.exception()
    return str(error or "closed")


async def _close_channel(channel: Channel) -> None:
    with suppress(LineLost, TimeoutError):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            with line_errors():
                await channel.close()


def _pause_s(failures: int) -> float:
    """Short after a first loss, then longer, always with jitter."""
    return random.uniform(0.0, min(2.0, 0.05 * 2.0 ** min(failures, 6)))  # noqa: S311
