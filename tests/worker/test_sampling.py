"""Sampling against a slow, straightforward reference, and the properties of draws."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from msgspec.structs import replace as changed

from services.worker.sampling import BatchSampler, SamplingRow, describe_logprobs, uniform
from shared.messages import Sampling
from shared.tokens import unpack
from tests.worker.reference import TIE, edited, interval

VOCABULARY = 50
ENDS = (0, 1)


def random_sampling(rng: random.Random) -> Sampling:
    """Any mixture of parameters, most of them off."""

    def maybe(value: object, default: object) -> object:
        return value if rng.random() < 0.4 else default

    ids = rng.sample(range(VOCABULARY), 12)
    return Sampling(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.0, 2.5]),
        top_p=maybe(rng.uniform(0.05, 0.99), 1.0),
        top_k=maybe(rng.randrange(1, 2 * VOCABULARY), 0),
        min_p=maybe(rng.uniform(0, 0.5), 0.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(rng.uniform(0.5, 2), 1.0),
        logit_bias=maybe({i: rng.uniform(-5, 5) for i in ids[:3]}, {}),
        seed=rng.getrandbits(63),
        min_tokens=maybe(rng.randrange(1, 8), 0),
        ignore_eos=rng.random() < 0.3,
        stop_token_ids=maybe((ids[4], ids[5]), ()),
        allowed_token_ids=maybe(tuple(ids), ()),
    )


@pytest.mark.parametrize("seed", range(40))
def test_every_mixture_of_parameters_agrees_with_the_slow_reference(seed: int) -> None:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    rows = [
        SamplingRow(
            random_sampling(rng),
            choice=rng.randrange(4),
            prompt=[rng.randrange(VOCABULARY) for _ in range(6)],
            output=[rng.randrange(VOCABULARY) for _ in range(rng.randrange(5))],
        )
        for _ in range(9)
    ]
    sampler = BatchSampler(rows, VOCABULARY, ENDS, torch.device("cpu"))
    outputs = [list(row.output) for row in rows]
    for _ in range(6):
        logits = torch.randn((len(rows), VOCABULARY), generator=generator) * 3
        kept = logits.clone()
        chosen = sampler.choose(logits)
        assert torch.equal(logits, kept), "the model's logits were changed"
        assert chosen.tensor.tolist() == chosen.ids
        for index, row in enumerate(rows):
            scores = edited(
                logits[index].numpy(), row.sampling, row.prompt, outputs[index], set(ENDS)
            )
            low, high = interval(scores, row.sampling, chosen.ids[index])
            draw = uniform(row.sampling.seed, row.choice, len(outputs[index]))
            greedy = row.sampling.temperature == 0
            assert low - (0 if greedy else TIE) <= draw < high + (0 if greedy else TIE)
            outputs[index].append(chosen.ids[index])


def test_a_rebuilt_sampler_goes_on_as_the_old_one_would() -> None:
    penal = Sampling(
        seed=4, presence_penalty=1, frequency_penalty=1, repetition_penalty=1.5, min_tokens=6
    )
    logits = torch.randn((10, 1, VOCABULARY), generator=torch.Generator().manual_seed(1)) * 2
    row = SamplingRow(penal, 2, prompt=[3, 4], output=[])
    straight = BatchSampler([row], VOCABULARY, ENDS, torch.device("cpu"))
    whole = [straight.choose(step).ids[0] for step in logits]
    moved: list[int] = []
    for step in logits:
        row = SamplingRow(penal, 2, prompt=[3, 4], output=list(moved))
        moved += BatchSampler([row], VOCABULARY, ENDS, torch.device("cpu")).choose(step).ids
    assert moved == whole


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.2}]
)
def test_draws_follow_the_probabilities(settings: dict[str, float]) -> None:
    rows = [SamplingRow(changed(Sampling(seed=99), **settings), 0, [1], [])]
    sampler = BatchSampler(rows, 8, (), torch.device("cpu"))
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -9.0]])
    draws = 4_000
    counts = Counter(sampler.choose(logits).ids[0] for _ in range(draws))
    for token in range(8):
        low, high = interval(logits[0].double().numpy(), rows[0].sampling, token)
        chance = high - low
        deviation = (draws * chance * (1 - chance)) ** 0.5
        assert abs(counts[token] - draws * chance) <= 5 * deviation + 1e-9


def test_uniform_is_uniform_and_keyed_by_all_three() -> None:
    draws = [uniform(seed, choice, p) for seed in (0, 1) for choice in (0, 1) for p in range(5_000)]
    assert len(set(draws)) == len(draws)
    assert all(0 <= draw < 1 for draw in draws)
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert ((counts - 1_000) ** 2 / 1_000).sum() < 50  # 19 degrees of freedom: p < 0.0002 beyond
    halves = np.array(draws).reshape(4, -1)
    assert np.abs(np.corrcoef(halves) - np.eye(4)).max() < 0.06


def test_uniform_never_changes() -> None:
    """A new version must go on with the texts of an old one."""
    assert uniform(0, 0, 0) == 0.3122295497459846
    assert uniform(-1, 3, 100) == uniform(2**64 - 1, 3, 100)


def test_where_only_end_tokens_are_allowed_min_tokens_gives_way() -> None:
    row = SamplingRow(Sampling(temperature=0, min_tokens=5, allowed_token_ids=ENDS), 0, [2], [])
    sampler = BatchSampler([row], VOCABULARY, ENDS, torch.device("cpu"))
    assert sampler.choose(torch.zeros(1, VOCABULARY)).ids[0] in ENDS


def test_a_wide_nucleus() -> None:
    vocabulary = 3_000
    row = SamplingRow(Sampling(seed=1, top_p=0.9), 0, [1], [])
    sampler = BatchSampler([row], vocabulary, (), torch.device("cpu"))
    logits = torch.linspace(0, 0.5, vocabulary)[torch.randperm(vocabulary)].unsqueeze(0)
    chosen = [sampler.choose(logits).ids[0] for _ in range(30)]
    order = logits[0].argsort(descending=True).tolist()
    ranks = [order.index(token) for token in chosen]
    assert max(ranks) > vocabulary / 2
    for position, token in enumerate(chosen):
        low, high = interval(logits[0].double().numpy(), row.sampling, token)
        assert low - TIE <= uniform(1, 0, position) < high + TIE


def test_bfloat16_logits_are_judged_in_float32() -> None:
    row = SamplingRow(Sampling(temperature=0, logit_bias={3: 0.001}), 0, [1], [])
    sampler = BatchSampler([row], VOCABULARY, (), torch.device("cpu"))
    logits = torch.full((1, VOCABULARY), 8.0, dtype=torch.bfloat16)
    assert sampler.choose(logits).ids == [3]


def test_describe_logprobs_of_several_wishes() -> None:
    scores = torch.log_softmax(torch.arange(12.0).reshape(2, 6), dim=-1)
    none, two = describe_logprobs(scores, [0, 5], [0, 2])
    assert (none.top_ids, none.top_logprobs) == (b"", ())
    assert unpack(two.top_ids) == [5, 4]
    assert two.top_logprobs[0] == two.chosen


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e300])
def test_an_overflowing_penalty_chooses_a_token_all_the_same(penalty: float) -> None:
    sampling = Sampling(temperature=1.0, seed=3, repetition_penalty=penalty)
    row = SamplingRow(sampling, 0, (1, 2), (3,))
    mate = SamplingRow(Sampling(temperature=1.0, seed=4), 0, (1,), ())
    logits = torch.tensor([[0.5, 2.0, -3.0, 1.0]] * 2)
    together = BatchSampler([row, mate], 4, (), torch.device("cpu")).choose(logits.clone())
    alone = BatchSampler([mate], 4, (), torch.device("cpu")).choose(logits[:1].clone())
    assert 0 <= together.ids[0] < 4
    assert together.ids[1] == alone.ids[0]


def test_not_a_number_from_the_model_is_a_token_and_spares_its_mates() -> None:
    rows = [SamplingRow(Sampling(temperature=1.0, seed=s), 0, (1,), ()) for s in (1, 2)]
    logits = torch.tensor([[float("nan")] * 4, [0.5, 2.0, -3.0, 1.0]])
    together = BatchSampler(rows, 4, (), torch.device("cpu")).choose(logits.clone())
    alone = BatchSampler(rows[1:], 4, (), torch.device("cpu")).choose(logits[1:].clone())
    assert 0 <= together.ids[0] < 4
    assert together.ids[1] == alone.ids[0]
