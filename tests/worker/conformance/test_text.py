"""What a request may ask of its text: its end, its draws, its log probabilities, its choices."""

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace as changed

from services.worker.sampling import LOGPROB_MIN
from shared.messages import RequestSpec, Sampling
from shared.tokens import unpack
from tests.worker.conformance.driver import run_all, some_prompts, some_specs
from tests.worker.conformance.subjects import Kit
from tests.worker.orders import GREEDY, make_spec
from tests.worker.reference import Agreement, Reference, edited
from tests.worker.tiny_models import END

DRAWN = Sampling(temperature=1.0, seed=11)


def ends_soon(sampling: Sampling) -> Sampling:
    """Outputs of random models rarely end; this makes about every 30th token the last."""
    return changed(sampling, logit_bias={END: 1.5})


def of_many_kinds(seed: int) -> list[RequestSpec]:
    """Requests that use every parameter of sampling."""
    kinds: list[dict[str, object]] = [
        {},
        {"temperature": 0.7},
        {"top_p": 0.8},
        {"top_k": 5},
        {"min_p": 0.1, "top_k": 40, "top_p": 0.95},
        {"presence_penalty": 1.5, "frequency_penalty": 0.8},
        {"repetition_penalty": 1.4, "min_tokens": 9, "seed": -5},
        {"temperature": 1.7, "allowed_token_ids": (3, 4, 5, 60, 61, END), "seed": 2**63},
        {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    ]
    prompts = some_prompts(len(kinds), seed=seed)
    return [
        make_spec(f"r{i}", prompt, 40, changed(ends_soon(DRAWN), **kind), choice=i)
        for i, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True))
    ]


# --------------------------------------------------------------------------------- the end


def test_an_end_token_ends_the_text(
    real_kit: Kit, llama: Path, references: dict[str, Reference]
) -> None:
    prompt = some_prompts(1)[0]
    free = references["llama"].greedy(prompt, 20)
    stopper = free[5]
    ended = free[: free.index(stopper) + 1]
    specs = [
        make_spec("stops", prompt, 20, changed(GREEDY, stop_token_ids=(stopper,))),
        make_spec("goes on", some_prompts(2)[1], 20),
    ]
    made = run_all(real_kit, real_kit.make(llama), specs, 20)
    assert made["stops"].ids == ended
    assert made["stops"].finish_reason == "stop"
    assert len(made["goes on"].ids) == 20


def test_eos_ends_the_text_unless_ignored(real_kit: Kit, llama: Path) -> None:
    always = changed(GREEDY, logit_bias={END: 1e4})
    samplings = {
        "ends": always,
        "ignores": changed(always, ignore_eos=True),
        "late": changed(always, min_tokens=3),
        "late stop": changed(GREEDY, logit_bias={7: 1e4}, stop_token_ids=(7,), min_tokens=4),
    }
    specs = [make_spec(name, max_tokens=5, sampling=s) for name, s in samplings.items()]
    made = run_all(real_kit, real_kit.make(llama), specs, 2)
    assert (made["ends"].ids, made["ends"].finish_reason) == ([END], "stop")
    assert (made["ignores"].ids, made["ignores"].finish_reason) == ([END] * 5, "length")
    assert made["late"].ids[3:] == [END]
    assert END not in made["late"].ids[:3]
    assert made["late stop"].ids[4:] == [7]
    assert (7 in made["late stop"].ids[:4], made["late stop"].finish_reason) == (False, "stop")


def test_an_output_is_never_longer_than_wanted(any_kit: Kit, llama: Path) -> None:
    specs = [make_spec(f"r{n}", max_tokens=n, sampling=DRAWN) for n in (1, 2, 17)]
    made = run_all(any_kit, any_kit.make(llama, **_endless(any_kit)), specs, 16)
    assert {n: (len(m.ids), m.finish_reason) for n, m in made.items()} == {
        f"r{n}": (n, "length") for n in (1, 2, 17)
    }


