"""A request's life: its states, and the one table of what may happen in which.

No other file changes `Request.state`. A cause that the table does not know in a state is a bug in
the core: events are checked before they become causes, so nothing from outside can reach it.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from shared import tokens
from shared.messages import AdmittedBy, Came, RequestSpec, WaitsFor


class State(Enum):
    """Where a request is."""

    NEW = "new"
    COLLECTING = "collecting"
    """After a takeover: is a worker running it already?"""
    WAITING = "waiting"
    """In the pool."""
    PLACED = "placed"
    """On a worker: in a closed batch, or with a lease of its own."""
    PARKING = "parking"
    """Its lease is to end early; until the worker's answer its memory counts as used."""
    RECALLING = "recalling"
    """Its worker or its tokens are lost; the gateway is asked for the truth."""
    DONE = "done"


class Cause(Enum):
    """Why it moves."""

    COLLECT = "collect"
    ADMIT = "admit"
    CLAIM = "claim"
    PLACE = "place"
    GIVE_BACK = "give back"
    RECALL = "recall"
    RESUME = "resume"
    PARK = "park"
    FINISH = "finish"


TRANSITIONS: dict[tuple[State, Cause], State] = {
    (State.NEW, Cause.COLLECT): State.COLLECTING,
    (State.NEW, Cause.ADMIT): State.WAITING,
    (State.COLLECTING, Cause.CLAIM): State.PLACED,
    (State.COLLECTING, Cause.RECALL): State.RECALLING,
    (State.COLLECTING, Cause.RESUME): State.COLLECTING,
    (State.COLLECTING, Cause.FINISH): State.DONE,
    (State.WAITING, Cause.PLACE): State.PLACED,
    (State.WAITING, Cause.RECALL): State.RECALLING,
    (State.WAITING, Cause.RESUME): State.WAITING,
    (State.WAITING, Cause.FINISH): State.DONE,
    (State.PLACED, Cause.GIVE_BACK): State.WAITING,
    (State.PLACED, Cause.RECALL): State.RECALLING,
    (State.PLACED, Cause.RESUME): State.WAITING,
    (State.PLACED, Cause.FINISH): State.DONE,
    (State.PLACED, Cause.PARK): State.PARKING,
    (State.PARKING, Cause.GIVE_BACK): State.WAITING,
    (State.PARKING, Cause.RECALL): State.RECALLING,
    (State.PARKING, Cause.RESUME): State.WAITING,
    (State.PARKING, Cause.FINISH): State.DONE,
    (State.RECALLING, Cause.RESUME): State.WAITING,
    (State.RECALLING, Cause.FINISH): State.DONE,
    (State.DONE, Cause.RECALL): State.RECALLING,
}

HELD = frozenset({State.PLACED, State.PARKING})
"""A worker has it."""


@dataclass(frozen=True, slots=True)
class Placement:
    """One slice of a request: from which output position, where, under which attempt."""

    position: int
    worker: str
    attempt: int


