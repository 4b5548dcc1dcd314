"""``fedmq checkpoint``: what stands in a run's checkpoints, whether it can be relied on, and the model out of it.

Reads only, without broker and torch, also while the aggregator runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table as Grid

from aggregator.agreement import Agreement
from aggregator.checkpoint import CheckpointStore
from aggregator.checkpointfile import read_checkpoint
from aggregator.cli import FolderOption, checkpoint_folder, run_folder
from aggregator.config import AggregatorConfig
from aggregator.core.ledger import Ledger
from aggregator.core.snapshot import Snapshot
from aggregator.inspection import Condition, FileFacts, describe, survey
from aggregator.results import write_model
from aggregator.verification import Verification
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
    say_table,
    set_up_logging,
)
from broker.errors import CheckpointCorrupt, CheckpointMissing, CheckpointNotWritten, ConfigError, WrongRun
from broker.messages import parameters_digest
from broker.settings import Settings, load

__all__ = ["app", "export", "list_", "require_some", "show", "verify"]

NUMBERS = {"version", "epoch", "buffered", "applied", "bytes", "norm", "not finite", "confirmed", "staleness", "weight"}

#: What a key is called where there is room for a word more.
NAMES = {"void": "taken_back_versions"}

VersionOption = Annotated[int | None, typer.Option("--version", min=0, help="The newest file of this version.")]


def list_(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    folder: FolderOption = None,
    as_json: JsonOption = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """List the run's checkpoints, the newest first. Each is read in full, so that damage shows.

    Example: fedmq checkpoint list --run digits
    """
    with _command(config, run, folder, settings, verbose) as (read, store):
        found = [facts for facts, _ in survey(store)]
        if not found:
            raise CheckpointMissing(_missing(read, store))
        if as_json:
            say(json.dumps([_plain(facts) for facts in found], indent=2))
            _require_ours(found)
            return
        table = _table("file", "version", "epoch", "buffered", "applied", "written (UTC)", "bytes", "state")
        for facts in found:
            counts = (facts.version, facts.epoch, facts.buffered, facts.applied)
            _add(table, facts.file, *counts, f"{facts.written:%Y-%m-%d %H:%M:%S}", f"{facts.bytes:,}", facts.condition)
        say_table(table)
        for facts in found:
            if facts.detail:
                say(f"{facts.condition}: {facts.detail}")
        _require_ours(found)


def show(
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="A name from the list, or a path; the newest that is whole.")
    ] = None,
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    folder: FolderOption = None,
    version: VersionOption = None,
    as_json: JsonOption = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Show one checkpoint in full: tensors, who has contributed, the open round, what was changed, what was rejected.

    Example: fedmq checkpoint show --run digits
    """
    with _command(config, run, folder, settings, verbose) as (read, store):
        if checkpoint is not None and version is not None:
            raise ConfigError("give a file or --version, not both")
        if checkpoint is None:
            facts, snapshot = _find(read, store, version)
            name = facts.file
        else:
            name = checkpoint
            snapshot = read_checkpoint(_file(store, checkpoint))
        found = {"file": name, **describe(snapshot)}
        if as_json:
            say(json.dumps(found, indent=2))
        else:
            _say_in_full(found)


