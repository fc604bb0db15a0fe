"""Which cost profiles are shipped, and what each is made of."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from shared.profiles import CostProfile
from sim.calibrated_profile import Described, calibrated
from sim.calibration_cells import Cell
from sim.calibration_tables import Table, read_tables

TABLES = Path(__file__).parent / "tables"
COMPOSED = "composed_iteration_latency.csv"
SPLITWISE = "splitwise_measured_latency.csv"
DISTSERVE = "distserve_published_fits.csv"
SARATHI = "sarathi_yi34b_measured.csv"
RTX4090 = "llmservingsim_profile_rtx4090_llama-3.1-8b_tp1.parquet"
OVERHEADS = "cpu_overheads_a100.csv"

KV_BYTES = {
    "Llama-2-7b": 524_288,
    "Llama-2-13b": 819_200,
    "CodeLlama-34b": 196_608,
    "Llama-2-70b": 327_680,
    "llama2-70b": 327_680,
    "Llama-3-70B": 327_680,
    "Llama-3-8B": 131_072,
    "Llama-3.1-8B": 131_072,
    "internlm-20b": 1_228_800,
    "Qwen-72B": 2_621_440,
    "bloom-176b": 4_014_080,
    "opt-13b": 819_200,
    "Yi-34B": 245_760,
}
"""2 x layers x KV heads x head size x 2 bytes, of all GPUs together."""
WEIGHTS_GB = {"llama2-70b": 138.0, "bloom-176b": 352.0, "Yi-34B": 68.8}
"""2 bytes a parameter; only where the table does not say what fits."""
DISTSERVE_KV_TOKENS = {1: 66_144, 2: 163_008, 4: 356_736}
"""OPT-13B on A100-80G by GPUs, as measured by DistServe's simulator authors."""
RTX4090_KV_BLOCKS = 2588
"""Of 16 tokens: what vLLM 0.19 found on that card (vllm_run meta.json, gpu_memory_utilization 0.9,
24 GB)."""
OVERHEADS_OF = {1: "meta-llama/Llama-2-7b-hf", 2: "codellama/CodeLlama-34b-Instruct-hf"}
OVERHEADS_OF |= {4: "meta-llama/Llama-2-70b-hf", 8: "meta-llama/Llama-2-70b-hf"}
"""Whose CPU overheads stand for a model's, by GPUs: the table has no others of 1, 2 and 4."""
OVERHEADS_OF_MODEL = {"Qwen-72B": "Qwen/Qwen-72B"}
"""Its vocabulary of 152,000 makes sampling slower."""
OVERHEAD_PARTS = ("schedule_ms", "sampler_ms", "prepare_inputs_ms", "process_outputs_ms")

VIDUR = "microsoft/vidur @ 7d475133"
AIC = "ai-dynamo/aiconfigurator @ 095f58a5, vLLM 0.14.0 tables"
COMPOSED_NOTES = (
    "GPU time composed of measured operators, a lower bound by modern kernels; no mixed "
    "iterations were measured, chunks and decodes are taken to add. Overhead: scheduler, sampler, "
    "input preparation and output processing of vLLM 0.2-era on A100 ({overheads}), without Ray."
)


def all_profiles() -> Iterator[CostProfile]:
    """Every shipped profile, refitted from the tables."""
    yield from composed()
    yield from splitwise()
    yield from distserve()
    yield sarathi()
    yield rtx4090()


def composed() -> Iterator[CostProfile]:
    """Operators' times composed to iterations: Vidur and aiconfigurator."""
    overheads = cpu_overheads()
    for table in read_tables(TABLES / COMPOSED):
        yield composed_profile(table, overheads)


def composed_profile(
    table: Table, overheads: dict[tuple[str, int], tuple[float, float]]
) -> CostProfile:
    """One of them."""
    like = OVERHEADS_OF_MODEL.get(table.model, OVERHEADS_OF[table.tp])
    base, per_sequence = overheads[like, min(table.tp, 4)]
    return calibrated(
        table.within(table.kv_tokens),
        Described(
            name=named(table),
            model=table.model,
            gpu=table.gpu,
            tp=table.tp,
            kv_tokens=table.kv_tokens,
            kv_bytes_per_token=KV_BYTES[table.model],
            overhead_s=base,
            overhead_per_sequence_s=per_sequence,
            source=f"tables/{COMPOSED}: {VIDUR}; {AIC}. tables/{OVERHEADS}: Vidur",
            licence="MIT (Vidur), Apache-2.0 (aiconfigurator)",
            notes=COMPOSED_NOTES.format(overheads=like),
        ),
    )


