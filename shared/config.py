"""Settings: one frozen record per service, read from flags and TRANCHE_<SERVICE>_<NAME>.

Flags win over the environment, the environment over defaults. A setting that nobody knows is an
error, also in the environment: a misspelt variable must not be silently without effect.
"""

import os
from typing import Any, ClassVar, Literal, Self

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
    """memory:// (one process) or amqp://user:password@host:port/vhost."""
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


def mask_url(url: str) -> str:
    """The address without its password: amqp://user:***@host/."""
    scheme, separator, rest = url.partition("://")
    credentials, at, host = rest.rpartition("@")
    if not at:
        return url
    user, colon, _ = credentials.partition(":")
    return f"{scheme}{separator}{user}{':***' if colon else ''}@{host}"
