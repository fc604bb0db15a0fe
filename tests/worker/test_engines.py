"""What every engine must do; each engine joins by its name in `make_engine`."""

import random
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace as changed

from services.worker.engines.api import BadOrder, OutOfMemory, StepReport
from services.worker.engines.registry import FORMS
from services.worker.sampling import LOGPROB_MIN
from shared.messages import Sampling, WorkerMemory
from shared.tokens import unpack
from tests.worker.conftest import MakeEngine
from tests.worker.orders import (
    GREEDY,
    Made,
    make_batch,
    make_order,
    make_spec,
    run_batch,
    run_to_end,
)
from tests.worker.reference import Agreement, Reference, edited
from tests.worker.tiny_models import BEGIN, END, FAMILIES, VOCABULARY

DRAWN = Sampling(temperature=1.0, seed=11)


def some_prompts(number: int, longest: int = 60, seed: int = 3) -> list[list[int]]:
    """Prompts of mixed length."""
    rng = random.Random(seed)
    return [
        [BEGIN, *(rng.randrange(256) for _ in range(rng.randrange(1, longest)))]
        for _ in range(number)
    ]


def ends_soon(sampling: Sampling) -> Sampling:
    """Outputs of random models rarely end; this makes about every 20th token the last."""
    return changed(sampling, logit_bias={END: 12.0})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slice_tokens", [1, 8, 32])
def test_greedy_text_is_that_of_generate(
    make_engine: MakeEngine,
    model_folders: dict[str, Path],
    references: dict[str, Reference],
    family: str,
    slice_tokens: int,
) -> None:
    # A chunk of 64 tokens takes these prompts in several pieces.
    engine = make_engine(model_folders[family], prefill_chunk_tokens=64)
    prompts = some_prompts(6)
    specs = [make_spec(f"r{i}", p, max_tokens=34) for i, p in enumerate(prompts)]
    made = run_to_end(engine, specs, slice_tokens, batch_size=4)
    agreement = Agreement()
    for prompt, request in zip(prompts, made.values(), strict=True):
        references[family].compare_greedy(prompt, request.ids, 34, agreement)
    agreement.check()


def test_an_end_token_ends_the_text(
    make_engine: MakeEngine, llama: Path, references: dict[str, Reference]
) -> None:
    engine = make_engine(llama)
    reference = references["llama"]
    prompt = some_prompts(1)[0]
    free = reference.greedy(prompt, 20)
    stopper = free[5]
    ended = free[: free.index(stopper) + 1]
    made = Made(make_spec("r", prompt, 20, changed(GREEDY, stop_token_ids=(stopper,))))
    reports = run_batch(engine, make_batch(make_order(made.spec, 20)), {"r": made})
    assert made.ids == ended
    assert made.finish_reason == "stop"
    assert [t.ending_token for r in reports for t in r.tokens] == [False] * (len(ended) - 1) + [
        True
    ]
    assert len([r for r in reports if r.tokens]) == len(ended), "no early return"


def test_eos_ends_the_text_unless_ignored(make_engine: MakeEngine, llama: Path) -> None:
    engine = make_engine(llama)
    always = changed(GREEDY, logit_bias={END: 1e4})
    ignoring = changed(always, ignore_eos=True)
    late = changed(always, min_tokens=3)
    specs = [
        make_spec(name, max_tokens=5, sampling=sampling)
        for name, sampling in (("ends", always), ("ignores", ignoring), ("late", late))
    ]
    made = run_to_end(engine, specs, 2)
    assert (made["ends"].ids, made["ends"].finish_reason) == ([END], "stop")
    assert (made["ignores"].ids, made["ignores"].finish_reason) == ([END] * 5, "length")
    assert made["late"].ids[3:] == [END]
    assert END not in made["late"].ids[:3]


