"""``fedmq dead``: the rejected updates of a run, to look at, to publish again, to drop."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from broker.amqp.deadletters import DeadLetterQueue, Outcome, Wish
from broker.console import (
    BrokerOption,
    ConfigOption,
    JsonOption,
    RunOption,
    SetOption,
    VerboseOption,
    bar,
    broker_command,
    errors,
    say,
    say_table,
)
from broker.errors import BrokerError, ConfigError
from broker.letterdisplay import Summary, by_reason, count_reason, letter_table, row_of, say_letter
from broker.letters import (
    DeadLetter,
    RawLetter,
    Selection,
    contents,
    facts,
    parse_age,
    parse_id,
    parse_reason,
    parse_time,
)
from broker.settings import Settings
from broker.topology import Topology

__all__ = ["app", "drop", "list_", "replay", "show"]

SPOOL_BYTES = 2**20
DONE = (Outcome.REPLAYED, Outcome.DROPPED)
#: Of letters that had to stay, so many are named without -v.
FAILURES = 10

WorkerOption = Annotated[list[str] | None, typer.Option("--worker", help="Of this worker. Repeatable.")]
ReasonOption = Annotated[
    list[str] | None, typer.Option("--reason", help="With this reason, as 'list' shows it. Repeatable.")
]
IdOption = Annotated[list[str] | None, typer.Option("--id", help="This update: WORKER/INCARNATION/SEQ. Repeatable.")]
BeforeOption = Annotated[
    str | None, typer.Option("--before", help="Rejected before this time (UTC): 2026-08-01T12:30.")
]
OlderOption = Annotated[str | None, typer.Option("--older-than", help="Rejected longer ago: 90s, 30m, 2h, 7d.")]
AllOption = Annotated[bool, typer.Option("--all", help="All of them.")]
#: Rows that ``list`` shows unless told otherwise.
ROWS = 100


def list_(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    broker: BrokerOption = None,
    workers: WorkerOption = None,
    reasons: ReasonOption = None,
    ids: IdOption = None,
    before: BeforeOption = None,
    older_than: OlderOption = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=0, help="Rows to show; if not given, 100, as JSON all.")
    ] = None,
    as_json: JsonOption = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """List the run's rejected updates, the oldest first, with a summary by reason. Changes nothing.

    The summary counts all of them.

    Example: fedmq dead list --run digits --reason not-finite
    """
    with broker_command(config, run, broker, settings, verbose) as read:
        wanted = _selection(workers, reasons, ids, before, older_than)
        if as_json:
            _list_json(read, wanted, limit)
            return
        summary = Summary(wanted)
        table = letter_table()

        def look(letter: DeadLetter, _raw: RawLetter) -> Wish:
            if summary.counts(letter) and summary.meant <= (ROWS if limit is None else limit):
                table.add_row(*row_of(letter))
            return Wish.KEEP

        _work(read, "list", look)
        if table.row_count:
            say_table(table)
        if summary.meant > table.row_count:
            say(f"… and {summary.meant - table.row_count:,} more (--limit, or --json)")
        say(summary.text(read.run))


def show(
    letter: Annotated[str, typer.Argument(help="Its number in the list, or WORKER/INCARNATION/SEQ.")],
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    broker: BrokerOption = None,
    as_json: JsonOption = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Show one rejected update in full: headers, what the worker says about it, norm and damage of each tensor.

    Example: fedmq dead show 3 --run digits
    """
    with broker_command(config, run, broker, settings, verbose) as read:
        number = int(letter) if letter.isascii() and letter.isdigit() else 0
        wanted = Selection() if number else Selection(ids=(parse_id(letter),))
        found: list[dict[str, Any]] = []
        met = 0

        def look(one: DeadLetter, raw: RawLetter) -> Wish:
            nonlocal met
            if one.number == number or (not number and wanted.matches(one)):
                met += 1
                if not found:
                    found.append(facts(one) | contents(raw))
            return Wish.KEEP

        letters = _work(read, "show", look)
        if not found:
            raise ConfigError(f"no letter {letter} in run {read.run!r}: it has {letters} (fedmq dead list)")
        if as_json:
            say(json.dumps(found[0], indent=2))
            return
        say_letter(found[0])
        if met > 1:
            say(f"({met} letters have this id: copies of one update, which counts once)")


