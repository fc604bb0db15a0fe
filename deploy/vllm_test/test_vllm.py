"""Engine `vllm` on the real vLLM: text, leases, sampling, memory (`make engine-vllm-test`)."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace as changed

from deploy.vllm_test.conftest import KV_TOKENS, Loaded, LoadEngine, settings_of
from services.worker.engines.api import BadOrder, EngineError, LeaseEnd, OutOfMemory
from services.worker.engines.padded import make_padded
from services.worker.engines.registry import engine_maker
from services.worker.loop import warm_up
from services.worker.models import ModelError
from services.worker.sampling import LOGPROB_MIN
from shared.memory import leased_blocks
from shared.messages import RequestSpec, Sampling
from shared.tokens import unpack
from tests.worker.conformance.driver import Driver, leases
from tests.worker.conformance.subjects import SUBJECTS
from tests.worker.orders import GREEDY, make_batch, make_order, make_spec, run_to_end
from tests.worker.reference import Agreement, Reference, edited, softmax
from tests.worker.tiny_models import BEGIN, END, VOCABULARY

DRAWN = Sampling(temperature=1.0, seed=11)
ENDLESS = changed(GREEDY, ignore_eos=True)
VLLM = next(subject for subject in SUBJECTS if subject.name == "vllm")
WHOLE = 10_000
BLOCK = 32


def random_ids(number: int, seed: int) -> list[int]:
    """A prompt of so many tokens and the begin token."""
    return [BEGIN, *np.random.default_rng(seed).integers(256, size=number).tolist()]


def some_prompts(number: int, longest: int = 90, seed: int = 3) -> list[list[int]]:
    """Prompts of mixed length."""
    lengths = np.random.default_rng(seed).integers(1, longest, size=number).tolist()
    return [random_ids(length, seed * 100 + n) for n, length in enumerate(lengths)]


def finish(driver: Driver, lease_tokens: int, *, early: bool) -> None:
    """Renew until all have ended: before the lease's end, or after a pause."""
    while going := [n for n, made in driver.made.items() if made.finish_reason is None]:
        if not early:
            driver.rest()
        elif driver.engine.busy:
            driver.step()
        for name in going:
            if name not in driver.until:
                continue
            left = driver.until[name] - len(driver.ids(name))
            if left <= (2 if early else 0):
                driver.renew(name, driver.until[name] + lease_tokens)


def ended(driver: Driver, spec: RequestSpec) -> bool:
    """Its end is the one that its text shows."""
    made = driver.made[spec.request_id]
    if made.ids and made.ids[-1] == END:
        return made.finish_reason == "stop"
    return made.finish_reason == "length" and len(made.ids) == spec.max_tokens


# ----------------------------------------------------------------------------------- text


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("lease_tokens", [1, 16, WHOLE])
def test_greedy_text_is_that_of_generate(
    loaded: Loaded, reference: Reference, lease_tokens: int, early: bool
) -> None:
    driver = Driver(loaded.engine, VLLM)
    prompts = some_prompts(8, seed=3 + 2 * lease_tokens + early)
    specs = [make_spec(f"r{i}", p, 60) for i, p in enumerate(prompts)]
    # Iterations of 64 tokens read these prompts in several pieces, beside decodes.
    driver.start(*(make_order(s, lease_tokens) for s in specs), iteration_tokens=64)
    finish(driver, lease_tokens, early=early)
    agreement = Agreement()
    for prompt, spec in zip(prompts, specs, strict=True):
        reference.compare_greedy(prompt, driver.ids(spec.request_id), 60, agreement)
        assert ended(driver, spec)
    assert agreement.tokens > 300
    agreement.check()


SAMPLINGS = {
    "plain": DRAWN,
    "top-p": changed(DRAWN, top_p=0.8, temperature=0.7),
    "top-k": changed(DRAWN, top_k=7, temperature=1.5),
    "min-p": changed(DRAWN, min_p=0.05),
    "penalties": changed(DRAWN, presence_penalty=0.6, frequency_penalty=0.4),
    "repetition": changed(DRAWN, repetition_penalty=1.3),
    "bias": changed(DRAWN, logit_bias={65: 3.0, 66: -100.0, END: 4.0}),
    "min-tokens": changed(DRAWN, min_tokens=15, logit_bias={END: 9.0}),
    "allowed": changed(DRAWN, allowed_token_ids=tuple(range(60, 90))),
    "greedy": changed(GREEDY, frequency_penalty=0.5, logit_bias={END: 4.0}),
}


