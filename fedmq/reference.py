"""``python -m fedmq.reference > docs/configuration.md``: every setting, from the tables' own docstrings.

With ``scenario``, those of ``fedmq simulate``: ``docs/scenario.md``. With ``metrics``, every series that Prometheus
finds: ``docs/metrics.md``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, get_args

from annotated_types import Ge, Gt, Le, Lt
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from aggregator.config import AggregatorConfig
from aggregator.metrics import SERIES as AGGREGATOR_SERIES
from broker.metrics import BROKER_SERIES, BUILD, Series
from broker.parts import Name
from broker.settings import BrokerConfig, LogConfig, MetricsConfig, Table
from fedmq.dashboard.config import DashboardConfig
from fedmq.demo import DemoConfig
from fedmq.simulation.scenario import KINDS
from fedmq.simulation.sweep import SweepTable
from worker_client.config import WorkerConfig
from worker_client.metrics import SERIES as WORKER_SERIES

__all__ = ["SCENARIO", "SERIES", "TABLES", "metrics_reference", "reference", "scenario_reference"]

TABLES: Mapping[str, type[Table]] = {
    "broker": BrokerConfig,
    "aggregator": AggregatorConfig,
    "worker": WorkerConfig,
    "metrics": MetricsConfig,
    "dashboard": DashboardConfig,
    "log": LogConfig,
    "demo": DemoConfig,
}

#: Of a scenario; ``[aggregator]`` and ``[worker]`` are those above.
SCENARIO: Mapping[str, type[Table]] = {
    **{name: table for name, table in KINDS.items() if name not in TABLES},
    "sweep": SweepTable,
}

#: All that is exported, by who does it.
SERIES: Mapping[str, tuple[Series, ...]] = {
    "The aggregator": AGGREGATOR_SERIES,
    "Workers and evaluators": WORKER_SERIES,
    "Both": (BUILD, *BROKER_SERIES),
}

METRICS_HEAD = """\
# Metrics

*The tables are made by `make docs` from the code.*

Aggregator, workers and evaluators serve figures for Prometheus at `http://ADDRESS:PORT/metrics`, each process its own:

```sh
fedmq aggregator --run digits --set metrics.port=9464
fedmq worker --run digits --name w1 --set metrics.port=9465    # on one machine each process needs its own port
fedmq demo --set metrics.port=9464                             # each program gets one, from there on
```

Without `metrics.port` nothing is served and nothing counted. `metrics.address` is this machine alone (127.0.0.1) unless
it is set; there is no password, so open it to a network of your own only. If the port is taken there is one warning,
and the run goes on. In the containers of `docker-compose.yml` metrics are on (port 9464 inside, not published);
`docker compose --profile monitoring up` starts Prometheus and Grafana beside them, with a dashboard and alerts:
[operating.md](operating.md#from-grafana).

Every series of an aggregator has the label `run`, those of a worker or evaluator `run`, `worker` and `role`. The names
of workers that an aggregator tells of are bounded: the first `metrics.workers` (100) have series of their own, all
others share `worker="other"`, which has counters alone. Prometheus adds what it scraped as `instance` and `job`; after
a takeover another aggregator's counters go on, so sum over them: `sum by (run) (rate(…[5m]))`. Counters begin at 0 with
each process. The process's own figures (`process_resident_memory_bytes`, `process_cpu_seconds_total`,
`process_open_fds`, …) are there as well. A standby shows `fedmq_aggregator_leads 0` and little else.
"""

SCENARIO_HEAD = """\
# Settings of a scenario

*Made by `make docs` from the docstrings in the code.*

What `fedmq simulate SCENARIO` reads; [simulation.md](simulation.md) explains it. `[aggregator]` and `[worker]` are the
tables of [configuration.md](configuration.md). All times are virtual seconds. `--set table.key=value` goes before the
file; environment variables are not looked at. An unknown key or a wrong value is an error that names it.
"""

HEAD = """\
# Settings

*Made by `make docs` from the docstrings in the code.*

