"""API keys: who may call, and as which tenant.

The key file has one line per key: the tenant, a space, and the SHA-256 of the key in hexadecimal;
`#` begins a comment. Behind it may stand the tenant's own limits, as `requests_per_minute=60`; one
of its lines with them is enough. Keys carry 256 random bits, so a plain hash cannot be guessed
backwards.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from services.gateway.core.quota import LIMIT_NAMES, TenantLimits
from shared.config import SetupError

KEY_PREFIX = "sk-tranche-"
KEY_BYTES = 32
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LIMIT = re.compile(r"[1-9][0-9]{0,11}")
DIGEST = re.compile(r"[0-9a-f]{64}")
OPEN_TENANT = "default"
"""Whose requests are served where no keys are asked for."""


def make_key(tenant: str) -> tuple[str, str]:
    """A new key, and its line for the key file. Raises SetupError for an unusable tenant name."""
    if not TENANT.fullmatch(tenant):
        raise SetupError(
            f"{tenant!r} is no tenant name: use up to 64 letters, digits, '.', '_' and '-'"
        )
    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    return key, f"{tenant} {_digest(key)}"


class KeyRing:
    """All keys of the file."""

    def __init__(
        self, tenants: dict[str, str], limits: Mapping[str, TenantLimits] | None = None
    ) -> None:
        """`tenants`: digest to tenant. `limits`: of the tenants that have their own."""
        self._tenants = tenants
        self.limits = limits or {}

    def tenant_of(self, key: str) -> str | None:
        """Whose key it is; None: nobody's. Takes the same time for right and wrong keys."""
        digest = _digest(key)
        found = None
        for known, tenant in self._tenants.items():
            if hmac.compare_digest(known, digest):
                found = tenant
        return found


def read_keys(path: str) -> KeyRing | None:
    """The keys of a file; None if `path` is empty: nobody needs a key. Raises SetupError."""
    if not path:
        return None
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"cannot read the key file {path}: {error}") from error
    tenants: dict[str, str] = {}
    limits: dict[str, TenantLimits] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) < 2 or not TENANT.fullmatch(words[0]) or not DIGEST.fullmatch(words[1]):
            raise SetupError(
                f"{path}, line {number}: expected a tenant and the SHA-256 of a key; "
                "`tranche keys TENANT` makes such a line"
            )
        tenant, digest, *more = words
        tenants[digest] = tenant
        if more:
            own = _limits(f"{path}, line {number}", more)
            if limits.setdefault(tenant, own) != own:
                raise SetupError(f"{path}, line {number}: {tenant} has other limits further up")
    if not tenants:
        raise SetupError(f"{path} has no key; `tranche keys TENANT` makes one")
    return KeyRing(tenants, limits)


def _limits(where: str, words: Sequence[str]) -> TenantLimits:
    pairs = [word.partition("=") for word in words]
    if not all(name in LIMIT_NAMES and LIMIT.fullmatch(value) for name, _, value in pairs):
        names = ", ".join(f"{name}=NUMBER" for name in LIMIT_NAMES)
        raise SetupError(f"{where}: behind the key may stand {names}")
    return TenantLimits(**{name: int(value) for name, _, value in pairs})


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
