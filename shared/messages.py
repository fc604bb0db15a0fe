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

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""`stop`: end token, stop token or stop string. `length`: the token limit. `cancelled`: nobody
waits any more. `error`: the request cannot be served; `detail` says why."""

Form = Literal["closed", "leased"]
"""How an engine runs slices: `closed` batches start and end together; a `leased` slice belongs to
one request in a batch that is continuous at iteration level."""


class Value(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A part of a message; never sent alone."""


class Message(Value, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Something that one service says to another."""


# ------------------------------------------------------------------------------ parts of messages


class Sampling(Value, frozen=True, kw_only=True):
    """How to choose the next token. `seed` is always set: the gateway draws one if nobody gave it.

    The draw for a token is keyed by (seed, choice, position), so it is the same on any worker,
    in any batch and after any move.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    logprobs: int | None = None
    """How many most likely tokens to report beside the chosen one; None: no logprobs at all."""
    prompt_logprobs: bool = False
    """Report logprobs of the prompt's tokens too (`echo` with `logprobs`), in the first slice."""
    min_tokens: int = 0
    """End tokens are forbidden at output positions below this."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    """These end the output, beside the model's own end tokens; the ending token is not text."""
    allowed_token_ids: tuple[int, ...] = ()
    """If not empty, only these can be chosen."""


class RequestSpec(Value, frozen=True, kw_only=True):
    """All that any service must know of a request; it never changes."""

    request_id: str
    parent_id: str
    choice: int = 0
    gateway: str
    """Boot id of the gateway that holds the client's connection."""
    model: str
    endpoint: str = "completions"
    tenant: str = "default"
    priority: int = 0
    """Lower is served first."""
    prompt: bytes
    """Packed ids, with any begin token."""
    max_tokens: int
    """Most output tokens, the end token counted; already capped by the model's context."""
    sampling: Sampling = Sampling()
    stream: bool = False
    ttft_deadline_ms: int | None = None
    deadline_ms: int | None = None
    trace: str = ""
    """W3C traceparent of the request's root span; empty if it is not sampled."""


class TokenLogprobs(Value, frozen=True, kw_only=True, array_like=True):
    """Natural-log probabilities for one position, before temperature and truncation, after
    penalties and bias."""

    chosen: float | None
    """None only for the first token of a prompt, which has no probability."""
    top_ids: bytes = b""
    top_logprobs: tuple[float, ...] = ()


class TokenRun(Value, frozen=True, kw_only=True, array_like=True):
    """Consecutive output tokens of one attempt of one request, from `position` on.

    An ending token (EOS or a stop token) is part of the run and counts as output, but is not text:
    `ending_token` is true if the last id is one.
    """

    request_id: str
    attempt: int
    position: int
    ids: bytes
    finish_reason: FinishReason | None = None
    ending_token: bool = False
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Empty, or one per id."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Empty, or one per prompt token; sent once, with the run at position 0."""
    detail: str = ""
    """Why, if the reason is `error`."""


class SliceOrder(Value, frozen=True, kw_only=True):
    """One request's share of a `RunSlice`."""

    spec: RequestSpec
    attempt: int
    tokens: bytes = b""
    """Output so far (packed). The slice starts at position len(tokens)."""
    lease_tokens: int
    """Most new tokens in this slice; never beyond `spec.max_tokens` in all."""
    pool_wait_s: float = 0.0
    """How long the request waited in the scheduler before this slice."""
    resident: bool = False
    """The worker already holds its KV; `spec.prompt` and `tokens` may be left out then."""


class Renewal(Value, frozen=True, kw_only=True, array_like=True):
    """The next lease of a request that the worker holds: it may make output up to `until`.

    Absolute and only ever raised, so that a repeat, or one that was overtaken, changes nothing."""

    request_id: str
    attempt: int
    until: int
    """Output position (count of output tokens) at which the lease now ends."""


class SliceResult(Value, frozen=True, kw_only=True):
    """What a slice did for one request."""

    request_id: str
    attempt: int
    position: int
    """Where these tokens begin: at the slice's begin, or at the end of the last report."""
    tokens: bytes = b""
    """New output, the ending token counted; nothing that was decoded after the ending."""
    finish_reason: FinishReason | None = None
    resident: bool = False
    """Leased only: its KV stays here, and it goes on while its lease lasts. A report of progress,
    sent with the first token and when no more than the margin of the lease is left, or the word
    that the lease is used up. False: its KV is freed; it ended, was parked or was evicted."""
    evicted: bool = False
    """The engine itself ended the lease early, for want of memory; the tokens are good."""
    cached_tokens: int = 0
    """Input tokens whose KV was found and not computed again."""
    invalid_tokens: int = 0
    """Iterations this request sat through after it had ended, until the closed batch did."""
    pad_tokens: int = 0
    detail: str = ""


class SliceTimings(Value, frozen=True, kw_only=True):
    """Measured by the worker on its own monotonic clock."""

    queue_s: float = 0.0
    """From receipt of the order to its first iteration."""
    prefill_s: float = 0.0
    decode_s: float = 0.0
    iterations: int = 0
    """Tokens made per running request, the one that prefill makes counted."""
    input_tokens_max: int = 0
    """L: longest input of the batch, others padded to it."""
    batch_size: int = 0


class WorkerMemory(Value, frozen=True, kw_only=True):
    """Memory telemetry of a worker. Tokens count KV slots; bytes are theirs on the device."""

    kv_tokens_capacity: int
    kv_tokens_used: int = 0
    kv_bytes_per_token: int = 0
    kv_bytes_capacity: int = 0
    kv_bytes_used: int = 0
    device_bytes_free: int = 0
    device_bytes_total: int = 0


class WorkerInfo(Value, frozen=True, kw_only=True):
    """What a worker is; the same in all its beats."""

    worker: str
    """Boot id: name and a random part; also the name of its queue."""
    name: str
    engine: str
    forms: tuple[Form, ...]
    model: str
    context_tokens_max: int
    vocabulary_size: int = 0
    batch_size_max: int = 0
    """0: only memory limits the batch."""
    device: str = "cpu"
    kv_block_tokens: int = 1
    """KV slots are given out in blocks of so many tokens."""


class Resident(Value, frozen=True, kw_only=True, array_like=True):
    """A request that a worker holds: it runs, waits in the worker's queue, or keeps its KV."""

    request_id: str
    attempt: int
    position: int


# -------------------------------------------------------------------------- gateway to scheduler


class Submit(Message, frozen=True, kw_only=True):
    """A new request. Key: request_id. A repeat is ignored while the request is known."""

    spec: RequestSpec


class Resume(Message, frozen=True, kw_only=True):
    """An open request with the output so far, the only truth. It answers `Recall`, and is sent
    for every open request when the gateway sees a new epoch. Attempts up to `attempt` are closed:
    their later words are dropped by the gateway."""

    spec: RequestSpec
    attempt: int
    tokens: bytes = b""


class Cancel(Message, frozen=True, kw_only=True):
    """Nobody waits for this request any more."""

    gateway: str
    request_id: str


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


class Rejected(Message, frozen=True, kw_only=True):
    """The scheduler will not serve this request."""

    epoch: int
    gateway: str
    request_id: str
    reason: Literal["queue_full", "too_long", "no_worker", "deadline", "unknown_model"]
    detail: str = ""
    retry_after_s: float | None = None
    """None: trying again will not help."""


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
    residents: tuple[Resident, ...] = ()
    """Full list; filled in the first beat after a start, a reconnect or a new epoch."""
    residents_listed: bool = False
    draining: bool = False
    leaving: bool = False
    """The last beat: nothing runs here any more, the queue is being deleted."""


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
    reason: FinishReason


class LengthClass(Value, frozen=True, kw_only=True):
    """Output lengths of recently finished requests of one class, oldest first."""

    model: str
    lengths: bytes
    """Packed u32, one per request."""
    finished: int
    """How many were ever seen."""
    censored: bytes = b""
    """One byte per length: 1 if the token limit cut the output, which would have been longer.
    Empty: not known."""


class LengthForecast(Message, frozen=True, kw_only=True):
    """The estimator's current knowledge, sent to the scheduler after changes, every few seconds
    at most, and when a scheduler takes over."""

    version: int
    classes: tuple[LengthClass, ...]


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
    | GatewayBeat
    | SliceDone
    | WorkerBeat
    | LengthForecast
)
ToGateway = Recall | Rejected | SchedulerBeat | TokenBatch
ToWorker = RunSlice | Park | Drop | SendTokens | DrainWorker | SchedulerBeat | FinishAck
ToEstimator = Finished | SchedulerBeat

SchedulerEvent = ToScheduler | OrderReturned | Elected
SchedulerCommand = (
    RunSlice
    | Park
    | Drop
    | SendTokens
    | DrainWorker
    | Recall
    | Rejected
    | SchedulerBeat
    | Finished
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
