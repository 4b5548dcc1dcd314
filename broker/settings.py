"""Settings: one ``fedmq.toml``, environment variables, flags; in rising precedence.

The mechanism, and the tables that both sides need (``run`` and ``[broker]``). The aggregator's and the
worker's tables stand beside their consumers. Every value remembers where it came from.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_core import ErrorDetails

from broker.addresses import addresses_of, holds_password
from broker.codecs import CODECS
from broker.errors import ConfigError
from broker.parts import register
from broker.redaction import HIDDEN, redacted
from broker.secretfiles import is_exposed, read_secret
from broker.topology import KEPT_VERSIONS, check_name

__all__ = [
    "CHUNK_BYTES",
    "DEFAULT_FILE",
    "TABLES",
    "BrokerConfig",
    "Flag",
    "LogConfig",
    "MetricsConfig",
    "Origin",
    "Settings",
    "Table",
    "listed",
    "load",
    "load_tables",
    "plain",
]

DEFAULT_FILE = "fedmq.toml"
#: Measured on loopback for 100 MB: 1 MiB 2.0 s a round, 4 MiB 1.7 s, 8 MiB 2.5 s.
CHUNK_BYTES = 4 * 2**20
PREFIX = "FEDMQ_"
#: ``package.module:attribute``.
_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")

_NUMBER, _WHOLE, _BOOL = "a number is wanted", "a whole number is wanted", "true or false is wanted"
#: What pydantic calls an error, in our words.
_WANTED = {
    "float_parsing": _NUMBER,
    "float_type": _NUMBER,
    "finite_number": "a number that is not infinite is wanted",
    "int_parsing": _WHOLE,
    "int_parsing_size": "a smaller number is wanted",
    "int_type": _WHOLE,
    "int_from_float": _WHOLE,
    "bool_parsing": _BOOL,
    "bool_type": _BOOL,
    "string_type": "text is wanted",
    "path_type": "a path is wanted",
    "literal_error": "{expected} is wanted",
    "greater_than_equal": "at least {ge} is wanted",
    "greater_than": "more than {gt} is wanted",
    "less_than_equal": "at most {le} is wanted",
    "less_than": "less than {lt} is wanted",
    "string_pattern_mismatch": "text that matches {pattern} is wanted",
}

#: Tables that a file may hold. A program reads those it needs; the others belong to another program.
TABLES = ("broker", "aggregator", "worker", "metrics", "log", "dashboard", "demo")


class Table(BaseModel):
    """Base of a table: frozen, no unknown keys, wrong types are errors and not guesses."""

    # The docstring under a field becomes its description, from which docs/configuration.md is made.
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def listed(value: Any) -> Any:
    """``value``, split at its commas if it is text: how a list is written in the environment and in options."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _registered(text: str) -> str:
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, path = item.partition("=")
        if not _PATH.fullmatch(path.strip()):
            raise ValueError(f"{item!r}: a codec is given as name=package.module:attribute")
        try:
            register(CODECS, name.strip(), path.strip())
        except ConfigError as error:
            raise ValueError(str(error)) from None
    return text


