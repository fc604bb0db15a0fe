"""A private RabbitMQ for tests, benchmarks and local runs: its own ports, data, cookie and epmd.

    python -m tests.rabbitmq run        # prints its AMQP url, runs until SIGTERM or Ctrl-C

Nothing of an installed system service is touched. Where the server is missing, it is installed with
apt if that is allowed (root); otherwise BrokerMissing says what to do. Works with 3.10 and 4.x.
"""

import argparse
import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import psutil  # type: ignore[import-untyped]

BOOT_TIMEOUT_S = 90.0
"""A boot takes 6 to 8 s of CPU; on a busy machine 24 s were seen."""
HTTP_TIMEOUT_S = 30.0
INSTALL_TIMEOUT_S = 300.0
FIRST_PORT = 21000
LAST_PORT = 31000
"""Below the ephemeral ports of Linux (32768), so that no client socket sits on one of ours."""
DEBIAN_SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
"""The real script; the one in /usr/sbin changes to the system's rabbitmq user."""


class BrokerMissing(Exception):
    """No RabbitMQ can be had here; the text says what to do."""


class BrokerFailed(Exception):
    """RabbitMQ did not start; the text has the end of its log."""


@dataclass(frozen=True, slots=True)
class Management:
    """The broker's HTTP interface: virtual hosts, connections, queues."""

    amqp_url: str
    """amqp://user:password@host:port, without a virtual host."""
    http_url: str

    def vhost_url(self, vhost: str) -> str:
        """The AMQP address of a virtual host."""
        return f"{self.amqp_url}/{quote(vhost, safe='')}"

    def create_vhost(self, vhost: str) -> str:
        """Makes it and returns its AMQP address."""
        user = unquote(urlsplit(self.amqp_url).username or "guest")
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        self.call("PUT", f"/api/vhosts/{quote(vhost, safe='')}")
        self.call("PUT", f"/api/permissions/{quote(vhost, safe='')}/{quote(user)}", everything)
        return self.vhost_url(vhost)

    def delete_vhost(self, vhost: str) -> None:
        """Removes it with all that is in it; its connections are closed."""
        self.call("DELETE", f"/api/vhosts/{quote(vhost, safe='')}")

    def connections(self, vhost: str) -> list[str]:
        """Names of the connections to a virtual host."""
        listed = self.call("GET", f"/api/vhosts/{quote(vhost, safe='')}/connections")
        assert isinstance(listed, list)
        return [str(connection["name"]) for connection in listed]

    def close_connection(self, name: str) -> None:
        """The broker ends it, as an operator would (CONNECTION_FORCED)."""
        self.call("DELETE", f"/api/connections/{quote(name, safe='')}")

    def call(self, method: str, path: str, body: object = None) -> object:
        """One request; the decoded answer, or None. Raises urllib.error.HTTPError or OSError."""
        parts = urlsplit(self.amqp_url)
        login = f"{unquote(parts.username or 'guest')}:{unquote(parts.password or 'guest')}"
        request = urllib.request.Request(
            self.http_url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Authorization": "Basic " + base64.b64encode(login.encode()).decode(),
                "Content-Type": "application/json",
            },
        )
        with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S) as answer:
            text = answer.read()
        return json.loads(text) if text else None


def management_of(amqp_url: str) -> Management:
    """The management interface beside a broker that somebody else runs.

    AMQP_MANAGEMENT_URL names it; the default is port 15672 on the broker's host. Raises
    BrokerMissing if it does not answer.
    """
    parts = urlsplit(amqp_url)
    http_url = os.environ.get("AMQP_MANAGEMENT_URL") or f"http://{parts.hostname}:15672"
    management = Management(f"{parts.scheme}://{parts.netloc}", http_url.rstrip("/"))
    try:
        management.call("GET", "/api/overview")
    except OSError as error:
        raise BrokerMissing(
            f"AMQP_URL is set, but no management interface answers at {http_url} ({error}); "
            "enable the plugin rabbitmq_management, or set AMQP_MANAGEMENT_URL, "
            "or unset AMQP_URL to let the tests start a broker of their own"
        ) from error
    return management


