"""The defining property: greedy text is that of `model.generate`, for every shape of decoder, in
any slices, in any company, and wherever a request has been meanwhile.

In float32 under the near-tie rule of `tests/worker/reference.py`; in bfloat16 within tolerances
that are stated here.
"""

from pathlib import Path
from random import Random

import numpy as np
import pytest
from msgspec.structs import replace as changed

from services.worker.engines.api import Engine, OutOfMemory
from shared.messages import RequestSpec
from shared.tokens import unpack
from tests.worker.conformance.driver import Driver, run_all, some_specs
from tests.worker.conformance.subjects import Kit
from tests.worker.conftest import DEVICE
from tests.worker.orders import GREEDY, Made, make_order, make_spec
from tests.worker.reference import Agreement, Reference
from tests.worker.tiny_models import BEGIN, FAMILIES, tiny_mistral

LENGTH = 34
UNLIMITED = 10_000
EQUAL_SHARE_MIN = 0.9
"""bfloat16: share of tokens that are the float32 model's best ones after the same text."""
BEHIND_MAX = 0.35
"""bfloat16: how far such another token's score is behind the best one; scores spread over 10."""
ERROR_MAX = 0.35
"""bfloat16: the largest error of a reported log probability, ..."""
ERROR_MEAN_MAX = 0.06
"""... and the mean one. A step of bfloat16 at a score of 8 is 0.06."""


def requests(seed: int = 3) -> list[RequestSpec]:
    """Prompts of up to 60 tokens: shorter and longer than the windows of those that have one."""
    return some_specs(5, LENGTH, seed=seed)


def check(made: dict[str, Made], reference: Reference) -> None:
    """Compare each text, as far as it got, with generate's."""
    agreement = Agreement()
    for request in made.values():
        prompt = unpack(request.spec.prompt)
        ended = request.finish_reason is not None
        most = LENGTH if ended else len(request.ids)
        reference.compare_greedy(prompt, request.ids, most, agreement)
    agreement.check()


@pytest.mark.parametrize("slice_tokens", [1, 7, 16, UNLIMITED])
def test_any_slices(
    real_kit: Kit, llama: Path, references: dict[str, Reference], slice_tokens: int
) -> None:
    # Chunks of 40 tokens take these prompts in several pieces.
    engine = real_kit.make(llama, prefill_chunk_tokens=40)
    made = run_all(real_kit, engine, requests(), slice_tokens, at_once=3)
    assert all(request.finish_reason for request in made.values())
    check(made, references["llama"])


