"""`tranche replay`: a recorded scheduler journal through the same core, or under another policy."""

from pathlib import Path
from typing import Annotated

import typer

from services.scheduler.core.explain import story
from services.scheduler.core.presets import UnknownPreset
from services.scheduler.core.replay import (
    BadJournal,
    Difference,
    cut_at,
    replay as replay_journal,
)
from shared.bus.identity import public_id
from shared.config import SetupError
from shared.messages import RunSlice, SchedulerCommand

DIFFERENT_EXIT_CODE = 3
SHOWN_COMMANDS_MAX = 8
SHOWN_ORDERS_MAX = 4
SHOWN_PAIRS_MAX = 3
OUTLINED = ("worker", "gateway", "batch_id", "request_id", "attempt", "reason", "iterations")
LEASED = ("margin_tokens", "iteration_tokens", "prefill_first")


def replay(
    file: Annotated[Path, typer.Argument(help="What a scheduler wrote with --journal FILE.")],
    policy: Annotated[
        str,
        typer.Option(
            help="Another preset, or a variant such as vllm+offloading=sal-a: where would it "
            "first have acted otherwise?"
        ),
    ] = "",
    request: Annotated[
        str,
        typer.Option(
            help="Tell the story of this request instead: why it waited, where it was placed and "
            "why, and what had been predicted. The beginning of its id is enough."
        ),
    ] = "",
) -> None:
    """Run the recorded events through the core; exit code 3 at the first different decision.

    Raises SetupError for a file that is no journal, or an unknown policy.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise SetupError(f"{file}: {error.strerror}; give the file of a journal") from error
    try:
        if request:
            _tell(data, request)
            return
        steps, difference = replay_journal(data, policy or None)
    except (BadJournal, UnknownPreset) as error:
        raise SetupError(f"{file}: {error}") from error
    cut = cut_at(data)
    if cut is not None:
        typer.echo(f"the last record is cut off at byte {cut}; it is left out", err=True)
    if difference is None:
        typer.echo(f"{steps} steps, every decision the same")
        return
    typer.echo(described(difference))
    raise typer.Exit(DIFFERENT_EXIT_CODE)


def _tell(data: bytes, request_id: str) -> None:
    # Clients see a prefix that says what they asked for.
    lines = story(data, request_id.removeprefix("chatcmpl-").removeprefix("cmpl-"))
    if not lines:
        raise SetupError(
            f"the journal knows no request {request_id!r}; give the beginning of an id, as clients "
            "get it or as logs and traces have it"
        )
    typer.echo(public_id("\n".join(lines)))


def described(difference: Difference) -> str:
    """The first different step for people; no prompt is shown."""
    lines = [f"step {difference.step}, at {difference.now:.6f} s, differs"]
    for title, commands in (
        ("recorded", difference.recorded),
        ("replayed", difference.replayed),
    ):
        lines.append(f"  {title}: {len(commands)} commands")
        lines += [f"    {outline(command)}" for command in commands[:SHOWN_COMMANDS_MAX]]
        if len(commands) > SHOWN_COMMANDS_MAX:
            lines.append(f"    and {len(commands) - SHOWN_COMMANDS_MAX} more")
    pairs = zip(difference.recorded, difference.replayed, strict=False)
    told = [text for pair in pairs if (text := unlike(*pair))]
    lines += [f"  {text}" for text in told[:SHOWN_PAIRS_MAX]]
    return "\n".join(lines)


def unlike(recorded: SchedulerCommand, replayed: SchedulerCommand) -> str:
    """The fields in which two commands of one kind differ, such as two beats; else empty. Of
    what may hold prompts only the field's name is told."""
    if type(recorded) is not type(replayed):
        return ""
    parts = []
    for field in recorded.__struct_fields__:
        old, new = getattr(recorded, field), getattr(replayed, field)
        if old != new:
            plain = all(isinstance(value, (int, float, str, type(None))) for value in (old, new))
            parts.append(f"{field} {old!r} recorded, {new!r} replayed" if plain else field)
    return f"{type(recorded).__name__} differs in: {'; '.join(parts)}" if parts else ""


def outline(command: SchedulerCommand) -> str:
    """The kind of a command and whom it concerns."""
    named = [
        f"{field} {value}"
        for field in OUTLINED
        if (value := getattr(command, field, None)) not in (None, "", 0)
    ]
    if isinstance(command, RunSlice):
        named += _listed(
            "orders", [f"{o.spec.request_id} +{o.lease_tokens}" for o in command.orders]
        )
        named += _listed("renewals", [f"{r.request_id} to {r.until}" for r in command.renewals])
        if command.form == "leased":
            named += [f"{field} {getattr(command, field)}" for field in LEASED]
    return f"{type(command).__name__} {', '.join(named)}".rstrip()


def _listed(title: str, parts: list[str]) -> list[str]:
    if not parts:
        return []
    more = f" and {len(parts) - SHOWN_ORDERS_MAX} more" if len(parts) > SHOWN_ORDERS_MAX else ""
    return [f"{len(parts)} {title} ({'; '.join(parts[:SHOWN_ORDERS_MAX])}{more})"]
