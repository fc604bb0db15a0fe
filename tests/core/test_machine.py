"""Hypothesis finds the order of misfortunes that breaks the protocol, if there is one."""

from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from services.scheduler.core.state import HELD, State
from services.scheduler.core.workers import Worker
from tests.core.test_world import LIVE
from tests.core.world import CALM, STORM, World

places = st.integers(0, 7)
POLICIES = ["sls", "pm", "ab", "scls", "past-future", "aggressive", "vllm", "sal+larry"]


class MeshMachine(RuleBasedStateMachine):
    """The world checks safety at every message; the machine adds the books' own invariants, and
    liveness at the end."""

    @initialize(policy=st.sampled_from(POLICIES), seed=st.integers(0, 2**32))
    def begin(self, policy: str, seed: int) -> None:
        self.world = World(policy, seed, LIVE)
        self.world.add_worker()
        self.world.add_gateway()
        self.count = 0

    @rule(which=places, prompt=st.integers(1, 300), length=st.integers(1, 90))
    def submit(self, which: int, prompt: int, length: int) -> None:
        gateways = list(self.world.gateways.values())
        self.count += 1
        gateways[which % len(gateways)].submit(f"r{self.count}", prompt, length, 60)

    @rule(seconds=st.sampled_from([0.002, 0.05, 0.3, 1.1, 3.5]))
    def pass_time(self, seconds: float) -> None:
        self.world.run(seconds)

    @rule(faults=st.sampled_from([CALM, STORM]))
    def weather(self, faults: object) -> None:
        self.world.net.faults = faults  # type: ignore[assignment]

    @rule(capacity=st.sampled_from([450, 1000, 5000]), rows=st.sampled_from([0, 1, 4]))
    @precondition(lambda self: len(self.world.workers) < 5)
    def worker_joins(self, capacity: int, rows: int) -> None:
        self.world.add_worker(capacity, rows)

    @rule(which=places, how=st.sampled_from(["die", "leave", "quiet"]))
    @precondition(lambda self: self.world.workers)
    def worker_trouble(self, which: int, how: str) -> None:
        workers = list(self.world.workers.values())
        worker = workers[which % len(workers)]
        if how == "die":
            worker.die()
        elif how == "leave":
            worker.leave()
        else:
            worker.quiet_until = self.world.net.now + 3.0

    @rule(away_s=st.sampled_from([0.0, 0.4, 2.5]))
    def leader_dies(self, away_s: float) -> None:
        self.world.kill_scheduler(away_s)

    @rule(which=places)
    @precondition(lambda self: len(self.world.gateways) < 3)
    def gateway_joins(self, which: int) -> None:
        self.world.add_gateway()

    @rule(which=places, how=st.sampled_from(["die", "quiet"]))
    @precondition(lambda self: len(self.world.gateways) > 1)
    def gateway_trouble(self, which: int, how: str) -> None:
        gateways = list(self.world.gateways.values())
        gateway = gateways[which % len(gateways)]
        if how == "die":
            gateway.die()
        else:
            gateway.quiet_until = self.world.net.now + 4.5

    @rule(which=st.integers(0, 100), how=st.sampled_from(["cancel", "stop"]))
    @precondition(lambda self: self.world.open_requests())
    def client_ends(self, which: int, how: str) -> None:
        ledgers = self.world.open_requests()
        ledger = ledgers[which % len(ledgers)]
        gateway = self.world.gateways[ledger.spec.gateway]
        gateway.cancel(ledger) if how == "cancel" else gateway.stop(ledger)

    @invariant()
    def books_agree(self) -> None:
        core = self.world.core
        if core is None:
            return
        requests, workers = core.books.requests, core.books.workers.active
        for request_id, request in requests.open.items():
            assert request.state is not State.DONE
            assert (request.state is State.WAITING) == (request_id in requests.pool)
            assert (request.state in HELD) == bool(request.worker)
            if request.worker and core.books.leased:
                assert workers[request.worker].credit.leases[request_id] is request
            elif request.worker:
                assert request_id in workers[request.worker].batches[request.batch_id].request_ids
        assert not set(requests.open) & set(requests.done)
        for worker in workers.values():
            self.credit_adds_up(worker)
        self.board_and_shelf_agree()

    def credit_adds_up(self, worker: Worker) -> None:
        credit = worker.credit
        leases = list(credit.leases.values())
        parking = [request for request in leases if request.state is State.PARKING]
        assert credit.blocks == sum(request.blocks for request in leases)
        assert credit.parking_blocks == sum(request.blocks for request in parking)
        worst = [credit.blocks_for(request, request.spec.max_tokens) for request in leases]
        assert credit.worst_blocks == sum(worst)
        assert credit.backlog_tokens == sum(request.backlog_tokens for request in leases)
        assert set(credit.wanting) <= set(credit.leases)
        line = worker.line.ordered(self.world.net.now) if worker.line is not None else []
        assert worker.waiting_tokens == sum(request.input_tokens for request in line)

    def board_and_shelf_agree(self) -> None:
        """What is kept along the way equals what a look at everything finds."""
        assert self.world.core is not None
        books = self.world.core.books
        workers, board = list(books.workers.active.values()), books.board
        assert board.workers == workers
        heads = [worker.head() for worker in workers]
        running = sum(len(head.request_ids) for head in heads if head is not None)
        assert board.running == running + sum(len(w.credit.leases) for w in workers)
        recalling = [r for r in books.requests.open.values() if r.state is State.RECALLING]
        assert sorted(books.requests.recalling) == sorted(r.request_id for r in recalling)
        if books.leased:
            return
        loads = [sum(batch.estimate_s for batch in w.batches.values()) for w in workers]
        assert [worker.load_s for worker in workers] == loads == board.loads.tolist()
        assert board.batches.tolist() == [len(worker.batches) for worker in workers]
        pool = books.requests.pool.values()
        assert sorted(books.shelf.requests) == sorted(request.number for request in pool)
        lengths = sorted((request.input_tokens, request.number) for request in pool)
        ranks = sorted((request.spec.priority, request.number) for request in pool)
        assert books.shelf.order == (lengths if books.preset.order == "by-length" else ranks)
        assert books.shelf.lengths in ([], lengths)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.add_worker(5000)
        self.world.run_until_done(600)
        self.world.check_drained()


TestMesh = MeshMachine.TestCase
TestMesh.settings = settings(
    max_examples=20,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