def splitwise() -> Iterator[CostProfile]:
    """End-to-end measurements of the Splitwise authors."""
    for table in read_tables(TABLES / SPLITWISE):
        cells = [cell for cell in table.cells if not impossible(cell, table.cells)]
        dropped = len(table.cells) - len(cells)
        gpu = table.gpu.removesuffix("-80gb")
        yield calibrated(
            cells,
            Described(
                name=f"{named(table)}-splitwise",
                model=table.model,
                gpu=gpu,
                tp=table.tp,
                kv_tokens=usable_kv_tokens(table.model, table.tp),
                kv_bytes_per_token=KV_BYTES[table.model],
                source=f"tables/{SPLITWISE}: Mutinifni/splitwise-sim @ 8f99e7dc, perf_model.csv",
                licence="MIT",
                notes="End to end (DeepSpeed and vLLM as its authors ran them), so no overhead is "
                "added. Few cells: batches at a prompt of 512 tokens, single prompts at others. "
                + (f"{dropped} rows left out that beat a smaller batch. " if dropped else "")
                + "KV capacity computed: (72 GB - weights - 2 GB) per GPU.",
            ),
        )


def impossible(cell: Cell, cells: list[Cell]) -> bool:
    """Whether a batch took less than 0.95 x the time of a smaller one of the same prompts."""
    if cell.decodes:
        smaller = [
            c
            for c in cells
            if 0 < c.decodes < cell.decodes
            and c.kv_tokens // c.decodes == cell.kv_tokens // cell.decodes
        ]
    else:
        smaller = [c for c in cells if c.chunks[:1] == cell.chunks[:1] and c.tokens < cell.tokens]
    return any(cell.seconds < 0.95 * c.seconds for c in smaller)


def distserve() -> Iterator[CostProfile]:
    """DistServe's published fits: the cells are their formulas on a grid."""
    with (TABLES / DISTSERVE).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kinds = {"distserve": "swift", "vllm": "vllm"}
    for engine, tp in dict.fromkeys((row["engine"], int(row["tp"])) for row in rows):
        fits = {
            row["regime"]: tuple(float(row[name]) for name in "abc")
            for row in rows
            if (row["engine"], int(row["tp"])) == (engine, tp)
        }
        capacity = DISTSERVE_KV_TOKENS[tp]
        cells = [cell for cell in distserve_cells(fits) if cell.memory_tokens <= capacity]
        tag = f"-tp{tp}" if tp > 1 else ""
        yield calibrated(
            cells,
            Described(
                name=f"opt-13b-a100{tag}-{kinds[engine]}",
                model="opt-13b",
                gpu="a100",
                tp=tp,
                kv_tokens=capacity,
                kv_bytes_per_token=KV_BYTES["opt-13b"],
                source=f"tables/{DISTSERVE}: LLMServe/DistServe @ 82831f16, profiler-a100-80g",
                licence="Apache-2.0",
                notes="The cells are the published formulas on a grid, end to end with "
                f"{'SwiftTransformer' if engine == 'distserve' else 'vLLM 0.2-era'}; the errors "
                "are between their form (two regimes that meet at a batch of 95, not smoothly) "
                "and ours, not against measurements.",
            ),
        )


def distserve_cells(fits: dict[str, tuple[float, ...]]) -> Iterator[Cell]:
    """Iterations as DistServe's formulas (ms) say them, up to OPT's 2048 tokens."""
    lengths = (32, 64, 128, 256, 512, 1024, 1536, 2000)
    a, b, c = fits["prefill"]
    for batch in (1, 2, 4, 8, 16):
        for length in lengths:
            tokens = batch * length
            yield Cell(((length, 0),) * batch, 0, 0, (a + b * tokens + c * batch * length**2) / 1e3)
    for batch in (1, 2, 4, 8, 16, 32, 48, 64, 80, 94, 95, 112, 128, 160, 192, 256):
        a, b, c = fits["decoding_smallbs" if batch < 95 else "decoding_largebs"]
        for length in lengths:
            yield Cell((), batch, batch * length, (a + b * batch * length + c * batch) / 1e3)


