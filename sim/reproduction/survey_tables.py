"""The words, tables and the picture of the survey part."""

from collections.abc import Mapping

from sim.reproduction.section import Table
from sim.reproduction.survey_results import Results
from sim.reproduction.survey_rows import CAPPED, CAPS, CENTRAL_HRRN, FCFS, LEAST_REQUESTS, SAL
from sim.reproduction.svg_chart import bar_chart

TEXT = """
"Is the GPU Half-Empty or Half-Full?" was not at hand beyond its abstract, so LARRY and SAL are our
*reconstructions*, a small family each, and the figures compared with are *predictions* that our
research note registered before this simulator existed, from a simple simulator of its own. That
two simulators agree does not say that a GPU does.

Set-up as in the note: OPT-13B on an A100 (DistServe's published fit, 66,144 KV tokens in blocks of
16, noise on), iterations of at most 512 tokens with decodes first, Poisson arrivals unless said,
no prefix cache. `conv`: lengths of the Azure 2023 conversations in random order, limit 1024.
`dec`: lognormal, prompts of 221 and outputs of 477 tokens on average, none above 4000, limit 4096;
its sigma of 1.1 was chosen to give the note's fluid bound. Loads are shares of the fluid bound,
computed on each sample with our profile (conv 2.6 requests/s a worker, the note's 2.60; dec 2.4 to
2.5, the note's 2.40). Single answers are compared as variants of preset `vllm` with 1 % of memory
free, for whole systems the presets stand as they are; all have the same chunk, running limit and
cap on prefill bound ahead. "Good": TTFT at most 2 s and TPOT at most 150 ms. Not built here and so
not compared: order by true volume, and the one-bit predictor of item 5.
"""
BALANCE: Mapping[str, tuple[float, str]] = {
    "round-robin": (1.18, "8.2"),
    "power of two": (0.83, "4.3"),
    "least requests": (0.80, "4.2"),
    "least KV": (0.77, "4.4"),
    "KV + queued": (0.66, "2.6"),
    "freeness": (0.65, "2.6"),
    "least queued prefill": (0.51, "2.7"),
    "SAL-A": (0.49, "2.2"),
    "SAL-B": (0.49, "2.5"),
    "LMetric": (0.50, "2.4"),
    "central, late binding": (0.48, "2.2"),
}
SHORT = {
    "round-robin": "in turn",
    "least requests": "requests",
    "least KV": "KV",
    "KV + queued": "KV+queue",
    "freeness": "freeness",
    "least queued prefill": "prefill",
    "SAL-A": "SAL-A",
    "LMetric": "LMetric",
    "central, late binding": "central",
}
ADMISSION: Mapping[str, tuple[str, str, str]] = {
    "no-evict (p + m)": ("86.2", "43.1", "0"),
    "aggressive, 1 %": ("98.2", "95.4", "0.54"),
    "aggressive, 5 %": ("97.5", "98.1", "0.026"),
    "aggressive, 10 %": ("96.4", "96.9", "0.006"),
    "Past-Future, 3 % reserve": ("97.9", "98.0", "0.033"),
    "Past-Future, 10 % reserve": ("96.4", "96.4", "0"),
    "exact peak (oracle)": ("98.5", "98.9", "0.004"),
}
BURST = {
    "round-robin": "3.49 / 15.9",
    "least KV": "4.05 / 29.7",
    "SAL-A": "2.97 / 13.6",
    "LMetric": "2.93 / 13.8",
    "central FCFS": "2.92 / 13.3",
    "central HRRN": "2.0 / 20 to 22",
}
MEMORY_BOUND = {
    "round-robin": ("75", "6.5 to 12"),
    "least KV": ("69", "6.5 to 12"),
    "SAL-A": ("48 to 49", "6.5 to 12"),
    "least requests": ("40", "6.5 to 12"),
    "central FCFS": ("33 to 35", "2.3"),
    "central + Past-Future, 5 %": ("33 to 35", "0.46"),
    "central + oracle gate": ("", "0.13"),
}
SYSTEM_STUDIES = ("conv at 0.7", "conv at 0.92", "conv at 1.05", "dec at 1.05")


def tables(found: Results) -> tuple[Table, ...]:
    """All of them, in the order of the note's items."""
    return (
        _admissions(found),
        _nearly(found),
        _orders(found),
        _balance(found),
        _eight(found),
        _burst(found),
        _memory_bound(found),
        _caps(found),
        _systems(found),
        _family(found),
    )


