"""docs/settings.md, made from the settings records."""

import socket

from pydantic.fields import FieldInfo

from services.mesh_settings import DEMO_MODEL, MeshSettings
from services.options import flag_of, variable_of
from services.process import SERVICES, settings_class
from shared.config import CommandSettings

HEAD = """# Settings

Made from the settings records by `make docs`. Flags win over variables, variables over defaults.
"""


def page() -> str:
    """The whole document."""
    sections = [_section("serve", MeshSettings)]
    sections += [_section(name, settings_class(name)) for name in SERVICES]
    return "\n".join([HEAD, *sections])


def _section(command: str, kind: type[CommandSettings]) -> str:
    rows = [
        f"| `{flag_of(name)}` | `{variable_of(kind, name)}` | {_shown(field)} "
        f"| {' '.join((field.description or '').split()).replace('|', chr(92) + '|')} |"
        for name, field in kind.model_fields.items()
    ]
    head = "| flag | variable | default | meaning |\n|---|---|---|---|"
    return "\n".join([f"## tranche {command}", "", head, *rows, ""])


def _shown(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is None or default in ("", (), {}):
        return "none"
    if field.default_factory is socket.gethostname:
        return "the host's name"
    if default == str(DEMO_MODEL):
        return "the demo model"
    return f"`{default}`"
