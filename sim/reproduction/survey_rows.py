"""What the survey part compares: labels, each with a preset or a variant of one, and constants."""

from collections.abc import Mapping

from sim.setup import Value

Constants = Mapping[str, Value]
Row = tuple[str, Constants]
"""Policy, constants that differ from its own."""
V0: Constants = {"prompt_watermark": 0.01}
"""The note's vLLM keeps 1 % free, as V0 did."""
CENTRAL = "vllm+offloading=late-binding+binding=late"


def _past_future(reserve: float) -> Row:
    start = {"cold_start_share": 0.02, "cold_start_ends": 40}  # as preset past-future's
    return "vllm+admission=past-future", {**start, "future_reserve": reserve}


NO_EVICT, WATERMARK_1, WATERMARK_5 = "no-evict (p + m)", "aggressive, 1 %", "aggressive, 5 %"
PF_0, PF_3, PF_10 = (f"Past-Future, {share} % reserve" for share in (0, 3, 10))
ORACLE, ORACLE_2 = "exact peak (oracle)", "exact peak, 2 % reserve"
MAX_UTILIZATION = "next step (max-utilization)"
ADMISSIONS: Mapping[str, Row] = {
    NO_EVICT: ("vllm+admission=reserve-all+pacing=whole", {}),
    "aggressive, 0 % (vLLM V1)": ("vllm", {}),
    WATERMARK_1: ("vllm", V0),
    WATERMARK_5: ("vllm", {"prompt_watermark": 0.05}),
    "aggressive, 10 %": ("vllm", {"prompt_watermark": 0.10}),
    MAX_UTILIZATION: ("vllm+admission=next-step", {}),
    PF_0: _past_future(0.0),
    PF_3: _past_future(0.03),
    PF_10: _past_future(0.10),
    ORACLE: ("vllm+admission=oracle", {}),
    ORACLE_2: ("vllm+admission=oracle", {"oracle_reserve": 0.02}),
}
NEARLY_FULL = (WATERMARK_1, WATERMARK_5, PF_3, PF_10, ORACLE, ORACLE_2)

FCFS, HRRN, LARRY, SPF = "FCFS", "HRRN (LARRY-1)", "LARRY-2", "SPF, not aged"
ORDERS: Mapping[str, Row] = {
    FCFS: ("vllm", V0),
    HRRN: ("vllm+order=hrrn", V0),
    LARRY: ("vllm+order=larry", V0),
    SPF: ("vllm+order=spf", V0),
}

ROUND_ROBIN, LEAST_REQUESTS, LEAST_KV = "round-robin", "least requests", "least KV"
SAL, LMETRIC, LATE = "SAL-A", "LMetric", "central, late binding"
BALANCERS: Mapping[str, Row] = {
    ROUND_ROBIN: ("vllm+offloading=round-robin", V0),
    "power of two": ("vllm+offloading=power-of-two", V0),
    LEAST_REQUESTS: ("vllm+offloading=least-requests", V0),
    "4w + r (vLLM)": ("vllm", V0),
    LEAST_KV: ("vllm+offloading=least-kv", V0),
    "KV + queued": ("vllm+offloading=kv-queued", V0),
    "freeness": ("vllm+offloading=freeness", V0),
    "least queued prefill": ("vllm+offloading=least-queued-prefill", V0),
    SAL: ("vllm+offloading=sal-a", V0),
    "SAL-B": ("vllm+offloading=sal-b", V0),
    "SAL-C": ("vllm+offloading=sal-c", V0),
    LMETRIC: ("vllm+offloading=lmetric", V0),
    LATE: (CENTRAL, V0),
}
FLEET = {name: BALANCERS[name] for name in (ROUND_ROBIN, LEAST_REQUESTS, LEAST_KV, SAL, LATE)}
"""On eight workers."""
CENTRAL_FCFS, CENTRAL_HRRN = "central FCFS", "central HRRN"
BURST: Mapping[str, Row] = {
    **{name: BALANCERS[name] for name in (ROUND_ROBIN, LEAST_KV, SAL, LMETRIC)},
    CENTRAL_FCFS: (CENTRAL, V0),
    CENTRAL_HRRN: (f"{CENTRAL}+order=hrrn", V0),
    "central LARRY-2": (f"{CENTRAL}+order=larry", V0),
}
CAPS = (512, 1024, 4096, 0)
"""Besides the one that all other runs have."""
CAPPED = (LEAST_REQUESTS, SAL, LATE, CENTRAL_HRRN)

CENTRAL_PF, CENTRAL_ORACLE = "central + Past-Future, 5 %", "central + oracle gate"
MEMORY_BOUND: Mapping[str, Row] = {
    **{name: BALANCERS[name] for name in (ROUND_ROBIN, LEAST_KV, SAL, LEAST_REQUESTS)},
    CENTRAL_FCFS: (CENTRAL, V0),
    CENTRAL_PF: (f"{CENTRAL}+admission=past-future", _past_future(0.05)[1]),
    CENTRAL_ORACLE: (f"{CENTRAL}+admission=oracle", {}),
}

PAIR = "sal+larry"
SYSTEMS: Mapping[str, Row] = {
    name: (name, {})
    for name in ("vllm", "sarathi", "trtllm-max-utilization", "trtllm-no-evict", PAIR)
}
OWN = "LARRY-2a (sal+larry)"
FAMILY: Mapping[str, Row] = {
    OWN: (PAIR, {}),
    "LARRY-1a": (f"{PAIR}+order=hrrn", {}),
    "LARRY-2b": (f"{PAIR}+admission=larry-b", {}),
    "LARRY-1b": (f"{PAIR}+order=hrrn+admission=larry-b", {}),
    "LARRY-2 + Past-Future, 3 %": (f"{PAIR}+admission=past-future", _past_future(0.03)[1]),
    "FCFS + a": (f"{PAIR}+order=fcfs", {}),
}
PARAMETERS: Mapping[str, Row] = {
    "2a, 3 % kept": (PAIR, {"larry_reserve": 0.03}),
    "2a, 10 % kept": (PAIR, {"larry_reserve": 0.10}),
    "2a, half the boost": (PAIR, {"larry_boost": 0.5}),
    "2a, twice the boost": (PAIR, {"larry_boost": 2.0}),
}
"""C3: would another setting suit one of the sets of lengths better?"""
