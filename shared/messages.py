"""The mesh's whole vocabulary: what gateways, scheduler, workers and estimator say to each other.

These structs are the wire messages *and* the events and commands of the sans-IO cores; there is no
second set. A message is frozen, keyword-only, tagged by its class name and encoded as msgpack.
A new field needs a default, so that older and newer services understand each other.

Identity and order (docs/protocol.md has the whole table):

- `request_id` names one choice of one client request. With `n > 1` each choice is a request of its
  own; they share `parent_id`.
- `attempt` numbers the placements of a request, from 1. A gateway drops what a closed attempt says.
- `position` is the index of a token in the request's *output*; the prompt does not count.
- `epoch` numbers scheduler leaders. A receiver keeps the largest it has seen and drops orders of a
  smaller one.
- Token ids travel as packed bytes (`shared.tokens`).
"""

from typing import Literal

import msgspec

from shared.message_parts import (
    AdmittedBy as AdmittedBy,
    Came as Came,
    FinishReason as FinishReason,
    Form as Form,
    LengthClass as LengthClass,
    Renewal as Renewal,
    RequestSpec as RequestSpec,
    Resident as Resident,
    Sampling as Sampling,
    SliceOrder as SliceOrder,
    SliceResult as SliceResult,
    SliceTimings as SliceTimings,
    TokenLogprobs as TokenLogprobs,
    TokenRun as TokenRun,
    Value as Value,
    WaitsFor as WaitsFor,
    Why as Why,
    WorkerInfo as WorkerInfo,
    WorkerMemory as WorkerMemory,
)


