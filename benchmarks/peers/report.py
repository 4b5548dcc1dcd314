"""The table for docs/benchmarks.md, and the same as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.peers.fedmq import HOW, NAME
from benchmarks.peers.trial import Outcome, Plan, System

__all__ = ["Machine", "Report"]


@dataclass(frozen=True)
class Machine:
    """Where it was measured. ``load`` is the number of processes that wanted to run, over the last minute."""

    cores: int
    processor: str
    memory: int
    system: str
    python: str
    load: float

    @classmethod
    def here(cls) -> Machine:
        """This one, now."""
        facts = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in facts if line.startswith("model name")]
        return cls(
            cores=len(os.sched_getaffinity(0)),
            processor=names[0] if names else platform.machine(),
            memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            system=f"{platform.system()} {platform.release()}",
            python=platform.python_version(),
            load=os.getloadavg()[0],
        )

    def line(self) -> str:
        """For people."""
        return (
            f"{self.cores} cores of {self.processor}, {self.memory / 1e9:.0f} GB, {self.system}, Python {self.python}; "
            f"load {self.load:.1f} before the first system was started"
        )


@dataclass(frozen=True)
class Report:
    """All that was measured, in the order in which it was measured."""

    command: str
    machine: Machine
    plan: Plan
    systems: Sequence[System]
    versions: Mapping[str, Mapping[str, str]]
    """By system: what its environment holds."""
    outcomes: Sequence[Outcome]
    reasons: Mapping[str, str]
    """By system: why there is nothing of it at all."""

    def title(self, name: str) -> str:
        """A system's name in the table."""
        for system in self.systems:
            if system.name == name:
                return system.title.format(version=self.versions.get(name, {}).get(system.package, "?"))
        return name

    def markdown(self) -> str:
        """A row for each system, two columns for each size, and what belongs to it."""
        sizes = sorted({outcome.mb for outcome in self.outcomes})
        names = list(dict.fromkeys([outcome.system for outcome in self.outcomes] + list(self.reasons)))
        heads = [f"{mb:g} MB: s/round" for mb in sizes]
        heads += [f"{mb:g} MB: memory" for mb in sizes]
        found = {(outcome.system, outcome.mb): outcome for outcome in self.outcomes}
        lines = [_row(["system", *heads]), _row(["---"] * (len(heads) + 1))]
        for name in names:
            if name in self.reasons:
                lines.append(_row([self.title(name), self.reasons[name], *[""] * (len(heads) - 1)]))
                continue
            row = [found.get((name, mb)) for mb in sizes]
            lines.append(_row([self.title(name), *map(_seconds, row), *map(_memory, row)]))
        return "\n".join([f"`{self.command}`", "", self.machine.line() + ".", "", *lines, "", *self._notes(names)])

    def _notes(self, names: Sequence[str]) -> list[str]:
        plan = self.plan
        heading = (
            f"Medians of {plan.rounds} rounds after {plan.warm_up} to warm up; {plan.workers} workers; a model of one "
            "float32 tensor; memory in MB: the peak of the largest of the server's processes / of all together."
        )
        notes = [heading, ""]
        for system in self.systems:
            if system.name in names:
                installed = self.versions.get(system.name, {})
                shown = ", ".join(f"{key} {installed[key]}" for key in _SHOWN if key in installed)
                notes.append(f"- {self.title(system.name)}: {system.how}. {shown}".rstrip(". ") + ".")
        return [*notes, f"- {NAME}: {HOW}."] if NAME in names else notes

    def json(self) -> str:
        """Everything, for another program."""
        content = {
            "command": self.command,
            "machine": asdict(self.machine),
            "plan": asdict(self.plan),
            "systems": {
                system.name: {"how": system.how, "versions": dict(self.versions.get(system.name, {}))}
                for system in self.systems
            },
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "reasons": dict(self.reasons),
        }
        return json.dumps(content, indent=2) + "\n"


_SHOWN = ("numpy", "grpcio", "protobuf", "httpx", "uvicorn")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _seconds(outcome: Outcome | None) -> str:
    if outcome is None:
        return "-"
    if outcome.failure:
        return f"failed: {outcome.failure}"
    return f"{outcome.median:.3g} ({min(outcome.seconds):.3g}-{max(outcome.seconds):.3g})"


def _memory(outcome: Outcome | None) -> str:
    if outcome is None or not outcome.largest:
        return "-"
    return f"{outcome.largest / 1e6:.0f} / {outcome.together / 1e6:.0f}"
