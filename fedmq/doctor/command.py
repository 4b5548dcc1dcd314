"""``fedmq doctor``: looks at the broker, the run, this machine and the settings, and says what to change."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Sequence
from typing import Annotated, Literal
from urllib.parse import quote

import typer
from rich.markup import escape
from rich.table import Table as Grid

from aggregator.checkpoint import CheckpointStore
from aggregator.cli import FolderOption, checkpoint_folder, run_folder
from aggregator.config import AggregatorConfig
from broker.accounts.provision import tags_of
from broker.admin import Admin
from broker.amqp.declare import QUORUM_SAFE
from broker.amqp.trial import ROLES, Examination, Role, examine
from broker.console import (
    BrokerOption,
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
from broker.errors import CheckpointError, TaskError
from broker.settings import Settings, load
from broker.topology import Queue, Topology
from fedmq.doctor.asking import Asking
from fedmq.doctor.connection import of_greeting, of_power, of_sizes, of_trials, without_advice_of_power
from fedmq.doctor.findings import Finding, Level, note, ok, problem, worst
from fedmq.doctor.machine import installed, of_folder, of_packages, of_torch
from fedmq.doctor.node import of_clock, of_limits, of_nodes, of_plugins
from fedmq.doctor.queues import of_dead_letters, of_objects, of_policies, of_timeouts
from worker_client.cli import NameOption, TaskOption
from worker_client.config import WorkerConfig

__all__ = ["doctor"]

#: A management API that is slower than this is as good as none.
ASK_SECONDS = 5.0
STYLES = {Level.OK: "green", Level.NOTE: "yellow", Level.PROBLEM: "bold red"}

RoleOption = Annotated[
    Literal["aggregator", "worker"] | None,
    typer.Option("--role", help="What this machine and its user are to be; if not given, either."),
]


def doctor(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    broker: BrokerOption = None,
    role: RoleOption = None,
    name: NameOption = None,
    task: TaskOption = None,
    folder: FolderOption = None,
    as_json: JsonOption = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Examine broker, run, machine and settings: what is well, what is not, and what to change.

    Permissions and sizes are really tried, and nothing is left on the broker. What the management API does not tell is
    named. With --task, the task is imported and its model built.

    Exit code 1 if there is a problem; notes are none.

    Example: fedmq doctor --run digits
    """
    with guard():
        set_up_logging(verbose, quiet=not verbose)
        if not verbose:
            logging.getLogger("fedmq.broker").setLevel(logging.CRITICAL)
        flags = parse_flags(
            settings or [], run=run, broker__url=broker, worker__name=name, worker__task=task, aggregator__folder=folder
        )
        read = load({"aggregator": AggregatorConfig, "worker": WorkerConfig}, file=config, flags=flags)
        findings = examined(read, None if role is None else (role,), _tell(as_json=as_json))
        if as_json:
            say(json.dumps({"run": read.run, "worst": worst(findings), "findings": [f.plain() for f in findings]}))
        else:
            _show(findings)
    if worst(findings) is Level.PROBLEM:
        raise typer.Exit(1)


def _tell(*, as_json: bool) -> Callable[[str], object]:
    status = None if as_json or not errors.is_terminal else errors.status("")

    def tell(text: str) -> None:
        if status is not None:
            status.update(text)
            status.start() if text else status.stop()

    return tell


def examined(read: Settings, asked: tuple[Role, ...] | None, tell: Callable[[str], object]) -> list[Finding]:
    """All findings; ``asked`` are the roles that this machine must be able to have, ``tell`` is told what goes on."""
    roles = asked or ROLES
    topology, worker = Topology(read.run), read.table("worker", WorkerConfig).name
    aggregator = read.table("aggregator", AggregatorConfig)
    model_bytes, folder = _state(read, is_wanted="aggregator" in roles)
    try:
        tell("trying what this user may do on the broker")
        examination = examine(read.broker, topology, worker, roles=roles, model_bytes=model_bytes)
        findings = _of_examination(examination, read, roles, is_asked=asked is not None)
        tell("asking the management API")
        asking = Asking(Admin.of(read.broker, timeout=ASK_SECONDS))
        if asked == ("worker",):
            me = (asking.some("/whoami", "whether this user may ask") or [{}])[0]
            findings += of_power(examination, worker, tags_of(me))
        declared = _declared(examination, read, model_bytes)
        told = _of_management(asking, topology, declared, aggregator, model_bytes)
        findings += without_advice_of_power(told) if asked == ("worker",) else told
        tell("looking at this machine")
        findings += folder + of_packages(*installed())
        if "worker" in roles:
            findings += _of_task(read, must="worker" in (asked or ()))
    finally:
        tell("")
    return findings


def _of_examination(
    examination: Examination, read: Settings, roles: Sequence[Role], *, is_asked: bool
) -> list[Finding]:
    worker = read.table("worker", WorkerConfig).name
    findings: list[Finding] = []
    for greeting in examination.greetings:
        findings += of_greeting(greeting, heartbeat=read.broker.heartbeat)
        if greeting.error is None and read.broker.queue_type == "quorum" and greeting.version < QUORUM_SAFE:
            text = "quorum queues of this version can run out of memory when they recover large messages"
            findings.append(note("settings", text, 'broker.queue_type = "auto", or RabbitMQ 3.10.11 or newer'))
    findings += of_sizes(examination, chunk_bytes=read.broker.chunk_bytes)
    return findings + of_trials(examination, read.run, worker, roles=roles, is_asked=is_asked)


