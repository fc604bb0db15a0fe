"""The id of a running service: a name for people and a secret for the broker.

`worker-1-5f0c91d2_<32 hex digits>` stands in queue names, routing keys and messages. Up to the
underscore it may be shown. The rest is drawn at the start and known only to those who are sent it:
the scheduler, and the gateways whose requests a worker has. Who does not know a whole id can
neither bind a queue to it nor speak under it (`shared.bus.rights`), so logs and traces show
`public_id`.
"""

import re
import secrets

NAME_LENGTH_MAX = 100
"""Queue names and routing keys end at 255 bytes."""
ID_PATTERN = r"[A-Za-z0-9._-]+_[0-9a-f]{32}"
_SECRET = re.compile(r"(-[0-9a-f]{8})_[0-9a-f]{32}(?![0-9a-f])")


def new_id(name: str) -> str:
    """An id for one run of a service. Signs that mean something to a broker become hyphens."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", name)[:NAME_LENGTH_MAX]
    return f"{plain}-{secrets.token_hex(4)}_{secrets.token_hex(16)}"


def public_id(text: str) -> str:
    """The text without the secret part of any id in it."""
    return _SECRET.sub(r"\1", text)
