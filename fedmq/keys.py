"""``fedmq keys``: keys for signatures, and the files that say whose are believed."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from aggregator.disk import replace_file
from broker.console import JsonOption, guard, say
from broker.errors import ConfigError
from broker.messages import NAME_PATTERN
from broker.signing import PublicKey, lines_of, make_key, parse_keys, public_of

__all__ = ["app"]

KeyFile = Annotated[Path, typer.Argument(metavar="FILE", help="The private key.")]
KeysFile = Annotated[Path, typer.Argument(metavar="FILE", help="A text file with a public key on each line.")]
NameOption = Annotated[
    str | None, typer.Option("--name", help="Whose key it is: the worker's name. The file's name, if not given.")
]


def make(file: KeyFile, *, name: NameOption = None) -> None:
    """Make a private key in a new file that nobody else may read, and show the public one.

    The private key stays where it was made. What is shown goes to whoever is to believe this key: 'fedmq keys enrol'.

    Example: fedmq keys make w1.key
    """
    with guard():
        say(str(make_key(file, _name(file, name))))


def show(file: KeyFile, *, name: NameOption = None) -> None:
    """Show the public key that goes with a private one.

    Example: fedmq keys show w1.key
    """
    with guard():
        say(str(public_of(file, _name(file, name), "FILE")))


def enrol(
    file: KeysFile,
    key: Annotated[list[str], typer.Argument(metavar="NAME KEY", help="As 'fedmq keys make' has shown it.")],
    *,
    expires: Annotated[str | None, typer.Option("--expires", help="The last day of the key: 2030-01-31.")] = None,
) -> None:
    """Add a public key to a file of those that are believed; whoever uses the file takes it up at once.

    A name may have several keys: of two, a worker can change from the old to the new one.

    Example: fedmq keys enrol workers.keys w1 ed25519:vKS1…=
    """
    with guard():
        text = " ".join([*key, *([f"expires={expires}"] if expires else [])])
        added = parse_keys(text, "the key")
        if len(added) != 1:
            raise ConfigError("give a name and one key, as 'fedmq keys make' has shown them")

        def changed(keys: tuple[PublicKey, ...]) -> tuple[PublicKey, ...]:
            others = tuple(one for one in keys if (one.name, one.raw) != (added[0].name, added[0].raw))
            return (*others, *added)

        _change(file, changed)
        say(f"{added[0].name}: key {added[0].id.hex()} is enrolled in {file}")


def remove(
    file: KeysFile,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key.")],
    *,
    key: Annotated[
        str | None, typer.Option("--key", help="Only the key of this short name; 'fedmq keys list' shows it.")
    ] = None,
) -> None:
    """Take a name's keys, or one of them, out of a file of those that are believed.

    Example: fedmq keys remove workers.keys w1
    """
    with guard():

        def changed(keys: tuple[PublicKey, ...]) -> tuple[PublicKey, ...]:
            kept = tuple(one for one in keys if one.name != name or (key is not None and one.id.hex() != key))
            if len(kept) == len(keys):
                raise ConfigError(f"{file} has no such key of {name!r}; see 'fedmq keys list {file}'")
            return kept

        before, after = _change(file, changed)
        say(f"{name}: {before - after} of its keys removed; {file} has {after}")


def list_(file: KeysFile, *, as_json: JsonOption = False) -> None:
    """Show the keys that are believed: name, short name of the key, last day.

    Example: fedmq keys list workers.keys
    """
    with guard():
        keys = _read(file)
        if as_json:
            say(json.dumps([_facts(key) for key in keys], indent=2))
            return
        for key in keys:
            end = "" if key.expires is None else f"  until {key.expires}{' (over)' if key.is_expired else ''}"
            say(f"{key.name}  {key.id.hex()}{end}")


def _facts(key: PublicKey) -> dict[str, str | bool | None]:
    last = key.expires.isoformat() if key.expires else None
    return {"name": key.name, "key": key.id.hex(), "expires": last, "is_expired": key.is_expired, "line": str(key)}


def _name(file: Path, name: str | None) -> str:
    name = file.stem if name is None else name
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(f"{name!r} cannot be a name (letters, digits, dash, underscore): give it with --name")
    return name


def _read(file: Path) -> tuple[PublicKey, ...]:
    try:
        return parse_keys(file.read_text("utf-8"), str(file))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: holds no text") from None


def _change(file: Path, changed: Callable[[tuple[PublicKey, ...]], tuple[PublicKey, ...]]) -> tuple[int, int]:
    """Put into ``file`` what ``changed`` makes of its keys; how many there were, and are. Comments are lost."""
    with _locked(file):
        keys = _read(file) if file.exists() else ()
        after = changed(keys)

        def write(out: BinaryIO) -> None:
            os.fchmod(out.fileno(), file.stat().st_mode & 0o775 if file.exists() else 0o644)
            out.write(lines_of(after).encode())

        try:
            # In one step: whoever reads it meanwhile has the old one or the new one.
            replace_file(file, write)
        except OSError as error:
            raise ConfigError(f"{file}: {error.strerror}") from None
    return len(keys), len(after)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Nobody else changes a file of keys in this folder meanwhile."""
    try:
        folder = os.open(file.parent, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"{file.parent}: {error.strerror}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


app = typer.Typer(
    help="Keys for signatures: make them, and say whose are believed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("make")(make)
app.command("show")(show)
app.command("enrol")(enrol)
app.command("list")(list_)
app.command("remove")(remove)
