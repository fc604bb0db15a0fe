"""A private Prometheus for tests: started on a free port, asked over its HTTP interface."""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

START_TIMEOUT_S = 30.0
QUERY_TIMEOUT_S = 10.0
INSTALL_TIMEOUT_S = 300.0
SCRAPE_INTERVAL_S = 1
POLL_S = 0.1
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "prometheus"
DOWNLOAD = ["apt-get", "download", "prometheus"]


class PrometheusMissing(Exception):
    """There is no Prometheus here, and none could be installed."""


class Prometheus:
    """`with Prometheus(folder, {"job": ("127.0.0.1:8000", "/metrics")}) as prometheus: ...`"""

    def __init__(self, folder: Path, jobs: Mapping[str, tuple[str, str]]) -> None:
        self._folder = folder
        self._port = _free_port()
        configuration = {
            "global": {"scrape_interval": f"{SCRAPE_INTERVAL_S}s", "scrape_timeout": "1s"},
            "scrape_configs": [
                {
                    "job_name": job,
                    "metrics_path": path,
                    "static_configs": [{"targets": [target]}],
                }
                for job, (target, path) in jobs.items()
            ],
        }
        (folder / "prometheus.yml").write_text(json.dumps(configuration))  # JSON is YAML too

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The instant value: one entry per series. Raises AssertionError with its complaint."""
        result: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return result

    def families(self) -> dict[str, str]:
        """Name and type of every metric family seen, those without a sample too."""
        found: dict[str, list[dict[str, str]]] = self._get("metadata")
        return {name: entries[0]["type"] for name, entries in found.items()}

    def wait_for(self, expression: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until the expression has a result."""
        deadline = time.monotonic() + timeout_s
        while not self.query(expression):
            assert time.monotonic() < deadline, f"no result in {timeout_s} s: {expression}"
            time.sleep(POLL_S)

    def __enter__(self) -> "Prometheus":
        server = tool("prometheus")
        self._log = (self._folder / "prometheus.log").open("wb")
        self._process = subprocess.Popen(
            [
                server,
                f"--config.file={self._folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={self._folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{self._port}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                log = (self._folder / "prometheus.log").read_text()
                self.__exit__(None, None, None)
                raise AssertionError(f"Prometheus did not start:\n{log[-2000:]}")
            time.sleep(POLL_S)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(self._url("/-/ready"), timeout=QUERY_TIMEOUT_S) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _get(self, what: str, **parameters: str) -> Any:
        address = self._url(f"/api/v1/{what}?{urllib.parse.urlencode(parameters)}")
        try:
            with urllib.request.urlopen(address, timeout=QUERY_TIMEOUT_S) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                said = json.load(error).get("error")
            raise AssertionError(f"{said}: {parameters}") from None

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._port}{path}"


def tool(name: str) -> str:
    """Path of `prometheus` or `promtool`, unpacked into the cache if it is not installed.

    Raises PrometheusMissing.
    """
    found = shutil.which(name)
    if found is not None:
        return found
    unpacked = CACHE / name
    if not unpacked.exists():
        _unpack()
    return str(unpacked)


def _unpack() -> None:
    """Debian's package, unpacked and not installed: no root needed, and no service is started."""
    advice = "these tests need Prometheus: install prometheus (apt, brew)"
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise PrometheusMissing(advice)
    with tempfile.TemporaryDirectory() as folder:
        for command in (DOWNLOAD, ["apt-get", "update"], DOWNLOAD):
            done = subprocess.run(
                command,
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=INSTALL_TIMEOUT_S,
                check=False,
            )
            packages = list(Path(folder).glob("*.deb"))
            if packages:
                break
        else:
            raise PrometheusMissing(f"{advice}; apt-get said: {done.stderr[-1000:]}")
        subprocess.run(["dpkg-deb", "-x", str(packages[0]), folder], check=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        for program in (Path(folder) / "usr" / "bin").iterdir():
            partial = CACHE / f"{program.name}.{os.getpid()}"
            shutil.move(program, partial)
            partial.rename(CACHE / program.name)  # at once: other test processes may look


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port: int = bound.getsockname()[1]
        return port