@pytest.mark.parametrize("lease_tokens", [5, WHOLE])
def test_sampled_text_is_that_of_our_sampler(
    loaded: Loaded, llama: Path, reference: Reference, lease_tokens: int
) -> None:
    prompts = some_prompts(len(SAMPLINGS))
    specs = [
        make_spec(name, prompt, 40, changed(sampling, seed=index * 7919), choice=index % 3)
        for index, (prompt, (name, sampling)) in enumerate(
            zip(prompts, SAMPLINGS.items(), strict=True)
        )
    ]
    driver = Driver(loaded.engine, VLLM)
    driver.start(*(make_order(spec, lease_tokens) for spec in specs), iteration_tokens=50)
    finish(driver, lease_tokens, early=False)
    agreement = Agreement()
    for prompt, spec in zip(prompts, specs, strict=True):
        reference.compare_sampled(
            prompt, driver.ids(spec.request_id), spec.sampling, agreement, spec.choice
        )
        assert ended(driver, spec)
    agreement.check()
    if not agreement.ties:
        padded = make_padded(settings_of(llama, engine="padded"))
        made = run_to_end(padded, specs, 40)
        assert {n: m.ids for n, m in driver.made.items()} == {n: m.ids for n, m in made.items()}
        padded.close()


@pytest.mark.parametrize("paused", [False, True])
def test_a_parked_request_goes_on_here_or_elsewhere(
    loaded: Loaded, load: LoadEngine, llama: Path, paused: bool
) -> None:
    prompt = some_prompts(1, seed=8)[0]
    spec = make_spec(
        "moved", prompt, 60, changed(DRAWN, seed=5, frequency_penalty=0.3, ignore_eos=True)
    )
    whole = Driver(loaded.engine, VLLM)
    whole.start(make_order(spec, WHOLE))
    whole.rest()
    driver = Driver(loaded.engine, VLLM)
    driver.start(make_order(spec, 20))
    while driver.engine.busy if paused else len(driver.ids("moved")) < 11:
        driver.step()
    driver.park("moved")
    driver.rest()
    assert driver.left == [LeaseEnd("moved", 1)]
    assert len(driver.ids("moved")) == (20 if paused else 11)
    assert loaded.engine.memory().kv_tokens_used == 0
    elsewhere = Driver(load(llama, kv_tokens=1024).engine, VLLM)
    for other in (Driver(loaded.engine, VLLM), elsewhere):
        other.made = deepcopy(driver.made)
        other.start(make_order(spec, WHOLE, driver.ids("moved"), attempt=2))
        other.rest()
        assert other.ids("moved") == whole.ids("moved")


def test_stop_tokens_end_the_text(loaded: Loaded, reference: Reference) -> None:
    prompt = some_prompts(1)[0]
    free = reference.greedy(prompt, 20)
    stopper = free[5]
    stopping = changed(GREEDY, stop_token_ids=(stopper,))
    expected = free[: free.index(stopper) + 1]
    driver = Driver(loaded.engine, VLLM)
    driver.start(
        make_order(make_spec("stops", prompt, 20, stopping), 20),
        make_order(make_spec("later", prompt, 20, changed(stopping, min_tokens=20)), 20),
    )
    reports = []
    while loaded.engine.busy:
        reports.append(driver.step())
    assert driver.ids("stops") == expected
    assert (driver.made["stops"].finish_reason, len(driver.ids("later"))) == ("stop", 20)
    assert stopper not in driver.ids("later")
    endings = [t.ending_token for r in reports for t in r.tokens if t.request_id == "stops"]
    assert endings == [*(False,) * (len(expected) - 1), True]


# ------------------------------------------------------------------------------- logprobs


