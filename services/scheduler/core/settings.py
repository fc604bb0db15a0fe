"""Constants: every number that the scheduler's core and its policies use, with its source.

Tags follow the research notes: [M] recollected from memory of a paper and not confirmed, [R] our
reconstruction, [T] Tranche's own choice. `--set NAME=VALUE` changes any of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches


class UnknownConstant(ValueError):
    """`--set` named a constant that does not exist, or gave a value that does not fit."""


@dataclass(frozen=True, slots=True)
class Constants:
    """Defaults are those of the reproduction; the live mesh changes a few (SchedulerSettings)."""

    # ---- slices and batches
    slice_tokens: int = 64
    """S: most new tokens per placement [T]. SCLS's experiments used 128 [M]."""
    batch_size: int = 12
    """N of `fixed` and `sorted` batching; SLS on DeepSpeed used 12 [M]."""
    memory_share: float = 0.9
    """zeta: the share of a worker's KV slots that a plan may fill [R]."""
    spread_batches: bool = False
    """Split `dp`'s batches until every idle worker has one [T]. The programme's objective, the sum
    of times, ignores how many workers wait; at low load it leaves some idle [R]."""

    # ---- leases
    first_slice_tokens: int = 0
    """The first lease on a worker; short ones tell early who is short. 0: as the others [T]. 16 to
    32, then growing, was advised by a simulation of the survey's note [S]."""
    ample_slice_tokens: int = 0
    """Leases are this long while `ample_share` of a worker's memory is free: for presets whose
    lease is a block, far from the limit where that matters, fewer messages. 0: never [T]."""
    ample_share: float = 0.75
    """See `ample_slice_tokens`. A lease cannot be taken back, so that memory has to be ample also
    once it has filled up: with 0.25 a burst into an empty worker waited 0.5 s longer [T]."""
    lease_margin_share: float = 0.25
    """A worker reports when this share of a slice is left of a lease, so that the next one is
    granted before it is used up [S: at most 25 % left]."""
    iteration_tokens: int = 512
    """Most tokens of one iteration of a worker, decodes first (Sarathi's chunk). 512: p99 token
    gaps of 0.14 s at 1.00x the throughput of larger chunks (13B, A100) [S]. 0: the engine's own."""
    bind_backlog_tokens: int = 1024
    """A worker with this much prefill queued gets no further request [S: about one chunk, to 1024;
    without it, late binding loses its advantage]. 0: no limit."""
    bind_backlog_estimated: bool = False
    """Of a prefill that is under way only what should be left by now counts as queued: workers
    tell of it when it is over, and meanwhile would run out of prefill [T]."""
    running_max: int = 256
    """Leases of one worker (vLLM's max_num_seqs). 0: only memory limits them."""
    gate_tests_max: int = 64
    """Requests tried at gates in one round; the rest of a longer round follows at the next
    wake-up, so that no call of the core takes long [T]."""
    round_rest_s: float = 0.001
    """Until then [T]."""
    backfill_max: int = 0
    """Requests behind a refused head that are tried in its stead; 0: nobody overtakes it. 15 were
    worth about one step in a hundred, in the memory-only experiment [T]. Twice as far back if their
    output was predicted."""
    overtaken_max: int = 32
    """How often a refused request may be overtaken so; then nobody behind it is tried [T]."""
    prefix_affinity: bool = True
    """`late-binding`: prompt tokens that a worker has computed lately, for another request with the
    same beginning, do not count as work there. Only where engines share them [T]."""
    binds_max: int = 1024
    """Requests bound to workers in one round, with early binding [T]."""

    move_gain: float = 0.0
    """Late binding: while nobody waits, a request moves at the end of a slice to a worker where
    many fewer run, or where its tokens are a quarter sooner, if all requests together gain so many
    times what its prefill there costs them; one at a time. 0: nobody moves [T]."""

    yield_after_s: float = 0.0
    """Late binding: when memory has kept a new request for so long, a larger one whose client does
    not stream makes room at the end of its slice and waits again. 0: nobody does [T]."""

    # ---- rounds
    interval_share: float = 0.5
    """lambda in max(lambda x least load, floor), of `adaptive` pacing [M]."""
    interval_floor_s: float = 3.0
    """Gamma, of `adaptive` pacing: 3 s with DeepSpeed, 6 s with transformers [M]."""
    interval_s: float = 3.0
    """Between rounds of `ticked` pacing (ablations SO to LB); taken equal to Gamma [R]."""
    deal_ahead: bool = True
    """SLS: each complete batch is dealt to the next worker in turn, whatever that still has to do
    [M: round-robin; that such schedulers do not balance load is in SCLS's abstract]. False: a
    worker fetches its next batch when it has none, which balances by itself [T]."""
    gather_s: float = 0.0
    """How long the first arrival waits for others before a round [T]."""
    round_on_idle: bool = False
    """`adaptive` pacing: do not wait for the interval while a worker has nothing to do [T]."""
    empty_round_s: float = 0.25
    """After a round that could place nothing, wait this long [T]."""

    round_work_max: int = 8000
    """Work on a round in one call, in about microseconds; a longer round is spread over calls, so
    that events between them do not wait [T]."""

    # ---- admission by memory and its future (policies/gates.py, lengths.py)
    history_window: int = 1000
    """W: finished requests that predictions rest on, of those that the estimator sends. About 1000
    in Past-Future (second hand); its artifact's server has 40, LightLLM's PR #348 200."""
    cold_start_share: float = 0.5
    """A history begins with this share of W in stand-ins, which go as real ones come: W/2 in the
    artifact."""
    cold_start_ends: int = 0
    """After so many finished requests no stand-in is left; 0: W, as in the artifact, where W is 40
    in the server and 1000 in the simulator."""
    cold_start_tokens: int = 0
    """Length of a stand-in; 0: each request's own limit, as Past-Future's preset maximum (second
    hand). The artifact's simulator has 512, its server 6000."""
    lengths_interpolated: bool = True
    """Between known lengths the distribution is linear, with a last segment to the limit, as in
    the artifact. False: only known lengths, as the paper is told to have it (second hand)."""
    lengths_within_cap: bool = True
    """No drawn length is above the request's own limit. False: the artifact's simulator, whose
    limit of 4096 does not bind the lengths of its history."""
    censored_open: bool = True
    """A length cut by its token limit stands for the longer ones (Kaplan and Meier) [T]. False: it
    counts as it is, as in the artifact."""
    future_reserve: float = 0.03
    """r of `past-future`: the share of memory its predicted peak leaves free. 3 % in the artifact's
    simulator, 5 % in its server."""
    future_lists_max: int = 5
    """At most so many joint samples; the largest peak counts. Artifact."""
    future_lists_budget: int = 200
    """And not more than budget / batch + 1 of them. Artifact."""
    requeued_conditioned: bool = True
    """A re-queued request is sampled given what it made [T]. False: a whole new length on top of
    it, as in the artifact's simulator."""
    count_last_token: bool = False
    """A request's last token counts as held, as in the artifact's simulator; in truth it is
    written when the next one is made [T]."""
    oracle_reserve: float = 0.0
    """r of `oracle`. With 5 % it is what the artifact's server compares, since its requests tell
    their true length."""
    aggressive_watermark: float = 0.99
    """a of `aggressive`: what is held and the newcomer stay within this share of memory. Artifact:
    99, 95 and 90 %."""
    aggressive_counts_made: bool = True
    """The newcomer's own output so far counts [T]. False: the artifact's simulator."""
    aggressive_full_at: float = 1.0
    """Nobody joins from this share held on. The artifact's server has 0.95 with a watermark of
    1."""
    conservative_overcommit: float = 1.0
    """`conservative` lets worst cases sum up to this share of memory: 100, 125 and 150 % in the
    artifact's simulator, 95 % in its server."""
    conservative_output_tokens: int = 0
    """The output that `conservative` expects of everybody; 0: each one's own limit. The artifact's
    server has 12000."""
    prompt_watermark: float = 0.0
    """Share of memory that `prompt-fits` keeps free: none in vLLM V1; 1 % in vLLM V0 and
    Sarathi."""
    larry_reserve: float = 0.05
    """x of `larry-a`: share of memory kept for the running requests [R]; the paper's value is not
    known. 5 % captures what a predicted peak does for throughput [S]."""

    chance_target: float = 0.03
    """`chance`: evictions per finished request that its margin is steered to, on every workload, or
    fewer where they are dear (`chance_priced`) [T]."""
    chance_priced: bool = True
    """`chance`: the target is less where an eviction is dear, as it is where a long prompt has to
    be computed anew and requests are short [T]."""
    chance_rate: float = 0.065
    """`chance`: how fast the margin moves. 0.05 and 0.1 keep to the target of long runs as well; of
    3,000 requests some come out below it, or wait more than they need [T]."""
    chance_return_less: float = 0.0
    """`chance`: who comes back after an eviction is admitted with a margin of so many deviations
    less: shorter standstills, but more of them [T]."""

    # ---- order of waiting requests
    victims_first: bool = True
    """Who lost its place for want of memory leads its priority, as vLLM pushes it to the front of
    the queue [C]."""
    srpt_ageing_tokens_per_s: float = 20.0
    """`srpt`: predicted tokens that a second of waiting makes up for [T]: about what the request
    would have made in it, had it run."""
    edf_default_s: float = 10.0
    """`edf`: due so long after the wait began, where the request names no deadline [T]: the time
    to first token that the acceptance of Past-Future's evaluation allows."""
    volume_boost_s: float = 10.0
    """`volume`: the most that a small request gains over its arrival, in seconds. 20 makes the mean
    wait shorter and the longest ones longer [T]."""
    mlfq_quantum_s: float = 0.01
    """`mlfq`: service in the first level; doubled from level to level, as in FastServe [C]."""
    mlfq_levels: int = 12
    """`mlfq`: 10 ms to 20 s; the last level is never left [T]."""
    mlfq_idle_s: float = 3.0
    """`mlfq`: without service for so long, back to the first level, as in FastServe [C]."""
    fair_input_weight: float = 1.0
    """`fair`: price of a prefilled token, as in VTC [C]."""
    fair_output_weight: float = 2.0
    """`fair`: price of a made token, as in VTC [C]."""
    tenant_weights: str = ""
    """`fair` and `volume`: NAME=WEIGHT, comma separated; a tenant of weight 2 is given twice as
    much as one of weight 1, which all others have [T]."""
    hoard_deviations: float = 0.0
    """`fair` and `volume`: a tenant that runs more than its share, and asks for more than that by
    so many standard deviations of chance, gets what the others leave; 0: all are alike [T]."""
    hoard_reserve: float = 1.5
    """Such a tenant leaves room for so many standard deviations more requests of the others [T]."""
    hoard_look_s: float = 0.05
    """Between two looks at who has too many; longer with more than a thousand tenants, in
    proportion, since each look takes as long. With 0.1 the others wait 3 % longer (p99) [T]."""
    yields_max: int = 3
    """How often one request makes way so [T]."""
    lead_prompts: float = 0.0
    """`fair` and `volume`, late binding: no lease for a tenant that is ahead of another, which
    waits, by more than so many of the largest prompt and a lease for each request that it has
    running; 0: however far [T]."""
    larry_boost: float = 1.0
    """`larry`: beta per waiting request; 0 is first come, first served [T]. With 1, a queue of
    prefills at 0.97 load waits 0.55x as long as that on average, HRRN 0.56x, p99 alike (one server,
    prompts lognormal around 900, 2 x 20,000 requests)."""
    larry_beta_max: float = 100.0
    """`larry`: a second of work never makes up for more waiting than this, in seconds [T]."""

    # ---- victims
    victim_spared_tokens: int = 0
    """`least-computed`: spare who has made more output than this, unless all have; 0: nobody. The
    survey note's LARRY spares them, with a number that is not known [R]."""

    # ---- limits
    waiting_max: int = 4096
    """Requests beyond those in running batches; more are refused with a retry time [T]. At 8 KiB
    of prompt each this is 32 MiB."""
    batches_max: int = 48
    """Batches given to one worker and not answered [T]; below the 64 that a worker takes. More
    would only lengthen a queue that the next round could still rearrange."""
    wait_max_s: float = 0.0
    """A new request that would wait longer than this is refused, by prediction; 0: never [T]."""
    reopen_share: float = 0.5
    """After a refusal for a full queue nobody is taken in until no more than this share of the
    queue is left [T],"""
    closed_max_s: float = 10.0
    """or until the workers took so many seconds of it [T]."""
    deadline_chance: float = 0.7
    """A request that names a deadline is refused if its chance to end in time is less [T]: with
    the Azure conversations 95 % of the accepted then do (sim/honesty.py)."""
    retry_after_max_s: float = 60.0
    """The longest retry time told to anybody [T]."""
    done_max: int = 4096
    """Finished requests remembered for late questions and repeats [T]."""
    done_ttl_s: float = 120.0
    """How long; above any gateway's patience with a silent stream [T]."""
    misfit_s: float = 30.0
    """A request that fits no present worker is refused after so long [T]: the larger worker that
    it was taken in for may come back meanwhile."""
    refusals_max: int = 8
    """Placements of one request in a row that made no token, before it is refused [T]."""
    asks_max: int = 3
    """TokensWanted for one position that a worker may leave unanswered, before a recall [T]."""
    recalls_max: int = 30
    """Recalls of one request without an answer, before it is given up [T]."""
    lost_workers_max: int = 256
    """Lost workers remembered, to tell them what to drop if they come back [T]."""

    # ---- time
    beat_s: float = 1.0
    """Between SchedulerBeats: the mesh's protocol."""
    worker_timeout_s: float = 1.5
    """Silence after which a worker is lost: three of its beats; with `watch_s` that is noticed
    within 2 s [T]."""
    gateway_timeout_s: float = 3.0
    """Silence after which a gateway is gone: three of its beats."""
    watch_s: float = 0.25
    """How often silence, recalls and overdue batches are looked for [T]."""
    collect_s: float = 1.0
    """After a takeover: how long gateways and workers have to report [T]."""
    recall_repeat_s: float = 1.0
    """Between repeats of an unanswered Recall [T]."""
    cooldown_s: float = 0.5
    """A worker that refused a batch gets no other for so long [T]."""
    overdue_s: float = 120.0
    """A batch or lease is given up this long after `overdue_factor` times its expected end [T].
    Only orders lost on the way need it: a dead worker is noticed by its missing beats."""
    overdue_factor: float = 10.0
    """See `overdue_s`; a lease ends after its tokens, at the present pace [T]."""
    lost_order_s: float = 2.0
    """An order older than this that its worker does not list among its residents is lost [T]."""


