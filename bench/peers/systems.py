"""The systems that can be compared: whether each is installed, how it is started, what it is asked.

Facts and traps behind every flag: docs/peers.md.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.peers.clients import Trace, ask
from bench.peers.gguf import gguf_file
from bench.peers.ours import OursOptions, start_embedded, start_mesh
from bench.peers.processes import ServerFailed, Tree, free_port
from bench.peers.workload import Ask

HOST = "127.0.0.1"
START_S = 600.0
"""vLLM compiles for a minute or more on a quiet core, several on a busy one."""
PROBE_S = 60.0
SLOTS = 32
"""Requests that llama.cpp may run at once; as many as there are clients at most."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where everything is on this machine."""

    model: Path
    peers: Path
    """The folder of peers.sh."""
    logs: Path
    core: int
    ours: OursOptions


@dataclass(slots=True)
class Server:
    """One that runs."""

    name: str
    tree: Tree
    port: int
    model: str
    extra: dict[str, Any]
    """Fields of a request beyond those that all know."""

    def body(self, request: Ask) -> dict[str, Any]:
        """The request as this server takes it: streamed, greedy, of the given length."""
        return {
            "model": self.model,
            "prompt": request.prompt,
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "stream": True,
        } | self.extra

    async def probe(self, request: Ask, timeout_s: float) -> Trace:
        """Ask until an answer is complete. Raises ServerFailed."""
        deadline, said = time.monotonic() + timeout_s, "nothing"
        while time.monotonic() < deadline:
            self.tree.check()
            try:
                async with asyncio.timeout(timeout_s):
                    trace = await ask(HOST, self.port, self.body(request), keep_text=True)
            except TimeoutError:
                break
            if trace.complete:
                return trace
            said = trace.error
            await asyncio.sleep(0.5)
        raise ServerFailed(
            f"{self.name} gave no answer within {timeout_s:g} s, last said: {said}; "
            f"see {self.tree.folder}"
        )


@dataclass(frozen=True, slots=True)
class System:
    """How to get a Server."""

    name: str
    title: str
    launch: Callable[["System", Place, Tree], Server]
    """Into the tree given; whoever gave it ends it, also after a failure."""
    parts: tuple[str, ...] = ()
    """Files below the peers' folder that must be there."""
    ours: bool = False
    settings: str = ""
    """For the report: what was told beyond the model and the port."""
    version: Callable[[Path], str] = field(default=lambda peers: "")

    def missing(self, peers: Path) -> str:
        """Why it cannot run here; empty if it can."""
        lacking = [part for part in self.parts if not (peers / part).exists()]
        return f"not installed ({peers / lacking[0]}): run `make peers`" if lacking else ""


STREAM_USAGE = {"stream_options": {"include_usage": True}}
EXACT = {"ignore_eos": True} | STREAM_USAGE


def _launch_vllm(system: System, place: Place, tree: Tree) -> Server:
    port = free_port()
    command = [str(place.peers / "vllm/bin/vllm"), "serve", str(place.model)]
    command += ["--host", HOST, "--port", str(port), "--dtype", "float32"]
    command += ["--served-model-name", "peers", "--max-model-len", "4096"]
    command += ["--gpu-memory-utilization", "0.15", "--disable-uvicorn-access-log"]
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": str(place.core),
        "VLLM_NO_USAGE_STATS": "1",
    }
    tree.spawn("vllm", command, env)
    return Server(system.name, tree, port, "peers", EXACT)


def _launch_llama(system: System, place: Place, tree: Tree) -> Server:
    port = free_port()
    gguf = gguf_file(place.model, place.peers / "llama")
    command = [str(place.peers / "llama/build/bin/llama-server"), "-m", str(gguf)]
    # -c is divided by -np, and each part is a multiple of 256: more than the longest needs (1024).
    command += ["--host", HOST, "--port", str(port), "-np", str(SLOTS), "-c", str(SLOTS * 1280)]
    command += ["-t", "1", "-tb", "1", "--no-ui", "--offline"]
    tree.spawn("llama", command)
    return Server(system.name, tree, port, "peers", EXACT)


def _launch_transformers(system: System, place: Place, tree: Tree) -> Server:
    port = free_port()
    command = [str(place.peers / "hf/bin/transformers"), "serve", str(place.model)]
    command += ["--host", HOST, "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    command += ["--continuous-batching", "--cb-num-blocks", "160", "--cb-max-batch-tokens", "512"]
    tree.spawn("transformers", command)
    # It refuses fields that it does not know, such as ignore_eos.
    return Server(system.name, tree, port, str(place.model), {})


def _launch_tranche(system: System, place: Place, tree: Tree) -> Server:
    port = start_mesh(tree, place.model, place.ours)
    return Server(system.name, tree, port, place.model.name, EXACT)


def _launch_tranche_serve(system: System, place: Place, tree: Tree) -> Server:
    port = start_embedded(tree, place.model, place.ours)
    return Server(system.name, tree, port, place.model.name, EXACT)


def _distribution(venv: str, name: str) -> Callable[[Path], str]:
    def found(peers: Path) -> str:
        infos = sorted((peers / venv).glob(f"lib/python3*/site-packages/{name}-*.dist-info"))
        return infos[0].stem.split("-")[1] if infos else "?"

    return found


def _llama_version(peers: Path) -> str:
    archives = sorted((peers / "llama").glob("llama_cpp_python-*.tar.gz"))
    return f"of {archives[-1].name.removesuffix('.tar.gz')}" if archives else "?"


SYSTEMS = {
    system.name: system
    for system in (
        System(
            "tranche",
            "Tranche: gateway, scheduler, estimator, RabbitMQ, worker",
            _launch_tranche,
            ours=True,
            version=lambda peers: version("tranche"),
        ),
        System(
            "tranche-serve",
            "Tranche: `tranche serve`, embedded bus",
            _launch_tranche_serve,
            ours=True,
            version=lambda peers: version("tranche"),
        ),
        System(
            "vllm",
            "vLLM (vllm-cpu)",
            _launch_vllm,
            parts=("vllm/bin/vllm",),
            settings="float32, KV 1 GiB, max-model-len 4096",
            version=_distribution("vllm", "vllm_cpu"),
        ),
        System(
            "llama",
            "llama.cpp's llama-server",
            _launch_llama,
            parts=("llama/build/bin/llama-server", "llama/convert"),
            settings="GGUF f32, -t 1 -tb 1 -np 32 -c 40960",
            version=_llama_version,
        ),
        System(
            "transformers",
            "transformers serve, continuous batching",
            _launch_transformers,
            parts=("hf/bin/transformers",),
            settings="float32, --cb-num-blocks 160 --cb-max-batch-tokens 512",
            version=_distribution("hf", "transformers"),
        ),
    )
}
