"""``fedmq runs``: all runs on a broker."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import SecretStr
from rich.markup import escape
from rich.table import Table as Grid

from broker.admin import Admin
from broker.amqp.look import Count, counts, newest_versions
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
from broker.errors import BrokerError
from broker.settings import BrokerConfig, Settings
from broker.topology import Topology
from fedmq.monitoring.text import clean

__all__ = ["RunFacts", "run_of", "runs", "runs_in", "table_of"]

#: A run's or a worker's name has no dot in it.
KINDS = "updates|control|turn|dead|parameters|chunks|outbox|notice|events"
NAME = re.compile(rf"fedmq\.([A-Za-z0-9_-]{{1,64}})\.({KINDS})(?:\.(.+))?")
COLUMNS = "vhost,name,messages,messages_ready,messages_unacknowledged,message_bytes,consumers"
ASK_SECONDS = 10.0


@dataclass(slots=True)
class RunFacts:
    """One run as a broker knows it. None is what could not be learnt."""

    run: str
    vhost: str
    version: int | None = None
    epoch: int | None = None
    active: bool | None = False
    """Whether an aggregator takes updates."""
    standby: int | None = 0
    """Aggregators that wait for their turn."""
    workers: list[str] | None = None
    """Names of workers and evaluators that are connected."""
    waiting: int = 0
    """Updates that wait for the aggregator."""
    unacked: int | None = 0
    """Updates that it has and that are in no checkpoint yet."""
    dead: int = 0
    bytes: int | None = 0
    """Of all messages in the run's queues."""


def runs(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    broker: BrokerOption = None,
    as_json: JsonOption = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """List the runs on a broker: version, aggregators, workers, what waits, dead letters, bytes.

    From the management API, in all virtual hosts that this user may see; the newest version from the run's stream. With
    --run that one alone, also where there is no management API.

    Example: fedmq runs
    """
    with broker_command(config, run, broker, settings, verbose) as read:
        wanted = None if read.origin("run").kind == "default" else read.run
        with bar("looking at the broker"):
            found, missing = _look(read, wanted)
        if as_json:
            say(json.dumps({"runs": [asdict(one) for one in found], "missing": missing}, indent=2))
            return
        if found:
            say_table(table_of(found))
        else:
            say(f"run {wanted!r} is not on this broker" if wanted else "there is no run on this broker")
        for text in missing:
            errors.print(f"not known: {text}", highlight=False, markup=False)


def _look(read: Settings, wanted: str | None) -> tuple[list[RunFacts], list[str]]:
    """The runs, and what could not be learnt."""
    admin = Admin.of(read.broker, timeout=ASK_SECONDS)
    try:
        rows: Any = admin.get(f"/queues?columns={COLUMNS}")
        found = runs_in(rows)
    except BrokerError as error:
        if wanted is None:
            raise type(error)(
                f"{error}. Over AMQP alone runs cannot be listed: enable it (rabbitmq-plugins enable "
                "rabbitmq_management), set broker.management_url, or look at one run with --run"
            ) from None
        topology = Topology(wanted)
        seen = counts(read.broker, topology)
        found = [run_of(topology, admin.vhost, seen)] if topology.updates in seen else []
        missing = [f"who the workers are, outboxes, bytes and unacknowledged messages ({error})"]
    else:
        found = [one for one in found if wanted in {None, one.run}]
        missing = []
    for vhost in dict.fromkeys(one.vhost for one in found):
        here = [one for one in found if one.vhost == vhost]
        try:
            newest = newest_versions(_in_vhost(read.broker, vhost), [one.run for one in here])
        except BrokerError as error:
            missing.append(f"versions of the runs in virtual host {vhost!r} ({error})")
            continue
        for one in here:
            one.epoch, one.version = newest.get(one.run, (None, None))
    return found, missing


def runs_in(rows: object) -> list[RunFacts]:
    """The runs whose queues are among ``rows`` of the management API, by virtual host and name.

    Raises :class:`BrokerError` if these are no rows of queues.
    """
    found: dict[tuple[str, str], RunFacts] = {}
    for row in _objects(rows):
        vhost, match = str(row.get("vhost", "/")), NAME.fullmatch(str(row.get("name", "")))
        if match is None:
            continue
        run, what, rest = match.groups()
        facts = found.setdefault((vhost, run), RunFacts(run, vhost, workers=[]))
        _add(facts, what, rest or "", row)
    return [found[key] for key in sorted(found)]


def _add(facts: RunFacts, what: str, rest: str, row: Mapping[str, Any]) -> None:
    consumers = _whole(row.get("consumers"))
    if what == "updates":
        facts.waiting, facts.unacked = _whole(row.get("messages_ready")), _whole(row.get("messages_unacknowledged"))
        facts.active = consumers > 0
    elif what == "turn":
        facts.standby = max(0, consumers - 1)
    elif what == "dead":
        facts.dead = _whole(row.get("messages"))
    elif what == "notice" and facts.workers is not None and consumers:
        # The queue of a worker's notices stays for some time after it.
        facts.workers = sorted({*facts.workers, rest})
    facts.bytes = (facts.bytes or 0) + _whole(row.get("message_bytes"))


def run_of(topology: Topology, vhost: str, seen: Mapping[str, Count]) -> RunFacts:
    """A run as AMQP alone knows it: no names, nothing of what is in somebody's hands."""
    none = Count(0, 0)
    turn, updates = seen.get(topology.turn, none), seen.get(topology.updates, none)
    return RunFacts(
        topology.run,
        vhost,
        active=updates.consumers > 0,
        standby=max(0, turn.consumers - 1),
        waiting=updates.ready,
        unacked=None,
        dead=seen.get(topology.dead, none).ready,
        bytes=None,
    )


def _objects(rows: object) -> Iterable[Mapping[str, Any]]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BrokerError("the management API answers in a form that fedmq does not know: another version?")
    return rows


def _in_vhost(config: BrokerConfig, vhost: str) -> BrokerConfig:
    """``config`` for another virtual host."""
    urls = (urlsplit(url)._replace(path=f"/{quote(vhost, safe='')}") for url in config.urls())
    return config.model_copy(update={"url": SecretStr(",".join(map(urlunsplit, urls))), "url_file": None})


def table_of(found: Sequence[RunFacts]) -> Grid:
    """As a terminal shows them."""
    hosts = {one.vhost for one in found}
    table = Grid(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", no_wrap=True)
    if len(hosts) > 1:
        table.add_column("virtual host")
    table.add_column("aggregator")
    for name in ("version", "epoch", "members", "waiting", "unacked", "dead", "bytes"):
        table.add_column(name, justify="right")
    for one in found:
        aggregator = ("active" if one.active else "none") + (f", {one.standby} standing by" if one.standby else "")
        workers = None if one.workers is None else len(one.workers)
        numbers = (one.version, one.epoch, workers, one.waiting, one.unacked, one.dead, one.bytes)
        hosts_cell = [escape(clean(one.vhost))] if len(hosts) > 1 else []
        table.add_row(one.run, *hosts_cell, aggregator, *("" if n is None else f"{n:,}" for n in numbers))
    return table


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
