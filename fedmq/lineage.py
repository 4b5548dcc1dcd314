"""``fedmq history | replay | rollback``: how the versions of a run came to be, and how to have one of them again."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from aggregator.ancestry import Ancestry
from aggregator.checkpoint import CheckpointStore
from aggregator.checkpoints import require_some
from aggregator.cli import FolderOption, checkpoint_folder, run_folder
from aggregator.config import AggregatorConfig
from aggregator.core.snapshot import Snapshot, SnapshotHead
from aggregator.lineage import Lineage, Replay, ranges
from aggregator.results import write_model
from aggregator.rollback import adopt as adopt_without
from aggregator.rollback import checkpoint_versions, find_checkpoint, open_lineage, roll_back
from broker.console import (
    ConfigOption,
    JsonOption,
    RunOption,
    SetOption,
    VerboseOption,
    bar,
    guard,
    parse_flags,
    say,
    say_nothing,
    set_up_logging,
)
from broker.errors import CheckpointNotWritten, ConfigError, LineageError
from broker.settings import Settings, load
from fedmq.historydisplay import Wanted, say_history, say_json

__all__ = ["history", "replay", "rollback"]

YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
#: Lines that ``history`` shows unless told otherwise.
LINES = 50


def history(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    folder: FolderOption = None,
    version: Annotated[int | None, typer.Option("--version", min=0, help="This version in full.")] = None,
    worker: Annotated[str | None, typer.Option("--worker", help="Versions with updates of this worker.")] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Lines to show, the newest; if not given, 50, as JSON all.")
    ] = None,
    as_json: JsonOption = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Show how a run's versions came to be: updates, staleness, weights, digests, settings, commands, evaluations.

    Example: fedmq history --run digits --version 12
    """
    with _command(config, run, folder, settings, verbose) as read:
        place = run_folder(read)
        snapshot = _store(read).head()
        wanted = Wanted(version=version, worker=worker)
        file = place / "history.jsonl"
        if as_json:
            shown = say_json(file, snapshot.records, wanted, limit=limit)
        else:
            shown = say_history(file, snapshot.records, wanted, limit=limit or LINES)
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
    as_json: JsonOption = False,
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
            raise ConfigError("nothing to adopt: name --version or --without")
        store = _store(read)
        lineage = open_lineage(run_folder(read), store)
        target = lineage.newest if version is None else version
        if adopt and not leave_out and target >= lineage.newest:
            raise ConfigError(f"version {target} is the newest already")
        if target <= lineage.newest:
            _require_known(_ancestry(read, store)[0].workers(target), leave_out, target)
        _require_answer(adopt, yes)
        tell = say_nothing if as_json else say
        rebuilding = Replay(lineage, store, leave_out)
        _rebuild(rebuilding, target)
        found = _report(rebuilding, leave_out, tell)
        if output is not None:
            _write(output, read.run, rebuilding, leave_out)
            found["output"] = str(output)
            tell(f"written to {output}")
        if adopt:
            found["adopted"] = _adopt(read, rebuilding, store, leave_out, tell, go_on=version is None, yes=yes)
        if as_json:
            say(json.dumps(found, indent=2))