def _declared(examination: Examination, read: Settings, model_bytes: int) -> tuple[Queue, ...]:
    """The queues that an aggregator with these settings would declare on this broker."""
    kind = read.broker.queue_type
    if kind == "auto":
        version = max((greeting.version for greeting in examination.greetings), default=())
        kind = "quorum" if version >= QUORUM_SAFE else "classic"
    return Topology(read.run).queues(kind, model_bytes, read.broker.kept_versions)


def _of_management(
    asking: Asking, topology: Topology, declared: Sequence[Queue], config: AggregatorConfig, model_bytes: int
) -> list[Finding]:
    me = (asking.some("/whoami", "whether this user may ask") or [{}])[0]
    nodes = asking.some("/nodes", "memory, disk and alarms of the broker, its plugins") or []
    overview = (asking.some("/overview", "how many connections there are") or [{}])[0]
    queues = asking.queues()
    policies = None if queues is not None and topology.updates in queues else asking.some("/policies", "policies")
    bindings = asking.of_vhost("bindings", "bindings")
    totals = overview.get("object_totals")
    connections = totals.get("connections") if isinstance(totals, dict) else None
    # Others may not ask.
    flags = asking.some("/feature-flags", "feature flags") if "administrator" in str(me.get("tags")) else None
    findings = of_nodes(nodes, model_bytes=model_bytes) + of_plugins(nodes, flags) + of_clock(asking.clock)
    findings += of_limits(
        "the virtual host",
        asking.of_vhost("vhost-limits", "limits of the virtual host") or [],
        connections=connections if isinstance(connections, int) else None,
        queues=None if queues is None else len(queues),
        setter=f"rabbitmqctl set_vhost_limits -p {shlex.quote(asking.vhost)}",
    )
    if name := str(me.get("name", "")):
        findings += of_limits(
            f"user {name!r}",
            asking.some(f"/user-limits/{quote(name, safe='')}", "limits of this user") or [],
            connections=None,
            queues=None,
            setter=f"rabbitmqctl set_user_limits {shlex.quote(name)}",
        )
    findings += of_objects(queues, declared, topology.run)
    findings += of_policies(topology, queues, policies, declared, vhost=asking.vhost)
    findings += of_dead_letters(topology, queues, bindings)
    findings += of_timeouts(queues, declared, commit_seconds=config.commit_seconds)
    return findings + asking.untold()


def _state(read: Settings, *, is_wanted: bool) -> tuple[int, list[Finding]]:
    """The size of a version as the run's folder knows it, 0 if it does not, and what is to be said of the folder."""
    if not is_wanted:
        return 0, []
    folder = run_folder(read)
    store = CheckpointStore(checkpoint_folder(read), read.run)
    if not store.files():
        text = f"there is no checkpoint of run {read.run!r} in {folder} yet: model and sizes are not known"
        return 0, [*of_folder(folder, model_bytes=0), note("disk", text, "fedmq init, where the aggregator is to run")]
    try:
        size = store.head().model.nbytes
    except CheckpointError as error:
        return 0, [*of_folder(folder, model_bytes=0), problem("disk", str(error), "fedmq checkpoint verify")]
    return size, of_folder(folder, model_bytes=size)


def _of_task(read: Settings, *, must: bool) -> list[Finding]:
    findings = of_torch()
    name = read.table("worker", WorkerConfig).task
    is_given = read.origin("worker.task").kind != "default"
    if worst(findings) is not Level.OK:
        advice = findings[0].advice
        return [problem("task", findings[0].text, advice)] if must or is_given else findings
    if not is_given:
        return findings
    try:
        from worker_client.loading import load_task  # noqa: PLC0415 (torch comes with it)
        from worker_client.training import initial_parameters  # noqa: PLC0415

        model, _ = initial_parameters(load_task(name), read.table("worker", WorkerConfig).local_parameters)
    except TaskError as error:
        return [*findings, problem("task", str(error), "mend the task, or install what it needs")]
    return [*findings, ok("task", f"{name}: a model of {len(model.tensors)} tensors, {model.nbytes:,} bytes a version")]


def _show(findings: Sequence[Finding]) -> None:
    table = Grid(box=None, pad_edge=False, show_header=False)
    table.add_column("level", no_wrap=True)
    table.add_column("area", no_wrap=True)
    table.add_column("text", overflow="fold")
    for finding in findings:
        level = f"[{STYLES[finding.level]}]{finding.level}[/]"
        table.add_row(level, finding.area, escape(finding.text))
        if finding.advice:
            table.add_row("", "", f"[bold]→[/] {escape(finding.advice)}")
    say_table(table)
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    say(f"{counts[Level.PROBLEM]} problems, {counts[Level.NOTE]} notes, {counts[Level.OK]} are as they should be")