def test_logprobs_are_those_of_the_edited_scores(loaded: Loaded, reference: Reference) -> None:
    prompt = some_prompts(1)[0]
    sampling = changed(DRAWN, logprobs=3, repetition_penalty=1.3, logit_bias={5: 2.0}, top_k=2)
    driver, found = Driver(loaded.engine, VLLM), []
    driver.start(
        make_order(make_spec("with", prompt, 12, sampling), 5),
        make_order(make_spec("without", prompt, 12, DRAWN), 12),
    )
    while driver.made["with"].finish_reason is None:
        for tokens in driver.step().tokens:
            if tokens.request_id == "with":
                found += tokens.logprobs
            else:
                assert tokens.logprobs == ()
        if "with" in driver.until:
            driver.renew("with", len(driver.ids("with")) + 3)
    driver.rest()
    output = driver.ids("with")
    logits = reference.logits([*prompt, *output])
    for position, scores in enumerate(found):
        row = logits[len(prompt) + position - 1]
        expected = np.log(softmax(edited(row, sampling, prompt, output[:position], {END})))
        assert scores.chosen == pytest.approx(expected[output[position]], abs=1e-4)
        best = np.argsort(-expected)[:3]
        assert list(unpack(scores.top_ids)) == best.tolist()
        assert scores.top_logprobs == pytest.approx(expected[best].tolist(), abs=1e-4)
    assert len(found) == len(output)


def test_prompts_are_scored(loaded: Loaded, reference: Reference) -> None:
    prompt = some_prompts(1, seed=6)[0]
    scored = changed(GREEDY, logprobs=2, prompt_logprobs=True)
    driver, found = Driver(loaded.engine, VLLM), {}
    driver.start(
        make_order(make_spec("goes on", prompt, 9, scored), 3),
        make_order(make_spec("no more", prompt, 0, scored), 0),
        iteration_tokens=32,
    )
    while loaded.engine.busy or driver.made["goes on"].finish_reason is None:
        for tokens in driver.step().tokens:
            if tokens.prompt_logprobs:
                assert (tokens.request_id in found, tokens.position) == (False, 0)
                found[tokens.request_id] = tokens.prompt_logprobs
        if "goes on" in driver.until:
            driver.renew("goes on", 9)
    assert (driver.ids("no more"), driver.made["no more"].finish_reason) == ([], "length")
    expected = [np.log(softmax(row)) for row in reference.logits(prompt)]
    for scores in (found["goes on"], found["no more"]):
        assert len(scores) == len(prompt)
        assert scores[0].chosen is None
        for index in range(1, len(prompt)):
            row = expected[index - 1]
            assert scores[index].chosen == pytest.approx(row[prompt[index]], abs=1e-4)
            assert scores[index].top_logprobs == pytest.approx(
                sorted(row, reverse=True)[:2], abs=1e-4
            )


def test_logprobs_of_forbidden_tokens_are_finite(loaded: Loaded) -> None:
    sampling = Sampling(temperature=1.0, logprobs=4, allowed_token_ids=(7, 8))
    driver = Driver(loaded.engine, VLLM)
    driver.start(make_order(make_spec(sampling=sampling, max_tokens=3), 3))
    while loaded.engine.busy:
        for tokens in driver.step().tokens:
            (scores,) = tokens.logprobs
            assert sorted(unpack(scores.top_ids)) == [7, 8]
            assert scores.chosen is not None
            assert scores.chosen > LOGPROB_MIN


# --------------------------------------------------------------------------------- leases


def test_a_renewal_in_time_leaves_the_request_where_it_is(loaded: Loaded) -> None:
    cached = loaded.core.cached_tokens
    driver = Driver(loaded.engine, VLLM)
    driver.start(make_order(make_spec("r", some_prompts(1, seed=21)[0], 90, ENDLESS), 6))
    while len(driver.ids("r")) < 4:
        driver.step()
    driver.renew("r", 60)
    while loaded.engine.busy:
        before = len(driver.ids("r"))
        assert driver.step().batch_size == 1
        assert len(driver.ids("r")) == before + 1
    assert loaded.core.cached_tokens == cached, "it was not put into vLLM anew"
    driver.cancel("r")


