"""Small scenarios for tests of the simulator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from fedmq.simulation.scenario import Scenario, load_scenario

__all__ = ["SMALL", "scenario_of", "written"]

#: Twelve workers of unlike speed on a small quadratic, 200 updates in rounds of five.
SMALL: Mapping[str, Mapping[str, Any]] = {
    "run": {"name": "small", "updates": 200},
    "aggregator": {"buffer_size": 5, "max_staleness": 100},
    "population": {"workers": 12, "speed": "lognormal"},
    "objective": {"dimensions": 4},
}


def written(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """:data:`SMALL` with ``changes``, by ``table.key``, as a file in ``folder``; None leaves a key out."""
    tables: dict[str, dict[str, Any]] = {name: dict(table) for name, table in SMALL.items()}
    for key, value in (changes or {}).items():
        table, _, name = key.partition(".")
        tables.setdefault(table, {})[name] = value
        if value is None:
            del tables[table][name]
    file = folder / "scenario.toml"
    file.write_text(tomli_w.dumps(tables))
    return file


def scenario_of(folder: Path, changes: Mapping[str, Any] | None = None) -> Scenario:
    """What :func:`written` gives, read."""
    return load_scenario(written(folder, changes))
