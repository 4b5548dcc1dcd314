"""``fedmq demo``: the whole of it on this machine, with real processes, a real RabbitMQ and real training."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import tomli_w
from pydantic import Field, SecretStr
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from aggregator.checkpoint import CheckpointStore
from aggregator.cli import checkpoint_folder, run_folder
from aggregator.config import AggregatorConfig
from aggregator.report import REPORT_FILE
from aggregator.strategies import strategy_of
from aggregator.strategies.base import gathers
from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpWorkerTransport
from broker.console import bar, stop_on_signals
from broker.errors import BrokerUnreachable, ConfigError, FedmqError
from broker.redaction import redacted
from broker.settings import BrokerConfig, Flag, MetricsConfig, Settings, Table, load, plain
from broker.topology import Topology
from fedmq.dashboard.beside import page_of
from fedmq.dashboard.config import DashboardConfig
from fedmq.initialise import initialise
from fedmq.local import Member, Processes, Threads, stopping
from fedmq.monitoring.monitor import Monitor
from fedmq.monitoring.terminal import Display, render
from fedmq.monitoring.watching import watching
from worker_client.config import WorkerConfig

__all__ = ["DemoConfig", "demo", "demo_settings", "members_of"]

log = logging.getLogger("fedmq.demo")


class DemoConfig(Table):
    """``[demo]``: the federation that ``fedmq demo`` puts on one machine."""

    workers: Annotated[int, Field(ge=1, le=64)] = 4
    """Training processes; the data is split among them."""
    slow_seconds: Annotated[float, Field(ge=0)] = 1.0
    """What the last but one of them waits before each update."""
    late_round: Annotated[int, Field(ge=0)] = 5
    """The last of them joins when this round has closed."""
    finish_seconds: Annotated[float, Field(ge=0)] = 20.0
    """How long workers may take to leave when the run is done."""
    trouble: bool = False
    """Two more of them have trouble: one is killed (SIGKILL), one sends updates that are no use. To see how such are
    found; takes RabbitMQ and at least five workers."""
    dashboard: bool = True
    """Serve the live page as well; see ``[dashboard]``."""
    in_process: bool = False
    """Use the in-process broker and threads, even where RabbitMQ can be had."""


#: What the demonstration sets where the user has set nothing.
DEFAULTS: dict[str, Any] = {
    "aggregator.mode": "delta",
    "aggregator.rounds": "buffered",
    "aggregator.buffer_size": 4,
    "aggregator.stop_after_rounds": 60,
    "aggregator.weighting": "examples",
    "worker.task": "worker_client.tasks.digits:Digits",
    "worker.local_epochs": 2,
    "worker.batch_size": 16,
    "worker.learning_rate": 0.05,
    "worker.heartbeat_seconds": 1.0,
}

#: What it sets where there is to be trouble: longer, and with an eye on what comes in.
TROUBLE: dict[str, Any] = {
    "aggregator.stop_after_rounds": 400,
    "aggregator.max_staleness": 10_000,
    # Not aggregator.norm_factor: so few rounds in, a good worker's update may be many times as long as the others'.
    "aggregator.max_norm": 100.0,
    "aggregator.quarantine_score": 4.0,
    "aggregator.quarantine_seconds": 600.0,
    "demo.workers": 6,
    "demo.slow_seconds": 4.0,
}
#: How the bad one trains: with steps that lead nowhere, and yet are finite.
BAD = {"worker.learning_rate": 50.0, "worker.clip_norm": 100.0}
#: When the one that is killed is killed.
KILL_ROUND = 10
LEAST_WITH_TROUBLE = 5
MOST_PORT = 65535


@dataclass(frozen=True, slots=True)
class Place:
    """Where the messages go."""

    url: str | None
    """None: the in-process broker."""
    admin: str


def demo_settings(file: Path | None, flags: Sequence[Flag]) -> Settings:
    """The settings of a demonstration: defaults of its own under the user's."""
    kinds: dict[str, type[Table]] = {"aggregator": AggregatorConfig, "worker": WorkerConfig}
    kinds |= {"dashboard": DashboardConfig, "demo": DemoConfig, "metrics": MetricsConfig}
    given = load(kinds, file=file, flags=flags)
    recipe = given.table("aggregator", AggregatorConfig).recipe()
    # Weights by examples are what this data is best trained with, and not every strategy goes with them.
    unfit = {"aggregator.weighting"} if gathers(strategy_of(recipe)) else set()
    trouble = given.table("demo", DemoConfig).trouble
    defaults = DEFAULTS | (TROUBLE if trouble else {})
    missing = [(key, value) for key, value in defaults.items() if key not in unfit.union(given.origins)]
    if "run" not in given.origins:
        task = dict(missing).get("worker.task") or given.table("worker", WorkerConfig).task
        name = re.sub(r"[^a-z0-9]+", "-", task.rpartition(":")[2].lower()).strip("-")[:40] or "demo"
        missing.append(("run", time.strftime(f"{name}-%Y%m%d-%H%M%S")))
    settings = load(kinds, file=file, flags=[*missing, *flags])
    if trouble and settings.table("demo", DemoConfig).workers < LEAST_WITH_TROUBLE:
        raise ConfigError(
            f"demo.workers: with trouble at least {LEAST_WITH_TROUBLE}, so that there are some that have none"
        )
    if settings.table("metrics", MetricsConfig).port + settings.table("demo", DemoConfig).workers + 1 > MOST_PORT:
        raise ConfigError(
            "metrics.port: each program gets a port from there on, and there are not so many; set a lower one"
        )
    return settings


