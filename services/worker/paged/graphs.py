"""Decode iterations as CUDA graphs: one launch in the place of some hundreds.

A graph is recorded once for each number of rows (rounded up) and replayed with new inputs in the
same memory. Rows that only fill up write their KV to a spare block and are left out of the answer.
Iterations with chunks of prefill run as they are. What cannot be recorded shows at the load, where
logits are checked, and then graphs are not used.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from services.worker.paged.attention import Attention
from services.worker.paged.cuda import VarlenAttention
from services.worker.paged.iteration import Iteration
from services.worker.paged.network import TransformersNetwork

SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
"""Rows of the graphs; larger iterations run as they are."""
WARM_RUNS = 2
"""Before recording, so that libraries have their workspaces."""


@dataclass(slots=True)
class _Graph:
    """One recording and the memory of its inputs and answer."""

    recording: torch.cuda.CUDAGraph
    ids: Tensor
    positions: Tensor
    slots: Tensor
    used: Tensor
    table: Tensor
    logits: Tensor


class GraphedNetwork:
    """See the module's text."""

    kind = "transformers in CUDA graphs"

    def __init__(self, network: TransformersNetwork, context_tokens_max: int) -> None:
        self._network = network
        self._context_max = context_tokens_max
        self._of: VarlenAttention | None = None
        self._graphs: dict[int, _Graph] = {}

    @property
    def recorded(self) -> bool:
        """Something has run as a graph."""
        return bool(self._graphs)

    def forward(self, iteration: Iteration, attention: Attention) -> Tensor:
        """See Network."""
        rows = len(iteration.ids)
        fits = not iteration.chunks and rows <= SIZES[-1]
        if not fits or not isinstance(attention, VarlenAttention):
            return self._network.forward(iteration, attention)
        if attention is not self._of:
            self._of, self._graphs = attention, {}
        size = next(size for size in SIZES if size >= rows)
        width = iteration.tables.shape[1]
        graph = self._graphs.get(size)
        if graph is None or graph.table.shape[1] != width:
            graph = self._graphs[size] = self._record(size, width, attention)
        _fill(graph, iteration, attention.cache.spare_slot, attention.cache.block_tokens)
        graph.recording.replay()
        wanted = torch.from_numpy(iteration.wanted).to(graph.logits.device)
        return graph.logits[wanted]

    def _record(self, size: int, width: int, attention: VarlenAttention) -> _Graph:
        device = attention.cache.device
        spare = attention.cache.spare_slot
        graph = _Graph(
            recording=torch.cuda.CUDAGraph(),
            ids=torch.zeros(size, dtype=torch.long, device=device),
            positions=torch.zeros(size, dtype=torch.long, device=device),
            slots=torch.full((size,), spare, dtype=torch.long, device=device),
            used=torch.ones(size, dtype=torch.int32, device=device),
            table=torch.full(
                (size, width),
                spare // attention.cache.block_tokens,
                dtype=torch.int32,
                device=device,
            ),
            logits=torch.empty(0),
        )
        held = VarlenAttention(attention.cache)
        held.hold(graph.slots, graph.used, graph.table, self._context_max)
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_RUNS):
                self._network.run(graph.ids, graph.positions, held)
        torch.cuda.current_stream(device).wait_stream(side)
        with torch.cuda.graph(graph.recording):
            graph.logits = self._network.run(graph.ids, graph.positions, held)
        return graph


def _fill(graph: _Graph, iteration: Iteration, spare_slot: int, block_tokens: int) -> None:
    """Copy an iteration's rows into the recording's memory; the rest fills up."""
    rows, device = len(iteration.ids), graph.ids.device
    graph.positions.zero_()
    graph.slots.fill_(spare_slot)
    graph.used.fill_(1)
    graph.table.fill_(spare_slot // block_tokens)
    graph.ids[:rows] = torch.from_numpy(iteration.ids).to(device)
    graph.positions[:rows] = torch.from_numpy(iteration.positions).to(device)
    graph.slots[:rows] = torch.from_numpy(iteration.slots).to(device)
    graph.used[:rows] = torch.from_numpy(iteration.contexts).to(device)
    graph.table[:rows] = torch.from_numpy(iteration.tables[iteration.seats]).to(device)