def sarathi() -> CostProfile:
    """Sarathi-Serve's Yi-34B. Its decode rows do not say the context: taken as 1024, and longer
    ones read as CodeLlama-34b does (same KV heads and head size, 60 layers for its 48)."""
    like = next(
        table
        for table in read_tables(TABLES / COMPOSED)
        if (table.model, table.tp) == ("CodeLlama-34b", 2)
    )
    parts = composed_profile(like, cpu_overheads()).coefficients.decode
    cells = []
    with (TABLES / SARATHI).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            seconds, batch = float(row["latency_ms"]) / 1e3, int(row["decode_tokens"])
            if not batch:
                cells.append(Cell(((int(row["prefill_tokens"]), 0),), 0, 0, seconds))
                continue
            slope = 60 / 48 * (parts.slope.at(batch) + batch * parts.beyond_bend_s)
            for context in (1024, 2048, 4096):
                longer = slope * (context - 1024)
                cells.append(Cell((), batch, batch * context, seconds + longer))
    return calibrated(
        cells,
        Described(
            name="yi-34b-a100-tp2-sarathi",
            model="Yi-34B",
            gpu="a100",
            tp=2,
            kv_tokens=usable_kv_tokens("Yi-34B", 2),
            kv_bytes_per_token=KV_BYTES["Yi-34B"],
            source=f"tables/{SARATHI}: microsoft/sarathi-serve @ 02d2567e, osdi-experiments",
            licence="Apache-2.0",
            notes="2 x A100 PCIe with NVLink, end to end. Reconstruction: the source's decode rows "
            "do not say the context; taken as 1024, and longer ones as CodeLlama-34b TP 2 x 60/48. "
            "8 prefill and 8 decode measurements. KV capacity computed.",
        ),
    )


def rtx4090() -> CostProfile:
    """LLMServingSim's profile of vLLM 0.19, with mixed iterations."""
    table = read_tables(TABLES / RTX4090)[0]
    kv_tokens = RTX4090_KV_BLOCKS * 16
    return calibrated(
        table.within(kv_tokens),
        Described(
            name="llama-3.1-8b-rtx4090",
            model=table.model,
            gpu="rtx4090",
            tp=table.tp,
            kv_tokens=kv_tokens,
            kv_bytes_per_token=KV_BYTES[table.model],
            source=f"tables/{RTX4090}: casys-kaist/LLMServingSim @ 5daddb21, profiler/perf",
            licence="MIT",
            notes="CUDA times of vLLM 0.19's operators (eager, one layer) composed, with LM head "
            "and sampler. Only cells that fit into the card's KV. No overhead: vLLM's V1 engine "
            "schedules the next iteration while the GPU computes.",
        ),
    )


def usable_kv_tokens(model: str, tp: int) -> int:
    """What fits into `tp` GPUs of 80 GB: 72 GB each, less weights and 2 GB."""
    return int((tp * (72 - 2) - WEIGHTS_GB[model]) * 1e9 / KV_BYTES[model])


def cpu_overheads() -> dict[tuple[str, int], tuple[float, float]]:
    """(seconds an iteration, seconds a sequence) by model and GPUs: non-negative least squares on
    relative error over the batch sizes."""
    with (TABLES / OVERHEADS).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    fitted = {}
    for key in dict.fromkeys((row["model"], int(row["tp"])) for row in rows):
        own = [row for row in rows if (row["model"], int(row["tp"])) == key]
        sizes = np.array([float(row["batch_size"]) for row in own])
        totals = np.array([sum(float(row[part]) for part in OVERHEAD_PARTS) for row in own]) / 1e3
        solution, _ = nnls(np.stack([1 / totals, sizes / totals], axis=1), np.ones(len(own)))
        fitted[key] = (float(f"{solution[0]:.4g}"), float(f"{solution[1]:.4g}"))
    return fitted


def named(table: Table) -> str:
    """model-gpu, with the number of GPUs if there are several."""
    gpu = table.gpu.lower().removesuffix("-80gb")
    return f"{table.model.lower()}-{gpu}" + (f"-tp{table.tp}" if table.tp > 1 else "")
