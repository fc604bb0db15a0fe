"""Live meshes as they are deployed: each service with its own account at the broker, over TLS; and
what may be seen in the logs."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import TypeVar

import httpx
import pytest
import trustme

from services.accounts_command import accounts
from services.gateway.keys import make_key
from services.mesh import Mesh
from shared.bus.connect import make_bus, memory_broker
from shared.config import ServiceSettings
from tests.e2e.asking import Question, ask_all
from tests.e2e.live_mesh import LiveMesh, live_mesh
from tests.rabbitmq import Broker, make_broker

DEPLOY = Path(__file__).parents[2] / "deploy" / "rabbitmq"
SIMULATED = {"engine": "simulated", "simulated_lengths": "mean=100000", "policy": "past-future"}
QUESTIONS = [
    Question(tuple(range(10, 15 + number)), 60, temperature=1.0, seed=7919 * number)
    for number in range(12)
]
Settings = TypeVar("Settings", bound=ServiceSettings)


@dataclasses.dataclass(frozen=True)
class Guarded:
    """A broker with the shipped configuration, and where its secrets lie."""

    broker: Broker
    folder: Path

    @property
    def tls_port(self) -> int:
        return self.broker.port + 4

    @property
    def authority(self) -> Path:
        return self.folder / "ca.pem"

    def account(self, settings: Settings) -> Settings:
        """The service's settings with its own account, over TLS."""
        return settings.model_copy(
            update={
                "bus": f"amqps://tranche-{settings.service}@localhost:{self.tls_port}/",
                "bus_password_file": str(self.folder / settings.service / "password"),
                "bus_ca_file": str(self.authority),
            }
        )

    def mesh(self, mesh: Mesh) -> Mesh:
        """All services with theirs; the workers share one."""
        return dataclasses.replace(
            mesh,
            estimator=self.account(mesh.estimator),
            scheduler=self.account(mesh.scheduler),
            workers=tuple(self.account(worker) for worker in mesh.workers),
            gateway=self.account(mesh.gateway),
        )


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("secrets")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    own = authority.issue_cert("localhost")
    own.private_key_pem.write_to_path(folder / "broker.key")
    own.cert_chain_pems[0].write_to_path(folder / "broker.pem")
    accounts(folder)
    broker = make_broker()
    tls = (DEPLOY / "tls.conf").read_text().replace("listeners.tcp = none\n", "")
    tls = tls.replace("/tls/", f"{folder}/").replace("= 5671", f"= {broker.port + 4}")
    imported = (DEPLOY / "accounts.conf").read_text().replace("/accounts/", f"{folder}/broker/")
    broker.settings = tls + imported
    broker.login = f"tranche-admin:{(folder / 'admin' / 'password').read_text().strip()}"
    broker.start()
    yield Guarded(broker, folder)
    broker.close()


def when_running(live: LiveMesh) -> None:
    """Returns once every request has tokens."""
    deadline = time.monotonic() + 60
    while live.metric("tranche_output_tokens_total") < 3 * len(QUESTIONS):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_mesh_with_an_account_for_each_service_over_tls(guarded: Guarded) -> None:
    """Two workers share an account; one dies, and the scheduler is replaced, in mid-stream."""
    with live_mesh(**SIMULATED, simulated_speed=100) as plain:
        wanted = ask_all(plain.url, QUESTIONS)
    with live_mesh(
        f"amqp://127.0.0.1:{guarded.broker.port}/",
        workers=2,
        adjust=guarded.mesh,
        **SIMULATED,
        simulated_speed=2,
    ) as live:
        answers: list[object] = []
        asking = Thread(target=lambda: answers.extend(ask_all(live.url, QUESTIONS)), daemon=True)
        asking.start()
        when_running(live)
        live.kill_worker()
        live.replace_scheduler()
        asking.join(90)
        assert answers == wanted


async def test_a_broker_of_unknown_authority_is_not_trusted(guarded: Guarded) -> None:
    password = (guarded.folder / "worker" / "password").read_text().strip()
    address = f"amqps://tranche-worker:{password}@localhost:{guarded.tls_port}/"
    for url in (
        address,
        address.replace("@localhost", "@127.0.0.1") + f"?cafile={guarded.authority}",
    ):
        stranger = make_bus(url, service="test")
        with pytest.raises(Exception, match=r"CERTIFICATE_VERIFY_FAILED|no connection") as caught:
            await stranger.open(deadline_s=2.0)
        assert password not in str(caught.value)
    friend = make_bus(f"{address}?cafile={guarded.authority}", service="test")
    await friend.open(deadline_s=20.0)
    assert friend.connected
    await friend.close()


