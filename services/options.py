"""Command line options, made from a settings record: one flag per field.

The settings classes are the one place where names, types, defaults and meanings stand; `--help`
shows them all, with the environment variable that sets the same.
"""

import inspect
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar

import typer
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from shared.config import PREFIX, CommandSettings, UnknownSetting

NAME_VALUE = "NAME=VALUE"
Settings = TypeVar("Settings", bound=CommandSettings)


def command_of(
    kind: type[Settings], run: Callable[[Settings], None], summary: str
) -> Callable[..., None]:
    """A function that typer turns into a command with a flag for each field of `kind`.

    It reads the settings and calls `run`. What cannot be understood ends with exit code 2 and a
    line that names the flag and the variable.
    """

    def command(**given: Any) -> None:
        run(load_settings(kind, given))

    parameters = [_parameter(kind, name, field) for name, field in kind.model_fields.items()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__doc__ = summary
    return command


def load_settings(kind: type[Settings], given: dict[str, Any]) -> Settings:
    """The settings from the given flags (None: not given), the environment and the defaults.

    Raises typer.BadParameter.
    """
    overrides = {
        name: pairs(value) if _is_mapping(kind.model_fields[name]) else value
        for name, value in given.items()
        if value is not None and value != []
    }
    try:
        return kind.load(**overrides)
    except UnknownSetting as error:
        raise typer.BadParameter(str(error)) from error
    except ValidationError as error:
        raise typer.BadParameter(complaints(kind, error)) from error


def complaints(kind: type[CommandSettings], error: ValidationError) -> str:
    """What is wrong with the settings, in one line that names flags and variables."""
    texts = []
    for problem in error.errors(include_url=False, include_input=False):
        path = [str(part) for part in problem["loc"]]
        text = problem["msg"].removeprefix("Value error, ")
        if path and path[0] in kind.model_fields:
            where = f"{flag_of(path[0])} (or {variable_of(kind, path[0])})"
            texts.append(": ".join([where, *path[1:], text]))
        else:
            texts.append(": ".join([".".join(path) or kind.service, text]))
    return "; ".join(texts)


def pairs(texts: Iterable[str]) -> dict[str, str]:
    """`NAME=VALUE` texts as a dict. Raises typer.BadParameter."""
    found = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not (name and separator):
            raise typer.BadParameter(f"{text!r} is not of the form {NAME_VALUE}")
        found[name.strip()] = value.strip()
    return found


def flag_of(name: str) -> str:
    """`slice_tokens` as `--slice-tokens`."""
    return "--" + name.replace("_", "-")


def variable_of(kind: type[CommandSettings], name: str) -> str:
    """The environment variable of a field."""
    return f"{PREFIX}{kind.service}_{name}".upper()


def _parameter(kind: type[CommandSettings], name: str, field: FieldInfo) -> inspect.Parameter:
    flag = flag_of(name)
    text = " ".join((field.description or "").split())
    help_text = f"{text} {_origin(kind, name, field)}".strip()
    annotation: Any
    if _bare(field) is bool:
        option = typer.Option(f"{flag}/--no-{flag[2:]}", help=help_text, show_default=False)
        annotation = Annotated[bool | None, option]
    elif _is_mapping(field):
        option = typer.Option(flag, metavar=NAME_VALUE, help=help_text, show_default=False)
        annotation = Annotated[list[str] | None, option]
    else:
        # As text: pydantic converts and checks, the same way as for the environment.
        option = typer.Option(flag, metavar=_metavar(field), help=help_text, show_default=False)
        annotation = Annotated[str | None, option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _origin(kind: type[CommandSettings], name: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if field.is_required():
        shown = "required"
    elif default is None or default in ("", (), {}, []):
        shown = "default: none"
    else:
        shown = f"default: {default}"
    return f"[{variable_of(kind, name)}; {shown}]"


def _bare(field: FieldInfo) -> Any:
    """The field's type without `| None`."""
    members = [kind for kind in typing.get_args(field.annotation) if kind is not NoneType]
    if type(None) in typing.get_args(field.annotation) and len(members) == 1:
        return members[0]
    return field.annotation


def _is_mapping(field: FieldInfo) -> bool:
    return typing.get_origin(_bare(field)) is dict


def _metavar(field: FieldInfo) -> str:
    kind = _bare(field)
    if typing.get_origin(kind) is Literal:
        return "|".join(str(value) for value in typing.get_args(kind))
    names = {int: "INT", float: "NUMBER", Path: "PATH", SecretStr: "SECRET", str: "TEXT"}
    return names.get(kind, "TEXT")