def rollback(
    version: Annotated[int, typer.Argument(min=0, help="An earlier version.")],
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    folder: FolderOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Make an earlier version the run's newest, under a new number; the run may go on meanwhile.

    Taken from a checkpoint that is still there (aggregator.keep_checkpoints), else rebuilt from the updates that
    were kept (aggregator.keep_updates).

    Example: fedmq rollback 12 --run digits
    """
    with _command(config, run, folder, settings, verbose) as read:
        store = _store(read)
        lineage = open_lineage(run_folder(read), store)
        if version >= lineage.newest:
            raise ConfigError(f"version {version} is not an earlier one: the newest is {lineage.newest}")
        _require_answer(True, yes)
        tell = say_nothing if as_json else say
        state = find_checkpoint(lineage, store, version)
        if state is not None:
            parameters, optimizer = state.parameters, state.optimizer
            tell(f"version {version} from a checkpoint; digest {state.digest}")
        else:
            result = _rebuilt(lineage, store, version)
            parameters, optimizer = result.original.parameters, result.original.optimizer
            _report(result, frozenset(), tell)
        ancestry, newest = _ancestry(read, store)
        lost = _loss(ancestry.taken_back(newest.version, version), len(newest.entries))
        _confirm(
            f"Take run {read.run!r} back to version {version}? {lost}; what is on its way and starts from a version "
            f"after {version} will be rejected.",
            yes,
        )
        head = roll_back(lineage, store, version, parameters, optimizer)
        found = _taken(read, head)
        tell(f"version {head.version} of run {read.run!r} is version {version} again; {_loss(*found)}")
        if as_json:
            say(json.dumps(_taken_plainly(head, *found), indent=2))


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
    """Raises :class:`CheckpointMissing` if it is empty."""
    store = CheckpointStore(checkpoint_folder(read), read.run)
    require_some(read, store)
    return store


def _ancestry(read: Settings, store: CheckpointStore) -> tuple[Ancestry, SnapshotHead]:
    """How the versions descend from each other, and the newest checkpoint."""
    head = store.head()
    return Ancestry(run_folder(read) / "history.jsonl", head.records), head


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
    with bar("rebuilding", total=count, unit="versions") as step:
        for _ in rebuilding.run():
            step()


def _require_known(workers: set[str], leave_out: frozenset[str], version: int) -> None:
    """Raise :class:`ConfigError` if a worker that is to be left out never took part."""
    if strangers := sorted(leave_out - workers):
        known = ", ".join(sorted(workers)) or "nobody"
        raise ConfigError(f"no update of {', '.join(strangers)} made version {version}; there are some of {known}")


def _report(rebuilding: Replay, leave_out: frozenset[str], tell: Callable[[str], None]) -> dict[str, Any]:
    """Tell what was rebuilt; gives the same for ``--json``."""
    original, result, base = rebuilding.original, rebuilding.result, rebuilding.base_version
    agree = f"all versions since agree with the history; digest {original.digest}"
    tell(f"version {original.version} rebuilt from version {base}: {agree}")
    found = {"version": original.version, "base_version": base, "digest": original.digest}
    if not leave_out:
        return found
    left_out = {version: count for version, count in result.left_out.items() if count}
    names = ", ".join(sorted(leave_out))
    stuck = sum(result.stuck.values())
    before = f"; updates are kept from version {base} on, and what came before is in" if base else ""
    before += f" ({stuck} of the round that was open then)" if stuck else ""
    if not left_out:
        known = ", ".join(sorted(rebuilding.workers)) or "nobody"
        raise ConfigError(f"no update of {names} made version {original.version}; there are some of {known}{before}")
    count = sum(left_out.values())
    tell(f"without {names}: {_updates(count)} left out, in versions {ranges(sorted(left_out))}{before}")
    tell(f"digest {result.digest}, at a distance (L2) of {rebuilding.distance:.6g} from the original")
    return {
        **found,
        "without": {
            "workers": sorted(leave_out),
            "left_out": count,
            "versions": sorted(left_out),
            "digest": result.digest,
            "distance": rebuilding.distance,
        },
    }


def _write(output: Path, run: str, rebuilding: Replay, leave_out: frozenset[str]) -> None:
    facts = {"version": str(rebuilding.result.version), "digest": rebuilding.result.digest}
    facts |= {"without": ",".join(sorted(leave_out))} if leave_out else {}
    try:
        write_model(output, run, rebuilding.result.parameters, **facts)
    except OSError as error:
        raise CheckpointNotWritten(f"{output}: {error.strerror or error}; choose another --output") from None


def _adopt(
    read: Settings,
    rebuilding: Replay,
    store: CheckpointStore,
    leave_out: frozenset[str],
    tell: Callable[[str], None],
    *,
    go_on: bool,
    yes: bool,
) -> dict[str, Any]:
    names = ", ".join(sorted(leave_out))
    lineage, version = rebuilding.lineage, rebuilding.result.version
    what = f"version {version}" + (f" without {names}" if names else "")
    ancestry, newest = _ancestry(read, store)
    later = {} if go_on else ancestry.taken_back(newest.version, version)
    _confirm(
        f"Make {what} the newest of run {read.run!r}? {_loss(_with_left_out(later, rebuilding), len(newest.entries))}; "
        "what is on its way and starts from versions that came out otherwise will be rejected."
        + (f" Stop {names} first: what it sends from now on counts again." if names else ""),
        yes,
    )
    if not leave_out:
        result = rebuilding.original
        head = roll_back(lineage, store, version, result.parameters, result.optimizer)
    else:
        head = adopt_without(rebuilding, store, leave_out, go_on=go_on, report=lambda _version: None)
    later, dropped = _taken(read, head)
    lost = _with_left_out(later, rebuilding)
    what = f"version {head.records[-1].source}" + (f" without {names}" if names else "")
    tell(f"version {head.version} of run {read.run!r} is {what}; {_loss(lost, dropped)}")
    if names:
        tell(f"what {names} sends from now on counts again: stop it, if it should not")
    return _taken_plainly(head, lost, dropped)


# ------------------------------------------------------------------------------------------- what counts no more


def _taken(read: Settings, head: Snapshot) -> tuple[dict[int, int], int]:
    """How many updates of which versions no longer count now that ``head`` is the newest, and how many were dropped."""
    record = head.records[-1]
    ancestry = Ancestry(run_folder(read) / "history.jsonl", head.records)
    return ancestry.taken_back(head.version - 1, record.source or 0), len(record.dropped)


def _with_left_out(later: Mapping[int, int], rebuilding: Replay) -> dict[int, int]:
    return {**later, **{version: count for version, count in rebuilding.result.left_out.items() if count}}


def _loss(lost: Mapping[int, int], dropped: int) -> str:
    """``3 updates of versions 2-3 no longer count; 1 in the buffer dropped``."""
    versions = f" of version{'s' * (len(lost) > 1)} {ranges(sorted(lost))}" if lost else ""
    count = sum(lost.values())
    return f"{_updates(count)}{versions} no longer count{'s' * (count == 1)}; {dropped} in the buffer dropped"


def _taken_plainly(head: Snapshot, lost: Mapping[int, int], dropped: int) -> dict[str, Any]:
    return {
        "version": head.version,
        "source": head.records[-1].source,
        "digest": head.digest,
        "taken_back": {"updates": sum(lost.values()), "versions": sorted(lost)},
        "dropped": dropped,
    }


def _updates(count: int) -> str:
    return f"{count:,} update{'s' * (count != 1)}"


def _require_answer(changes: bool, yes: bool) -> None:
    if changes and not yes and not sys.stdin.isatty():
        raise ConfigError("nobody can be asked whether to change the run: give --yes")


def _confirm(question: str, yes: bool) -> None:
    if not yes and not typer.confirm(question, err=True):
        say("nothing was changed")
        raise typer.Exit(1)