def demo(settings: Settings, console: Console) -> Path:
    """Run it, show it, and return the folder with its results.

    Raises:
        FedmqError: a part of it failed; its last words are in the message.
    """
    stop = threading.Event()
    folder = run_folder(settings)
    with stop_on_signals(stop), ExitStack() as stack:
        _prepare(settings, console)
        place = _broker(settings, console, stack)
        config = _write_config(settings, folder)
        members = members_of(settings)
        _say_ports(members, place, settings, console)
        federation, monitor = _federation(settings, place, config=config, stack=stack)
        if settings.table("demo", DemoConfig).dashboard:
            _show_page(monitor, settings, console, stack)
        stack.enter_context(stopping(federation))
        monitor.rounds = settings.table("aggregator", AggregatorConfig).stop_after_rounds
        draw = partial(render, title=f"fedmq · run {settings.run}", footer=place.admin)
        display = Display(monitor, console, draw, kinds=("version",))
        with display:
            waiting = [member for member in members if member.after_round > 0]
            for member in members:
                if member.command != "aggregator":
                    monitor.expect(
                        member.name, f"after round {member.after_round}" if member in waiting else "starting"
                    )
                if member not in waiting and not stop.is_set():  # a signal may have come while the node started
                    federation.start(member)
            to_kill = [member for member in members if member.killed_at]
            while federation.is_running("aggregator") and not stop.wait(0.2):
                federation.check()
                for member in [m for m in to_kill if monitor.version >= m.killed_at]:
                    federation.kill(member.name)
                    to_kill.remove(member)
                display.refresh()
                for member in [m for m in waiting if monitor.version >= m.after_round]:
                    monitor.expect(member.name, "starting")
                    federation.start(member)
                    waiting.remove(member)
            if not stop.is_set():
                federation.check(["aggregator"])
                federation.wait(settings.table("demo", DemoConfig).finish_seconds)
    if stop.is_set():
        again = f"'fedmq demo --run {settings.run}' with the same settings goes on from there"
        console.print(f"[yellow]stopped[/]; what was done is in {folder}; {again}", soft_wrap=True, highlight=False)
    else:
        _summarise(folder, console)
    return folder


def _prepare(settings: Settings, console: Console) -> None:
    store = CheckpointStore(checkpoint_folder(settings), settings.run)
    if store.files():
        console.print(f"run {settings.run} goes on where its checkpoint stands")
        return
    task = settings.table("worker", WorkerConfig).task
    with bar(f"initial parameters from {task}"):
        snapshot = initialise(settings)
    size = sum(array.size for array in snapshot.parameters.values())
    console.print(f"initial parameters from {task}: {size:,} in {len(snapshot.parameters)} tensors")


def _broker(settings: Settings, console: Console, stack: ExitStack) -> Place:
    """A broker that the user named, or a private one, or none."""
    in_process = settings.table("demo", DemoConfig).in_process
    if not in_process and ("broker.url" in settings.origins or "broker.url_file" in settings.origins):
        _require_broker(settings)
        admin = settings.broker.management_url
        return Place(",".join(settings.broker.urls()), f"admin UI: {redacted(admin)}" if admin else "")
    available, reason = PrivateNode.available()
    if (in_process or not available) and settings.table("demo", DemoConfig).trouble:
        raise ConfigError(f"demo.trouble: a thread cannot be killed, and there is no RabbitMQ ({reason or 'as asked'})")
    if in_process or not available:
        why = "as asked" if in_process else reason
        console.print(f"[yellow]no RabbitMQ ({why}): the in-process broker and threads instead of processes[/]")
        return Place(None, "in-process broker: no admin UI")
    port = settings.table("metrics", MetricsConfig).port
    node = PrivateNode(plugins=("rabbitmq_management", *(["rabbitmq_prometheus"] if port else [])))
    with bar("starting a private RabbitMQ node"):
        started: AbstractContextManager[PrivateNode] = node
        stack.enter_context(started)
    login = f"user {node.user}, password {node.password}"
    if port:
        console.print(f"RabbitMQ's metrics while this runs: {node.prometheus_url}", soft_wrap=True)
    console.print(f"RabbitMQ's admin UI while this runs: {node.management_url} ({login})", soft_wrap=True)
    console.print(
        # Not by --broker: what is on a command line, everybody on the machine can read.
        f"from another terminal: FEDMQ_BROKER_URL={node.url} fedmq status --watch --run {settings.run}",
        soft_wrap=True,
    )
    return Place(node.url, f"admin UI: {node.management_url}\n{login}")


