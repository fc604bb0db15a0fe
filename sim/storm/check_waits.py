"""Checked: nobody starves. A request that could be served makes progress within a stated time.

The clock of a request runs while there is a leader and a worker that takes work, and begins anew
when the request makes progress: a token for its client, or work on a worker. It may not run longer
than the work of everybody else takes, one after the other on one worker, and the mending of what
the storm broke. Under every order of ours, with priorities too, that bound holds: no world has more
work than its plan says, so whoever waits longer waits for nobody.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sim.storm.storm import Storm

EVERY_S = 1.0


class Waits:
    """See the module's text. It looks once a second."""

    def __init__(self, storm: "Storm", most_s: float) -> None:
        self.most_s = most_s
        self.longest_s = 0.0
        self._storm = storm
        self._seen: dict[str, tuple[object, float]] = {}
        """Request to what was seen of it, and for how long it has been the same."""

    def start(self) -> None:
        self._storm.world.after(EVERY_S, self._look)

    def _look(self) -> None:
        storm = self._storm
        storm.world.after(EVERY_S, self._look)
        open_ = [asked for gateway in storm.gateways for asked in gateway.open]
        if not open_:
            self._seen.clear()
            return
        could = self._servable()
        work: dict[str, tuple[int, int]] = {}
        for worker in storm.workers:
            if not worker.frozen:
                work |= worker.engine.progress()
        seen: dict[str, tuple[object, float]] = {}
        for asked in open_:
            name = asked.request_id
            if asked.paused_at:
                continue  # it waits for its own reader
            state = (asked.got, work.get(name))
            before = self._seen.get(name)
            if before is None or before[0] != state:
                seen[name] = (state, 0.0)
                continue
            waited_s = before[1] + could * EVERY_S
            seen[name] = (state, waited_s)
            self.longest_s = max(self.longest_s, waited_s)
            if waited_s > self.most_s:
                storm.judge.tell("starvation", f"{name} has waited for {waited_s:.0f} s")
        self._seen = seen

    def _servable(self) -> bool:
        storm = self._storm
        leader = storm.leader
        if leader is None or leader.frozen or not leader.line.up:
            return False
        return any(w.line.up and not (w.frozen or w.draining) for w in storm.workers)
