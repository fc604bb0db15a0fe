"""An estimator of a storm: the real history, and a database that outlives its process."""

from collections.abc import Callable
from typing import Any

from services.estimator.core.history import History, fault_of
from shared.messages import Finished, SchedulerBeat
from sim.storm.broker import HISTORY, INBOX, Broker
from sim.storm.process import Process
from sim.world import World

FORECAST_S = 2.0
WINDOW = 1_000
MakeHistory = Callable[[int, int], History]


class Estimator(Process):
    """See the module's text."""

    def __init__(
        self,
        world: World,
        broker: Broker,
        boot: str,
        make: MakeHistory,
        stored: dict[str, Finished],
    ) -> None:
        super().__init__(world, broker, boot, (HISTORY, boot))
        self.history = make(WINDOW, int(world.now * 1e6))
        self.history.restore(stored.values(), {})
        self._stored = stored
        self._published = (0, 0)
        self._epoch = 0

    def start(self) -> None:
        self.connect()
        self._forecast()

    def handle(self, message: Any) -> None:
        if isinstance(message, Finished):
            assert not fault_of(message)
            if self.history.add(message):
                self._stored.setdefault(message.request_id, message)
        elif isinstance(message, SchedulerBeat) and message.epoch > self._epoch:
            self._epoch = message.epoch
            self._say()

    def wake(self) -> None:
        """It has no deadlines of its own."""

    def deadline(self) -> float | None:
        return None

    def _forecast(self) -> None:
        if self.alive:
            changed = self._published != (self.history.version, self._epoch)
            if changed and not self.frozen and self.line.up:
                self._say()
            self.world.after(FORECAST_S, self._forecast)

    def _say(self) -> None:
        self._published = (self.history.version, self._epoch)
        self.say(INBOX, self.history.forecast(), None, 5.0)
