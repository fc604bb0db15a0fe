"""What a gateway can be told: flags of `tranche gateway`, or TRANCHE_GATEWAY_<NAME>."""

from typing import ClassVar

from pydantic import Field

from shared.config import ServiceSettings, settings_config
from shared.model_name import served_name


class GatewaySettings(ServiceSettings):
    """All settings of a gateway."""

    service: ClassVar[str] = "gateway"
    model_config = settings_config("gateway")

    host: str = "127.0.0.1"
    """Where the REST interface listens; 0.0.0.0: everywhere."""
    port: int = Field(default=8000, ge=0, le=65_535)
    """Where the REST interface listens; 0: any free port (for tests)."""
    model: str = ""
    """Folder or hub id of the model; the gateway loads its tokenizer and configuration only."""
    served_model_name: str = ""
    """What clients call the model, and the workers too (their `model_name`); empty: the folder's
    own name, or the hub id."""
    api_keys_file: str = ""
    """Lines of `tenant sha256-of-key`; empty: nobody needs a key."""

    body_bytes_max: int = Field(default=8 * 1024 * 1024, ge=1_024)
    """A prompt of 128k tokens has about 0.6 MB as text and 1 MB as ids."""
    open_requests_max: int = Field(default=1_024, ge=1)
    """Open choices of all clients (a request with n = 4 counts 4); beyond: 429."""
    tenant_requests_max: int = Field(default=0, ge=0)
    """Open choices of one tenant; 0: only the limit above."""
    wait_max_s: float = Field(default=0.0, ge=0.0)
    """Refuse a request at once (429) if the scheduler predicts a longer wait; 0: never."""
    request_timeout_s: float = Field(default=3_600.0, gt=0.0)
    """Longest life of a request."""
    submit_timeout_s: float = Field(default=5.0, gt=0.0)
    """A request that the broker does not take within this time gets 503."""
    beat_timeout_s: float = Field(default=5.0, gt=0.0)
    """Without a scheduler's beat for so long, the gateway is not ready: 503."""
    worker_grace_s: float = Field(default=10.0, ge=0.0)
    """Requests that come while there is no worker wait for one for so long, as for a crashed one
    that starts again; then they get 503. Before the first one was seen: 503 at once."""
    keepalive_s: float = Field(default=5.0, gt=0.0)
    """A comment line goes to a stream that has nothing else to say for so long."""
    stream_characters_max: int = Field(default=262_144, ge=1_024)
    """Text that waits for a slow reader; beyond, its request is cancelled."""
    write_timeout_s: float = Field(default=60.0, gt=0.0)
    """A client that takes nothing for so long is given up."""
    body_timeout_s: float = Field(default=60.0, gt=0.0)
    """A body must be here within this time."""
    gap_wait_s: float = Field(default=1.0, gt=0.0)
    """Missing tokens in front of later ones are asked for after so long."""
    silence_s: float = Field(default=5.0, gt=0.0)
    """The next tokens of a running output are asked for after so long."""
    first_silence_s: float = Field(default=30.0, gt=0.0)
    """The first tokens of an output are asked for after so long."""
    drain_s: float = Field(default=30.0, ge=0.0)
    """At a stop, open requests may go on for so long."""
    keep_alive_connection_s: int = Field(default=75, ge=1)
    """An idle connection is kept so long; longer than the usual proxies' 60 s."""
    tokenizer_threads: int = Field(default=2, ge=1)
    """Long prompts are tokenized in threads, so that the streams go on."""

    def served_name(self) -> str:
        """The model's name in requests."""
        return served_name(self.model, self.served_model_name)