@pytest.mark.parametrize("family", FAMILIES)
def test_any_shape(
    real_kit: Kit, model_folders: dict[str, Path], references: dict[str, Reference], family: str
) -> None:
    """Each request with slices of its own length."""
    engine = real_kit.make(model_folders[family], prefill_chunk_tokens=40)
    lengths = dict(zip([f"r{n}" for n in range(5)], [7, 1, UNLIMITED, 16, 3], strict=True))
    made = run_all(real_kit, engine, requests(seed=4), lengths, at_once=4)
    assert all(request.finish_reason for request in made.values())
    check(made, references[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_any_life(
    real_leased_kit: Kit,
    model_folders: dict[str, Path],
    references: dict[str, Reference],
    family: str,
) -> None:
    """Two engines; requests come and go, park, come back, and move from one to the other, while
    iterations are as small as a few tokens."""
    engines = [real_leased_kit.make(model_folders[family]) for _ in range(2)]
    life(real_leased_kit, engines, references[family], seed=sorted(FAMILIES).index(family))


def life(kit: Kit, engines: list[Engine], reference: Reference, seed: int) -> None:
    """As above, drawn from the seed; ends when all have finished."""
    rng = Random(seed)
    drivers = [Driver(engine, kit.subject) for engine in engines]
    made: dict[str, Made] = {}
    attempts: dict[str, int] = {}
    for driver in drivers:
        driver.made, driver.attempts = made, attempts
    specs = {spec.request_id: spec for spec in requests(seed=4)}
    homeless = list(specs)
    for _ in range(2_000):
        there = [(driver, name) for driver in drivers for name in driver.until]
        if not homeless and not there:
            break
        driver = rng.choice(drivers)
        match rng.choice(["place", "renew", "renew", "park", *["step"] * 8]):
            case "place" if homeless:
                name = homeless.pop(rng.randrange(len(homeless)))
                ids = made[name].ids if name in made else []
                order = make_order(
                    specs[name], rng.choice([1, 7, 16]), ids, attempts.get(name, 0) + 1
                )
                try:
                    driver.start(order, iteration_tokens=rng.choice([5, 16, 40, 0]))
                except OutOfMemory:
                    homeless.append(name)
            case "renew" if there:
                driver, name = rng.choice(there)
                driver.renew(name, driver.until[name] + rng.choice([1, 7, 16]))
            case "park" if there:
                driver, name = rng.choice(there)
                driver.park(name)
            case _:
                if driver.engine.busy:
                    homeless += [end.request_id for end in driver.step().left]
    assert all(request.finish_reason for request in made.values()), "it takes too long"
    check(made, reference)
    for driver in drivers:
        driver.assert_empty()


def test_other_paths_through_the_engine(
    paged_kit: Kit, model_folders: dict[str, Path], references: dict[str, Reference]
) -> None:
    """It has two networks, and may keep parked KV in host memory."""
    small = {"kv_tokens": 160, "kv_host_tokens": 2_000}
    # Attention on CUDA wants blocks of a multiple of 16 tokens.
    odd = {"kv_block_tokens": 5 if DEVICE == "cpu" else 32}
    for settings in ({"fuse": False}, small, {"share_prefixes": False}, odd):
        engine = paged_kit.make(model_folders["llama"], **settings)
        life(paged_kit, [engine], references["llama"], seed=5)


def test_a_window_that_only_long_texts_reach(real_kit: Kit, tmp_path: Path) -> None:
    """Longer than any prompt by which an engine may try itself when it loads a model."""
    folder = tiny_mistral(tmp_path / "mistral", window=64)
    specs = [make_spec(f"r{n}", [BEGIN, *range(n, n + 70)], LENGTH) for n in range(2)]
    made = run_all(real_kit, real_kit.make(folder), specs, 16)
    check(made, Reference(folder))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16_stays_close_to_float32(
    real_kit: Kit, model_folders: dict[str, Path], references: dict[str, Reference], family: str
) -> None:
    """Weights, activations and KV in bfloat16 against the float32 model, after the same text."""
    engine = real_kit.make(model_folders[family], dtype="bfloat16")
    scored = changed(GREEDY, logprobs=0)
    specs = [changed(spec, sampling=scored) for spec in requests()]
    made = run_all(real_kit, engine, specs, 16)
    equal, behind, errors = closeness(made, references[family])
    print(f"{family}: {equal:.3f} equal, {behind:.3f} behind, {max(errors):.3f}", np.mean(errors))
    assert equal >= EQUAL_SHARE_MIN
    assert behind <= BEHIND_MAX
    assert max(errors) <= ERROR_MAX
    assert np.mean(errors) <= ERROR_MEAN_MAX


def closeness(made: dict[str, Made], reference: Reference) -> tuple[float, float, list[float]]:
    """(share of best tokens, the furthest behind of the others, errors of log probabilities)."""
    best, behind, errors = 0, 0.0, []
    tokens = 0
    for request in made.values():
        prompt = unpack(request.spec.prompt)
        logits = reference.logits([*prompt, *request.ids])[len(prompt) - 1 : -1]
        for row, token, found in zip(logits, request.ids, request.logprobs, strict=True):
            tokens += 1
            best += int(row.argmax() == token)
            behind = max(behind, float(row.max() - row[token]))
            assert found.chosen is not None
            exact = row[token] - row.max() - np.log(np.exp(row - row.max()).sum())
            errors.append(abs(float(exact) - found.chosen))
    return best / tokens, behind, errors
