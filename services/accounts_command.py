"""`tranche accounts`: passwords for the broker's accounts, and the definitions that make them.

One folder per account, so that each service can be given its own and no other:

    FOLDER/<role>/password            the first line is the password
    FOLDER/broker/definitions.json    for RabbitMQ; hashes only

A password that is there already is kept, so the command can be run again; delete a file and run it
to change that password. Nothing secret is printed.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from shared.config import PREFIX, SetupError

PASSWORD_LENGTH_MIN = 16
"""Of a password that people choose; generated ones have 43 characters."""
VARIABLE = f"{PREFIX}RABBITMQ_PASSWORD_"


def accounts(
    folder: Annotated[Path, typer.Argument(help="Where the accounts' folders are made.")],
    vhost: Annotated[str, typer.Option(help="The broker's virtual host.")] = "/",
    prefix: Annotated[str, typer.Option(help="Users are called PREFIX and the role.")] = "tranche-",
) -> None:
    """The command; see the module's text. Passwords may also come from
    TRANCHE_RABBITMQ_PASSWORD_<ROLE>. Raises SetupError, OSError."""
    from shared.bus.rights import ADMIN, ROLES, Account, definitions

    passwords = {role: _password(folder, role, os.environ) for role in (*ROLES, ADMIN)}
    made = {role: Account(prefix + role, password) for role, password in passwords.items()}
    text = msgspec.json.format(msgspec.json.encode(definitions(made, vhost)))
    _write(folder / "broker" / "definitions.json", text, 0o444)
    for role in made:
        typer.echo(f"{prefix}{role}: {folder / role / 'password'}")
    typer.echo(f"for RabbitMQ: {folder / 'broker' / 'definitions.json'}")


def _password(folder: Path, role: str, environment: Mapping[str, str]) -> str:
    from shared.bus.rights import new_password

    path = folder / role / "password"
    variable = VARIABLE + role.upper()
    given = environment.get(variable, "")
    if given and len(given) < PASSWORD_LENGTH_MIN:
        raise SetupError(f"{variable} has less than {PASSWORD_LENGTH_MIN} characters")
    if given.splitlines() != [given] and given:
        raise SetupError(f"{variable} has more than one line")
    kept = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if kept and kept[0] and given in ("", kept[0]):
        return kept[0]
    password = given or new_password()
    _write(path, f"{password}\n".encode(), 0o400)
    return password


def _write(path: Path, content: bytes, mode: int) -> None:
    """Whole or not at all; nobody else can read it before it has its mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    partial.chmod(mode)  # whatever the umask was
    partial.replace(path)