def test_there_is_no_other_account(guarded: Guarded) -> None:
    listed = guarded.broker.management.call("GET", "/api/users")
    assert isinstance(listed, list)
    roles = ("admin", "estimator", "gateway", "scheduler", "worker")
    assert sorted(user["name"] for user in listed) == [f"tranche-{role}" for role in roles]


def test_accounts_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = "a-password-of-people's"
    monkeypatch.setenv("TRANCHE_RABBITMQ_PASSWORD_GATEWAY", given)
    accounts(tmp_path)
    passwords = {path.parent.name: path.read_text() for path in tmp_path.glob("*/password")}
    assert len(set(passwords.values())) == 5
    assert passwords["gateway"] == f"{given}\n"
    for path in tmp_path.glob("*/password"):
        assert path.stat().st_mode & 0o777 == 0o400
    definitions = (tmp_path / "broker" / "definitions.json").read_text()
    assert not [secret for secret in passwords.values() if secret.strip() in definitions]
    (tmp_path / "worker" / "password").unlink()
    accounts(tmp_path)
    again = {path.parent.name: path.read_text() for path in tmp_path.glob("*/password")}
    assert {role for role in again if again[role] != passwords[role]} == {"worker"}


# ----------------------------------------------------------------------------------------- logs

CANARY = "xylophone-canary-4711"


def test_no_prompt_and_no_key_in_the_logs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the level debug, through everything that can go right and wrong."""
    key, line = make_key("tenant-1")
    keys = tmp_path / "keys"
    keys.write_text(f"{line} requests_per_minute=20\n")
    monkeypatch.setenv("TRANCHE_GATEWAY_API_KEYS_FILE", str(keys))
    boots: list[str] = []
    with live_mesh(**SIMULATED, simulated_speed=100, log_level="debug", log_format="json") as live:
        with httpx.Client(base_url=live.url, timeout=30) as client:
            statuses = [answer.status_code for answer in _provoke(client, key)]
        queues = memory_broker(live.mesh.gateway.bus).depths()
        boots += [name.split(".", 2)[2] for name in queues if name.count(".") == 2]
    text = "".join(capfd.readouterr())
    assert statuses == [200, 200, 200, 400, 400, 400, 400, 404, 401, 401, 415, *[200] * 13, 429]
    assert text.count('"event": "request"') >= 20
    assert '"tenant": "tenant-1"' in text
    assert CANARY not in text
    assert key not in text
    assert key.removeprefix("sk-tranche-") not in text
    assert len(boots) == 3, "gateway, worker and estimator"
    assert not [boot for boot in boots if boot in text], "ids appear without their secret part"
    assert all(boot.partition("_")[0] in text for boot in boots)


def _provoke(client: httpx.Client, key: str) -> Iterator[httpx.Response]:
    client.headers["authorization"] = f"Bearer {key}"
    good = {"model": "demo_model", "prompt": f"{CANARY} says", "max_tokens": 4}
    chat = {"model": "demo_model", "messages": [{"role": "user", "content": CANARY}]}
    text, head = "/v1/completions", {"x-request-id": "r-1"}
    yield client.post(text, json={**good, "logprobs": 2, "echo": True}, headers=head)
    yield client.post(text, json={**good, "stream": True, "stop": [CANARY], "user": CANARY})
    yield client.post("/v1/chat/completions", json={**chat, "max_tokens": 4})
    yield client.post(text, content=f'{{"prompt": "{CANARY}"'.encode(), headers=JSON)
    yield client.post(text, json={**good, "temperature": CANARY})
    yield client.post(text, json={**good, "prompt": {CANARY: CANARY}})
    yield client.post(text, json={**good, "prompt": f"{CANARY} " * 3_000})
    yield client.post(text, json={**good, "model": f"{CANARY}"})
    yield client.post(text, json=good, headers={"authorization": f"Bearer {key}{CANARY}"})
    yield client.post(text, json=good, headers={"authorization": f"Basic {key}"})
    yield client.post(text, content=CANARY.encode(), headers={"content-type": "text/plain"})
    for _ in range(13):
        yield client.post(text, json={**good, "max_tokens": 1})
    while (answer := client.post(text, json={**good, "max_tokens": 1})).status_code == 200:
        pass
    yield answer


JSON = {"content-type": "application/json"}
