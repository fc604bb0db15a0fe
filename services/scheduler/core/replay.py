"""The journal's format, and its replay: the same events must give the same commands.

A journal is a sequence of msgpack records, each after its length as 4 bytes, big-endian. The
first of every leadership is a `Started`; the rest are `Step`s. A production incident becomes a
test by keeping its journal.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import msgspec

from services.scheduler.core.presets import preset_named
from services.scheduler.core.scheduler import Scheduler
from services.scheduler.core.settings import Constants
from shared.messages import SchedulerCommand, SchedulerEvent

LENGTH_BYTES = 4
RECORD_BYTES_MAX = 1 << 28
"""No record is near this; a longer one is not a journal."""


class BadJournal(ValueError):
    """The bytes are no journal, or one of another version."""


class Started(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A leadership begins, with this policy."""

    policy: str
    constants: dict[str, int | float | bool | str]


class Step(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One call of the core and its answer."""

    now: float
    event: SchedulerEvent | None
    """None: `wake`."""
    commands: tuple[SchedulerCommand, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first step where a replay decided otherwise."""

    step: int
    """From 0, `Started` not counted."""
    now: float
    recorded: tuple[SchedulerCommand, ...]
    replayed: tuple[SchedulerCommand, ...]


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Started | Step] = msgspec.msgpack.Decoder(Started | Step)


def started(policy: str, constants: Constants) -> Started:
    """The record that a leadership begins with."""
    return Started(policy=policy, constants=asdict(constants))


def to_bytes(record: Started | Step) -> bytes:
    """The record as it stands in the file."""
    body = _encoder.encode(record)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def records(data: bytes) -> Iterator[Started | Step]:
    """The records of a journal; one that was cut off at the end is left out.

    Raises BadJournal.
    """
    at = 0
    while at + LENGTH_BYTES <= len(data):
        length = int.from_bytes(data[at : at + LENGTH_BYTES], "big")
        if length > RECORD_BYTES_MAX:
            raise BadJournal(f"no journal: a record of {length} bytes at byte {at}")
        body = data[at + LENGTH_BYTES : at + LENGTH_BYTES + length]
        if len(body) < length:
            return
        try:
            yield _decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            why = f"no journal, damaged, or of another version, at byte {at}: {error}"
            raise BadJournal(why) from error
        at += LENGTH_BYTES + length


def cut_at(data: bytes) -> int | None:
    """Where a last record begins that is not whole; None if all are."""
    at = 0
    while at < len(data):
        end = at + LENGTH_BYTES + int.from_bytes(data[at : at + LENGTH_BYTES], "big")
        if end > len(data) or at + LENGTH_BYTES > len(data):
            return at
        at = end
    return None


def replay(data: bytes, policy: str | None = None) -> tuple[int, Difference | None]:
    """Run the recorded events through a new core: (steps run, the first difference or None).

    With `policy` another preset decides; then the first difference is where it would have acted
    otherwise. Raises BadJournal and UnknownPreset.
    """
    steps = 0
    for step, _, answer in steps_of(data, policy):
        if tuple(answer) != step.commands:
            return steps, Difference(steps, step.now, step.commands, tuple(answer))
        steps += 1
    return steps, None


def steps_of(
    data: bytes, policy: str | None = None
) -> Iterator[tuple[Step, Scheduler, list[SchedulerCommand]]]:
    """Each recorded step, the core after it, and what that answered. Raises as `replay`."""
    if not data:
        raise BadJournal("empty: no leadership has been recorded")
    core: Scheduler | None = None
    for record in records(data):
        if isinstance(record, Started):
            core = _core(record, policy or record.policy)
            continue
        if core is None:
            raise BadJournal("no journal: it does not begin with a leadership")
        now = record.now
        yield (
            record,
            core,
            core.wake(now) if record.event is None else core.handle(record.event, now),
        )


def _core(record: Started, policy: str) -> Scheduler:
    """Another policy than the recorded one has constants of its own, and of the recorded ones
    those that had been changed."""
    preset = preset_named(policy)
    if preset.needs_truth:
        raise BadJournal(
            f"{policy} needs true lengths, which no journal holds: choose another policy"
        )
    constants = _constants(record)
    if policy != record.policy:
        usual = asdict(preset_named(record.policy).with_constants())
        changed = {name: value for name, value in asdict(constants).items() if value != usual[name]}
        constants = preset.with_constants(**changed)
    return Scheduler(preset, constants)


def _constants(record: Started) -> Constants:
    try:
        return Constants(**record.constants)  # type: ignore[arg-type]
    except TypeError as error:
        raise BadJournal(f"a journal of another version: {error}") from error
