"""Settings: one frozen record per service, read from flags and TRANCHE_<SERVICE>_<NAME>.

Flags win over the environment, the environment over defaults. A setting that nobody knows is an
error, also in the environment: a misspelt variable must not be silently without effect.
"""

import os
from pathlib import Path
from typing import Any, ClassVar, Literal, Self
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from pydantic import SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "TRANCHE_"
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["json", "console"]


class SetupError(Exception):
    """The user must put something right before the service can run; the text says what."""


class UnknownSetting(SetupError):
    """A TRANCHE_ variable of this service that no setting answers to."""


class CommandSettings(BaseSettings):
    """The settings that every command of a mesh has."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    service: ClassVar[str] = ""

    bus: str = "memory://"
    """memory:// (one process), amqp://user:password@host:port/vhost, or amqps:// over TLS."""
    bus_password_file: str = ""
    """A file with the broker's password, for an address that names the user only."""
    bus_ca_file: str = ""
    """For amqps://: certificates (PEM) of who vouches for the broker; empty: the system's own."""
    log_level: LogLevel = "info"
    """debug, info, warning or error; debug shows tracebacks."""
    log_format: LogFormat = "json"
    """json, or console for people."""
    otlp_endpoint: str = ""
    """Base address of an OTLP/HTTP collector, such as http://jaeger:4318; empty: no traces."""
    trace_sample_ratio: float = 1.0
    """Share of requests that are traced, 0 to 1."""

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Settings from the overrides, then the environment, then defaults.

        Raises UnknownSetting or pydantic.ValidationError.
        """
        prefix = f"{PREFIX}{cls.service.upper()}_"
        known = {f"{prefix}{name.upper()}" for name in cls.model_fields}
        unknown = sorted(k for k in os.environ if k.upper().startswith(prefix) and k not in known)
        if unknown:
            raise UnknownSetting(
                f"unknown setting {', '.join(unknown)}; `tranche {cls.service} --help` lists all"
            )
        return cls(**overrides)

    def bus_address(self) -> str:
        """`bus` with the password and the authority of their files. Raises SetupError."""
        parts = urlsplit(self.bus)
        if self.bus_password_file:
            if not parts.username or parts.password is not None:
                raise SetupError(
                    "--bus-password-file goes with an address that names a user and no password: "
                    "amqp://user@host/"
                )
            login, _, host = parts.netloc.rpartition("@")
            password = quote(_first_line(self.bus_password_file), safe="")
            parts = parts._replace(netloc=f"{login.rstrip(':')}:{password}@{host}")
        if self.bus_ca_file:
            if parts.scheme != "amqps":
                raise SetupError("--bus-ca-file goes with amqps:// only")
            if not Path(self.bus_ca_file).is_file():
                raise SetupError(f"--bus-ca-file: there is no file {self.bus_ca_file}")
            query = [*parse_qsl(parts.query), ("cafile", self.bus_ca_file)]
            parts = parts._replace(query=urlencode(query))
        return parts.geturl() if parts.scheme.startswith("amqp") else self.bus

    def masked(self) -> dict[str, Any]:
        """All settings for the log, without secrets."""
        shown = {}
        for name, value in self.model_dump().items():
            shown[name] = mask_url(value) if name == "bus" else value
            if isinstance(value, SecretStr):
                shown[name] = "***"
        return shown


class ServiceSettings(CommandSettings):
    """The base of each service's settings. A subclass sets `service` and its env_prefix:

    class GatewaySettings(ServiceSettings):
        service = "gateway"
        model_config = settings_config("gateway")
        port: int = 8000
    """

    ops_host: str = "127.0.0.1"
    """Where the operations port listens."""
    ops_port: int = 0
    """/health, /ready and /metrics of a service without REST; 0: none."""


def settings_config(service: str) -> SettingsConfigDict:
    """The pydantic configuration of one service's settings."""
    return SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        env_prefix=f"{PREFIX}{service.upper()}_",
    )


def _first_line(path: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"cannot read the password in {path}: {error}") from error
    if not lines or not lines[0]:
        raise SetupError(f"{path} holds no password in its first line")
    return lines[0]


def mask_url(url: str) -> str:
    """The address without its password: amqp://user:***@host/."""
    scheme, separator, rest = url.partition("://")
    credentials, at, host = rest.rpartition("@")
    if not at:
        return url
    user, colon, _ = credentials.partition(":")
    return f"{scheme}{separator}{user}{':***' if colon else ''}@{host}"