@dataclass(slots=True)
class Broker:
    """One private server. `start` after `kill` comes up on the same data."""

    folder: Path
    port: int = field(default_factory=lambda: free_ports(5))
    """The first of five: AMQP, management, distribution, epmd, and one for `settings`."""
    settings: str = ""
    """More lines of rabbitmq.conf."""
    login: str = "guest:guest"
    """Of somebody who may manage it; another one where `settings` load accounts."""
    _process: "subprocess.Popen[bytes] | None" = None

    @property
    def management(self) -> Management:
        return Management(
            f"amqp://{self.login}@127.0.0.1:{self.port}", f"http://127.0.0.1:{self.port + 1}"
        )

    @property
    def url(self) -> str:
        """The AMQP address of the default virtual host."""
        return self.management.vhost_url("/")

    def start(self) -> None:
        """Returns when AMQP and management answer. Raises BrokerMissing or BrokerFailed."""
        server = find_server()
        self._write_configuration()
        log = self.folder / "log" / "stdout"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [str(server)],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until(lambda: speaks_amqp(self.port), log)
            self._wait_until(self._management_answers, log)
        except BaseException:
            self.kill()
            raise

    def control(self, *arguments: str) -> None:
        """rabbitmqctl; takes a second or two."""
        command = [str(find_server().with_name("rabbitmqctl")), *arguments]
        subprocess.run(
            command, env=self._environment(), check=True, capture_output=True, timeout=60
        )

    def wait_until_written(self) -> None:
        """Returns when the quorum queues that were made before this call survive `kill`.

        RabbitMQ 3.10 writes their vote records 3 s late. Killed sooner, a new queue never finds a
        leader again: it refuses every message and every consumer until somebody deletes it.
        """
        begin = time.time()
        while True:
            records = list(self.folder.glob("data/*/quorum/*/meta.dets"))
            if all(record.stat().st_mtime > begin for record in records):
                return
            if time.time() > begin + BOOT_TIMEOUT_S:
                raise BrokerFailed("RabbitMQ wrote no vote records; were there new quorum queues?")
            time.sleep(0.05)

    def kill(self) -> None:
        """kill -9, as a crash: nothing is saved that was not saved before."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        beam = self._beam()
        if beam is not None:
            with suppress(psutil.NoSuchProcess):
                beam.kill()
                beam.wait(timeout=10)
        self._process.wait(timeout=10)
        self._process = None

    def close(self) -> None:
        """Kill it, end its epmd, remove its files."""
        self.kill()
        for process in psutil.process_iter(["name"]):
            if process.info["name"] == "epmd" and self._is_ours(process):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _beam(self) -> psutil.Process | None:
        with suppress(OSError, ValueError, psutil.NoSuchProcess):
            process = psutil.Process(int((self.folder / "pid").read_text()))
            if self._is_ours(process):
                return process
        return None

    def _is_ours(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error, OSError):
            return bool(process.environ().get("ERL_EPMD_PORT") == str(self.port + 3))
        return False

    def _write_configuration(self) -> None:
        for name in ("data", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "pid").unlink(missing_ok=True)
        (self.folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            "management.tcp.ip = 127.0.0.1\n"
            f"management.tcp.port = {self.port + 1}\n"
            "vm_memory_high_watermark.absolute = 1GB\n"
            "disk_free_limit.absolute = 50MB\n"
            "raft.wal_max_size_bytes = 33554432\n" + self.settings
        )
        (self.folder / "enabled_plugins").write_text("[rabbitmq_management].\n")

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "HOME": str(self.folder),
            "RABBITMQ_NODENAME": f"tranche{self.port}@localhost",
            "ERL_EPMD_PORT": str(self.port + 3),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            "RABBITMQ_DIST_PORT": str(self.port + 2),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none",
        }

    def _management_answers(self) -> bool:
        try:
            self.management.call("GET", "/api/overview")
        except OSError:
            return False
        return True

    def _wait_until(self, condition: Callable[[], bool], log: Path) -> None:
        assert self._process is not None
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while not condition():
            if self._process.poll() is not None or time.monotonic() > deadline:
                text = log.read_text(errors="replace")[-3000:]
                raise BrokerFailed(f"RabbitMQ in {self.folder} did not start:\n{text}")
            time.sleep(0.05)


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody listens on, a different block for
    different processes."""
    blocks = range(FIRST_PORT, LAST_PORT, count)
    begin = os.getpid() * 7 + time.monotonic_ns() // 1000
    for step in range(len(blocks)):
        port = blocks[(begin + step) % len(blocks)]
        if all(_is_free(port + offset) for offset in range(count)):
            return port
    raise BrokerMissing(f"no {count} free ports between {FIRST_PORT} and {LAST_PORT}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def speaks_amqp(port: int) -> bool:
    """Whether a broker is ready to talk: it answers the protocol header with a method frame."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as line:
            line.sendall(b"AMQP\x00\x00\x09\x01")
            return line.recv(1) == b"\x01"
    except OSError:
        return False


def find_server() -> Path:
    """The script that starts RabbitMQ; installed now if need be. Raises BrokerMissing."""
    server = _installed_server()
    if server is not None:
        return server
    _install()
    server = _installed_server()
    if server is None:
        raise BrokerMissing("rabbitmq-server was installed but its start script was not found")
    return server


def _installed_server() -> Path | None:
    if DEBIAN_SERVER.exists():
        return DEBIAN_SERVER
    found = shutil.which("rabbitmq-server")
    return Path(found) if found else None


def _install() -> None:
    command = ["apt-get", "install", "-y", "--no-install-recommends", "rabbitmq-server"]
    advice = (
        "these tests need RabbitMQ: install rabbitmq-server (apt, brew), or set AMQP_URL to a "
        "running broker with the management plugin"
    )
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise BrokerMissing(advice)
    print("RabbitMQ is missing: " + " ".join(command), file=sys.stderr, flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for attempt in (command, ["apt-get", "update"], command):
        done = subprocess.run(
            attempt,
            env=environment,
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
            check=False,
        )
        if done.returncode == 0 and attempt is command:
            return
    raise BrokerMissing(f"{advice}; apt-get said: {done.stdout[-500:]}{done.stderr[-1000:]}")


def make_broker() -> Broker:
    """A server in a folder of its own, in memory where there is such a file system."""
    memory = Path("/dev/shm")
    parent = memory if os.access(memory, os.W_OK) else None
    return Broker(Path(tempfile.mkdtemp(prefix="tranche-rabbitmq-", dir=parent)))


def run(for_pid: int | None, ready_file: Path | None) -> None:
    """Start a broker, say where it is, and keep it until a signal or the end of `for_pid`."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    broker = make_broker()
    try:
        broker.start()
        print(broker.url, flush=True)
        if ready_file is not None:
            management = broker.management
            text = json.dumps([management.amqp_url, management.http_url])
            partial = ready_file.with_suffix(".partial")
            partial.write_text(text)
            partial.rename(ready_file)
        while for_pid is None or psutil.pid_exists(for_pid):
            time.sleep(0.5)
    finally:
        broker.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["run"])
    parser.add_argument("--for-pid", type=int, help="end when this process is gone")
    parser.add_argument("--ready-file", type=Path, help="write the addresses here when ready")
    arguments = parser.parse_args()
    run(arguments.for_pid, arguments.ready_file)


if __name__ == "__main__":
    main()
