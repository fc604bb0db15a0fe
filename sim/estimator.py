"""The estimator in virtual time: the real history, published as the real service does."""

from typing import Any

from services.estimator.core.history import History, fault_of
from shared.messages import Finished, LengthForecast
from sim.leader import Leader
from sim.network import Network
from sim.world import World


class SimEstimator:
    """Forecasts go out after changes, at least `interval_s` apart, and to every new leader."""

    def __init__(
        self, world: World, network: Network, leader: Leader, window: int, interval_s: float
    ) -> None:
        self.history = History(window)
        self._world, self._network, self._leader = world, network, leader
        self._interval_s = interval_s
        self._published = (0, 0)
        """(version, epoch)."""
        world.after(interval_s, self._publish)

    def know(self, model: str, lengths: tuple[int, ...], max_tokens: int) -> None:
        """Lengths from before the run."""
        for number, length in enumerate(lengths):
            cut = length >= max_tokens
            self.history.add(
                Finished(
                    epoch=0,
                    request_id=f"before-{number}",
                    model=model,
                    prompt_tokens=0,
                    output_tokens=length,
                    max_tokens=max_tokens,
                    reason="length" if cut else "stop",
                )
            )
        if lengths:
            self._say()

    def receive(self, message: Finished, extra: Any = None) -> None:
        """A request ended."""
        assert not fault_of(message)
        self.history.add(message)

    def _publish(self) -> None:
        self._world.after(self._interval_s, self._publish)
        if self.history.version and self._published != (self.history.version, self._leader.epoch):
            self._say()

    def _say(self) -> None:
        self._published = (self.history.version, self._leader.epoch)
        forecast: LengthForecast = self.history.forecast()
        self._network.carry(forecast, self._leader.deliver)