AT_LEAST_ONE = frozenset(
    {"slice_tokens", "batch_size", "batches_max", "gate_tests_max", "overtaken_max"}
)
"""With 0 of these nothing would ever run."""
SHARES = frozenset(
    {"ample_share", "lease_margin_share", "cold_start_share", "chance_target"}
    | {"reopen_share", "deadline_chance"}
)
"""From 0 to 1. Not `interval_share`, a factor; nor `conservative_overcommit`, which is to exceed
1; nor `aggressive_full_at`, which above 1 never binds."""
FILLED = frozenset({"memory_share", "aggressive_watermark"})
"""Shares of memory that may be used: with 0 nothing would fit, above 1 there is none."""
KEPT_FREE = frozenset({"future_reserve", "oracle_reserve", "larry_reserve", "prompt_watermark"})
"""Shares of memory that stay free: with 1 nothing would fit."""


def known_names() -> list[str]:
    """What `--set` accepts."""
    return [field.name for field in fields(Constants)]


def with_overrides(constants: Constants, overrides: Mapping[str, str]) -> Constants:
    """`constants` with text values put in. Raises UnknownConstant, naming what is known."""
    changes: dict[str, int | float | bool | str] = {}
    for name, text in overrides.items():
        if name not in known_names():
            near, known = did_you_mean(name, known_names()), ", ".join(known_names())
            raise UnknownConstant(f"unknown constant {name!r}{near}; known are: {known}")
        changes[name] = _parse(name, text, type(getattr(constants, name)))
    return replace(constants, **changes)  # type: ignore[arg-type]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What was perhaps meant, to stand behind the wrong name; empty if nothing is near."""
    near = get_close_matches(name.lower(), list(known), n=2)
    return f", did you mean {' or '.join(map(repr, near))}?" if near else ""