From `fedmq.toml` in the working directory (or `--config FILE`), environment variables (`FEDMQ_<TABLE>_<KEY>`, such
as `FEDMQ_AGGREGATOR_BUFFER_SIZE=8`; `FEDMQ_RUN` for the run's name) and flags (`--set aggregator.buffer_size=8`), in
rising precedence. `fedmq config` prints what is in force and where each value came from. An unknown key or a wrong
value is an error that names the key, where it was set and what is allowed (in the tables that a command uses;
`fedmq config` looks at all). On Kubernetes no Service should be called `fedmq` or `fedmq-…`: it would put
variables of its own, such as `FEDMQ_METRICS_PORT=tcp://…`, into every container.

`run` stands at the top of the file: the run's name, 1 to 64 letters, digits, `-` and `_`. Many runs share a broker.
"""


def reference() -> str:
    """The page in Markdown."""
    return _page(HEAD, TABLES)


def scenario_reference() -> str:
    """The page of a scenario's settings in Markdown."""
    return _page(SCENARIO_HEAD, SCENARIO)


def metrics_reference() -> str:
    """The page of all series in Markdown."""
    return METRICS_HEAD + "".join(_series(title, series) for title, series in SERIES.items())


def _series(title: str, series: Iterable[Series]) -> str:
    rows = "".join(
        f"| `{one.name}` | {one.kind} | {', '.join(f'`{label}`' for label in one.labels)} | {one.help} |\n"
        for one in series
    )
    return f"\n## {title}\n\n| series | type | labels | meaning |\n| --- | --- | --- | --- |\n{rows}"


def _page(head: str, tables: Mapping[str, type[Table]]) -> str:
    parts = [head]
    for name, table in tables.items():
        what = (table.__doc__ or "").strip().splitlines()[0]
        parts.append(f"\n## `[{name}]`\n\n{what}\n\n| key | default | allowed | meaning |\n| --- | --- | --- | --- |\n")
        parts += [_row(key, field) for key, field in table.model_fields.items()]
    return "".join(parts).replace("``", "`")


def _row(key: str, field: FieldInfo) -> str:
    meaning = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"| `{key}` | {_default(field)} | {_allowed(field)} | {meaning} |\n"


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "the host's name"
    value: Any = field.default
    if value is None:
        return ""
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, Enum):
        value = value.value
    return f"`{json.dumps(value)}`"


def _allowed(field: FieldInfo) -> str:
    choices = [*_choices(field.annotation), *_names(field)]
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    signs = {Ge: "≥", Gt: "&gt;", Le: "≤", Lt: "&lt;"}
    bounds = [(signs[type(rule)], _bound(rule)) for rule in _rules(field) if type(rule) in signs]
    return ", ".join(f"{sign} {bound:g}" if bound < 10**6 else f"{sign} {bound:.0f}" for sign, bound in bounds)


def _choices(annotation: Any) -> list[str]:
    """What a Literal or an enumeration allows, also inside ``… | None``."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [member.value for member in annotation]
    found: list[str] = []
    for argument in get_args(annotation):
        found += [argument] if isinstance(argument, str) else _choices(argument)
    return found


def _names(field: FieldInfo) -> list[str]:
    """The names that come with fedmq, where a setting names a part."""
    functions = (getattr(rule, "func", None) for rule in field.metadata)
    return [name for function in functions if isinstance(function, Name) for name in function.parts.own]


def _rules(field: FieldInfo) -> list[Any]:
    """Bounds on the field, also inside ``Annotated[…] | None``."""
    rules = list(field.metadata)
    for argument in get_args(field.annotation):
        for rule in getattr(argument, "__metadata__", ()):
            rules += rule.metadata if isinstance(rule, FieldInfo) else [rule]
    return rules


def _bound(rule: Any) -> float:
    return float(next(getattr(rule, name) for name in ("ge", "gt", "le", "lt") if hasattr(rule, name)))


if __name__ == "__main__":
    pages = {"scenario": scenario_reference, "metrics": metrics_reference}
    sys.stdout.write(pages.get("".join(sys.argv[1:]), reference)())
