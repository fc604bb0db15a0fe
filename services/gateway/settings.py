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
    """Lines of `tenant sha256-of-key`, limits of the tenant behind them; empty: nobody needs a
    key."""
    tls_cert_file: str = ""
    """Certificate chain (PEM) of the REST interface; empty: plain HTTP."""
    tls_key_file: str = ""
    """The certificate's private key (PEM, without a password); empty: it is in `tls_cert_file`."""

    header_bytes_max: int = Field(default=65_536, ge=1_024)
    """Request line and headers of one request; beyond: 431. Proxies add cookies and tokens."""
    headers_max: int = Field(default=128, ge=8)
    """Headers of one request; beyond: 431."""
    header_timeout_s: float = Field(default=20.0, gt=0.0)
    """Request line and headers must be here within this time, from the first byte or the
    connection's begin: 408."""
    connections_max: int = Field(default=4_352, ge=1)
    """Open connections, idle ones too; beyond: 503. Four for each open request, and some beside."""
    body_bytes_max: int = Field(default=8 * 1024 * 1024, ge=1_024)
    """A prompt of 128k tokens has about 0.6 MB as text and 1 MB as ids."""
    open_requests_max: int = Field(default=1_024, ge=1)
    """Open choices of all clients (a request with n = 4 counts 4); beyond: 429."""
    tenant_requests_max: int = Field(default=0, ge=0)
    """Open choices of one tenant; 0: only the limit above. A tenant's own limits in the key file
    win, here and in the next two."""
    tenant_requests_per_minute: int = Field(default=0, ge=0)
    """Requests of one tenant, as many at once after a quiet minute; beyond: 429. 0: no limit."""
    tenant_tokens_per_minute: int = Field(default=0, ge=0)
    """Prompt and output tokens of one tenant; a request counts with its `max_tokens` until it has
    ended. Beyond: 429. 0: no limit."""
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
    """Text that waits for a slow reader; beyond, its request is cancelled. That is the last resort,
    where no lease ends in between."""
    reader_behind_characters: int = Field(default=2_048, ge=256)
    """With more text than this waiting for its client, a stream is paused at its next lease until
    the client has read it."""
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