def picture(found: Results) -> tuple[str, str]:
    """(caption, SVG): mean TTFT by balancer."""
    labels = [label for label in found.labels("balance") if label in SHORT]
    chart = bar_chart(
        "Mean TTFT by load balancer, seconds",
        "seconds",
        [SHORT[label] for label in labels],
        [
            ("predicted", [BALANCE[label][0] for label in labels]),
            ("ours", [round(found.mean("balance", label, "ttft_s"), 2) for label in labels]),
        ],
    )
    caption = "Mean TTFT by load balancer: four workers, conversations at 0.92 of the fluid bound."
    return caption, chart


def _admissions(found: Results) -> Table:
    conv, dec = "saturated conv", "saturated dec"
    rows = []
    for label in found.labels(dec):
        of_conv, of_dec, evictions = ADMISSION.get(label, ("", "", ""))
        rows.append(
            (
                label,
                f"{100 * found.of_bound(conv, label):.1f}",
                of_conv,
                f"{100 * found.of_bound(dec, label):.1f}",
                of_dec,
                f"{found.mean(dec, label, 'evictions'):.3f}",
                evictions,
                f"{100 * found.mean(dec, label, 'recomputed'):.0f}",
                f"{1000 * found.mean(dec, label, 'tpot_p99_s'):.0f}",
                f"{found.mean(dec, label, 'stall_p99_s'):.2f}",
            )
        )
    return Table(
        title="Item 1: admission with an endless backlog, one worker, FCFS",
        columns=(
            "admission",
            "conv, % of bound",
            "predicted",
            "dec, % of bound",
            "predicted",
            "dec, preemptions per request",
            "predicted",
            "dec, prefilled again, % of prompts",
            "dec, p99 TPOT, ms",
            "dec, p99 longest gap, s",
        ),
        rows=tuple(rows),
        note="The bound is that of the requests begun while tokens were counted; a sample's luck "
        "moves a whole column by some percent, and its differences little.",
    )


def _nearly(found: Results) -> Table:
    study = "dec at 0.94"
    rows = [
        (
            label,
            f"{found.mean(study, label, 'ttft_s'):.2f}",
            f"{found.mean(study, label, 'evictions'):.3f}",
            f"{100 * found.mean(study, label, 'recomputed'):.1f}",
            f"{1000 * found.mean(study, label, 'tpot_p99_s'):.0f}",
            f"{found.mean(study, label, 'stall_p99_s'):.2f}",
        )
        for label in found.labels(study)
    ]
    return Table(
        title="Item 2: admission at 0.94 load, dec, one worker",
        columns=(
            "admission",
            "mean TTFT, s",
            "preemptions per request",
            "prefilled again, % of prompts",
            "p99 TPOT, ms",
            "p99 longest gap, s",
        ),
        rows=tuple(rows),
    )


def _orders(found: Results) -> Table:
    rows = []
    for label in found.labels("orders"):
        cells = [label]
        for name in ("ttft_s", "ttft_p50_s", "ttft_p99_s", "ttft_longest_s"):
            change = found.change("orders", label, FCFS, name)
            mean = found.mean("orders", label, name)
            cells.append(f"{mean:.2f}" + (f" ({change:+.0%})" if label != FCFS else ""))
        rows.append((*cells, f"{found.mean('orders', label, 'good'):.2f}"))
    columns = ("order", "mean TTFT, s", "p50, s", "p99, s", "p99 of the longest 5 %, s", "good")
    return Table(
        title="Order: conv at 0.96 load, one worker (in brackets: over FCFS)",
        columns=columns,
        rows=tuple(rows),
    )


def _balance(found: Results) -> Table:
    rows = []
    for label in found.labels("balance"):
        mean, p99 = BALANCE.get(label, (None, ""))
        rows.append(
            (
                label,
                f"{found.mean('balance', label, 'ttft_s'):.2f}",
                "" if mean is None else f"{mean:.2f}",
                f"{found.mean('balance', label, 'ttft_p99_s'):.1f}",
                p99,
                f"{found.mean('balance', label, 'good'):.2f}",
            )
        )
    return Table(
        title="Item 3 and the SAL family: balancers, four workers, conv at 0.92 load",
        columns=("balancer", "mean TTFT, s", "predicted", "p99, s", "predicted", "good"),
        rows=tuple(rows),
        note="Least KV is worse here than predicted: its gauge is what leases reserve, and who is "
        "bound and waits in a worker's line reserves nothing yet, so newcomers herd to it.",
    )


def _eight(found: Results) -> Table:
    return _latencies(found, "eight workers", "The same on eight workers")


def _latencies(found: Results, study: str, title: str) -> Table:
    rows = [
        (
            label,
            f"{found.mean(study, label, 'ttft_s'):.2f}",
            f"{found.mean(study, label, 'ttft_p99_s'):.1f}",
            f"{found.mean(study, label, 'good'):.2f}",
        )
        for label in found.labels(study)
    ]
    return Table(
        title=title, columns=("balancer", "mean TTFT, s", "p99, s", "good"), rows=tuple(rows)
    )