def test_a_pause_costs_less_than_a_block_of_computing_again(loaded: Loaded) -> None:
    prompt = random_ids(199, seed=5)
    driver = Driver(loaded.engine, VLLM)
    driver.start(make_order(make_spec("r", prompt, 300, ENDLESS), 50))
    driver.rest()
    assert loaded.core.blocks_used == 0
    assert loaded.engine.memory().kv_tokens_used == BLOCK * leased_blocks(200, 50, BLOCK)
    before = loaded.core.cached_tokens
    driver.renew("r", 80)
    driver.rest()
    known = 200 + 50
    assert known - BLOCK <= loaded.core.cached_tokens - before < known
    assert len(driver.ids("r")) == 80
    driver.cancel("r")


def test_a_cancelled_request_is_gone_before_the_next_iteration(loaded: Loaded) -> None:
    driver = Driver(loaded.engine, VLLM)
    gone, stays = (make_spec(n, p, 60, ENDLESS) for n, p in zip("gs", some_prompts(2), strict=True))
    driver.start(make_order(gone, 60), make_order(stays, 60))
    while len(driver.ids("s")) < 3:
        driver.step()
    both, made = loaded.core.blocks_used, len(driver.ids("g"))
    driver.cancel("g")
    assert loaded.core.blocks_used < both
    report = driver.step()
    assert ([t.request_id for t in report.tokens], report.batch_size) == (["s"], 1)
    driver.rest()
    assert (len(driver.ids("g")), driver.left) == (made, [])
    assert driver.made["s"].finish_reason is not None


def test_an_attempt_may_be_replaced_at_once(loaded: Loaded, reference: Reference) -> None:
    prompt = some_prompts(1, seed=31)[0]
    spec = make_spec("r", prompt, 50)
    driver = Driver(loaded.engine, VLLM)
    driver.start(make_order(spec, 50))
    while len(driver.ids("r")) < 3:
        driver.step()
    driver.cancel("r")
    driver.start(make_order(spec, 50, driver.ids("r"), attempt=2))
    driver.rest()
    agreement = Agreement()
    reference.compare_greedy(prompt, driver.ids("r"), 50, agreement)
    agreement.check()


def test_new_leases_join_between_two_iterations(loaded: Loaded, reference: Reference) -> None:
    prompts = some_prompts(12, seed=17)
    driver = Driver(loaded.engine, VLLM)
    for number, prompt in enumerate(prompts):
        driver.start(make_order(make_spec(f"r{number}", prompt, 40), WHOLE), iteration_tokens=48)
        driver.step()
        driver.step()
    driver.rest()
    agreement = Agreement()
    for number, prompt in enumerate(prompts):
        reference.compare_greedy(prompt, driver.ids(f"r{number}"), 40, agreement)
    agreement.check()


# --------------------------------------------------------------------------------- memory


def test_telemetry(loaded: Loaded) -> None:
    info, memory = loaded.engine.info, loaded.engine.memory()
    assert (info.engine, info.forms, info.kv_block_tokens) == ("vllm", ("leased",), BLOCK)
    assert (info.context_tokens_max, info.vocabulary_size) == (512, VOCABULARY)
    assert (info.end_token_ids, info.details) == ((END,), {"dtype": "float32"})
    # 2 layers, keys and values, 2 heads of 32 numbers of 4 bytes.
    assert (memory.kv_tokens_capacity, memory.kv_bytes_per_token) == (KV_TOKENS, 2 * 2 * 2 * 32 * 4)
    assert 0 < memory.device_bytes_free <= memory.device_bytes_total
    driver = Driver(loaded.engine, VLLM)
    spec = make_spec("r", [BEGIN] * 70, 200, ENDLESS)
    driver.start(make_order(spec, 100))
    set_aside = leased_blocks(70, 100, BLOCK)
    seen = []
    while loaded.engine.busy:
        driver.step()
        assert loaded.engine.memory().kv_tokens_used == set_aside * BLOCK
        seen.append(loaded.core.blocks_used)
    # vLLM takes them one by one, and at the lease's end as many as were set aside.
    assert seen[:-1] == [leased_blocks(70, until, BLOCK) for until in range(1, 100)]
    assert seen[-1] == 0
    driver.cancel("r")