@pytest.mark.parametrize("slice_tokens", [1, 7, 32])
def test_sampled_text_is_the_same_in_any_slices_and_company(
    make_engine: MakeEngine, llama: Path, references: dict[str, Reference], slice_tokens: int
) -> None:
    engine = make_engine(llama)
    prompts = some_prompts(8, seed=slice_tokens)
    samplings = [
        changed(ends_soon(DRAWN), **settings)
        for settings in (
            {},
            {"temperature": 0.7},
            {"top_p": 0.8},
            {"top_k": 5},
            {"min_p": 0.1, "top_k": 40, "top_p": 0.95},
            {"presence_penalty": 1.5, "frequency_penalty": 0.8},
            {"repetition_penalty": 1.4, "min_tokens": 9, "seed": -5},
            {"temperature": 1.7, "allowed_token_ids": (3, 4, 5, 60, 61, END), "seed": 2**63},
        )
    ]
    specs = [
        make_spec(f"r{i}", p, 40, s, choice=i)
        for i, (p, s) in enumerate(zip(prompts, samplings, strict=True))
    ]
    made = run_to_end(engine, specs, slice_tokens, batch_size=5)
    agreement = Agreement()
    for prompt, request in zip(prompts, made.values(), strict=True):
        spec = request.spec
        references["llama"].compare_sampled(
            prompt, request.ids, spec.sampling, agreement, spec.choice
        )
        ended = request.ids[-1] == END
        assert request.finish_reason == ("stop" if ended else "length")
        assert ended or len(request.ids) == 40
    agreement.check()


def test_choices_differ_and_seeds_repeat(make_any_engine: MakeEngine, llama: Path) -> None:
    engine = make_any_engine(llama)
    specs = [make_spec(f"c{n}", max_tokens=12, sampling=DRAWN, choice=n) for n in range(4)]
    texts = [tuple(m.ids) for m in run_to_end(engine, specs, 12).values()]
    assert len(set(texts)) == 4
    assert [tuple(m.ids) for m in run_to_end(engine, specs, 5).values()] == texts


def test_logprobs_are_those_of_the_edited_scores(
    make_engine: MakeEngine, llama: Path, references: dict[str, Reference]
) -> None:
    engine = make_engine(llama)
    prompt = some_prompts(1)[0]
    sampling = changed(DRAWN, logprobs=3, repetition_penalty=1.3, logit_bias={5: 2.0}, top_k=2)
    specs = [make_spec("with", prompt, 10, sampling), make_spec("without", prompt, 10, DRAWN)]
    made = run_to_end(engine, specs, 4)
    assert made["without"].logprobs == []
    output = made["with"].ids
    assert len(made["with"].logprobs) == len(output)
    logits = references["llama"].logits([*prompt, *output])
    for position, found in enumerate(made["with"].logprobs):
        row = logits[len(prompt) + position - 1]
        expected = log_softmax(edited(row, sampling, prompt, output[:position], {END}))
        assert found.chosen == pytest.approx(expected[output[position]], abs=1e-4)
        best = np.argsort(-expected)[:3]
        assert unpack(found.top_ids) == best.tolist()
        assert found.top_logprobs == pytest.approx(expected[best].tolist(), abs=1e-4)


def test_logprobs_of_forbidden_tokens_are_finite(make_engine: MakeEngine, llama: Path) -> None:
    engine = make_engine(llama)
    sampling = Sampling(temperature=1.0, logprobs=4, allowed_token_ids=(7, 8))
    made = run_to_end(engine, [make_spec(sampling=sampling, max_tokens=3)], 3)["r"]
    for found in made.logprobs:
        assert sorted(unpack(found.top_ids)) == [7, 8]
        assert found.chosen is not None
        assert found.chosen > LOGPROB_MIN


@pytest.mark.parametrize("chunk", [16, 4096])
def test_prompt_logprobs_come_with_the_first_token(
    make_engine: MakeEngine, llama: Path, references: dict[str, Reference], chunk: int
) -> None:
    engine = make_engine(llama, prefill_chunk_tokens=chunk)
    prompts = some_prompts(3)
    scored = changed(GREEDY, logprobs=2, prompt_logprobs=True)
    specs = [make_spec(f"r{i}", p, 5, scored) for i, p in enumerate(prompts)]
    specs[1] = changed(specs[1], sampling=GREEDY)
    made = run_to_end(engine, specs, 2)
    assert made["r1"].prompt_logprobs == ()
    for name in ("r0", "r2"):
        found = made[name].prompt_logprobs
        prompt = unpack(made[name].spec.prompt)
        assert len(found) == len(prompt)
        assert found[0].chosen is None
        expected = [log_softmax(row) for row in references["llama"].logits(prompt)]
        for index in range(1, len(prompt)):
            scores = expected[index - 1]
            assert found[index].chosen == pytest.approx(scores[prompt[index]], abs=1e-4)
            assert list(found[index].top_logprobs) == pytest.approx(
                sorted(scores, reverse=True)[:2], abs=1e-4
            )