def _burst(found: Results) -> Table:
    plain = _latencies(
        found, "burst", "Item 4: bursts (gamma, cv 4), conv at 0.8 load, four workers"
    )
    return Table(
        title=plain.title,
        columns=("policy", *plain.columns[1:], "predicted mean / p99, s"),
        rows=tuple((*row, BURST.get(row[0], "")) for row in plain.rows),
        note="Bursts differ widely from seed to seed, so ratios are to be compared rather than "
        "seconds.",
    )


def _memory_bound(found: Results) -> Table:
    study = "memory-bound"
    rows = []
    for label in found.labels(study):
        p99, stall = MEMORY_BOUND[label]
        rows.append(
            (
                label,
                f"{found.mean(study, label, 'ttft_s'):.1f}",
                f"{found.mean(study, label, 'ttft_p99_s'):.0f}",
                p99,
                f"{found.mean(study, label, 'stall_p99_s'):.2f}",
                stall,
                f"{found.mean(study, label, 'evictions'):.3f}",
            )
        )
    return Table(
        title="Item 5: bound by memory, dec at 1.1 load, four workers",
        columns=(
            "policy",
            "mean TTFT, s",
            "p99, s",
            "predicted",
            "p99 longest gap, s",
            "predicted",
            "preemptions per request",
        ),
        rows=tuple(rows),
        note="The note does not say at which load; its p99 are those of an overload.",
    )


def _caps(found: Results) -> Table:
    def waits(label: str) -> list[float]:
        usual = found.runs("burst" if label == CENTRAL_HRRN else "balance", label)[0].ttft_s
        others = [found.mean(f"cap {cap}", label, "ttft_s") for cap in CAPS]
        return [*others[:2], usual, *others[2:]]

    rows = [(label, *(f"{wait:.2f}" for wait in waits(label))) for label in CAPPED]
    ratios = [one / other for one, other in zip(waits(SAL), waits(LEAST_REQUESTS), strict=True)]
    rows.append(("SAL-A over least requests", *(f"{ratio:.2f}" for ratio in ratios)))
    return Table(
        title="Item 6: mean TTFT (s) by the cap on prefill bound ahead, tokens",
        columns=("policy", "512", "1024", "2048 (all other runs)", "4096", "none"),
        rows=tuple(rows),
        note="Four workers, conv at 0.92 load; central HRRN under the bursts of item 4. First "
        "seed. A small cap leaves chunks half empty, since a prompt counts whole until its first "
        "token; a large one binds before the order can help.",
    )


def _systems(found: Results) -> Table:
    rows = []
    for study in SYSTEM_STUDIES:
        rows += [(study, label, *_system(found, study, label)) for label in found.labels(study)]
    return Table(
        title="C1: whole presets; conv on four workers, dec on one",
        columns=("load", "preset", *SYSTEM_COLUMNS),
        rows=tuple(rows),
    )


SYSTEM_COLUMNS = (
    "mean TTFT, s",
    "p50, s",
    "p99, s",
    "p99 of the longest 5 %, s",
    "tokens/s",
    "preemptions per request",
    "p99 longest gap, s",
    "good",
)


def _system(found: Results, study: str, label: str) -> tuple[str, ...]:
    return (
        f"{found.mean(study, label, 'ttft_s'):.2f}",
        f"{found.mean(study, label, 'ttft_p50_s'):.2f}",
        f"{found.mean(study, label, 'ttft_p99_s'):.1f}",
        f"{found.mean(study, label, 'ttft_longest_s'):.1f}",
        f"{found.mean(study, label, 'tps'):.0f}",
        f"{found.mean(study, label, 'evictions'):.4f}",
        f"{found.mean(study, label, 'stall_p99_s'):.2f}",
        f"{found.mean(study, label, 'good'):.2f}",
    )


def _family(found: Results) -> Table:
    rows = []
    for study in ("family conv", "family dec"):
        rows += [(study[7:], label, *_system(found, study, label)) for label in found.labels(study)]
    return Table(
        title="The LARRY family at 1.05 load, with SAL-A (conv on four workers, dec on one)",
        columns=("lengths", "variant", *SYSTEM_COLUMNS),
        rows=tuple(rows),
        note="1: HRRN, 2: load-adaptive short-first. a: 5 % of memory kept; b: room for what "
        "everybody is expected to grow, which over-reserves where lengths spread: "
        "requests that all last for their mean free their memory all at once.",
    )
