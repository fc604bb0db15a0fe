"""`tranche serve` as a newcomer meets it: ready, streaming, fast when idle, graceful at the end."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.live_mesh import LiveMesh, live_mesh

ROOT = Path(__file__).parents[2]
IDLE_TTFT_LIMIT_S = 0.5
IDLE_TRIES = 5
TIMEOUT_S = 150.0
"""For waiting only: on a machine that other work shares, a start took 60 s."""


def stream(url: str, max_tokens: int, **more: object) -> Iterator[str]:
    """The text pieces of a streamed completion; ends with [DONE]."""
    body = {"model": "demo_model", "prompt": "ROMEO:\n", "max_tokens": max_tokens, "stream": True}
    request = {"json": {"seed": 1, **body, **more}, "timeout": TIMEOUT_S}
    with httpx.stream("POST", f"{url}/v1/completions", **request) as answer:  # type: ignore[arg-type]
        assert answer.status_code == 200, answer.read()
        data = [""]
        for line in answer.iter_lines():
            if line.startswith("data: "):
                data.append(line.removeprefix("data: "))
                if data[-1] != "[DONE]":
                    event = json.loads(data[-1])
                    assert "error" not in event, event
                    yield from (choice["text"] for choice in event["choices"])
        assert data[-1] == "[DONE]"


def test_first_token_comes_at_once_when_idle(shared_mesh: LiveMesh) -> None:
    waits = []
    for seed in range(IDLE_TRIES):
        started = time.perf_counter()
        pieces = stream(shared_mesh.url, 40, seed=seed)
        next(piece for piece in pieces if piece)
        waits.append(time.perf_counter() - started)
        assert len(list(pieces)) > 0
    assert sorted(waits)[IDLE_TRIES // 2] < IDLE_TTFT_LIMIT_S, waits


def test_readme_curl_works_as_printed(shared_mesh: LiveMesh) -> None:
    block = re.search(r"```sh\n(curl .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    command = block[1].replace("http://127.0.0.1:8000", shared_mesh.url)
    shown = subprocess.run(
        shlex.split(command.replace("\\\n", " ")),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    events = [line for line in shown.stdout.splitlines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    texts = [json.loads(event[6:])["choices"][0]["text"] for event in events[:-1]]
    assert len("".join(texts)) > 10


def test_readme_python_works_as_printed(shared_mesh: LiveMesh) -> None:
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    code = block[1].replace("http://127.0.0.1:8000", shared_mesh.url)
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    assert len(shown.stdout) > 10


def test_a_stopping_mesh_finishes_open_streams() -> None:
    with live_mesh(slice_tokens=8, workers=2) as mesh:
        pieces = stream(mesh.url, 64, ignore_eos=True)
        first = next(piece for piece in pieces if piece)
        mesh.ask_to_stop()
        text = first + "".join(pieces)
        assert len(text) > 64
        mesh.stop()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_serves_and_ends_with_exit_code_0(
    number: signal.Signals, free_port: int
) -> None:
    command = [sys.executable, "-m", "services", "serve", "--port", str(free_port)]
    environment = os.environ | {
        "TRANCHE_WORKER_TORCH_THREADS": "1",
        "TRANCHE_ESTIMATOR_DATABASE": ":memory:",
    }
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        guard = threading.Timer(TIMEOUT_S, process.kill)
        guard.start()
        try:
            assert process.stderr
            banner = []
            for line in process.stderr:
                banner.append(line)
                if "Ctrl-C" in line:
                    break
            assert f"http://127.0.0.1:{free_port}" in "".join(banner), banner
            assert "".join(stream(f"http://127.0.0.1:{free_port}", 8))
            process.send_signal(number)
            rest = process.stderr.read()
            assert process.wait(TIMEOUT_S) == 0, rest
            assert "Traceback" not in rest
        finally:
            guard.cancel()
            process.kill()
