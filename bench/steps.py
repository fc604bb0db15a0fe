"""`python -m bench.steps`: where the time of a decode step of the engine `paged` goes.

The floor is what the machine could do at best: all weights read once at the memory's measured rate,
or all multiplications at the measured rate of a large matrix product, whichever takes longer, plus
reading the KV. Beside it stand the linear layers alone, with PyTorch's own and with packed weights,
the attention kernel alone, and the whole step of the engine, for several batch sizes.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import median
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.peers.model import model_folder
from services.worker.engines.paged import PagedEngine, make_paged
from services.worker.models import load_model
from services.worker.paged import kernels
from services.worker.paged.linears import pack
from services.worker.settings import WorkerSettings
from shared.messages import RequestSpec, RunSlice, Sampling, SliceOrder
from shared.tokens import pack as pack_ids

RESULTS = Path(__file__).parent / "results"
COPY_BYTES = 1 << 28
PRODUCT = 1024
"""Rows, columns and depth of the product that tells the arithmetic's rate."""
PREFILL_TOKENS = 128
WARM_STEPS = 4


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one decode step (medians), for one batch size."""

    batch: int
    context_tokens: int
    floor_s: float
    linears_torch_s: float
    linears_packed_s: float
    attention_s: float
    step_s: float


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Of this machine, with the same number of threads."""

    read_bytes_s: float
    flops_s: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What is stored."""

    begun: str
    threads: int
    weights_bytes: int
    rates: Rates
    steps: list[Step]


def main(
    batches: Annotated[str, typer.Option(help="Sequences that decode together.")] = "1,8,32",
    context: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 215,
    threads: Annotated[int, typer.Option(help="Of arithmetic.")] = 1,
    steps: Annotated[int, typer.Option(help="Measured steps for each batch size.")] = 40,
    model: Annotated[str, typer.Option(help="Default: the model of bench.peers.")] = "",
    results: Path = RESULTS,
) -> None:
    """Measure, print and store."""
    console = Console()
    torch.set_num_threads(threads)
    begun = datetime.now(UTC)
    folder = model or str(model_folder())
    weights = _weights(folder)
    size = sum(w.numel() * w.element_size() for w in weights)
    rates = _rates()
    settings = WorkerSettings(model=folder, torch_threads=threads, kv_tokens=64 * 1024)
    engine = make_paged(settings)
    made = []
    for batch in track([int(text) for text in batches.split(",")], console=console, transient=True):
        kv = batch * context * engine.memory().kv_bytes_per_token
        flops = 2 * batch * sum(w.numel() for w in weights)
        made.append(
            Step(
                batch=batch,
                context_tokens=context,
                floor_s=max(size / rates.read_bytes_s, flops / rates.flops_s)
                + kv / rates.read_bytes_s,
                linears_torch_s=_linears(weights, batch, torch.nn.functional.linear),
                linears_packed_s=_packed(weights, batch),
                attention_s=_attention(engine, batch, context),
                step_s=_steps(engine, batch, context, steps),
            )
        )
    engine.close()
    report = Report(
        begun=begun.isoformat(timespec="seconds"),
        threads=threads,
        weights_bytes=size,
        rates=rates,
        steps=made,
    )
    console.print(_table(report))
    path = results / f"steps-{begun:%Y-%m-%d}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    console.print(f"written: {path.name}")


def timed(run: Callable[[], object], times: int = 15) -> float:
    """The median of so many runs, after two that do not count; seconds."""
    seconds = []
    for index in range(times + 2):
        began = time.perf_counter()
        run()
        if index >= 2:
            seconds.append(time.perf_counter() - began)
    return median(seconds)


def _rates() -> Rates:
    read = torch.ones(COPY_BYTES // 4)
    a, b = torch.randn(PRODUCT, PRODUCT), torch.randn(PRODUCT, PRODUCT)
    return Rates(
        read_bytes_s=COPY_BYTES / timed(read.sum),
        flops_s=2 * PRODUCT**3 / timed(lambda: a @ b),
    )


def _weights(folder: str) -> list[torch.Tensor]:
    """Those of the products of a step, as the engine joins them: [outputs, inputs]."""
    network = load_model(WorkerSettings(model=folder)).network
    found = []
    for layer in network.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        found.append(torch.cat([linear.weight.detach() for linear in qkv]))
        found.append(attention.o_proj.weight.detach())
        found.append(torch.cat([mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()]))
        found.append(mlp.down_proj.weight.detach())
    return [*found, network.lm_head.weight.detach()]


@torch.inference_mode()
def _linears(weights: list[torch.Tensor], batch: int, product: Callable[..., object]) -> float:
    inputs = {w.shape[1]: torch.randn(batch, w.shape[1]) for w in weights}
    return timed(lambda: [product(inputs[w.shape[1]], w) for w in weights])


@torch.inference_mode()
def _packed(weights: list[torch.Tensor], batch: int) -> float:
    inputs = [torch.randn(batch, w.shape[1]) for w in weights]
    packed = [pack(w, both=True) for w in weights]
    return timed(lambda: [p.wide(x) for p, x in zip(packed, inputs, strict=True)])


def _attention(engine: PagedEngine, batch: int, context: int) -> float:
    """The kernel over every layer, each with KV of its own."""
    model = engine.model
    shape, layers = model.kv_shapes[0], len(model.kv_shapes)
    heads, block = model.network.config.num_attention_heads, engine.info.kv_block_tokens
    blocks = -(-context // block)
    slots = (batch * blocks * block, shape.heads)
    rng = np.random.default_rng(0)
    caches = [
        (
            rng.standard_normal((*slots, shape.key_size), dtype=np.float32),
            rng.standard_normal((*slots, shape.value_size), dtype=np.float32),
        )
        for _ in range(layers)
    ]
    query = rng.standard_normal((batch, heads * shape.key_size), dtype=np.float32)
    out = np.empty((batch, heads, shape.value_size), np.float32)
    tables = rng.permutation(batch * blocks).astype(np.int32).reshape(batch, blocks)
    seats, contexts = np.arange(batch, dtype=np.int32), np.full(batch, context, np.int32)
    attend = kernels.attention(heads // shape.heads, shape.key_size, shape.value_size)

    def run() -> None:
        for keys, values in caches:
            numbers: tuple[Any, ...] = (0, np.float32(0.125), np.float32(0))
            attend(query, keys, values, block, tables, seats, contexts, *numbers, out, 0, batch)

    return timed(run)


def _steps(engine: PagedEngine, batch: int, context: int, steps: int) -> float:
    """Steps of the engine around this context."""
    rng = Random(batch)
    prompt = max(1, context - steps // 2)
    tokens = steps + WARM_STEPS + 1
    orders = tuple(
        SliceOrder(
            spec=RequestSpec(
                request_id=f"{batch}-{index}",
                parent_id="",
                gateway="",
                model="",
                prompt=pack_ids(
                    [rng.randrange(engine.info.vocabulary_size) for _ in range(prompt)]
                ),
                max_tokens=tokens,
                sampling=Sampling(temperature=0.0, ignore_eos=True),
            ),
            attempt=1,
            lease_tokens=tokens,
        )
        for index in range(batch)
    )
    engine.start(
        RunSlice(
            epoch=1, worker="", batch_id="steps", form="leased", orders=orders, prefill_first=True
        )
    )
    seconds = []
    while engine.busy:
        began = time.perf_counter()
        report = engine.step()
        if not report.prefill_s:
            seconds.append(time.perf_counter() - began)
    return median(seconds[WARM_STEPS:])


def _table(report: Report) -> Table:
    rates = report.rates
    table = Table(
        title=f"one decode step, ms; {report.threads} thread(s); "
        f"{report.weights_bytes / 1e6:.0f} MB of weights; "
        f"read {rates.read_bytes_s / 1e9:.1f} GB/s, product {rates.flops_s / 1e9:.0f} GFLOP/s"
    )
    for name in ("sequences", "floor", "linears, torch", "packed", "attention", "rest", "step", ""):
        table.add_column(name, justify="right")
    for step in report.steps:
        rest = step.step_s - step.linears_packed_s - step.attention_s
        values = (step.floor_s, step.linears_torch_s, step.linears_packed_s, step.attention_s)
        table.add_row(
            str(step.batch),
            *(f"{1e3 * value:.1f}" for value in (*values, rest, step.step_s)),
            f"{step.step_s / step.floor_s:.1f}x the floor",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