def _require_broker(settings: Settings) -> None:
    """Connect once: members would wait for a broker that is away, and say so in their logs only.

    Raises :class:`BrokerError`. As a worker, who declares nothing.
    """
    where = ", ".join(redacted(url) for url in settings.broker.urls())
    probe = AmqpWorkerTransport(settings.broker, Topology(settings.run), worker="demo")
    with bar(f"connecting to {where}"):
        try:
            probe.open(lambda _item: None, wait=settings.broker.connect_timeout + 5)
        except BrokerUnreachable as error:
            raise BrokerUnreachable(f"{error}; is RabbitMQ running there? (broker.url is {where})") from None
        finally:
            probe.close()


def _write_config(settings: Settings, folder: Path) -> Path:
    """What all members read. The address, which holds the password, goes to them by the environment."""
    values = plain(settings)
    del values["broker"]["url"]
    values["broker"].pop("url_file", None)
    for own in ("name", "shard"):
        values["worker"].pop(own, None)
    file = folder / "fedmq.toml"
    file.write_text(tomli_w.dumps(values))
    return file


def members_of(settings: Settings) -> list[Member]:
    """The programs of a demonstration, each with what it has for itself."""
    config = settings.table("demo", DemoConfig)
    count = config.workers
    members = [
        Member("aggregator", "aggregator", {}),
        Member("evaluator", "evaluate", {"worker.name": "evaluator"}),
    ]
    for index in range(count):
        own: dict[str, str | int | float] = {"worker.name": f"w{index}", "worker.shard": f"{index}/{count}"}
        slow = index == count - 2
        if slow:
            own["worker.delay"] = config.slow_seconds
        if config.trouble and index == count - 3:
            own |= BAD
        late = config.late_round if index == count - 1 and count > 1 else 0
        killed = KILL_ROUND if config.trouble and index == count - 4 else 0
        members.append(Member(f"w{index}", "worker", own, after_round=late, killed_at=killed))
    port = settings.table("metrics", MetricsConfig).port
    # Each process serves its own figures, one port after the other.
    own_ports = [{"metrics.port": port + index} if port else {} for index in range(len(members))]
    return [replace(one, settings={**one.settings, **own}) for one, own in zip(members, own_ports, strict=True)]


def _say_ports(members: Sequence[Member], place: Place, settings: Settings, console: Console) -> None:
    """Where the members' metrics are, if they are wanted."""
    ports = [
        f"{member.name} {member.settings['metrics.port']}" for member in members if "metrics.port" in member.settings
    ]
    if ports and place.url is None:
        console.print("[yellow]no metrics[/]: threads of one process have none", soft_wrap=True)
    elif ports:
        address = settings.table("metrics", MetricsConfig).address
        console.print(f"metrics while this runs, at {address}, ports: {', '.join(ports)}", soft_wrap=True)


def _federation(
    settings: Settings, place: Place, *, config: Path, stack: ExitStack
) -> tuple[Processes | Threads, Monitor]:
    if place.url is None:

        def resolve(member: Member) -> Settings:
            return load({"worker": WorkerConfig}, file=config, flags=list(member.settings.items()))

        threads = Threads(settings, resolve)
        monitor = Monitor(settings.run)
        threads.broker.watch(settings.run, monitor.take)
        return threads, monitor
    broker = settings.broker.model_copy(update={"url": SecretStr(place.url), "url_file": None})
    monitor = stack.enter_context(watching(BrokerConfig.model_validate(broker), settings.run))
    return Processes(config=config, url=place.url, logs=run_folder(settings) / "logs"), monitor


def _show_page(monitor: Monitor, settings: Settings, console: Console, stack: ExitStack) -> None:
    """Serve the live page, or say why not: the demonstration does without."""
    config = settings.table("dashboard", DashboardConfig)
    try:
        url = stack.enter_context(page_of(monitor, config, run_folder(settings), any_port=True))
    except FedmqError as error:
        console.print(Text(f"no live page: {error}", style="yellow"), soft_wrap=True)
        return
    taken = "" if config.port in (0, urlsplit(url).port) else f" (port {config.port} is taken)"
    console.print(f"live page while this runs: {url}{taken}", soft_wrap=True)
    if exposure := config.exposure():
        console.print(Text(f"warning: {exposure}", style="yellow"), soft_wrap=True)


def _summarise(folder: Path, console: Console) -> None:
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError) as error:
        raise FedmqError(f"the run left no summary: {error}; its logs are in {folder / 'logs'}") from None
    grid = Grid.grid(padding=(0, 2))
    updates = summary["updates"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in updates["rejected_by_reason"].items())
    grid.add_row("rounds", str(summary["rounds"]))
    for name, value in sorted(summary["evaluation"].items()):
        grid.add_row(f"final test {name}", "not finite" if value is None else f"{value:.4f}")
    grid.add_row(
        "updates", f"{updates['confirmed']} confirmed, {updates['applied']} applied, {updates['rejected']} rejected"
    )
    if reasons:
        grid.add_row("", reasons)
    grid.add_row("seconds", f"{summary['seconds']:.1f}")
    grid.add_row("results", str(folder))
    if (report := folder / REPORT_FILE).exists():
        grid.add_row("report", str(report))
    console.print(grid)
