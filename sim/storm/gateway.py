"""A gateway of a storm: the real ledger, its clients with their habits, and its beats."""

from collections.abc import Callable
from typing import Any, Protocol

from services.gateway.core.ledger import Ended, Expired, Ledger, Output, Promised, Refused
from services.gateway.core.record import Arrived
from shared.messages import FinishAck, GatewayBeat, Submit, TokenBatch
from sim.storm.asked import Asked, Texts, Wish, spec_of
from sim.storm.broker import INBOX, Broker
from sim.storm.process import Process
from sim.world import World

BEAT_S = 1.0
SUBMIT_S = 10.0
"""A Submit that no broker has taken by then is the client's 503."""
BEHIND = 8
"""So many unread tokens pause a request, and again whenever there are twice as many."""
UNREAD_MAX = 60
"""Tokens that wait for a slow reader; beyond it the gateway hangs up, as the real one does."""
DRAIN_S = 20.0
"""A gateway that is asked to stop waits so long for its open streams."""
LOOKS_S = 0.5
"""Between looks at slow readers."""


class GatewayJudge(Protocol):
    """Who watches what a gateway does."""

    def gateway_did(self, gateway: "Gateway", event: Any, outputs: list[Output]) -> None: ...

    def resumed(self, gateway: "Gateway", message: Any) -> None: ...

    def ended(self, asked: Asked) -> None: ...


class Gateway(Process):
    """See the module's text."""

    def __init__(
        self,
        world: World,
        broker: Broker,
        boot: str,
        ledger: Callable[..., Ledger],
        texts: Texts,
        judge: GatewayJudge,
    ) -> None:
        super().__init__(world, broker, boot, (boot,))
        self.ledger = ledger(boot, told=True)
        self.asked: dict[str, Asked] = {}
        """All that it was ever asked."""
        self.leaving = False
        self._texts, self._judge = texts, judge

    def start(self) -> None:
        self.connect()
        self._beat()
        self._look()

    @property
    def open(self) -> list[Asked]:
        return [asked for asked in self.asked.values() if not asked.outcome]

    # --------------------------------------------------------------------------------- clients

    def submit(self, wish: Wish) -> None:
        """A client calls."""
        expires_at = float("inf") if wish.expires_s is None else self.now() + wish.expires_s
        for choice, length in enumerate(wish.lengths):
            self._texts.lengths[wish.seed, choice] = length
            spec = spec_of(wish, choice, self.name, f"{self.name}.{wish.number}")
            whole = self._texts.whole(spec)
            asked = Asked(wish, choice, self.name, self.world.now, spec, whole)
            self.asked[asked.request_id] = asked
            message = self.ledger.open(spec, self.now(), expires_at)
            self.say(INBOX, message, self._submitted(asked), SUBMIT_S)
        if wish.abort_s is not None:
            self.world.after(wish.abort_s, self._abort, wish)
        self.arm()

    def _submitted(self, asked: Asked) -> Callable[[str], None]:
        def told(result: str) -> None:
            if result == "failed" and not asked.outcome and self.alive:
                self._hang_up(asked, "no broker")

        return told

    def _abort(self, wish: Wish) -> None:
        if self.alive and not self.frozen:
            for asked in self.open:
                if asked.wish is wish:
                    self._hang_up(asked, "aborted")

    def _hang_up(self, asked: Asked, why: str) -> None:
        self._over(asked, why)
        for output in self.ledger.cancel(asked.request_id):
            self.say(INBOX, output)

    def _look(self) -> None:
        """At slow readers."""
        if not self.alive:
            return
        self.world.after(LOOKS_S, self._look)
        if self.frozen:
            return
        for asked in self.open:
            if asked.wish.reads_tps is not None:
                self._follow_reader(asked, asked.unread(self.world.now))
        self.arm()

    def _follow_reader(self, asked: Asked, unread: float) -> None:
        if unread > UNREAD_MAX:
            self._hang_up(asked, "reads too slowly")
            return
        outputs: list[Output] = []
        if unread > max(BEHIND, 2 * asked.paused_at):
            asked.paused_at = unread
            outputs = self.ledger.pause(asked.request_id, self.now(), paused=True)
        elif asked.paused_at and unread <= 0:
            asked.paused_at = 0.0
            outputs = self.ledger.pause(asked.request_id, self.now(), paused=False)
        for output in outputs:
            self.say(INBOX, output)

    def leave(self) -> None:
        """SIGTERM: no new calls; what is open may end within a limit."""
        self.leaving = True
        self.world.after(DRAIN_S, self._abandon)
        self._leave_if_done()

    def _abandon(self) -> None:
        if self.alive and not self.frozen:
            for asked in self.open:
                self._hang_up(asked, "gateway left")
            self._leave_if_done()

    def _leave_if_done(self) -> None:
        if self.leaving and self.alive and not self.open:
            self.say(INBOX, GatewayBeat(gateway=self.name, leaving=True))
            self.world.after(0.05, self.die)

    # -------------------------------------------------------------------------------- the mesh

    def handle(self, message: Any) -> None:
        outputs = self.ledger.handle(message, self.now())
        self._judge.gateway_did(self, message, outputs)
        self._take(outputs, message.worker if isinstance(message, TokenBatch) else "")

    def wake(self) -> None:
        self._take(self.ledger.wake(self.now()), "")

    def deadline(self) -> float | None:
        return self.ledger.deadline()

    def reconnected(self) -> None:
        self._take(self.ledger.reconnected(self.now()), "")

    def _take(self, outputs: list[Output], worker: str) -> None:
        for output in outputs:
            match output:
                case Arrived():
                    self._arrived(output)
                case Ended():
                    self._end(output.request_id, output.reason, output.detail)
                case Refused():
                    detail = f"{output.rejection.reason}: {output.rejection.detail}"
                    self._end(output.request_id, "refused", detail)
                case Promised():
                    pass
                case Expired():
                    self._end(output.request_id, "expired", "")
                case FinishAck():
                    self.say(output.worker, output)
                case Submit():
                    raise AssertionError("only clients submit")
                case _:
                    self._judge.resumed(self, output)
                    self.say(INBOX, output)
        if self.leaving:
            self._leave_if_done()

    def _arrived(self, arrived: Arrived) -> None:
        asked = self.asked[arrived.request_id]
        asked.got += len(arrived.ids)
        stop = asked.wish.stop_at
        if stop is not None and asked.got >= stop and not asked.outcome:
            asked.got = stop
            self._over(asked, "stopped")
            for output in self.ledger.stop(arrived.request_id, stop):
                self.say(INBOX, output)

    def _end(self, request_id: str, outcome: str, detail: str) -> None:
        asked = self.asked[request_id]
        if not asked.outcome:
            self._over(asked, outcome, detail)

    def _over(self, asked: Asked, outcome: str, detail: str = "") -> None:
        asked.outcome, asked.detail, asked.ended_at = outcome, detail, self.world.now
        self._judge.ended(asked)

    # ------------------------------------------------------------------------------------ time

    def _beat(self) -> None:
        if not self.alive:
            return
        if not self.frozen and self.line.up:
            self.say(INBOX, GatewayBeat(gateway=self.name, open_requests=len(self.ledger)))
        self.world.after(BEAT_S, self._beat)