def test_a_prompt_can_be_scored_without_any_output(
    make_any_engine: MakeEngine, llama: Path
) -> None:
    engine = make_any_engine(llama)
    scored = changed(GREEDY, logprobs=0, prompt_logprobs=True)
    made = Made(make_spec("r", max_tokens=0, sampling=scored))
    run_batch(engine, make_batch(make_order(made.spec, 8)), {"r": made})
    assert made.ids == []
    assert made.finish_reason == "length"
    assert len(made.prompt_logprobs) == 3


def test_rows_may_have_different_leases(make_any_engine: MakeEngine, llama: Path) -> None:
    engine = make_any_engine(llama)
    made = {name: Made(make_spec(name, max_tokens=9)) for name in ("short", "long", "last")}
    batch = make_batch(
        make_order(made["short"].spec, 2),
        make_order(made["long"].spec, 6),
        make_order(made["last"].spec, 20),
    )
    reports = run_batch(engine, batch, made)
    assert {n: (len(m.ids), m.finish_reason) for n, m in made.items()} == {
        "short": (2, None),
        "long": (6, None),
        "last": (9, "length"),
    }
    (end,) = reports[-1].ended
    assert [r.invalid_tokens for r in end.results] == [7, 3, 0]
    assert end.timings.iterations == 9
    assert end.timings.batch_size == 3
    assert end.timings.prefill_s > 0
    assert end.timings.decode_s > 0


def test_the_batch_is_no_longer_than_its_iterations(
    make_any_engine: MakeEngine, llama: Path
) -> None:
    engine = make_any_engine(llama)
    made = Made(make_spec())
    run_batch(engine, make_batch(make_order(made.spec, 16), iterations=3), {"r": made})
    assert (len(made.ids), made.finish_reason) == (3, None)


def test_padding_is_counted(make_any_engine: MakeEngine, llama: Path) -> None:
    engine = make_any_engine(llama)
    orders = [
        make_order(make_spec("a", [BEGIN] * 10), 2),
        make_order(make_spec("b", [BEGIN] * 3), 2, output=[5, 6]),
    ]
    reports = run_batch(engine, make_batch(*orders))
    (end,) = reports[-1].ended
    assert [r.pad_tokens for r in end.results] == [0, 5]
    assert end.timings.input_tokens_max == 10


def test_a_cancelled_request_makes_no_more_tokens(make_any_engine: MakeEngine, llama: Path) -> None:
    engine = make_any_engine(llama)
    engine.start(make_batch(make_order(make_spec("gone"), 6), make_order(make_spec("stays"), 6)))
    seen: list[tuple[str, int]] = []
    ended = ()
    while engine.busy:
        report = engine.step()
        seen += [(t.request_id, t.position) for t in report.tokens]
        ended = report.ended or ended
        if ("gone", 1) in seen:
            engine.cancel("gone")
            engine.cancel("unknown")
    assert [p for name, p in seen if name == "gone"] == [0, 1]
    assert [p for name, p in seen if name == "stays"] == [0, 1, 2, 3, 4, 5]
    gone, stays = ended[0].results
    assert (gone.finish_reason, len(unpack(gone.tokens)), gone.invalid_tokens) == (
        "cancelled",
        2,
        4,
    )
    assert (stays.finish_reason, stays.invalid_tokens) == (None, 0)


def test_a_batch_without_takers_ends_at_once(make_any_engine: MakeEngine, llama: Path) -> None:
    engine = make_any_engine(llama)
    engine.start(make_batch(make_order(make_spec("a"), 8), make_order(make_spec("b"), 8)))
    engine.step()
    engine.cancel("a")
    engine.cancel("b")
    report = engine.step()
    assert not engine.busy
    assert report.tokens == ()
    assert [r.finish_reason for r in report.ended[0].results] == ["cancelled", "cancelled"]