def _endless(kit: Kit) -> dict[str, str]:
    return {"simulated_lengths": "mean=1000000"} if kit.subject.name == "simulated" else {}


# ---------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("slice_tokens", [1, 7, 64])
def test_sampled_text_is_the_same_in_any_slices_and_company(
    real_kit: Kit, llama: Path, references: dict[str, Reference], slice_tokens: int
) -> None:
    specs = of_many_kinds(slice_tokens)
    made = run_all(real_kit, real_kit.make(llama), specs, slice_tokens, at_once=5)
    agreement = Agreement()
    for request in made.values():
        references["llama"].check_text(request, agreement)
    agreement.check()
    assert {request.finish_reason for request in made.values()} == {"stop", "length"}


def test_choices_differ_and_seeds_repeat(any_kit: Kit, llama: Path) -> None:
    specs = [make_spec(f"c{n}", max_tokens=12, sampling=DRAWN, choice=n) for n in range(4)]
    engine = any_kit.make(llama)
    texts = [tuple(m.ids) for m in run_all(any_kit, engine, specs, 12).values()]
    assert len(set(texts)) == 4
    assert [tuple(m.ids) for m in run_all(any_kit, engine, specs[::-1], 5).values()] == texts[::-1]


# ------------------------------------------------------------------------------- log probs


def test_logprobs_are_those_of_the_edited_scores(
    real_kit: Kit, llama: Path, references: dict[str, Reference]
) -> None:
    prompt = some_prompts(1)[0]
    sampling = changed(DRAWN, logprobs=3, repetition_penalty=1.3, logit_bias={5: 2.0}, top_k=2)
    specs = [make_spec("with", prompt, 10, sampling), make_spec("without", prompt, 10, DRAWN)]
    made = run_all(real_kit, real_kit.make(llama), specs, 4, shares=True)
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


def test_logprobs_of_forbidden_tokens_are_finite(real_kit: Kit, llama: Path) -> None:
    sampling = Sampling(temperature=1.0, logprobs=4, allowed_token_ids=(7, 8))
    spec = make_spec(sampling=sampling, max_tokens=3)
    made = run_all(real_kit, real_kit.make(llama), [spec], 3)["r"]
    for found in made.logprobs:
        assert sorted(unpack(found.top_ids)) == [7, 8]
        assert found.chosen is not None
        assert found.chosen > LOGPROB_MIN


@pytest.mark.parametrize("chunk", [16, 4096])
def test_prompt_logprobs_come_with_the_first_token(
    real_kit: Kit, llama: Path, references: dict[str, Reference], chunk: int
) -> None:
    """Also of a prompt whose KV is known from the one before."""
    engine = real_kit.make(llama, prefill_chunk_tokens=chunk)
    scored = changed(GREEDY, logprobs=2, prompt_logprobs=True)
    first, plain, last = some_specs(3, 5, scored)
    again = changed(first, request_id="again", parent_id="again")
    specs = [first, changed(plain, sampling=GREEDY), last]
    made = run_all(real_kit, engine, specs, 2)
    made |= run_all(real_kit, engine, [again], 2, shares=True)
    assert made["r1"].prompt_logprobs == ()
    for name in ("r0", "r2", "again"):
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


def test_a_prompt_can_be_scored_without_any_output(any_kit: Kit, llama: Path) -> None:
    scored = changed(GREEDY, logprobs=0, prompt_logprobs=True)
    specs = [make_spec("scored", max_tokens=0, sampling=scored), make_spec("mate", max_tokens=3)]
    made = run_all(any_kit, any_kit.make(llama), specs, 8)
    assert made["scored"].ids == []
    assert made["scored"].finish_reason == "length"
    assert len(made["scored"].prompt_logprobs) == 3
    assert len(made["mate"].ids) == 3


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Along the only axis."""
    shifted = scores - scores.max()
    return shifted - np.log(np.exp(shifted).sum())