def _admin_address(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_known = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_known = False
    if not is_known:
        raise ValueError("the admin UI's address is like http://127.0.0.1:15672")
    if parts.username is not None or parts.password is not None:
        # It is named in messages, on pages and in reports.
        raise ValueError("no user and no password here: those of broker.url are taken")
    return url


def _no_address(path: Path) -> Path:
    # A path has lost one of the slashes. What is taken for a file's name is shown here and there.
    if ":/" in str(path):
        raise ValueError("a path is wanted; an address is given as broker.url")
    return path


class BrokerConfig(Table):
    """``[broker]``: where RabbitMQ is and how to talk to it."""

    url: SecretStr = SecretStr("amqp://guest:guest@127.0.0.1:5672/")
    """Address with user, password and virtual host; several, separated by commas, are tried in turn."""
    url_file: Annotated[Path, AfterValidator(_no_address)] | None = None
    """A file that holds the address, instead of ``url``: for Docker's and Kubernetes' secrets. Refused if others than
    its owner and its group may read it, except below ``/run/secrets``."""
    login_grace: Annotated[float, Field(ge=0, le=86400)] = 60.0
    """Seconds for which a login that was good before, and is refused now, is tried again with what stands in
    ``url_file`` or ``token_file`` then: the time in which a new password must be there. Without such a file it is
    refused for good."""
    management_url: Annotated[str, AfterValidator(_admin_address)] | None = None
    """The address of the admin UI and its API, without user and password: those of ``url`` are taken.
    ``http://<host>:15672`` of the broker if not set, and ``https://<host>:15671`` if ``url`` begins with ``amqps``."""
    ca_file: Path | None = None
    """Whose signature under the broker's certificate is trusted, for ``amqps://`` and ``https://``: a PEM file. The
    system's CAs if not set. There is no way to trust just anybody."""
    certificate_file: Path | None = None
    """What we show the broker: a client certificate, as a PEM file. If ``url`` names no password, it is the login, too:
    RabbitMQ takes its common name for the account."""
    key_file: Path | None = None
    """The key of ``certificate_file``, as a PEM file that others cannot read."""
    key_password_file: Path | None = None
    """A file with the passphrase of ``key_file``, if that is encrypted."""
    token_file: Path | None = None
    """A file with an OAuth2 token, which is the password then. Something else renews it; a connection gets the new one
    before the old one expires."""
    allow_plain: bool = False
    """Whether to speak to a broker on another machine without TLS: all can be read and altered on the way, passwords,
    too. Without it only ``amqps://`` is taken, and ``amqp://`` to ``localhost``, ``127.0.0.1`` or ``::1``."""
    heartbeat: Annotated[int, Field(ge=5, le=3600)] = 30
    """Seconds; a silent peer is given up after about two."""
    connect_timeout: Annotated[float, Field(gt=0, le=600)] = 10.0
    """Seconds to wait for one address to answer."""
    blocked_timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds that the broker may block publishing (memory or disk alarm) before the connection is made anew."""
    queue_type: Literal["auto", "classic", "quorum"] = "auto"
    """Type of the run's queues. ``auto``: quorum from RabbitMQ 3.10.11 on, classic before."""
    max_message_bytes: Annotated[int, Field(ge=65536, le=512 * 2**20)] | None = None
    """Largest message to send; if not set, the broker's default: 16 MiB from RabbitMQ 4.0 on, 128 MiB before."""
    chunk_bytes: Annotated[int, Field(ge=65536, le=128 * 2**20)] = CHUNK_BYTES
    """Updates and versions that are larger than this travel in chunks of this size (less, if the broker takes less)."""
    kept_versions: Annotated[int, Field(ge=KEPT_VERSIONS, le=1000)] = KEPT_VERSIONS
    """Versions in chunks that the broker keeps, on disk, for workers that are still downloading them: more than the run
    makes while the slowest of them downloads one. Of the aggregator."""
    codecs: Annotated[str, AfterValidator(_registered)] = ""
    """Codecs of one's own that are in no package, as ``name=package.module:attribute``, separated by commas; on the
    aggregator and on all workers. See docs/extending.md."""
    pack_chunks: bool = False
    """Pack chunks with zstandard where that makes them smaller: for sparse updates (``topk``), or slow lines."""

    def urls(self) -> tuple[str, ...]:
        """The addresses to try, from ``url_file`` if it is set.

        Raises :class:`ConfigError` if the file cannot be read, others may read it, or an address is not AMQP's.
        """
        text = self.url.get_secret_value()
        if self.url_file is not None:
            text = read_secret(self.url_file, "broker.url_file")
        return addresses_of(text)


class MetricsConfig(Table):
    """``[metrics]``: figures for Prometheus, of the aggregator and of each worker."""

    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Where this process serves ``/metrics``, 9464 for instance; 0 for nowhere. On one machine each aggregator and each
    worker needs a port of its own."""
    address: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Which of this machine's addresses it is served at: this machine alone can read it, if not set. ``0.0.0.0`` is all
    of them: the figures are then for whoever reaches the port, without a password."""
    certificate_file: Path | None = None
    """A server certificate, as a PEM file: ``https``, then."""
    key_file: Path | None = None
    """Its key, as a PEM file that others cannot read."""
    client_ca_file: Path | None = None
    """Whoever asks must show a certificate that a CA in this PEM file has signed."""
    workers: Annotated[int, Field(ge=0, le=10_000)] = 100
    """Workers that have series of their own in the aggregator's figures: the first that come. The others are summed up
    as ``other``."""


class LogConfig(Table):
    """``[log]``: what the aggregator, workers and evaluators say on stderr."""

    format: Literal["auto", "human", "json"] = "auto"
    """``json``: one object a line, for machines. ``auto``: that, unless stderr is a terminal."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was set: ``default``, a file, an environment variable or a flag."""

    kind: Literal["default", "file", "environment", "flag"]
    where: str

    def __str__(self) -> str:
        return self.where


#: ``table.key`` (or ``run``), its value, and where it was given if that was not ``--set``.
Flag = tuple[str, Any] | tuple[str, Any, Origin]

T = TypeVar("T", bound=Table)


@dataclass(frozen=True, slots=True)
class Settings:
    """Validated tables, and the origin of each key that was set somewhere."""

    run: str
    tables: Mapping[str, Table]
    origins: Mapping[str, Origin] = field(default_factory=dict)

    def table(self, name: str, kind: type[T]) -> T:
        """The table ``name`` as ``kind``."""
        table = self.tables[name]
        if not isinstance(table, kind):
            raise TypeError(f"table {name!r} is a {type(table).__name__}, not a {kind.__name__}")
        return table

    @property
    def broker(self) -> BrokerConfig:
        """The table ``[broker]``."""
        return self.table("broker", BrokerConfig)

    def origin(self, key: str) -> Origin:
        """Where ``table.key`` was set."""
        return self.origins.get(key, Origin("default", "default"))


def plain(settings: Settings) -> dict[str, Any]:
    """All values as TOML knows them, for printing and for keeping beside a run's results.

    Passwords are replaced by ``***``; keys without a value are left out, since TOML has no null.
    """
    result: dict[str, Any] = {"run": settings.run}
    for name, table in settings.tables.items():
        values = table.model_dump(mode="json", exclude_none=True)
        if isinstance(table, BrokerConfig):
            urls = table.url.get_secret_value().split(",")
            # A comma within a password would come out in pieces that are no addresses.
            values["url"] = ",".join(map(redacted, urls)) if all("://" in url for url in urls) else HIDDEN
            if table.management_url is not None:
                values["management_url"] = redacted(table.management_url)
        result[name] = values
    return result


def load(
    kinds: Mapping[str, type[Table]],
    *,
    file: Path | None = None,
    flags: Sequence[Flag] = (),
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """Read, merge and validate.

    Args:
        kinds: the tables that the caller needs, by name; ``broker`` is always read.
        file: the TOML file; if None, ``fedmq.toml`` in the working directory if there is one.
        flags: from the command line.
        environment: variables, by default the process's; ``FEDMQ_RUN``, ``FEDMQ_BROKER_URL`` and so on.

    Raises:
        ConfigError: for an unknown table or key, a wrong value, an unreadable file; the message names the
            key, where it was set and what is allowed.
    """
    kinds = {"broker": BrokerConfig, **kinds}
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for source in (_from_file(file), _from_environment(os.environ if environment is None else environment), flags):
        if "broker.url" in (given := {key for key, *_ in source}) and "broker.url_file" not in given:
            # Else the address of a file of settings would go before that of the environment.
            values.pop("broker.url_file", None)
            origins.pop("broker.url_file", None)
        for key, value, *rest in source:
            origins[key] = rest[0] if rest else Origin("flag", f"--set {key}")
            values[key] = value
    for key in values:
        _check_key(key, origins[key], kinds)
    _make_importable(values.values())
    run = check_name(f"run (from {origins['run']})" if "run" in origins else "run", str(values.pop("run", "default")))
    tables = {}
    for name, kind in kinds.items():
        own = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{name}.")}
        tables[name] = _validated(name, kind, own, origins)
    return Settings(run=run, tables=tables, origins=origins)


def load_tables(kinds: Mapping[str, type[Table]], *, file: Path, flags: Sequence[Flag] = ()) -> dict[str, Table]:
    """Read a file of its own kind, like a scenario, all of whose tables are ``kinds``. No environment.

    Args:
        kinds: the tables, by name.
        file: the TOML file.
        flags: what takes precedence over the file.

    Raises:
        ConfigError: as :func:`load`.
    """
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for key, value, *rest in (*_from_file(file), *flags):
        values[key] = value
        origins[key] = rest[0] if rest else Origin("flag", f"--set {key}")
        _check_key(key, origins[key], kinds, tuple(kinds))
    tables = {}
    for name, kind in kinds.items():
        own = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{name}.")}
        tables[name] = _validated(name, kind, own, origins)
    return tables


def _make_importable(values: Iterable[Any]) -> None:
    """If a value names a module, the working directory is importable, after all that is installed."""
    here = str(Path.cwd())
    words = (word for value in values if isinstance(value, str) for word in re.split(r"\s*[,=]\s*", value))
    if here not in sys.path and any(map(_PATH.fullmatch, words)):
        sys.path.append(here)


def _from_file(file: Path | None) -> list[tuple[str, Any, Origin]]:
    path = Path(DEFAULT_FILE) if file is None else file
    try:
        with path.open(encoding="utf-8") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            content = tomllib.loads(opened.read())
    except FileNotFoundError:
        if file is None:
            return []
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    _refuse_exposed(path, mode, content)
    origin = Origin("file", str(path))
    result: list[tuple[str, Any, Origin]] = []
    for name, value in content.items():
        if isinstance(value, dict):
            result += [(f"{name}.{key}", inner, origin) for key, inner in value.items()] or []
        else:
            result.append((name, value, origin))
    return result


def _refuse_exposed(path: Path, mode: int, content: Mapping[str, Any]) -> None:
    """A file of settings that holds a password is a secret like any other file that does."""
    table = content.get("broker")
    url = table.get("url") if isinstance(table, dict) else None
    if isinstance(url, str) and holds_password(url) and is_exposed(path, mode):
        raise ConfigError(
            f"{path}: broker.url holds a password, and others may read this file: chmod 600 {shlex.quote(str(path))}, "
            "or keep the address in a file of its own (broker.url_file), or in FEDMQ_BROKER_URL"
        )


def _from_environment(environment: Mapping[str, str]) -> list[tuple[str, Any, Origin]]:
    result: list[tuple[str, Any, Origin]] = []
    for variable in sorted(environment):
        if not variable.startswith(PREFIX):
            continue
        table, _, key = variable.removeprefix(PREFIX).lower().partition("_")
        name = f"{table}.{key}" if key else table
        result.append((name, environment[variable], Origin("environment", f"environment variable {variable}")))
    return result


def _check_key(
    key: str, origin: Origin, kinds: Mapping[str, type[Table]], tables: Sequence[str] = ("run", *TABLES)
) -> None:
    if key == "run" and "run" not in kinds:
        return
    table, _, name = key.partition(".")
    if table not in tables or (table == "run" and "run" not in kinds):
        known = list(tables)
        hint = _of_some_table(key, kinds) or _nearest(table, known)
        raise ConfigError(f"{origin}: unknown key {key!r}{hint}; at the top are {', '.join(known)}")
    if not name:
        raise ConfigError(
            f"{origin}: {key!r} is a table: its settings are given as {key}.<name>, in a file under [{key}]"
        )
    kind = kinds.get(table)
    if kind is not None and name not in kind.model_fields:
        known = list(kind.model_fields)
        raise ConfigError(f"{origin}: unknown key {key!r}{_nearest(name, known)}; [{table}] has {', '.join(known)}")


def _of_some_table(key: str, kinds: Mapping[str, type[Table]]) -> str:
    """The table that was forgotten in front of ``key``, as a question."""
    found = [f"{table}.{key}" for table, kind in kinds.items() if key in kind.model_fields]
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _validated(name: str, kind: type[Table], values: dict[str, Any], origins: Mapping[str, Origin]) -> Table:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            key = str(problem["loc"][0]) if problem["loc"] else ""
            full = f"{name}.{key}" if key else name
            secret = key in kind.model_fields and kind.model_fields[key].annotation is SecretStr
            shown = "" if secret or not key else f" = {redacted(repr(problem['input'])):.80}"
            where = str(origins.get(full, "default")) if key else _all_of(name, origins)
            lines.append(f"{where}: {full}{shown}: {_wanted(problem)}")
        raise ConfigError("\n".join(lines)) from None


def _all_of(name: str, origins: Mapping[str, Origin]) -> str:
    """Where the values of a table were set, for a complaint about several of them."""
    return ", ".join(dict.fromkeys(str(origin) for key, origin in origins.items() if key.startswith(f"{name}.")))


def _wanted(problem: ErrorDetails) -> str:
    """What is wrong, in our words; in pydantic's where they come from a validator of ours or are rare."""
    words = _WANTED.get(problem["type"])
    if words is not None:
        return words.format_map(problem.get("ctx", {}))
    text = problem["msg"].removeprefix("Value error, ")
    return text[:1].lower() + text[1:]