def test_full_books_never_make_vllm_take_blocks_back(
    load: LoadEngine, llama: Path, reference: Reference
) -> None:
    loaded = load(llama, kv_tokens=640)
    assert loaded.engine.memory().kv_tokens_capacity == 640
    driver = Driver(loaded.engine, VLLM)
    prompts = [random_ids(29, seed) for seed in range(10)]
    specs = [make_spec(f"r{n}", p, 35, ENDLESS) for n, p in enumerate(prompts)]
    driver.start(*(make_order(spec, 35) for spec in specs))
    assert loaded.engine.memory().kv_tokens_used == 640, "10 requests of 2 blocks"
    fullest = 0
    while loaded.engine.busy:
        driver.step()
        fullest = max(fullest, loaded.core.blocks_used)
    assert fullest == 20
    assert loaded.core.preemptions == 0
    assert all(len(made.ids) == 35 for made in driver.made.values())


def test_a_request_may_fill_the_whole_cache(load: LoadEngine, llama: Path) -> None:
    loaded = load(llama, kv_tokens=64)
    driver = Driver(loaded.engine, VLLM)
    driver.start(make_order(make_spec("r", [BEGIN] * 33, 90, ENDLESS), 32))
    driver.rest()
    assert len(driver.ids("r")) == 32
    driver.renew("r", 33)
    driver.rest()
    assert [(end.request_id, end.evicted) for end in driver.left] == [("r", True)]
    with pytest.raises(OutOfMemory, match="96 tokens of KV, there are 64"):
        loaded.engine.start(leases(make_order(make_spec("r", [BEGIN] * 33, 90), 33)))


def test_the_context_may_be_filled(loaded: Loaded) -> None:
    driver = Driver(loaded.engine, VLLM)
    driver.start(make_order(make_spec("r", [BEGIN] * 480, 32, ENDLESS), WHOLE))
    driver.rest()
    assert (len(driver.ids("r")), driver.made["r"].finish_reason) == (32, "length")


def test_memory_may_be_a_share_of_what_is_free(load: LoadEngine, llama: Path) -> None:
    loaded = load(llama, kv_tokens=0, kv_memory_share=0.001)
    memory = loaded.engine.memory()
    assert loaded.engine.info.context_tokens_max == 512
    share = memory.kv_bytes_capacity / (memory.device_bytes_free + memory.kv_bytes_capacity)
    assert 0.0005 < share < 0.0015
    warm_up(loaded.engine)
    assert loaded.engine.memory().kv_tokens_used == 0


# ----------------------------------------------------------------------------- what is not


def test_what_cannot_be_served_says_so(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="vLLM cannot serve"):
        engine_maker("vllm")(settings_of(llama, context_tokens_max=100_000))
    (tmp_path / "config.json").write_text('{"vocab_size": 5, "max_position_embeddings": 9}')
    with pytest.raises(ModelError, match="vLLM cannot serve"):
        engine_maker("vllm")(settings_of(tmp_path))


def test_impossible_orders_are_refused(loaded: Loaded) -> None:
    refused = {
        "vocabulary": leases(make_order(make_spec(prompt=[VOCABULARY]))),
        "context": leases(make_order(make_spec(prompt=[1] * 510, max_tokens=99))),
        "leases only": make_batch(make_order(make_spec())),
    }
    for complaint, order in refused.items():
        with pytest.raises(BadOrder, match=complaint):
            loaded.engine.start(order)
    assert not loaded.engine.busy


def test_a_failing_model_drops_all_and_the_engine_goes_on(
    load: LoadEngine, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(llama, kv_tokens=512)
    driver = Driver(loaded.engine, VLLM)
    spec = make_spec("r", [BEGIN] * 20, 9)
    driver.start(make_order(spec, 9))
    driver.step()
    with monkeypatch.context() as broken:
        broken.setattr(loaded.core, "_tokens_of", lambda _: 1 / 0)
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            loaded.engine.step()
    assert loaded.core.blocks_used == 0
    assert (loaded.engine.busy, loaded.engine.memory().kv_tokens_used) == (False, 0)
    driver.start(make_order(spec, 9, driver.ids("r"), attempt=2))
    driver.rest()
    assert driver.made["r"].finish_reason is not None