def verify(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    folder: FolderOption = None,
    skip_updates: Annotated[
        bool, typer.Option("--skip-updates", help="Leave out the kept updates, which take as long as the disk to read.")
    ] = False,
    as_json: JsonOption = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Read all checkpoints, the history and the kept updates: checksums, digests, each applied update told once.

    Exit code 5 if anything is wrong, with a line for each thing and what to do about it.

    Example: fedmq checkpoint verify --run digits
    """
    with _command(config, run, folder, settings, verbose) as (read, store):
        tell: Callable[[str], None] = say_nothing if as_json else say
        checked = Verification(run_folder(read), store)
        files: list[dict[str, Any]] = []
        verdicts: list[str] = []

        def report(facts: FileFacts, is_sound: bool) -> None:
            files.append({**_plain(facts), "sound": is_sound})
            verdicts.append(_verdict(facts, is_sound))
            step()

        # Not told in between: lines and a bar on one terminal would run into each other.
        with bar("reading checkpoints", total=len(store.files()), unit="files") as step:
            checked.files(report)
        for verdict in verdicts:
            tell(verdict)
        if checked.newest is not None:
            with bar("reading the history"):
                agreement = checked.history()
            _say_agreement(agreement, tell)
            if not skip_updates:
                with bar("reading the kept updates"):
                    count = checked.kept()
                if count:
                    tell(f"updates: {count:,} were kept, read in full")
        elif not checked.findings:
            raise CheckpointMissing(_missing(read, store))
        if as_json:
            findings = [{"what": finding.what, "todo": finding.todo} for finding in checked.findings]
            say(json.dumps({"files": files, "findings": findings}, indent=2))
        for finding in checked.findings:
            tell(f"wrong: {finding}")
        if checked.findings:
            count = len(checked.findings)
            things = "one thing is" if count == 1 else f"{count} things are"
            raise CheckpointCorrupt(
                f"{things} wrong with the state of run {read.run!r} in {store.folder}: what to do stands with each"
            )


def export(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    folder: FolderOption = None,
    version: VersionOption = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write; one that is there is replaced.")
    ] = Path("model.safetensors"),
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Write a version's parameters as a file that torch loads in one line.

    In Python: model.load_state_dict(safetensors.torch.load_file("model.safetensors")).

    Example: fedmq checkpoint export --run digits --output digits.safetensors
    """
    with _command(config, run, folder, settings, verbose) as (read, store):
        with bar("reading the checkpoint"):
            facts, snapshot = _find(read, store, version)
        if parameters_digest(snapshot.parameters) != snapshot.digest:
            raise CheckpointCorrupt(f"{facts.file}: the parameters do not have the digest that stands beside them")
        if output.is_dir():
            raise ConfigError(f"--output {output} is a folder: give the name of a file")
        try:
            with bar("writing the model"):
                write_model(
                    output, read.run, snapshot.parameters, version=str(snapshot.version), digest=snapshot.digest
                )
        except OSError as error:
            raise CheckpointNotWritten(f"{output}: {error.strerror or error}; choose another --output") from None
        size = sum(array.size for array in snapshot.parameters.values())
        say(
            f"version {snapshot.version} of run {read.run!r}: {size:,} numbers in {len(snapshot.parameters)} tensors,"
            f" in {output}"
        )


# ----------------------------------------------------------------------------------------------- finding


@contextmanager
def _command(
    config: Path | None, run: str | None, folder: Path | None, settings: list[str] | None, verbose: int
) -> Iterator[tuple[Settings, CheckpointStore]]:
    with guard():
        set_up_logging(verbose, quiet=not verbose)
        flags = parse_flags(settings or [], run=run, aggregator__folder=folder)
        read = load({"aggregator": AggregatorConfig}, file=config, flags=flags)
        yield read, CheckpointStore(checkpoint_folder(read), read.run)


def _require_ours(found: list[FileFacts]) -> None:
    """Raise :class:`WrongRun` if all that was found is another run's."""
    strange = [facts.detail for facts in found if facts.condition is Condition.STRANGE]
    if strange and len(strange) == len(found):
        raise WrongRun(strange[0])


def require_some(read: Settings, store: CheckpointStore) -> None:
    """Raise :class:`CheckpointMissing`, for who looks at a run rather than begins one, if ``store`` has no file."""
    if not store.files():
        raise CheckpointMissing(_missing(read, store))


def _missing(read: Settings, store: CheckpointStore) -> str:
    return f"no checkpoint of run {read.run!r} in {store.folder}: name the run with --run, and its folder with --folder"


def _find(read: Settings, store: CheckpointStore, version: int | None) -> tuple[FileFacts, Snapshot]:
    """The newest file that is whole, of ``version`` if that is not None. Raises :class:`CheckpointError`."""
    versions: list[int] = []
    details: list[str] = []
    for facts, snapshot in survey(store):
        if snapshot is not None and version in (None, snapshot.version):
            return facts, snapshot
        if facts.version is not None:
            versions.append(facts.version)
        elif facts.condition is not Condition.ASIDE:
            details.append(facts.detail)
    if versions:
        there = ", ".join(map(str, sorted(set(versions))))
        raise CheckpointMissing(
            f"version {version} of run {read.run!r} is in no checkpoint that is whole; there: {there}. "
            "aggregator.keep_checkpoints keeps more; 'fedmq replay' rebuilds any, if updates were kept"
        )
    if details:
        raise CheckpointCorrupt("; ".join(details) + ": restore one from a backup")
    raise CheckpointMissing(_missing(read, store))


def _file(store: CheckpointStore, name: str) -> Path:
    for file in (store.folder / name, Path(name)):
        if file.is_file():
            return file
    there = ", ".join(file.name for file in store.files()) or "no checkpoint"
    raise ConfigError(f"there is no file {name!r}, here or in {store.folder}, which has: {there}")


# ------------------------------------------------------------------------------------------------ checking


def _verdict(facts: FileFacts, is_sound: bool) -> str:
    if facts.condition is not Condition.WHOLE:
        return f"{facts.file}: {facts.condition}"
    state = "whole" if is_sound else "wrong"
    return f"{facts.file}: {state}, version {facts.version}, epoch {facts.epoch}, {facts.applied:,} updates applied"


def _say_agreement(agreement: Agreement, tell: Callable[[str], None]) -> None:
    if not (agreement.problems or agreement.gaps or agreement.damaged):
        updates = len(Ledger(agreement.snapshot.ledger))
        tell(f"history.jsonl: {agreement.versions:,} versions and the buffer tell of {updates:,} updates, each once")
    if given_up := agreement.given_up:
        tell(f"{given_up:,} updates of versions that were taken back do not count: an older state has taken over")


# ------------------------------------------------------------------------------------------------ showing


def _plain(facts: FileFacts) -> dict[str, Any]:
    plain = {**asdict(facts), "written": facts.written.isoformat(timespec="milliseconds")}
    plain["state"] = plain.pop("condition")
    return plain


def _say_in_full(found: Mapping[str, Any]) -> None:
    for key, value in found.items():
        if key not in {"ledger", "buffer", "tensors"}:
            say(f"{NAMES.get(key, key).replace('_', ' '):20} {_text(value)}")
    say(f"{'buffer':20} {found['buffer']['updates']} updates, weight {found['buffer']['weight']:g}")
    _say_rows(found["buffer"]["entries"], "update", "base version", "staleness", "weight", "examples", "loss")
    _say_rows(found["ledger"], "worker", "incarnation", "applied", "seqs", "confirmed")
    _say_rows(found["tensors"], "name", "shape", "dtype", "role", "bytes", "norm", "not finite")


def _say_rows(rows: list[dict[str, Any]], *names: str) -> None:
    if not rows:
        return
    say("")
    table = _table(*names)
    for row in rows:
        values = [row[name.replace(" ", "_")] for name in names]
        _add(table, *(_seqs(v) if n == "seqs" else _number(v) for n, v in zip(names, values, strict=True)))
    say_table(table)


def _table(*names: str) -> Grid:
    table = Grid(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, justify="right" if name in NUMBERS else "left", no_wrap=name in NUMBERS, overflow="fold")
    return table


def _add(table: Grid, *cells: object) -> None:
    table.add_row(*("-" if cell is None else escape(str(cell)) for cell in cells))


def _text(value: object) -> str:
    """A fact in one line."""
    match value:
        case None:
            return "-"
        case dict() | list() if not value:
            return "-"
        case bool():
            return "yes" if value else "no"
        case dict():
            return ", ".join(f"{key}={_text(inner)}" for key, inner in value.items())
        case list():
            return ", ".join(_seqs([one]) if isinstance(one, list) else str(one) for one in value)
        case _:
            return str(value)


def _seqs(pairs: list[list[int]]) -> str:
    """``0-41, 43``."""
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)


def _number(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else value


app = typer.Typer(
    help="A run's checkpoints: list them, look into one, verify them, export the model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("list")(list_)
app.command("show")(show)
app.command("verify")(verify)
app.command("export")(export)
