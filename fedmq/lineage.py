"""``fedmq history | replay | rollback``: how the versions of a run came to be, and how to have one of them again."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aggregator.checkpoint import CheckpointStore
from aggregator.cli import FolderOption, checkpoint_folder, run_folder
from aggregator.config import AggregatorConfig
from aggregator.lineage import Lineage, Replay, ranges
from aggregator.results import write_model
from aggregator.rollback import adopt as adopt_without
from aggregator.rollback import checkpoint_versions, find_checkpoint, open_lineage, roll_back
from broker.console import ConfigOption, RunOption, SetOption, VerboseOption, errors, guard, parse_flags, set_up_logging
from broker.errors import CheckpointNotWritten, ConfigError, LineageError
from broker.settings import Settings, load
from fedmq.historydisplay import Wanted, say, say_history, say_json

__all__ = ["history", "register", "replay", "rollback"]

YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def history(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    folder: FolderOption = None,
    version: Annotated[int | None, typer.Option("--version", min=0, help="This version in full.")] = None,
    worker: Annotated[str | None, typer.Option("--worker", help="Versions with updates of this worker.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Lines to show, the newest.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, all of it.")] = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Show how a run's versions came to be: updates, staleness, weights, digests, settings, commands, evaluations.

    Example: fedmq history --run digits --version 12
    """
    with _command(config, run, folder, settings, verbose) as read:
        place = run_folder(read)
        snapshot = _store(read).load()
        wanted = Wanted(version=version, worker=worker)
        show = say_json if as_json else say_history
        shown = show(place / "history.jsonl", snapshot.records, wanted, limit=limit)
        if not shown and (version is not None or worker is not None):
            what = f"version {version}" if version is not None else f"update of {worker!r}"
            raise ConfigError(
                f"the history of run {read.run!r} knows no {what}; its newest version is {snapshot.version}"
            )


