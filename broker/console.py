"""What every command of fedmq shares: errors as one line, logging, signals, ``--set``."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from broker.addresses import holds_password
from broker.errors import ConfigError, FedmqError
from broker.logs import LogFormat, handler_for, is_json, says_json
from broker.progress import bar, errors, show_deep
from broker.redaction import harmless, redacted
from broker.settings import Flag, Origin, Settings, load

__all__ = [
    "BrokerOption",
    "ConfigOption",
    "JsonOption",
    "LogFormatOption",
    "RunOption",
    "SetOption",
    "VerboseOption",
    "bar",
    "broker_command",
    "errors",
    "guard",
    "parse_flags",
    "say",
    "say_nothing",
    "say_table",
    "service_logging",
    "set_up_logging",
    "stop_on_signals",
]


def _runs_here(incomplete: str) -> list[str]:
    """For the shell: runs that have a folder here."""
    return sorted(path.name for path in Path("runs").glob(f"{glob.escape(incomplete)}*") if path.is_dir())


# Options that several commands have.
ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="Settings; fedmq.toml, if there is one.")]
RunOption = Annotated[str | None, typer.Option("--run", help="Name of the run.", autocompletion=_runs_here)]
BrokerOption = Annotated[
    str | None,
    typer.Option("--broker", help="Address of RabbitMQ: amqp://host/. With a password rather in FEDMQ_BROKER_URL."),
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Any setting: worker.batch_size=64. Repeatable.")]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON.")]
LogFormatOption = Annotated[
    str | None, typer.Option("--log-format", help="auto (JSON unless on a terminal), human or json.")
]
VerboseOption = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Log details.")]

#: Options that are not called as their setting is.
OPTIONS = {"broker.url": "--broker", "aggregator.stop_after_rounds": "--rounds", "log.format": "--log-format"}

#: Whoever signals a process and its group as well (``timeout``, some supervisors) means it once.
TWICE_SECONDS = 1.0

#: In a pipe there is no width: a line a row, for grep.
PIPE_WIDTH = 1000

#: A text with ``:bug:`` in it stays as it is, JSON above all.
_out = Console(emoji=False)


def say(text: str) -> None:
    """A line of the command's result, as it is."""
    _out.print(text, highlight=False, markup=False, soft_wrap=True)


def say_nothing(_text: str) -> None:
    """Instead of :func:`say` where all is said at the end, as JSON."""


def say_table(table: Table) -> None:
    """``table``, in full width if the result goes into a pipe."""
    (_out if _out.is_terminal else Console(width=PIPE_WIDTH, emoji=False)).print(table)


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Turn a :class:`FedmqError` into one message on stderr and its exit code; nothing else is caught."""
    try:
        yield
    except FedmqError as error:
        if says_json():
            logging.getLogger("fedmq").error("%s", error, extra={"exit_code": error.exit_code})
        else:
            errors.print(Text.assemble(("error: ", "bold red"), harmless(str(error))))
        logging.getLogger("fedmq").debug("raised here", exc_info=error)
        raise SystemExit(error.exit_code) from None


def parse_flags(pairs: Sequence[str], **named: Any) -> list[Flag]:
    """``--set table.key=value`` strings and named options as flags for ``settings.load``.

    ``named`` holds values of dedicated options under the key with ``__`` for the dot; None means not given.
    """
    result: list[Flag] = []
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"--set {redacted(pair)!r}: give it as table.key=value, like --set aggregator.buffer_size=8"
            )
        result.append((key.strip(), value))
    for name, value in named.items():
        if value is not None:
            key = name.replace("__", ".")
            option = OPTIONS.get(key, f"--{key.rpartition('.')[2]}")
            result.append((key, value, Origin("flag", option)))
    _warn_of_the_command_line(result)
    return result


def _warn_of_the_command_line(flags: Sequence[Flag]) -> None:
    """What stands on a command line, everybody on the machine can read, and the shell keeps it."""
    if any(key == "broker.url" and isinstance(value, str) and holds_password(value) for key, value, *_ in flags):
        logging.getLogger("fedmq").warning(
            "broker.url is on the command line with a password, where every user of this machine can read it: put it "
            "into the environment (FEDMQ_BROKER_URL), or into a file of mode 0600 (broker.url_file)"
        )


def set_up_logging(
    verbosity: int = 0, *, quiet: bool = False, form: LogFormat = "human", is_service: bool = False
) -> None:
    """Log to stderr: warnings of libraries, and fedmq's own information (``-v``: its details too).

    Args:
        verbosity: how often ``-v`` was given.
        quiet: only errors, for commands that have a display.
        form: what a line looks like.
        is_service: the program runs for long.
    """
    handler = handler_for(errors, as_json=is_json(form, errors, is_service=is_service))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    level = logging.ERROR if quiet else logging.DEBUG if verbosity else logging.INFO
    logging.getLogger("fedmq").setLevel(level)
    # Typer has put its own there, which would print the same.
    sys.excepthook = _say_crash
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _say_crash_of_a_thread


def _say_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A mistake of ours comes out with its traceback, like any of Python's, but for the passwords in it."""
    sys.stderr.write(harmless("".join(traceback.format_exception(kind, error, trace))))


def _say_crash_of_a_thread(crash: threading.ExceptHookArgs) -> None:
    if crash.exc_value is not None and not isinstance(crash.exc_value, SystemExit):
        sys.stderr.write(f"Exception in thread {crash.thread.name if crash.thread else '(gone)'}:\n")
        _say_crash(crash.exc_type, crash.exc_value, crash.exc_traceback)


def service_logging(verbosity: int, form: str | None = None) -> None:
    """As :func:`set_up_logging`, for a program that runs for long.

    ``form`` is what its settings or its option say; if None, what the environment says, which the settings will check.
    """
    given = os.environ.get("FEDMQ_LOG_FORMAT", "") if form is None else form
    known: dict[str, LogFormat] = {"human": "human", "json": "json"}
    set_up_logging(verbosity, form=known.get(given, "auto"), is_service=True)
    show_deep()


@contextlib.contextmanager
def broker_command(
    config: Path | None, run: str | None, broker: str | None, settings: list[str] | None, verbose: int
) -> Iterator[Settings]:
    """What a command that speaks to the broker for a moment runs in: its errors, its log, its settings."""
    with guard():
        set_up_logging(verbose)
        if not verbose:
            # Whatever goes wrong comes out as this command's one error.
            logging.getLogger("fedmq.broker").setLevel(logging.CRITICAL)
        yield load({}, file=config, flags=parse_flags(settings or [], run=run, broker__url=broker))


@contextlib.contextmanager
def stop_on_signals(stop: threading.Event, also: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within the block, SIGTERM and SIGINT set ``stop`` and call ``also``.

    Another one, ``TWICE_SECONDS`` later or more, ends the process at once.
    """
    first: list[float] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not stop.is_set():
            first.append(now)
            stop.set()
            also()
        elif not first or now - first[0] > TWICE_SECONDS:
            os._exit(128 + number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
