"""What a line of the log looks like, and what it says of where it comes from: role, run, worker, version, epoch.

Everything goes through :mod:`logging`; this is the one place that knows how it comes out. For a person it is a line of
text, for a machine a line of JSON.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

from rich.console import Console
from rich.logging import RichHandler

from broker.redaction import harmless

__all__ = ["FIELDS", "LogFormat", "describe", "handler_for", "is_json", "member", "says_json"]

LogFormat = Literal["auto", "human", "json"]

#: What a line says of where it comes from, as far as it is known; in this order.
FIELDS = ("role", "run", "worker", "epoch", "version")

Fields = dict[str, str | int]

#: Of this process, and of a member of a federation that has one process for all its members.
_process: Fields = {}
_member: ContextVar[Fields | None] = ContextVar("fedmq.log.member", default=None)


def describe(**facts: str | int) -> None:
    """Let every line from now on say this, too: of this process, or of this thread's :func:`member`.

    ``facts`` are some of :data:`FIELDS`.
    """
    own = _member.get()
    (_process if own is None else own).update(facts)


@contextmanager
def member(**facts: str | int) -> Iterator[None]:
    """What is described within the block, in this thread, is said by this thread's lines alone."""
    token = _member.set(dict(facts))
    try:
        yield
    finally:
        _member.reset(token)


def is_json(form: LogFormat, stream: Console, *, is_service: bool) -> bool:
    """Whether lines of JSON are meant: ``auto`` means a program that runs for long, and whose log no person sees now.

    Whoever runs a command for a moment reads what it says, even where it goes into a file.
    """
    return form == "json" or (form == "auto" and is_service and not stream.is_terminal)


def handler_for(stream: Console, *, as_json: bool) -> logging.Handler:
    """What writes lines to stderr; ``stream`` is a console on it."""
    handler: logging.Handler
    if not as_json and stream.is_terminal:
        handler = RichHandler(console=stream, show_path=False, markup=False, log_time_format="%H:%M:%S")
        handler.setFormatter(_Human("%(where)s%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        text = _Human("%(asctime)s %(levelname)s %(name)s: %(where)s%(message)s", "%Y-%m-%dT%H:%M:%S")
        handler.setFormatter(_Json() if as_json else text)
    return handler


def says_json() -> bool:
    """Whether this process logs lines of JSON."""
    return any(isinstance(handler.formatter, _Json) for handler in logging.getLogger().handlers)


class _Human(logging.Formatter):
    """``[digits/w3 e2 v12] message``."""

    def format(self, record: logging.LogRecord) -> str:
        record.where = _where(_fields())
        return harmless(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        # What others have sent may hold line breaks, and must not look like lines of ours.
        return super().formatMessage(record).replace("\n", "\n    ")


class _Json(logging.Formatter):
    """An object a line: ``time``, ``level``, ``logger``, ``message``, the :data:`FIELDS`, perhaps ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "time": moment.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": harmless(record.getMessage()),
            **_fields(),
        }
        if isinstance(code := getattr(record, "exit_code", None), int):
            line["exit_code"] = code
        if record.exc_info:
            line["exception"] = harmless(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False, default=str)


def _fields() -> Fields:
    own = _member.get()
    known = _process if own is None else {**_process, **own}
    return {name: known[name] for name in FIELDS if name in known}


def _where(fields: Mapping[str, str | int]) -> str:
    names = [str(fields[name]) for name in ("run", "worker") if name in fields]
    if "worker" not in fields and "role" in fields:
        names.append(str(fields["role"]))
    numbers = [f"{name[0]}{fields[name]}" for name in ("epoch", "version") if name in fields]
    text = " ".join([part for part in ("/".join(names), *numbers) if part])
    return f"[{text}] " if text else ""
