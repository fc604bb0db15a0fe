"""Whether all systems do the same work: the same tokens of a prompt, the same greedy answer."""

import asyncio
from collections.abc import Mapping

from bench.peers.rounds import Running
from bench.peers.systems import PROBE_S
from bench.peers.workload import Ask

PROMPTS = (
    " the of and to in that was his he it",
    "ROMEO: But, soft! what light through yonder window breaks?",
    "It's 1600 o'clock,\n\n  and they're\tall   here.",
)
TOKENS = 48


def compare(running: Running) -> dict[str, str]:
    """What each system's answers say, by system.

    The greedy text is compared with the first system's: float32 sums in another order may choose
    another token where two are nearly equal, and all after it differs; the token count of the
    prompt has to be the same.
    """
    answers = {name: _answers(running, name) for name in running.servers}
    return describe(answers)


def describe(answers: Mapping[str, list[tuple[int | None, str]]]) -> dict[str, str]:
    """From (prompt tokens, text) for each prompt and system: a sentence for each system."""
    names = list(answers)
    if len(names) < 2:
        return {}
    reference = answers[names[0]]
    said = {}
    for name in names[1:]:
        pairs = list(zip(reference, answers[name], strict=True))
        counts = [
            f"{ours} and {theirs}"
            for (ours, _), (theirs, _) in pairs
            if None not in (ours, theirs) and ours != theirs
        ]
        same = [_common_tokens(ours, theirs) for (_, ours), (_, theirs) in pairs]
        said[name] = (
            f"greedy text as {names[0]}'s for {', '.join(map(str, same))} of {TOKENS} tokens"
        )
        if counts:
            said[name] += f"; prompt tokens differ: {', '.join(counts)}"
    return said


def _answers(running: Running, name: str) -> list[tuple[int | None, str]]:
    server = running.servers[name]
    server.tree.thaw()
    found = []
    for prompt in PROMPTS:
        trace = asyncio.run(server.probe(Ask(prompt, 0, TOKENS), PROBE_S))
        found.append((trace.prompt_tokens, trace.text))
    server.tree.freeze()
    return found


def _common_tokens(one: str, other: str) -> int:
    count = 0
    for mine, theirs in zip(one.split(" ")[1:], other.split(" ")[1:], strict=False):
        if mine != theirs:
            break
        count += 1
    return count