def test_memory_is_exact(make_engine: MakeEngine, llama: Path) -> None:
    engine = make_engine(llama, kv_tokens=500)
    # 2 layers, keys and values, 2 heads of 8 numbers of 4 bytes.
    per_token = 2 * 2 * 2 * 8 * 4
    idle = memory_of(engine.memory())
    assert idle == (500, 0, per_token, 500 * per_token, 0)
    seen = set()
    orders = [make_order(make_spec("a", [BEGIN] * 20), 5), make_order(make_spec("b"), 9)]
    run_batch(
        engine, make_batch(*orders), after_step=lambda _: seen.add(memory_of(engine.memory()))
    )
    busy = 2 * (20 + 9)
    assert seen == {(500, busy, per_token, 500 * per_token, busy * per_token), idle}
    memory = engine.memory()
    assert 0 < memory.device_bytes_free <= memory.device_bytes_total


def test_what_does_not_fit_is_refused_and_leaves_nothing(
    make_any_engine: MakeEngine, llama: Path
) -> None:
    engine = make_any_engine(llama, kv_tokens=48)
    orders = [make_order(make_spec(f"r{n}", [BEGIN] * 16), 8) for n in range(3)]
    with pytest.raises(OutOfMemory, match="72 tokens of KV, there are 48"):
        engine.start(make_batch(*orders))
    assert not engine.busy
    assert engine.step() == StepReport()
    run_batch(engine, make_batch(*orders[:2]))


def test_the_batch_size_is_bounded(make_any_engine: MakeEngine, llama: Path) -> None:
    engine = make_any_engine(llama, batch_size_max=2)
    orders = [make_order(make_spec(f"r{n}"), 2) for n in range(3)]
    with pytest.raises(OutOfMemory, match="at most 2"):
        engine.start(make_batch(*orders))
    run_batch(engine, make_batch(*orders[:2]))


@pytest.mark.parametrize(
    ("order", "complaint"),
    [
        (make_batch(make_order(make_spec(prompt=[VOCABULARY]))), "vocabulary"),
        (make_batch(make_order(make_spec(prompt=[1] * 510, max_tokens=99))), "context"),
        (make_batch(make_order(make_spec(prompt=[]))), "no prompt"),
        (make_batch(), "empty"),
    ],
)
def test_impossible_orders_are_refused(
    make_any_engine: MakeEngine, llama: Path, order: object, complaint: str
) -> None:
    engine = make_any_engine(llama)
    with pytest.raises(BadOrder, match=complaint):
        engine.start(order)  # type: ignore[arg-type]
    assert not engine.busy


def test_a_form_that_the_engine_lacks_is_refused(make_engine: MakeEngine, llama: Path) -> None:
    engine = make_engine(llama)
    with pytest.raises(BadOrder, match="closed"):
        engine.start(make_batch(make_order(make_spec()), form="leased"))
    assert not engine.busy


def test_forms_are_known_before_an_engine_is_made(make_any_engine: MakeEngine, llama: Path) -> None:
    info = make_any_engine(llama).info
    assert FORMS[info.engine] == info.forms


def test_results_do_not_depend_on_what_ran_before(
    make_engine: MakeEngine, llama: Path, references: dict[str, Reference]
) -> None:
    """The cache's memory is used again; nothing of an earlier slice may shine through."""
    engine = make_engine(llama)
    run_to_end(engine, [make_spec(f"x{n}", p, 30) for n, p in enumerate(some_prompts(6))], 30)
    prompts = some_prompts(3, longest=20, seed=9)
    made = run_to_end(engine, [make_spec(f"r{n}", p, 20) for n, p in enumerate(prompts)], 20)
    agreement = Agreement()
    for prompt, request in zip(prompts, made.values(), strict=True):
        references["llama"].compare_greedy(prompt, request.ids, 20, agreement)
    agreement.check()


def memory_of(memory: WorkerMemory) -> tuple[int, int, int, int, int]:
    """The exact part of the telemetry."""
    return (
        memory.kv_tokens_capacity,
        memory.kv_tokens_used,
        memory.kv_bytes_per_token,
        memory.kv_bytes_capacity,
        memory.kv_bytes_used,
    )


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Along the only axis."""
    shifted = scores - scores.max()
    return shifted - np.log(np.exp(shifted).sum())