def replay(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    folder: FolderOption = None,
    version: Annotated[int | None, typer.Option("--version", min=0, help="The newest, if not given.")] = None,
    without: Annotated[
        list[str] | None, typer.Option("--without", metavar="WORKER", help="Leave its updates out. Repeatable.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the parameters to this file.")] = None,
    adopt: Annotated[bool, typer.Option("--adopt", help="Make the result the run's newest version.")] = False,
    yes: YesOption = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Rebuild a version from the updates that were kept (aggregator.keep_updates), and check each one on the way.

    With --without as if these workers had never taken part; --adopt makes that the newest version of the run,
    which may go on meanwhile.

    Example: fedmq replay --run digits --without w3 --adopt
    """
    with _command(config, run, folder, settings, verbose) as read:
        leave_out = frozenset(without or ())
        if adopt and not leave_out and version is None:
            raise ConfigError("the newest version is the newest already: give --version or --without with --adopt")
        _require_answer(adopt, yes)
        store = _store(read)
        lineage = open_lineage(run_folder(read), store)
        target = lineage.newest if version is None else version
        if adopt and not leave_out and target >= lineage.newest:
            raise ConfigError(f"version {target} is the newest already")
        rebuilding = Replay(lineage, store, leave_out)
        _rebuild(rebuilding, target)
        _report(rebuilding, leave_out)
        if output is not None:
            _write(output, read.run, rebuilding, leave_out)
        if adopt:
            _adopt(read, rebuilding, store, leave_out, go_on=version is None, yes=yes)


def rollback(
    version: Annotated[int, typer.Argument(min=0, help="An earlier version.")],
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    folder: FolderOption = None,
    yes: YesOption = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Make an earlier version the run's newest, under a new number; the run may go on meanwhile.

    Taken from a checkpoint that is still there (aggregator.keep_checkpoints), else rebuilt from the updates that
    were kept (aggregator.keep_updates).

    Example: fedmq rollback 12 --run digits
    """
    with _command(config, run, folder, settings, verbose) as read:
        _require_answer(True, yes)
        store = _store(read)
        lineage = open_lineage(run_folder(read), store)
        if version >= lineage.newest:
            raise ConfigError(f"version {version} is not an earlier one: the newest is {lineage.newest}")
        state = find_checkpoint(lineage, store, version)
        if state is not None:
            parameters, optimizer = state.parameters, state.optimizer
            say(f"version {version} from a checkpoint; digest {state.digest}")
        else:
            result = _rebuilt(lineage, store, version)
            parameters, optimizer = result.original.parameters, result.original.optimizer
            _report(result, frozenset())
        _confirm(
            f"Take run {read.run!r} back to version {version}? What is in the buffer, and updates on their way that "
            f"start from a version after {version}, will not count.",
            yes,
        )
        head = roll_back(lineage, store, version, parameters, optimizer)
        dropped = len(head.records[-1].dropped)
        say(
            f"version {head.version} of run {read.run!r} is version {version} again; {dropped} updates in the buffer "
            "were dropped"
        )


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    for command in (history, replay, rollback):
        app.command()(command)


# ------------------------------------------------------------------------------------------------------- work


@contextmanager
def _command(
    config: Path | None, run: str | None, folder: Path | None, settings: list[str] | None, verbose: int
) -> Iterator[Settings]:
    with guard():
        set_up_logging(verbose)
        if not verbose:
            logging.getLogger("fedmq").setLevel(logging.WARNING)
        flags = parse_flags(settings or [], run=run, aggregator__folder=folder)
        yield load({"aggregator": AggregatorConfig}, file=config, flags=flags)


def _store(read: Settings) -> CheckpointStore:
    return CheckpointStore(checkpoint_folder(read), read.run)


def _rebuilt(lineage: Lineage, store: CheckpointStore, version: int) -> Replay:
    """Raises :class:`LineageError`, which says which versions can be had."""
    rebuilding = Replay(lineage, store)
    try:
        _rebuild(rebuilding, version)
    except LineageError as error:
        there = ranges(checkpoint_versions(store))
        raise LineageError(f"{error}; checkpoints are there of {there}") from None
    return rebuilding


def _rebuild(rebuilding: Replay, version: int) -> None:
    count = rebuilding.plan(version)
    with _progress(count) as step:
        for _ in rebuilding.run():
            step()


@contextmanager
def _progress(count: int) -> Iterator[Callable[[], object]]:
    columns = (
        TextColumn("rebuilding"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("versions"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("", total=count)
        yield lambda: progress.advance(task)


def _report(rebuilding: Replay, leave_out: frozenset[str]) -> None:
    original, result, base = rebuilding.original, rebuilding.result, rebuilding.base_version
    agree = f"all versions since agree with the history; digest {original.digest}"
    say(f"version {original.version} rebuilt from version {base}: {agree}")
    if not leave_out:
        return
    left_out = {version: count for version, count in result.left_out.items() if count}
    names = ", ".join(sorted(leave_out))
    stuck = sum(result.stuck.values())
    before = f"; updates are kept from version {base} on, and what came before is in" if base else ""
    before += f" ({stuck} of the round that was open then)" if stuck else ""
    if not left_out:
        known = ", ".join(sorted(rebuilding.workers)) or "nobody"
        raise ConfigError(f"no update of {names} made version {original.version}; there are some of {known}{before}")
    versions = ranges(sorted(left_out))
    say(f"without {names}: {sum(left_out.values())} updates left out, in versions {versions}{before}")
    say(f"digest {result.digest}, at a distance (L2) of {rebuilding.distance:.6g} from the original")


def _write(output: Path, run: str, rebuilding: Replay, leave_out: frozenset[str]) -> None:
    facts = {"version": str(rebuilding.result.version), "digest": rebuilding.result.digest}
    facts |= {"without": ",".join(sorted(leave_out))} if leave_out else {}
    try:
        write_model(output, run, rebuilding.result.parameters, **facts)
    except OSError as error:
        raise CheckpointNotWritten(f"{output}: {error.strerror or error}; choose another --output") from None
    say(f"written to {output}")


def _adopt(
    read: Settings, rebuilding: Replay, store: CheckpointStore, leave_out: frozenset[str], *, go_on: bool, yes: bool
) -> None:
    names = ", ".join(sorted(leave_out))
    lineage, version = rebuilding.lineage, rebuilding.result.version
    what = f"version {version}" + (f" without {names}" if names else "")
    _confirm(
        f"Make {what} the newest of run {read.run!r}? What is in the buffer, and updates on their way that start from "
        "versions that came out otherwise, will not count."
        + (f" Stop {names} first: what it sends from now on counts again." if names else ""),
        yes,
    )
    if not leave_out:
        result = rebuilding.original
        head = roll_back(lineage, store, version, result.parameters, result.optimizer)
    else:
        head = adopt_without(rebuilding, store, leave_out, go_on=go_on, report=lambda _version: None)
    record = head.records[-1]
    what = f"version {record.source}" + (f" without {names}" if names else "")
    say(f"version {head.version} of run {read.run!r} is {what}; {len(record.dropped)} updates were dropped")
    if names:
        say(f"what {names} sends from now on counts again: stop it, if it should not")


def _require_answer(changes: bool, yes: bool) -> None:
    if changes and not yes and not sys.stdin.isatty():
        raise ConfigError("nobody can be asked whether to change the run: give --yes")


def _confirm(question: str, yes: bool) -> None:
    if not yes and not typer.confirm(question, err=True):
        say("nothing was changed")
        raise typer.Exit(1)
