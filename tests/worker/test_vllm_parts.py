"""Engine `vllm` without vLLM: its sampling in a changing batch, its books, and the engine itself on
a core that only counts. What needs vLLM is in deploy/vllm_test."""

import random
from collections.abc import Sequence

import pytest
import torch
from msgspec.structs import replace as changed

from services.worker.engines.api import (
    BadOrder,
    EngineError,
    EngineInfo,
    LeasedEngine,
    LeaseEnd,
    OutOfMemory,
    StepReport,
)
from services.worker.engines.registry import FORMS
from services.worker.engines.vllm import VllmEngine
from services.worker.engines.vllm_core import CoreTokens, vllm_arguments
from services.worker.engines.vllm_sampling import KeyedBatch, KeyedRow, vllm_parameters
from services.worker.models_config import ModelConfig
from services.worker.sampling import BatchSampler, SamplingRow
from services.worker.settings import WorkerSettings
from shared.config import SetupError
from shared.memory import leased_blocks
from shared.messages import Sampling, TokenLogprobs
from shared.tokens import count, pack
from tests.worker.conformance.driver import Driver, leases
from tests.worker.orders import GREEDY, make_batch, make_order, make_spec

VOCABULARY, END, BLOCK = 300, 0, 16
DRAWN = Sampling(temperature=1.0, seed=11)
CPU = torch.device("cpu")

# ------------------------------------------------------------------------------- sampling


def forced(logits: torch.Tensor) -> list[int]:
    """The only token that is left of each row."""
    assert ((logits == 0).sum(dim=1) == 1).all()
    assert logits.isneginf().sum() == logits.shape[0] * (logits.shape[1] - 1)
    return logits.argmax(dim=1).tolist()


def alone(row: KeyedRow, made: Sequence[int], logits: torch.Tensor) -> int:
    """What our sampler chooses for this row without company."""
    sampled = SamplingRow(row.sampling, row.choice, row.prompt, (*row.output, *made))
    return BatchSampler([sampled], VOCABULARY, (END,), CPU).choose(logits.unsqueeze(0)).ids[0]


@pytest.mark.parametrize("seed", range(5))
def test_choices_do_not_depend_on_how_the_batch_changes(seed: int) -> None:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch = KeyedBatch(VOCABULARY, (END,))
    seats: list[tuple[KeyedRow, list[int]]] = []
    for number in range(40):
        if rng.random() < 0.4 or not seats:
            row = KeyedRow(
                f"k{number}",
                changed(
                    DRAWN,
                    seed=number,
                    temperature=rng.choice([0.0, 1.0]),
                    frequency_penalty=rng.choice([0.0, 1.5]),
                    repetition_penalty=rng.choice([1.0, 1.4]),
                    min_tokens=rng.choice([0, 9]),
                ),
                choice=number % 2,
                prompt=(3, 4),
                output=tuple(rng.choices(range(VOCABULARY), k=rng.randrange(3))),
            )
            seats.append((row, []))
            batch.add(len(seats) - 1, *seats[-1])
        elif rng.random() < 0.3:
            gone, last = rng.randrange(len(seats)), len(seats) - 1
            batch.remove(gone)
            if gone != last:
                batch.move(last, gone, swap=False)
                seats[gone] = seats[last]
            seats.pop()
        elif len(seats) > 1:
            one, other = rng.sample(range(len(seats)), 2)
            batch.move(one, other, swap=True)
            seats[one], seats[other] = seats[other], seats[one]
        if not seats:
            continue
        logits = torch.randn((len(seats), VOCABULARY), generator=generator) * 2
        expected = [
            alone(row, made, one) for (row, made), one in zip(seats, logits.clone(), strict=True)
        ]
        assert forced(batch.choose(logits)) == expected
        for (_, made), token in zip(seats, expected, strict=True):
            if rng.random() < 0.8:  # else its prompt is being read, and vLLM drops the token
                made.append(token)


def test_logprobs_are_kept_by_key() -> None:
    batch = KeyedBatch(VOCABULARY, (END,))
    batch.add(0, KeyedRow("with", changed(GREEDY, logprobs=2), 0, (1,), ()), [])
    batch.add(1, KeyedRow("without", GREEDY, 0, (1,), ()), [])
    logits = torch.randn((2, VOCABULARY))
    best = logits[0].topk(2).indices.tolist()
    (chosen, _) = forced(batch.choose(logits))
    assert list(batch.logprobs) == ["with"]
    assert chosen == best[0]
    assert batch.logprobs["with"].top_ids == pack(best)