class Message(Value, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Something that one service says to another."""


# -------------------------------------------------------------------------- gateway to scheduler


class Submit(Message, frozen=True, kw_only=True):
    """A new request. Key: request_id. A repeat is ignored while the request is known."""

    spec: RequestSpec
    told: bool = False
    """The gateway wants to be told (`Accepted`) what is predicted."""


class Resume(Message, frozen=True, kw_only=True):
    """An open request with the output so far, the only truth. It answers `Recall`, and is sent
    for every open request when the gateway sees a new epoch. Attempts up to `attempt` are closed:
    their later words are dropped by the gateway."""

    spec: RequestSpec
    attempt: int
    tokens: bytes = b""
    paused: bool = False
    """Its client is behind with reading, as the word with this `turn` said."""
    turn: int = 0


class Cancel(Message, frozen=True, kw_only=True):
    """Nobody waits for this request any more."""

    gateway: str
    request_id: str
    output_tokens: int = 0
    """How many came; fewer than were made."""


class Stopped(Message, frozen=True, kw_only=True):
    """The gateway found a stop string: the output ends after `output_tokens` tokens."""

    gateway: str
    request_id: str
    output_tokens: int


class TokensWanted(Message, frozen=True, kw_only=True):
    """The gateway misses tokens from `position` on (a gap, or silence past a limit).

    The scheduler passes it to the worker that has them, or recalls the request."""

    gateway: str
    request_id: str
    attempt: int
    position: int


class Reading(Message, frozen=True, kw_only=True):
    """A client fell behind with reading its stream (`paused`), or has caught up. Meanwhile its
    request gets no new lease. `turn` counts these words of one request: older ones are ignored."""

    gateway: str
    request_id: str
    turn: int
    paused: bool


class GatewayBeat(Message, frozen=True, kw_only=True):
    """Every second. Three missed beats cancel the gateway's requests."""

    gateway: str
    open_requests: int = 0
    leaving: bool = False


# -------------------------------------------------------------------------- scheduler to gateway


class Recall(Message, frozen=True, kw_only=True):
    """Close all attempts up to `attempt` of this request and answer `Resume`. If the gateway does
    not know the request, it answers `Cancel`."""

    epoch: int
    gateway: str
    request_id: str
    attempt: int


class Accepted(Message, frozen=True, kw_only=True):
    """The request was taken in, and this is what is predicted for it. Seconds from then on."""

    epoch: int
    gateway: str
    request_id: str
    start_s: float
    """Until its first token."""
    finish_s: float
    """Until its last one."""
    output_tokens: int = 0
    """The length of the output that this rests on."""


class Rejected(Message, frozen=True, kw_only=True):
    """The scheduler will not serve this request."""

    epoch: int
    gateway: str
    request_id: str
    reason: Literal["queue_full", "too_long", "no_worker", "deadline", "unknown_model"]
    detail: str = ""
    retry_after_s: float | None = None
    """None: trying again will not help."""
    start_s: float = 0.0
    """When its first token was predicted; 0: nothing was."""
    finish_s: float = 0.0


class SchedulerBeat(Message, frozen=True, kw_only=True):
    """Every second, to all gateways and workers: who leads, and how full the mesh is."""

    epoch: int
    waiting: int = 0
    running: int = 0
    workers: int = 0
    kv_usage: float = 0.0
    """Share of all workers' KV slots in use, 0 to 1."""
    context_tokens_max: int = 0
    """The longest prompt plus output that every worker can hold; 0 while there is none."""
    predicted_wait_s: float = 0.0
    """How long a request submitted now would wait for its first slice."""
    advice: str = ""
    """What to do about workers that are there but cannot be used; empty if all is well."""


# --------------------------------------------------------------------------- scheduler to worker


class RunSlice(Message, frozen=True, kw_only=True):
    """Run these orders. `closed`: one batch that starts and ends together, at most `iterations`
    long. `leased`: each order is a lease of its own."""

    epoch: int
    worker: str
    batch_id: str
    """Key: a repeat of a batch that the worker knows is ignored."""
    form: Form
    orders: tuple[SliceOrder, ...]
    iterations: int = 0
    expected_s: float = 0.0
    """The scheduler's estimate of the serving time."""
    renewals: tuple[Renewal, ...] = ()
    """Leased only: longer leases for requests that are there already. Obeyed also in a repeat."""
    margin_tokens: int = 0
    """Leased only, for all leases of this worker from now on: report progress when no more than
    this is left of a lease, so that the next one comes before it is used up."""
    iteration_tokens: int = 0
    """Leased only: most tokens in one iteration, decodes first, then chunks of prefill in the
    order of arrival here. 0: the engine's own limit."""
    prefill_first: bool = False
    """Leased only: while any prefill is left, iterations of prefill alone; decodes wait."""


class Park(Message, frozen=True, kw_only=True):
    """End this request's lease after the iteration that runs: report its tokens and free its KV.
    It goes on later, here or elsewhere, from the tokens. Unknown or older attempts: ignored."""

    epoch: int
    worker: str
    request_id: str
    attempt: int
    reason: Literal["memory", "reader", "share", "move", "turn"] = "memory"
    """For traces and journals: no blocks for the next leases; its client is behind; its tenant runs
    more than its share; it goes on elsewhere; it makes room, since nobody reads along."""


class Drop(Message, frozen=True, kw_only=True):
    """Stop working on this request's attempts up to `attempt` and forget them."""

    epoch: int
    worker: str
    request_id: str
    attempt: int


class SendTokens(Message, frozen=True, kw_only=True):
    """Send the request's tokens from `position` on to its gateway again."""

    epoch: int
    worker: str
    request_id: str
    attempt: int
    position: int


class DrainWorker(Message, frozen=True, kw_only=True):
    """Finish the running slices, take no new ones, leave."""

    epoch: int
    worker: str


# --------------------------------------------------------------------------- worker to scheduler


class SliceDone(Message, frozen=True, kw_only=True):
    """A batch (closed) or some leases ended. Key: batch_id, and (request, attempt) of each."""

    epoch: int
    worker: str
    batch_id: str
    form: Form
    results: tuple[SliceResult, ...]
    timings: SliceTimings
    memory: WorkerMemory
    refused: str = ""
    """Not run at all, and why: out of memory, unknown request, draining. No result then counts;
    the orders go back."""


class WorkerBeat(Message, frozen=True, kw_only=True):
    """Twice a second, and at once at the start and on a new epoch."""

    info: WorkerInfo
    memory: WorkerMemory
    epoch: int = 0
    """The largest epoch that the worker has seen."""
    heard_s: float = 0.0
    """How long ago it last heard the beat of that epoch's leader; 0 if there was none since it
    started or reconnected."""
    residents: tuple[Resident, ...] = ()
    """Full list; filled in the first beat after a start, a reconnect or a new epoch, and every ten
    seconds, so that what was lost on its way is noticed."""
    residents_listed: bool = False
    draining: bool = False
    leaving: bool = False
    """The last beat: nothing runs here any more, the queue is being deleted."""


class WorkerBeats(Message, frozen=True, kw_only=True):
    """The beats of all workers that one process pretends to be, in one message."""

    host: str
    """Boot id of the process; its workers' ids are this, a dot and a number."""
    beats: tuple[WorkerBeat, ...]


# ----------------------------------------------------------------------------- worker to gateway


class TokenBatch(Message, frozen=True, kw_only=True):
    """New tokens for one gateway: one message per gateway and iteration at most, coalesced."""

    gateway: str
    worker: str
    epoch: int = 0
    runs: tuple[TokenRun, ...]


# ----------------------------------------------------------------------------- gateway to worker


class FinishAck(Message, frozen=True, kw_only=True):
    """The gateway has everything of these requests up to the finish; forget them."""

    gateway: str
    worker: str
    request_ids: tuple[str, ...]


# ------------------------------------------------------------------- scheduler and the estimator


class Finished(Message, frozen=True, kw_only=True):
    """A request ended. Key: request_id. Cancelled ones say so: they are no full length."""

    epoch: int
    request_id: str
    model: str
    endpoint: str = "completions"
    tenant: str = "default"
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    predicted_output_tokens: int | None = None
    """As the request said."""
    reason: FinishReason


class PredictionWanted(Message, frozen=True, kw_only=True):
    """How long will this output be? For an estimator with a predictor (`LengthForecast.predicts`),
    about a new request that came without a prediction and does not wait for the answer."""

    epoch: int
    request_id: str
    model: str
    endpoint: str = "completions"
    tenant: str = "default"
    prompt: bytes
    """Packed ids."""
    max_tokens: int


class LengthPredicted(Message, frozen=True, kw_only=True):
    """What the predictor says. Key: request_id; the first one counts."""

    request_id: str
    output_tokens: int


class LengthForecast(Message, frozen=True, kw_only=True):
    """The estimator's current knowledge, sent to the scheduler after changes, every few seconds
    at most, and when a scheduler takes over."""

    version: int
    classes: tuple[LengthClass, ...]
    predicts: bool = False
    """There is a predictor: it may be asked about new requests."""


# ------------------------------------------------------------------------- from the shell, local


class OrderReturned(Message, frozen=True, kw_only=True):
    """The broker could not route a message to this worker: its queue is gone."""

    worker: str


class Elected(Message, frozen=True, kw_only=True):
    """This scheduler leads from now on, with this epoch. The first event of every scheduler."""

    epoch: int


ToScheduler = (
    Submit
    | Resume
    | Cancel
    | Stopped
    | TokensWanted
    | Reading
    | GatewayBeat
    | SliceDone
    | WorkerBeat
    | WorkerBeats
    | LengthForecast
    | LengthPredicted
)
ToGateway = Recall | Accepted | Rejected | SchedulerBeat | TokenBatch
ToWorker = RunSlice | Park | Drop | SendTokens | DrainWorker | SchedulerBeat | FinishAck
ToEstimator = Finished | PredictionWanted | SchedulerBeat

SchedulerEvent = ToScheduler | OrderReturned | Elected
SchedulerCommand = (
    RunSlice
    | Park
    | Drop
    | SendTokens
    | DrainWorker
    | Recall
    | Accepted
    | Rejected
    | SchedulerBeat
    | Finished
    | PredictionWanted
)
AnyMessage = ToScheduler | ToGateway | ToWorker | ToEstimator | OrderReturned | Elected

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """The message as msgpack."""
    return _encoder.encode(message)


def decode(data: bytes) -> AnyMessage:
    """The message in `data`. Raises msgspec.DecodeError (or its ValidationError) for anything
    that is not exactly one known message."""
    return _decoder.decode(data)