def replay(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    broker: BrokerOption = None,
    workers: WorkerOption = None,
    reasons: ReasonOption = None,
    ids: IdOption = None,
    before: BeforeOption = None,
    older_than: OlderOption = None,
    everything: AllOption = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Publish rejected updates again, once what was wrong is mended.

    Each keeps its id, so it counts once however often it is replayed. It leaves the dead letters only after the
    broker has confirmed the copy. Those that are rejected again come back with their reason.

    Example: fedmq dead replay --run digits --reason too-stale --worker w3
    """
    with broker_command(config, run, broker, settings, verbose) as read:
        wanted = _required(_selection(workers, reasons, ids, before, older_than), everything=everything)
        _change(read, wanted, Wish.REPLAY, "replay", verbose=verbose)


def drop(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    broker: BrokerOption = None,
    workers: WorkerOption = None,
    reasons: ReasonOption = None,
    ids: IdOption = None,
    before: BeforeOption = None,
    older_than: OlderOption = None,
    everything: AllOption = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Delete rejected updates for good.

    Example: fedmq dead drop --run digits --older-than 7d --yes
    """
    with broker_command(config, run, broker, settings, verbose) as read:
        wanted = _required(_selection(workers, reasons, ids, before, older_than), everything=everything)
        most: int | None = None
        if not yes:
            if not sys.stdin.isatty():
                raise ConfigError("nobody can be asked whether to delete them: give --yes")
            most = _count(read, wanted)
            if not most or not typer.confirm(f"Delete {most} for good?", err=True):
                say("nothing was dropped")
                return
        _change(read, wanted, Wish.DROP, "drop", most=most, verbose=verbose)


# ------------------------------------------------------------------------------------------------- selection


def _selection(
    workers: list[str] | None,
    reasons: list[str] | None,
    ids: list[str] | None,
    before: str | None,
    older_than: str | None,
) -> Selection:
    """What the options mean; raises :class:`ConfigError`."""
    times = [] if before is None else [parse_time(before)]
    if older_than is not None:
        times.append(datetime.now(UTC) - parse_age(older_than))
    return Selection(
        workers=tuple(workers or ()),
        reasons=tuple(parse_reason(text) for text in reasons or ()),
        ids=tuple(parse_id(text) for text in ids or ()),
        before=min(times, default=None),
    )


def _required(wanted: Selection, *, everything: bool) -> Selection:
    if everything and wanted:
        raise ConfigError("--all and a selection contradict each other: give one of them")
    if not everything and not wanted:
        raise ConfigError("say which: --worker, --reason, --id, --before, --older-than, or --all")
    return wanted


# ------------------------------------------------------------------------------------------------------ work


def _work(read: Settings, what: str, decide: Callable[[DeadLetter, RawLetter], Wish]) -> int:
    """Look at each letter; their number."""
    with bar(f"reading the dead letters of run {read.run!r}"):
        looked = DeadLetterQueue(read.broker, Topology(read.run), what=what).work(decide)
    if looked.others:
        errors.print(
            f"note: somebody else reads this queue just now ({looked.others} consumers); what they have in hand is "
            "not shown",
            highlight=False,
        )
    return looked.letters


def _count(read: Settings, wanted: Selection) -> int:
    summary = Summary(wanted)

    def look(letter: DeadLetter, _raw: RawLetter) -> Wish:
        summary.counts(letter)
        return Wish.KEEP

    _work(read, "count", look)
    say(summary.text(read.run))
    return summary.meant


def _change(
    read: Settings, wanted: Selection, wish: Wish, what: str, *, most: int | None = None, verbose: int = 0
) -> None:
    """Replay or drop what is meant (``most`` letters, the oldest first) and report it: ``verbose``, each."""
    summary = Summary(wanted)
    outcomes: Counter[Outcome] = Counter()
    reasons: defaultdict[Outcome, Counter[str]] = defaultdict(Counter)

    def decide(letter: DeadLetter, _raw: RawLetter) -> Wish:
        is_meant = (most is None or summary.meant < most) and summary.counts(letter)
        return wish if is_meant else Wish.KEEP

    def report(letter: DeadLetter, outcome: Outcome, detail: str) -> None:
        outcomes[outcome] += 1
        count_reason(reasons[outcome], letter.reason)
        name = letter.id or f"letter {letter.number} of worker {letter.worker}"
        if verbose or (outcome not in DONE and outcomes[outcome] <= FAILURES):
            say(f"{outcome:9} {name} ({letter.reason}){': ' if detail else ''}{detail}")

    queue = DeadLetterQueue(read.broker, Topology(read.run), what=what)
    try:
        queue.work(decide, report, alone=True)
    except BrokerError as error:
        if not outcomes:
            raise
        raise BrokerError(f"{error}. Until then {_told(outcomes)}; the rest is in the queue still") from None
    if not summary.meant:
        say(summary.text(read.run))
        return
    for outcome, counts in reasons.items():
        say(f"run {read.run!r}: {outcomes[outcome]:,} {outcome}: {by_reason(counts)}")
    if outcomes[Outcome.REPLAYED]:
        say("what is rejected again comes back: fedmq dead list")
    left = outcomes.total() - sum(outcomes[outcome] for outcome in DONE)
    if left:
        raise BrokerError(f"{left} of {summary.meant} were not replayed; they are in the queue still")


def _told(outcomes: Counter[Outcome]) -> str:
    return ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.items()) or "nothing happened"


def _list_json(read: Settings, wanted: Selection, limit: int | None) -> None:
    # By way of a file: a pager may take its time, and the letters must not be in our hands meanwhile.
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES, "w+") as rows:
        separator, written = "[", 0

        def look(letter: DeadLetter, _raw: RawLetter) -> Wish:
            nonlocal separator, written
            if (limit is None or written < limit) and wanted.matches(letter):
                rows.write(f"{separator}\n{json.dumps(facts(letter))}")
                separator, written = ",", written + 1
            return Wish.KEEP

        _work(read, "list", look)
        rows.write("[]\n" if separator == "[" else "\n]\n")
        rows.seek(0)
        shutil.copyfileobj(rows, sys.stdout)


app = typer.Typer(
    help="A run's rejected updates: look at them, publish them again, drop them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("list")(list_)
app.command("show")(show)
app.command("replay")(replay)
app.command("drop")(drop)
