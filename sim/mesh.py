"""A whole mesh in virtual time: one scheduler, one gateway, an estimator and workers."""

from collections.abc import Callable
from random import Random
from typing import Any

from services.scheduler.core.presets import preset_named
from shared.messages import Finished
from sim.clients import Call, Clients
from sim.estimator import SimEstimator
from sim.gateway import SimGateway
from sim.leader import Leader, Step
from sim.network import Network, Seen
from sim.setup import Setup
from sim.worker import SimWorker
from sim.worker_closed import ClosedSimWorker
from sim.worker_leased import LeasedSimWorker
from sim.world import World

GATEWAY = "gateway-1"


class SimMesh:
    """Everything of one run, wired together. Each random stream has a seed of its own, so that a
    change in one part of a set-up does not change the luck of the others."""

    def __init__(
        self,
        setup: Setup,
        *,
        progress: Callable[[int, int], None] | None = None,
        journal: list[Step] | None = None,
        log: list[Seen] | None = None,
        spans: bool = False,
    ) -> None:
        self.setup = setup
        self.world = World()
        self.network = Network(
            self.world,
            Random(f"network {setup.seed}"),
            delay_s=setup.network_delay_s,
            faults=setup.faults,
            encoded=setup.encoded,
            log=log,
        )
        self.workers: dict[str, SimWorker] = {}
        self.all_workers: list[SimWorker] = []
        """The dead ones among them."""
        self.gateways: dict[str, SimGateway] = {}
        self.finished_lengths: list[Finished] = []
        self._spans = spans
        self._luck = Random(f"losses {setup.seed}")
        self.leader = Leader(
            self, preset_named(setup.policy), setup.all_constants(), self.truth, journal
        )
        self.estimator = SimEstimator(
            self.world,
            self.network,
            self.leader,
            setup.estimator_window,
            setup.forecast_interval_s,
        )
        self.gateway = self._make_gateway()
        self.clients = Clients(
            self.world, setup.workload, self.gateway.submit, progress, setup.resubmit
        )

    def start(self) -> None:
        """Everybody says hello; then the clients come."""
        self.leader.elect()
        for _ in range(self.setup.workers):
            self.add_worker()
        self.gateway.start()
        self.estimator.know(self.setup.profile.model, self.setup.history, self.setup.cap_tokens)
        for at in self.setup.faults.worker_losses_s:
            self.world.at(at, self._lose_worker)
        for at in self.setup.faults.leader_losses_s:
            self.world.at(at, self._lose_leader)
        self.world.run(self.world.now + 4 * self.setup.network_delay_s)
        self.clients.start()

    def add_worker(self) -> SimWorker:
        """A new one joins."""
        number = len(self.all_workers) + 1
        leased = preset_named(self.setup.policy).form == "leased"
        kind = LeasedSimWorker if leased else ClosedSimWorker
        luck = Random(f"worker {number} {self.setup.seed}")
        worker = kind(self, f"worker-{number}", luck, self._spans)
        self.workers[worker.boot] = worker
        self.all_workers.append(worker)
        worker.start()
        return worker

    # ------------------------------------------------------------------------ between services

    def to_leader(self, message: Any) -> None:
        self.network.carry(message, self.leader.deliver)

    def to_gateway(self, gateway: str, message: Any, times: Any) -> None:
        receiver = self.gateways.get(gateway)
        if receiver is not None:
            self.network.carry(message, receiver.receive, times)

    def to_worker(self, worker: str, message: Any) -> None:
        receiver = self.workers.get(worker)
        if receiver is not None:
            self.network.carry(message, receiver.receive)

    def finished(self, message: Finished, extra: Any = None) -> None:
        """For the estimator."""
        self.estimator.receive(message)

    def truth(self, request_id: str) -> int:
        """Where the model would end this output. Workers know it by running the model."""
        return self.clients.calls[int(request_id[1:])].item.output_tokens

    def gone(self, worker: str) -> None:
        """It died or left."""
        self.workers.pop(worker, None)

    def last_token_at(self, worker: str, request_id: str) -> float | None:
        """What a client sees of a stream between two reports."""
        holder = self.workers.get(worker)
        return None if holder is None else holder.last_token_at(request_id)

    def placed(self, request_id: str) -> bool:
        """Whether some worker has it."""
        return any(worker.holds(request_id) for worker in self.workers.values())

    # ---------------------------------------------------------------------------------- misfortune

    def _lose_worker(self) -> None:
        if not self.workers:
            return
        self._luck.choice(list(self.workers.values())).die()
        back_s = self.setup.faults.worker_back_s
        if back_s is not None:
            self.world.after(back_s, self._worker_returns)

    def _worker_returns(self) -> None:
        self.add_worker()

    def _lose_leader(self) -> None:
        self.leader.die(self.setup.faults.leader_away_s)

    def _make_gateway(self) -> SimGateway:
        setup = self.setup
        gateway = SimGateway(
            GATEWAY,
            self.world,
            self.to_leader,
            self.to_worker,
            model=setup.profile.model,
            max_tokens=setup.cap_tokens,
            patience=setup.gateway_patience,
            abort=setup.abort,
            last_token_at=self.last_token_at,
            placed=self.placed,
            ended=self._call_ended,
            failed=self._call_failed,
            told=setup.told,
            streamed=setup.streamed,
        )
        self.gateways[GATEWAY] = gateway
        return gateway

    def _call_ended(self, call: Call) -> None:
        self.clients.finished(call)

    def _call_failed(self, call: Call, *what: Any) -> None:
        self.clients.failed(call, *what)