def test_vllm_is_told_to_count_and_to_look_for_ends_only() -> None:
    sampling = Sampling(temperature=1.3, top_k=4, logprobs=3, prompt_logprobs=True, min_tokens=5)
    row = KeyedRow("k", sampling, 0, (1, 2), ())
    fields = vllm_parameters(row, {7, 3}, 12)
    assert fields.pop("extra_args") == {"tranche_row": row}
    assert fields == {
        "temperature": 0.0,
        "max_tokens": 12,
        "ignore_eos": True,
        "stop_token_ids": [3, 7],
        "prompt_logprobs": 3,
        "detokenize": False,
        "skip_clone": True,
    }
    moved = KeyedRow("k", sampling, 0, (1, 2), (9,))
    assert vllm_parameters(moved, (), 0)["prompt_logprobs"] is None, "they went out before"
    assert vllm_parameters(moved, (), 0)["max_tokens"] == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kv_tokens": 8_000}, {"num_gpu_blocks_override": 252, "max_model_len": 512}),
        ({"kv_tokens": 70}, {"num_gpu_blocks_override": 4, "max_model_len": 65}),
        ({"kv_memory_share": 0.1}, {"max_model_len": -1}),
        ({"context_tokens_max": 99}, {"max_model_len": 99}),
        ({"batch_size_max": 7, "prefill_chunk_tokens": 5}, {"max_num_batched_tokens": 7}),
        ({"vllm_compile": True}, {"enforce_eager": False}),
        ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({}, {"dtype": "float32", "block_size": 32, "enforce_eager": True}),
    ],
)
def test_settings_become_vllms_own(
    settings: dict[str, object], expected: dict[str, object]
) -> None:
    context = int(str(settings.get("context_tokens_max", 512)))
    config = ModelConfig(vocabulary_size=9, end_token_ids=(1,), context_tokens_max=context)
    found = vllm_arguments(WorkerSettings(model="m", **settings), config, CPU)
    assert {name: found[name] for name in expected} == expected


def test_less_than_a_block_is_no_cache() -> None:
    config = ModelConfig(vocabulary_size=9, end_token_ids=(), context_tokens_max=512)
    with pytest.raises(SetupError, match="less than a block"):
        vllm_arguments(WorkerSettings(model="m", kv_tokens=31), config, CPU)


# ------------------------------------------------------------------------------- the engine


def token_at(row: KeyedRow, position: int) -> int:
    """The text that the counting core makes: depends on the request alone."""
    return (row.sampling.seed + 7 * position + sum(row.prompt)) % (VOCABULARY - 1) + 1