def weights_of(text: str) -> dict[str, float]:
    """Tenants' weights from NAME=WEIGHT, comma separated. Raises UnknownConstant."""
    weights = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        tenant, _, number = part.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not tenant or not 0 < weight < float("inf"):
            raise UnknownConstant(
                f"tenant_weights wants NAME=WEIGHT with a weight above 0, not {part!r}"
            )
        weights[tenant] = weight
    return weights


def _parse(name: str, text: str, kind: type) -> int | float | bool | str:
    if kind is str:
        weights_of(text)
        return text
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]
        number = int(text) if kind is int else float(text)
    except (ValueError, KeyError):
        raise UnknownConstant(f"{name} wants {_wanted(kind)}, not {text!r}") from None
    if not 0 <= number < float("inf"):
        raise UnknownConstant(f"{name} must be finite and not negative, not {text!r}")
    if number < 1 and name in AT_LEAST_ONE:
        raise UnknownConstant(f"{name} must be at least 1, not {text!r}")
    _check_share(name, number, text)
    return number


def _check_share(name: str, number: float, text: str) -> None:
    """Per cents given as such, for example."""
    if name in SHARES and not 0 <= number <= 1:
        raise UnknownConstant(f"{name} is a share from 0 to 1, not {text!r}")
    if name in FILLED and not 0 < number <= 1:
        raise UnknownConstant(f"{name} is a share above 0, at most 1, not {text!r}")
    if name in KEPT_FREE and not 0 <= number < 1:
        raise UnknownConstant(f"{name} is a share of memory kept free, below 1, not {text!r}")


def _wanted(kind: type) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number"}[kind]
