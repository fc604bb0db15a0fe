"""The oracle of generated text: plain transformers, one request at a time, written independently.

Float32 sums change with the shape of a batch, so a difference is allowed only where the reference
itself is undecided: for greedy text where its two best scores lie within `TIE`; for sampled text
where the draw lies within `TIE` of the edge that it fell beside. What follows is then compared
with a reference that was forced onto the other token. Such places are counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from services.worker.sampling import uniform
from shared.messages import Sampling
from shared.tokens import unpack
from tests.worker.orders import Made

TIE = 1e-4
TIES_MAX_SHARE = 1 / 20_000


@dataclass
class Agreement:
    """What was compared, and at how many tokens the reference was undecided."""

    tokens: int = 0
    ties: int = 0

    def check(self) -> None:
        """At most one token in 20,000 (but one in any case) may have been undecided."""
        assert self.ties <= max(1, self.tokens * TIES_MAX_SHARE), self


class Reference:
    """A model in float32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ends = self.model.generation_config.eos_token_id
        self.end_ids = {ends} if isinstance(ends, int) else set(ends or ())
        self._known: dict[tuple[int, ...], tuple[list[int], list[torch.Tensor]]] = {}
        """Greedy texts by prompt and length; many engines are compared with the same ones."""

    def greedy(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """What model.generate makes of it, the end token counted."""
        return self._generate(list(prompt), max_tokens)[0]

    def compare_greedy(
        self, prompt: Sequence[int], output: Sequence[int], max_tokens: int, into: Agreement
    ) -> None:
        """Fails if `output` is not the greedy text of `max_tokens` tokens at most."""
        forced = 0
        into.tokens += len(output)
        while True:
            start = [*prompt, *output[:forced]]
            ended = forced > 0 and output[forced - 1] in self.end_ids
            left = 0 if ended else max_tokens - forced
            made, scores = self._generate(start, left) if left else ([], [])
            if made == list(output[forced:]):
                return
            pairs = zip(made, output[forced:], strict=False)
            differing = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            assert differing is not None, (
                f"lengths differ: {len(output)} tokens instead of {forced + len(made)}"
            )
            best = scores[differing].max().item()
            mine = scores[differing][output[forced + differing]].item()
            assert best - mine <= TIE, (
                f"position {forced + differing}: {output[forced + differing]} instead of "
                f"{made[differing]}, whose score is higher by {best - mine:.2g}"
            )
            into.ties += 1
            forced += differing + 1

    def compare_sampled(
        self,
        prompt: Sequence[int],
        output: Sequence[int],
        sampling: Sampling,
        into: Agreement,
        choice: int = 0,
    ) -> None:
        """Fails if a token of `output` is not the one that its draw chooses; without a draw, the
        one with the best score."""
        into.tokens += len(output)
        logits = self.logits([*prompt, *output])
        for position, token in enumerate(output):
            row = logits[len(prompt) + position - 1]
            scores = edited(row, sampling, prompt, output[:position], self.end_ids)
            if sampling.temperature == 0:
                behind = scores.max() - scores[token]
                assert behind <= TIE, f"position {position}: {token} is behind by {behind:.2g}"
                into.ties += int(behind > 0)
                continue
            low, high = interval(scores, sampling, token)
            draw = uniform(sampling.seed, choice, position)
            if not low <= draw < high:
                beside = min(abs(draw - low), abs(draw - high))
                assert beside <= TIE, f"position {position}: {draw} is not in {low}..{high}"
                into.ties += 1

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """[tokens, vocabulary], without any cache."""
        found = self.model(torch.tensor([list(ids)]), use_cache=False).logits[0]
        scores: np.ndarray = found.double().numpy()
        return scores

    def check_text(self, made: Made, into: Agreement) -> None:
        """Fails if a request's text is not the one that its model and its sampling make, as far
        as it got; or if it ended elsewhere than it should."""
        spec, output = made.spec, made.ids
        prompt = unpack(spec.prompt)
        self.compare_sampled(prompt, output, spec.sampling, into, spec.choice)
        ends = set(spec.sampling.stop_token_ids)
        ends |= set() if spec.sampling.ignore_eos else self.end_ids
        assert not ends & set(output[:-1]), "it went on after an end token"
        stopped = bool(output) and output[-1] in ends
        if made.finish_reason is None:
            assert not stopped
            assert len(output) < max(1, spec.max_tokens)
        else:
            assert made.finish_reason == ("stop" if stopped else "length")
            assert stopped or len(output) == spec.max_tokens

    def _generate(self, prompt: list[int], max_tokens: int) -> tuple[list[int], list[torch.Tensor]]:
        key = (max_tokens, *prompt)
        if key not in self._known:
            self._known[key] = self._generate_anew(prompt, max_tokens)
        return self._known[key]

    def _generate_anew(
        self, prompt: list[int], max_tokens: int
    ) -> tuple[list[int], list[torch.Tensor]]:
        made = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return made.sequences[0, len(prompt) :].tolist(), [step[0] for step in made.logits]


def edited(
    row: np.ndarray,
    sampling: Sampling,
    prompt: Sequence[int],
    output: Sequence[int],
    model_end_ids: set[int],
) -> np.ndarray:
    """One row of logits after bias, penalties and forbidden tokens, token by token."""
    scores = row.astype(np.float64).copy()
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    for token in set(prompt) | set(output):
        divide = scores[token] > 0
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] / penalty if divide else scores[token] * penalty
    for token in set(output):
        scores[token] -= sampling.frequency_penalty * list(output).count(token)
        scores[token] -= sampling.presence_penalty
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else model_end_ids)
    for token in range(len(scores)):
        outside = bool(sampling.allowed_token_ids) and token not in sampling.allowed_token_ids
        if outside or (len(output) < sampling.min_tokens and token in ends):
            scores[token] = -np.inf
    return scores


def interval(scores: np.ndarray, sampling: Sampling, token: int) -> tuple[float, float]:
    """Where a draw must lie to choose `token`, of edited scores. Greedy: [0, 1) or nothing."""
    if sampling.temperature == 0:
        return (0.0, 1.0) if scores.argmax() == token else (2.0, 2.0)
    scaled = scores / sampling.temperature
    kept = softmax(scaled) >= sampling.min_p * softmax(scaled).max()
    scaled = np.where(kept, scaled, -np.inf)
    if 0 < sampling.top_k < len(scaled):
        scaled = np.where(scaled >= np.sort(scaled)[-sampling.top_k], scaled, -np.inf)
    chances = softmax(scaled)
    if sampling.top_p < 1:
        held, least = 0.0, 0.0
        for chance in sorted(chances, reverse=True):
            held, least = held + chance, chance
            if held >= sampling.top_p:
                break
        chances = np.where(chances >= least, chances, 0.0)
        chances = chances / chances.sum()
    return float(chances[:token].sum()), float(chances[: token + 1].sum())


def softmax(scores: np.ndarray) -> np.ndarray:
    """Along the only axis."""
    powers: np.ndarray = np.exp(scores - scores.max())
    shares: np.ndarray = powers / powers.sum()
    return shares