class CountingCore:
    """In vLLM's place: `speed` tokens of a prompt in each iteration, then one token in each. It
    holds the engine to its books: never more blocks than there are."""

    def __init__(self, blocks: int, speed: int = 20) -> None:
        self.blocks = blocks
        self.speed = self.most = speed
        self.prefill_first = False
        self.preemptions = 0
        self.failing = False
        self.closed = False
        self.running: dict[str, list[int]] = {}
        self._rows: dict[str, tuple[KeyedRow, Sequence[int], int]] = {}

    def add(self, row: KeyedRow, ends: Sequence[int], tokens_max: int) -> None:
        if row.key.startswith("refused"):
            raise ValueError("not this one")
        self._rows[row.key] = (row, ends, tokens_max)
        self.running[row.key] = [0, 0]

    def abort(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.running.pop(key, None)

    def configure(self, iteration_tokens: int, *, prefill_first: bool) -> None:
        self.speed = min(iteration_tokens or self.most, self.most)
        self.prefill_first = prefill_first

    def step(self) -> list[CoreTokens]:
        if self.failing:
            self.failing = False
            raise RuntimeError("a bad day")
        found = []
        for key, progress in list(self.running.items()):
            row, ends, tokens_max = self._rows[key]
            inputs = len(row.prompt) + len(row.output)
            progress[0] = min(inputs, progress[0] + self.speed)
            if progress[0] < inputs:
                continue
            token = token_at(row, len(row.output) + progress[1])
            progress[1] += 1
            ended = token in ends or progress[1] == tokens_max
            scored = row.sampling.prompt_logprobs and progress[1] == 1 and not row.output
            scores = (TokenLogprobs(chosen=None),) * len(row.prompt) if scored else ()
            found.append(CoreTokens(key, (token,), ended=ended, prompt_logprobs=scores))
        used = sum(-(-(done + max(0, made - 1)) // BLOCK) for done, made in self.running.values())
        assert used <= self.blocks, "vLLM would take blocks back"
        for one in found:
            if one.ended:
                del self.running[one.key]
        return found

    def close(self) -> None:
        self.closed = True


def make_engine(blocks: int = 100, context: int = 512) -> tuple[VllmEngine, CountingCore]:
    core = CountingCore(blocks)
    info = EngineInfo(
        engine="vllm",
        forms=("leased",),
        model="m",
        context_tokens_max=context,
        vocabulary_size=VOCABULARY,
        end_token_ids=(END,),
        kv_block_tokens=BLOCK,
    )
    return VllmEngine(info, core, blocks=blocks, kv_bytes_per_token=8), core


def test_the_registry_knows_its_forms() -> None:
    engine, core = make_engine()
    assert isinstance(engine, LeasedEngine)
    assert FORMS["vllm"] == engine.info.forms
    engine.close()
    assert core.closed


@pytest.mark.parametrize("lease_tokens", [1, 7, 16, 90])
def test_any_leases_make_the_same_text(lease_tokens: int) -> None:
    engine, _ = make_engine()
    driver = Driver(engine)
    specs = [make_spec(f"r{n}", [1] * (3 + 29 * n), 90, changed(DRAWN, seed=n)) for n in range(4)]
    driver.start(*(make_order(spec, lease_tokens) for spec in specs), iteration_tokens=10)
    while any(made.finish_reason is None for made in driver.made.values()):
        driver.rest()
        for name, made in driver.made.items():
            if made.finish_reason is None:
                assert len(made.ids) == driver.until[name], "it stops at its lease's end only"
                driver.renew(name, len(made.ids) + lease_tokens)
    for spec in specs:
        row = KeyedRow("", spec.sampling, 0, [1] * count(spec.prompt), ())
        assert driver.ids(spec.request_id) == [token_at(row, i) for i in range(90)]
    assert engine.memory().kv_tokens_used == 0


def test_a_renewal_in_time_makes_no_pause() -> None:
    engine, core = make_engine()
    driver = Driver(engine)
    driver.start(make_order(make_spec(max_tokens=90), 6))
    while len(driver.ids("r")) < 4:
        driver.step()
    driver.renew("r", 12)
    inside = dict(core.running)
    driver.rest()
    assert len(driver.ids("r")) == 12
    assert len(inside) == 1
    assert core.running == {}, "it is not in vLLM while it pauses"


def test_how_iterations_are_filled_holds_from_the_order_on() -> None:
    engine, core = make_engine()
    driver = Driver(engine)
    driver.start(make_order(make_spec("a", [1] * 40), 9), iteration_tokens=4, prefill_first=True)
    assert (core.speed, core.prefill_first) == (4, True)
    assert [len(driver.step().tokens) for _ in range(10)] == [0] * 9 + [1]
    driver.start(make_order(make_spec("b"), 9))
    assert (core.speed, core.prefill_first) == (core.most, False)


def test_memory_is_that_of_the_leases() -> None:
    engine, _ = make_engine()
    driver = Driver(engine)
    driver.start(make_order(make_spec(prompt=[1] * 20, max_tokens=90), 40))
    held = BLOCK * leased_blocks(20, 40, BLOCK)
    assert engine.memory().kv_tokens_used == held
    driver.rest()
    assert engine.memory().kv_tokens_used == held, "it can always come back"
    driver.renew("r", 41)
    assert engine.memory().kv_tokens_used == BLOCK * leased_blocks(20, 41, BLOCK)
    engine.cancel("r")
    memory = engine.memory()
    assert (memory.kv_tokens_capacity, memory.kv_tokens_used) == (1600, 0)
    assert (memory.kv_blocks_capacity, memory.kv_blocks_used) == (100, 0)
    assert (memory.kv_bytes_per_token, memory.kv_bytes_capacity) == (8, 12800)


def test_what_does_not_fit_is_refused_and_leaves_nothing() -> None:
    engine, _ = make_engine(blocks=6)
    with pytest.raises(OutOfMemory, match="112 tokens of KV, there are 96"):
        engine.start(leases(make_order(make_spec("big", [1] * 90, 90), 20)))
    orders = [make_order(make_spec(f"r{n}", [1] * 16, 90), 17) for n in range(4)]
    engine.start(leases(*orders[:2]))
    with pytest.raises(OutOfMemory, match="the leases need 64 tokens of KV, 32 are free"):
        engine.start(leases(*orders[2:]))
    engine.start(leases(orders[2]))
    assert engine.memory().kv_tokens_used == 96


@pytest.mark.parametrize("paused", [False, True])
def test_a_renewal_without_room_ends_where_the_lease_does(paused: bool) -> None:
    engine, _ = make_engine(blocks=6)
    driver = Driver(engine)
    driver.start(*(make_order(make_spec(f"r{n}", [1] * 8, 90), 24) for n in range(3)))
    while driver.engine.busy if paused else len(driver.ids("r0")) < 5:
        driver.step()
    driver.renew("r0", 60)
    driver.rest()
    (end,) = driver.left
    assert (end.request_id, end.evicted, len(driver.ids("r0"))) == ("r0", True, 24)
    driver.renew("r1", 60)
    driver.rest()
    assert len(driver.left) == 2, "the freed blocks are too few"
    driver.renew("r2", 60)
    driver.rest()
    assert (len(driver.left), len(driver.ids("r2"))) == (2, 60)


def test_room_that_comes_in_time_is_taken() -> None:
    engine, _ = make_engine(blocks=6)
    driver = Driver(engine)
    driver.start(*(make_order(make_spec(f"r{n}", [1] * 8, 90), 24) for n in range(3)))
    driver.renew("r0", 60)
    while len(driver.ids("r0")) < 5:
        driver.step()
    driver.engine.cancel("r1")
    driver.engine.cancel("r2")
    driver.rest()
    assert (driver.left, len(driver.ids("r0"))) == ([], 60)


def test_parking_is_said_and_cancelling_is_not() -> None:
    engine, core = make_engine()
    driver = Driver(engine)
    driver.start(*(make_order(make_spec(f"r{n}", max_tokens=90), 50) for n in range(3)))
    for _ in range(3):
        driver.step()
    engine.park("r0")
    engine.cancel("r1")
    made = [len(driver.ids(f"r{n}")) for n in range(2)]
    driver.rest()
    assert driver.left == [LeaseEnd("r0", 1)]
    assert [len(driver.ids(f"r{n}")) for n in range(2)] == made
    assert len(driver.ids("r2")) == 50
    for unknown in ("r0", "r1", "never"):
        engine.park(unknown)
        engine.cancel(unknown)
        engine.renew(unknown, 99)
    assert engine.step() == StepReport()
    assert core.running == {}


def test_ends_are_told_apart() -> None:
    engine, _ = make_engine()
    driver = Driver(engine)
    row = KeyedRow("", DRAWN, 0, [1, 1, 1], ())
    stop = token_at(row, 4)
    specs = {
        "stops": make_spec("stops", [1] * 3, 90, changed(DRAWN, stop_token_ids=(stop,))),
        "ends": make_spec("ends", [1] * 3, 4, DRAWN),
    }
    driver.start(*(make_order(spec, 50) for spec in specs.values()))
    reports = []
    while engine.busy:
        reports.append(driver.step())
    found = {name: (len(m.ids), m.finish_reason) for name, m in driver.made.items()}
    assert found == {"stops": (5, "stop"), "ends": (4, "length")}
    assert [t.ending_token for r in reports for t in r.tokens if t.request_id == "stops"] == [
        *(False,) * 4,
        True,
    ]


def test_a_prompt_can_be_scored_without_any_output() -> None:
    engine, _ = make_engine()
    scored = changed(GREEDY, logprobs=0, prompt_logprobs=True)
    engine.start(leases(make_order(make_spec(max_tokens=0, sampling=scored), 0)))
    (said,) = engine.step().tokens
    assert (said.ids, said.finish_reason, len(said.prompt_logprobs)) == ((), "length", 3)
    engine.start(leases(make_order(make_spec(max_tokens=2), 1, output=[5, 6], attempt=2)))
    (said,) = engine.step().tokens
    assert (said.ids, said.finish_reason, said.position, said.attempt) == ((), "length", 2, 2)
    assert not engine.busy
    assert engine.memory().kv_tokens_used == 0


def test_a_lease_of_nothing_waits_for_its_first_renewal() -> None:
    engine, _ = make_engine()
    driver = Driver(engine)
    driver.start(make_order(make_spec(max_tokens=9), 0))
    assert not engine.busy
    driver.renew("r", 2)
    driver.rest()
    assert len(driver.ids("r")) == 2


def test_a_failure_drops_everything_and_the_engine_goes_on() -> None:
    engine, core = make_engine()
    engine.start(leases(make_order(make_spec("a"), 8), make_order(make_spec("b"), 0)))
    core.failing = True
    with pytest.raises(EngineError, match="vLLM failed: RuntimeError: a bad day"):
        engine.step()
    assert not engine.busy
    assert engine.memory().kv_tokens_used == 0
    driver = Driver(engine)
    driver.start(make_order(make_spec("a"), 8, attempt=2))
    driver.rest()
    assert len(driver.ids("a")) == 8


@pytest.mark.parametrize(
    ("order", "complaint"),
    [
        (leases(make_order(make_spec(prompt=[VOCABULARY]))), "vocabulary"),
        (leases(make_order(make_spec(prompt=[1] * 510, max_tokens=99))), "context"),
        (leases(make_order(make_spec(prompt=[]))), "no prompt"),
        (leases(), "empty"),
        (make_batch(make_order(make_spec())), "leases only, not closed"),
        (leases(make_order(make_spec("fine")), make_order(make_spec("refused"))), "not this one"),
    ],
)
def test_impossible_orders_are_refused(order: object, complaint: str) -> None:
    engine, core = make_engine()
    with pytest.raises(BadOrder, match=complaint):
        engine.start(order)  # type: ignore[arg-type]
    assert not engine.busy
    assert core.running == {}
    assert engine.memory().kv_tokens_used == 0
