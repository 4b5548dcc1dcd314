"""``fedmq contribution``: what each worker brought to a run, by the loss on held-out data."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table as Grid

from aggregator.ancestry import Ancestry
from aggregator.checkpoint import CheckpointStore
from aggregator.checkpoints import require_some
from aggregator.cli import FolderOption, checkpoint_folder, run_folder
from aggregator.config import AggregatorConfig
from aggregator.contribution import METHODS, Kept, Report
from aggregator.core.snapshot import SnapshotHead
from aggregator.disk import replace_file
from aggregator.rollback import open_lineage
from aggregator.tally import CONTRIBUTION_FILE
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
    say_table,
    set_up_logging,
)
from broker.errors import ConfigError, LineageError, ModelMismatch, TaskError
from broker.settings import Settings, load
from broker.variates import like
from worker_client.cli import TaskOption
from worker_client.config import WorkerConfig

if TYPE_CHECKING:  # torch comes with it
    from worker_client.judging import HeldOut

__all__ = ["calculate", "contribution"]

log = logging.getLogger("fedmq.contribution")

LEAVE_ONE_OUT = "leave-one-out"


def _nothing(_done: int, _total: int) -> None:
    """Of a report that nobody reads."""


def contribution(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    folder: FolderOption = None,
    task: TaskOption = None,
    method: Annotated[str, typer.Option("--method", help=f"{', '.join(METHODS)}.")] = "first-order",
    since: Annotated[int, typer.Option("--since", min=1, help="The first version to look at.")] = 1,
    until: Annotated[int | None, typer.Option("--until", min=1, help="The last one; the newest, if not given.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the orders that gtg-shapley draws.")] = 0,
    as_json: JsonOption = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Calculate what each worker brought, from kept updates (aggregator.keep_updates) and the task's held-out data.

    A contribution of 0.1 means that the held-out loss is lower by 0.1 for it. first-order takes one gradient a version,
    leave-one-out rebuilds the run without each worker, gtg-shapley takes some tens or hundreds of losses a version,
    exact-shapley two to the number of its workers. May be run while the run goes on; the last answer is kept in the
    run's folder, and 'fedmq workers' shows it.

    Example: fedmq contribution --run digits --task worker_client.tasks.digits:Digits --method gtg-shapley
    """
    with guard():
        set_up_logging(verbose)
        if not verbose:
            logging.getLogger("fedmq").setLevel(logging.WARNING)
        flags = parse_flags(settings or [], run=run, aggregator__folder=folder, worker__task=task)
        read = load({"aggregator": AggregatorConfig, "worker": WorkerConfig}, file=config, flags=flags)
        with bar(method, unit="versions") as shown:
            found = calculate(read, method=method, since=since, until=until, seed=seed, report=shown.say)
        _keep(run_folder(read) / CONTRIBUTION_FILE, found)
        if as_json:
            say(json.dumps(found, indent=2))
        else:
            _show(found)


def calculate(
    read: Settings, *, method: str, since: int = 1, until: int | None = None, seed: int = 0, report: Report = _nothing
) -> dict[str, Any]:
    """What ``--json`` shows.

    Args:
        read: tables ``aggregator`` and ``worker``.
        method: a key of ``METHODS``.
        since: the first version whose updates are valued.
        until: the last; the newest, if None.
        seed: of what is drawn.
        report: told how many of how many versions are done.

    Raises:
        ConfigError: there is no such method, or it does not go with ``since``.
        LineageError: the updates were not kept.
        TaskError: the task has no held-out data, or raised.
        ModelMismatch: it is not the run's.
    """
    if method not in METHODS:
        raise ConfigError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
    if method == LEAVE_ONE_OUT and since > 1:
        raise ConfigError(f"{LEAVE_ONE_OUT} is of a whole run without somebody: leave --since away")
    store = CheckpointStore(checkpoint_folder(read), read.run)
    require_some(read, store)
    head = store.head()
    last = head.version if until is None else until
    if since > last > 0:
        raise ConfigError(f"--since {since} is after version {last}")
    lineage = open_lineage(run_folder(read), store)
    ancestry = Ancestry(lineage.history, head.records)
    judge = _judge(read, head)
    kept = Kept(lineage, store, frozenset(ancestry.workers(last)), since)
    result = METHODS[method](kept, last, judge, seed, report)
    if result.base_version >= last:
        raise LineageError(f"no updates are kept of the versions up to {last}; set aggregator.keep_updates")
    first = max(since, result.base_version + 1)
    updates = Counter[str]()
    for at, counts in ancestry.by_worker(last).items():
        updates += counts if at >= first else Counter()
    return {
        "run": read.run,
        "method": method,
        "seed": seed,
        "task": read.table("worker", WorkerConfig).task,
        "since": first,
        "until": last,
        "loss_before": result.before,
        "loss_after": result.after,
        "examples": judge.examples,
        "losses_calculated": result.losses,
        "stuck": result.stuck,
        "workers": [
            {"worker": worker, "updates": updates[worker], "contribution": gain}
            for worker, gain in sorted(result.totals.items(), key=lambda pair: (-pair[1], pair[0]))
        ],
        "versions": {str(at): found for at, found in result.by_version.items()},
    }


def _judge(read: Settings, head: SnapshotHead) -> HeldOut:
    """Raises :class:`TaskError`, and :class:`ModelMismatch` if it is not the run's task."""
    try:
        # Here, because the command line must also start where torch is not installed.
        from worker_client.judging import HeldOut  # noqa: PLC0415
        from worker_client.loading import load_task  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise TaskError('held-out data need torch: pip install "fedmq[torch]"') from None
    own = read.table("worker", WorkerConfig)
    judge = HeldOut(load_task(own.task), own)
    if (spec := like(judge.spec, head.model)) != head.model:
        differences = "; ".join(head.model.differences(spec, theirs="the task")[:3])
        raise ModelMismatch(f"task {own.task} is not that of run {read.run!r}: {differences}; give the run's --task")
    return judge


def _keep(file: Path, plain: dict[str, Any]) -> None:
    text = json.dumps(plain, indent=2) + "\n"
    try:
        replace_file(file, lambda target: target.write(text.encode()))
    except OSError as error:
        log.warning("%s: %s; 'fedmq workers' will not show it", file, error.strerror or error)


def _show(found: Mapping[str, Any]) -> None:
    say(
        f"{found['method']} of versions {found['since']} to {found['until']}; {found['losses_calculated']:,} losses on "
        f"{found['examples']:,} examples, {found['loss_before']:.4g} where updates began to be kept and "
        f"{found['loss_after']:.4g} at the end"
    )
    if found["stuck"]:
        say(f"{found['stuck']} updates of the round in which updates began to be kept are in every model")
    table = Grid(box=None, pad_edge=False, header_style="bold")
    table.add_column("worker", overflow="fold")
    for name in ("updates", "contribution"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found["workers"]:
        table.add_row(row["worker"], str(row["updates"]), f"{row['contribution']:+.4g}")
    if table.row_count:
        say_table(table)