@dataclass(slots=True)
class Request:
    """All the scheduler knows of one request."""

    spec: RequestSpec
    number: int
    """Order of arrival here."""
    prompt_tokens: int
    state: State = State.NEW
    attempt: int = 0
    """Of the latest placement."""
    closed: int = 0
    """Attempts up to this are closed at the gateway."""
    tokens: bytes = b""
    """Output that is known here, packed."""
    worker: str = ""
    """Where it is placed; empty in every other state."""
    batch_id: str = ""
    since: float = 0.0
    """When it came into its state."""
    arrived_at: float = 0.0
    """When it was first heard of here."""
    predicted_tokens: int = 0
    """The output that its client or the estimator's predictor expects; 0: nobody said."""
    predicted_start_s: float = 0.0
    """What was told of its first token, from `arrived_at` on; 0: nothing."""
    predicted_alone_s: float = 0.0
    """That, if nothing else had been there."""
    predicted_finish_s: float = 0.0
    predicted_output: int = 0
    """The length of its output on which that rests."""
    predicted_quantiles: tuple[float, ...] = ()
    """Of its output (calibration.py); empty: nothing was predicted."""
    came: Came = "new"
    """How it came to wait; with the next four: reasons, for people only (reasons.py)."""
    waits_for: WaitsFor = "turn"
    admitted_by: AdmittedBy = "dealt"
    needed_tokens: int = 0
    """KV that its worker's batch would need with it, when it was last looked at."""
    room_tokens: int = 0
    paused: bool = False
    """Its client reads slowly: it gets no lease, and stands in no line."""
    reading_turn: int = 0
    """Of the latest word about that."""
    bound: str = ""
    """With early binding: the worker in whose line it waits."""
    until: int = 0
    """Leased: output position up to which it may go on."""
    listed: int = 0
    """Leased: how far its worker said that it has come, when that was more than the tokens we have:
    a new leader learns of a lease that is used up before it learns the tokens."""
    leased_tokens: int = 0
    """Leased: what its lease still covers, as its tenant's share counts it."""
    blocks: int = 0
    """Leased: KV blocks of its worker that its lease reserves."""
    backlog_tokens: int = 0
    """Leased: input that is still to be prefilled there; counts in whole until the first token."""
    backlog_ahead: int = 0
    """Leased: all prefill that was queued there when it joined, its own counted."""
    beside: int = 0
    """Leased: how many others had a lease there when it joined."""
    prefix_keys: tuple[bytes, ...] | None = None
    """Leased: names of its prompt's beginnings; None: nobody has asked for them."""
    first_token: bool = False
    """Leased: its prefill on its present worker is over."""
    heard_at: float = 0.0
    """Leased: when its worker last reported on it."""
    timed_at: float = 0.0
    """Leased: when it last was given its place, or reported with new tokens,"""
    lease_seconds: float = 0.0
    """and the lease seconds of its worker (credit.py) at that time."""
    stood: bool = False
    """Leased: its lease was used up then, or nobody knows: it may have stood still since."""
    evicted_at: float = 0.0
    """When it last lost its place for want of memory; 0: never. It comes back first."""
    evictions: int = 0
    yields: int = 0
    """How often it made way for a tenant that was given less (yielding.py)."""
    rested: int = 0
    """How often it was parked since its tenant was too far ahead of others (leads.py)."""
    makes_way: bool = False
    """It is parked for that."""
    parked_for: Literal["", "move", "turn"] = ""
    """Why it is parked, where that is not for want of memory: it goes on elsewhere, or others have
    their turn first."""
    moves: int = 0
    rooms_made: int = 0
    """How often it was, for the one and for the other."""
    left: str = ""
    """Where it was before a move: it goes on there only if nobody else takes it."""
    overtaken: int = 0
    """How often one behind it was placed in its stead since it waits."""
    placements: list[Placement] = field(default_factory=list)
    refusals: int = 0
    asks: int = 0
    asked_position: int = -1
    recalls: int = 0
    recall_attempt: int = 0
    published: bool = False
    """Its end was told to the estimator."""
    orphaned: bool = False
    """It ended because its gateway fell silent."""

    @property
    def request_id(self) -> str:
        return self.spec.request_id

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) // tokens.TOKEN_BYTES

    @property
    def input_tokens(self) -> int:
        """What the next slice has to prefill: prompt and output so far."""
        return self.prompt_tokens + self.output_tokens

    @property
    def remaining_tokens(self) -> int:
        return self.spec.max_tokens - self.output_tokens

    @property
    def context_tokens(self) -> int:
        """The most it can ever hold."""
        return self.prompt_tokens + self.spec.max_tokens


def move(request: Request, cause: Cause, now: float) -> None:
    """Change the request's state as the table says."""
    target = TRANSITIONS.get((request.state, cause))
    assert target is not None, f"{cause} in {request.state}"
    request.state = target
    request.since = now


def drawn() -> str:
    """The table as a Mermaid state diagram, for the docs."""
    lines = ["stateDiagram-v2"]
    for (source, cause), target in TRANSITIONS.items():
        lines.append(f"    {source.value} --> {target.value}: {cause.value}")
    return "\n".join(lines) + "\n"
