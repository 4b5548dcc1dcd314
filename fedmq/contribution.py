"""``fedmq contribution``: what each worker's updates were worth, by a model's loss on held-out data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as Grid

from aggregator.checkpoint import CheckpointStore
from aggregator.checkpoints import require_some
from aggregator.cli import FolderOption, checkpoint_folder, run_folder
from aggregator.coalitions import PlayedRound
from aggregator.config import AggregatorConfig
from aggregator.lineage import Replay
from aggregator.rollback import open_lineage
from aggregator.valuation import METHODS, MOST_EXACT
from broker.console import (
    ConfigOption,
    JsonOption,
    RunOption,
    SetOption,
    VerboseOption,
    errors,
    guard,
    parse_flags,
    say,
    say_table,
    set_up_logging,
)
from broker.errors import CheckpointNotWritten, ConfigError
from broker.settings import Settings, load
from worker_client.cli import TaskOption
from worker_client.config import WorkerConfig

if TYPE_CHECKING:
    from worker_client.valuing import HeldOut

__all__ = ["CONTRIBUTION_FILE", "Contribution", "contribution", "register", "valued"]

FIRST_ORDER = "first-order"
#: In the run's folder: what was found last.
CONTRIBUTION_FILE = "contribution.json"

MethodOption = Annotated[
    str,
    typer.Option("--method", help=f"{FIRST_ORDER}, {', '.join(sorted(METHODS))}."),
]


@dataclass(slots=True)
class Contribution:
    """Values added up over rounds."""

    values: dict[str, float] = field(default_factory=dict)
    updates: dict[str, int] = field(default_factory=dict)
    rounds: int = 0
    gain: float = 0.0
    """By how much the loss fell in these rounds."""

    def add(self, played: PlayedRound, values: dict[str, float], gain: float) -> None:
        """One round more."""
        self.rounds += 1
        self.gain += gain
        for worker, value in values.items():
            self.values[worker] = self.values.get(worker, 0.0) + value
        for update in played.updates:
            self.updates[update.id.worker] = self.updates.get(update.id.worker, 0) + 1


def contribution(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    task: TaskOption = None,
    folder: FolderOption = None,
    method: MethodOption = FIRST_ORDER,
    since: Annotated[int, typer.Option("--since", min=1, help="The first version to look at.")] = 1,
    until: Annotated[int | None, typer.Option("--until", min=1, help="The last one; the newest, if not given.")] = None,
    as_json: JsonOption = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Say by how much each worker's updates made the loss on the task's held-out data fall.

    Needs the updates that were kept (aggregator.keep_updates) and the task. first-order takes one gradient a round,
    leave-one-out a model for each worker, gtg-shapley some tens of them, exact-shapley two to the number of workers.
    The last answer is kept in the run's folder, and 'fedmq workers' shows it.

    Example: fedmq contribution --run digits --task worker_client.tasks.digits:Digits --method gtg-shapley
    """
    with guard():
        set_up_logging(verbose, quiet=not verbose)
        flags = parse_flags(settings or [], run=run, worker__task=task, aggregator__folder=folder)
        read = load({"aggregator": AggregatorConfig, "worker": WorkerConfig}, file=config, flags=flags)
        if method != FIRST_ORDER and method not in METHODS:
            raise ConfigError(f"no method is called {method!r}; there are {', '.join([FIRST_ORDER, *sorted(METHODS)])}")
        found = _found(read, method, since, until)
        report = _report(read, method, since, found)
        _keep(read, report)
        if as_json:
            say(json.dumps(report, indent=2))
            return
        say(f"{found.rounds} rounds; the loss on held-out data fell by {found.gain:.6g}; {method}")
        table = Grid(box=None, pad_edge=False, header_style="bold")
        table.add_column("worker", no_wrap=True)
        for name in ("updates", "contribution"):
            table.add_column(name, justify="right")
        for worker, value in sorted(found.values.items(), key=lambda pair: -pair[1]):
            table.add_row(worker, str(found.updates[worker]), f"{value:+.4g}")
        say_table(table)


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(contribution)


def valued(played: PlayedRound, held_out: HeldOut, method: str) -> tuple[dict[str, float], float]:
    """What the workers of a round are worth, and by how much the loss fell in it.

    Raises :class:`ConfigError` if there are too many for exact values.
    """
    everybody = frozenset(played.workers)
    if method == FIRST_ORDER:
        values = played.first_order(held_out.gradient(played.halfway()))
        gain = held_out.loss(played.before.parameters) - held_out.loss(played.parameters(everybody))
        return values, gain
    if method == "exact-shapley" and len(everybody) > MOST_EXACT:
        raise ConfigError(
            f"version {played.version} was made by {len(everybody)} workers; exact-shapley takes up to {MOST_EXACT}: "
            "use gtg-shapley"
        )
    known: dict[frozenset[str], float] = {}

    def utility(coalition: frozenset[str]) -> float:
        if coalition not in known:
            known[coalition] = -held_out.loss(played.parameters(coalition))
        return known[coalition]

    return METHODS[method](played.workers, utility), utility(everybody) - utility(frozenset())


def _found(read: Settings, method: str, since: int, until: int | None) -> Contribution:
    from worker_client.loading import load_task  # noqa: PLC0415 (needs torch)
    from worker_client.valuing import HeldOut  # noqa: PLC0415

    store = CheckpointStore(checkpoint_folder(read), read.run)
    require_some(read, store)
    lineage = open_lineage(run_folder(read), store)
    last = lineage.newest if until is None else until
    if since > last:
        raise ConfigError(f"--since {since} is after version {last}")
    worker = read.table("worker", WorkerConfig)
    held_out = HeldOut(load_task(worker.task), worker)
    replay = Replay(lineage, store)
    found = Contribution()
    with _progress(replay.plan(last)) as step:
        for played in replay.rounds():
            step()
            if played.version >= since:
                found.add(played, *valued(played, held_out, method))
    if not found.rounds:
        raise ConfigError(f"no updates are kept of the rounds from version {since} to {last}")
    return found


def _report(read: Settings, method: str, since: int, found: Contribution) -> dict[str, object]:
    workers = [
        {"worker": worker, "updates": found.updates[worker], "contribution": value}
        for worker, value in sorted(found.values.items(), key=lambda pair: -pair[1])
    ]
    return {
        "run": read.run,
        "method": method,
        "since": since,
        "rounds": found.rounds,
        "gain": found.gain,
        "workers": workers,
    }


def _keep(read: Settings, report: dict[str, object]) -> None:
    file = run_folder(read) / CONTRIBUTION_FILE
    try:
        file.write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise CheckpointNotWritten(f"{file}: {error.strerror or error}") from None


@contextmanager
def _progress(count: int) -> Iterator[Callable[[], object]]:
    columns = (TextColumn("rounds"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("", total=count)
        yield lambda: progress.advance(task)
