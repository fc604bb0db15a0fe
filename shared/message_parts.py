"""Parts of messages: the values that `shared.messages` is made of; never sent alone.

Frozen, keyword-only msgspec Structs. A new field needs a default, so that older and newer services
understand each other.
"""

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""`stop`: end token, stop token or stop string. `length`: the token limit. `cancelled`: nobody
waits any more. `error`: the request cannot be served; `detail` says why."""

Form = Literal["closed", "leased"]
"""How an engine runs slices: `closed` batches start and end together; a `leased` slice belongs to
one request in a batch that is continuous at iteration level."""


Came = Literal["new", "returned", "evicted", "refused", "resumed"]
"""How a request came to wait: `new`; `returned` at the end of its slice; `evicted` for want of
memory; `refused` by a worker; `resumed` after its worker or its tokens had been lost."""

WaitsFor = Literal["turn", "memory", "room", "prefill", "places", "workers", "reader"]
"""What a request waits for. `turn`: others are before it. `memory`: admission predicts that no
worker's memory would last. `room`: no worker has blocks for its first lease. `prefill`: every
worker with room has enough prefill queued. `places`: all run as many requests as they may.
`workers`: none takes orders. `reader`: its client is behind with reading."""

AdmittedBy = Literal["dealt", "idle", "sure", "gate"]
"""Why a request was placed. `dealt`: as one of a closed batch. `idle`: its worker had nothing to
do. `sure`: memory lasts even if everybody makes as much as they may. `gate`: by prediction."""


class Value(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A part of a message; never sent alone."""


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
    predicted_output_tokens: int | None = None
    """What the client, or a predictor before the mesh, expects of the output; a hint only."""
    stop_strings: bool = False
    """Its gateway looks for strings that end it; no worker knows of them."""
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


class Why(Value, frozen=True, kw_only=True, array_like=True):
    """Why a request waited and was placed: for traces and journals; nobody acts on it. Figures are
    0 where nothing was predicted."""

    came: Came = "new"
    waited_for: WaitsFor = "turn"
    """Last."""
    admitted_by: AdmittedBy = "dealt"
    overtaken: int = 0
    """How often one behind it was placed in its stead."""
    needed_tokens: int = 0
    """KV that its worker's batch will need with it, as admission predicts,"""
    room_tokens: int = 0
    """and what there is for it."""
    start_s: float = 0.0
    """When its first token was predicted, from its arrival on."""
    output_tokens: int = 0
    """How long its output was predicted."""
    moved: bool = False
    """Another worker had it before."""


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
    why: Why | None = None


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
    kv_blocks_capacity: int = 0
    """0 in all three: this engine has no blocks."""
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    """Free, but their content is kept as long as nobody needs the room."""
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
    shares_prefixes: bool = False
    """A prompt that begins like one computed there lately is not computed anew so far."""


class Resident(Value, frozen=True, kw_only=True, array_like=True):
    """A request that a worker holds: it runs, waits in the worker's queue, or keeps its KV."""

    request_id: str
    attempt: int
    position: int
    until: int = 0
    """Leased: where its lease ends. 0: not a lease."""


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
    prompts: bytes = b""
    """Packed u32 like `lengths`: prompt tokens. Empty: not known."""
    predicted: bytes = b""
    """Packed u32 like `lengths`: the output that was predicted for each, 0 where nothing was.
    Empty: nothing was predicted for any."""
