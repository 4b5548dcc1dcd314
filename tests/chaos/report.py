"""What a run of chaos gave, as tables for people and as JSON."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.chaos.judge import Verdict
from tests.chaos.nemesis import KILLS, KINDS, Done

__all__ = ["Report", "show"]

#: A fault is undisturbed if there was a version so many seconds before it, and no other fault.
AT_WORK, ALONE = 1.0, 8.0


@dataclass
class Report:
    """A run of chaos from beginning to end."""

    seed: int
    seconds: float
    done: Sequence[Done]
    missed: Mapping[str, int]
    made: Sequence[float]
    """When each version was made, seconds since 1970, rising."""
    verdict: Verdict
    load: str = "whole"
    problems: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether the promise was kept."""
        return self.verdict.is_good and not self.problems

    @property
    def kills(self) -> int:
        """SIGKILLs."""
        return sum(done.fault.kind in KILLS for done in self.done)

    @property
    def longest_gap(self) -> float:
        """Longest time without a new version, in seconds."""
        return max((after - before for before, after in zip(self.made, self.made[1:], strict=False)), default=0.0)

    def recovery(self, *, from_healing: bool) -> dict[str, list[float]]:
        """By kind of fault, seconds until the next new version: after the fault, or after its cause was gone."""
        times: dict[str, list[float]] = defaultdict(list)
        for done in self.done:
            begin = done.healed if from_healing else done.at
            index = bisect_right(self.made, begin)
            if begin and index < len(self.made):
                times[done.fault.kind].append(self.made[index] - begin)
        return times

    def undisturbed(self) -> dict[str, list[float]]:
        """The same from the fault, of faults that met a run at work and had nothing else near them."""
        times: dict[str, list[float]] = defaultdict(list)
        moments = sorted(done.at for done in self.done)
        for done in self.done:
            index = bisect_right(self.made, done.at)
            if not 0 < index < len(self.made) or done.at - self.made[index - 1] > AT_WORK:
                continue
            begin, end = done.at - ALONE, self.made[index]
            if bisect_right(moments, end) - bisect_right(moments, begin) == 1:
                times[done.fault.kind].append(end - done.at)
        return times

    def plain(self) -> dict[str, Any]:
        """For a file."""
        return {
            "seed": self.seed,
            "load": self.load,
            "seconds": round(self.seconds, 1),
            "good": self.is_good,
            "kills": self.kills,
            "longest gap": round(self.longest_gap, 2),
            "verdict": {name: _plain(value) for name, value in vars(self.verdict).items()},
            "problems": self.problems,
            "faults": [asdict(done.fault) | {"target": done.target, "at": done.at} for done in self.done],
            "missed": dict(self.missed),
            "recovery": {kind: _spread(times) for kind, times in self.recovery(from_healing=False).items()},
            "undisturbed": {kind: _spread(times) for kind, times in self.undisturbed().items()},
        }


def _plain(value: Any) -> Any:
    return [str(item) for item in value] if isinstance(value, list) else value


def _spread(times: Sequence[float]) -> tuple[float, float, float]:
    """Median, 95th percentile (the smallest time that no more than 5 % exceed), maximum."""
    ordered = sorted(times)
    return statistics.median(ordered), ordered[-(-len(ordered) * 95 // 100) - 1], ordered[-1]


def show(report: Report, console: Console) -> None:
    """Print the tables."""
    console.print(_faults(report))
    console.print(_updates(report))
    for problem in (*report.problems, *report.verdict.problems):
        console.print(f"[bold red]wrong:[/] {problem}")
    verdict = "[bold green]nothing lost, nothing twice[/]" if report.is_good else "[bold red]THE PROMISE IS BROKEN[/]"
    times = f"{report.seconds:.0f} s, {len(report.done)} faults, {report.kills} kills"
    console.print(f"{verdict}: load {report.load}, seed {report.seed}, {times}")


def _faults(report: Report) -> Table:
    table = Table(title="Faults, and seconds until the next new version (median, 95 %, longest)")
    for name in ("fault", "times", "found nobody", "from the fault", "if undisturbed", "from its end"):
        table.add_column(name, justify="left" if name == "fault" else "right")
    counts = Counter(done.fault.kind for done in report.done)
    columns = report.recovery(from_healing=False), report.undisturbed(), report.recovery(from_healing=True)
    for kind in KINDS:
        if counts[kind] or report.missed.get(kind):
            spreads = (_shown(times.get(kind, [])) for times in columns)
            table.add_row(kind, str(counts[kind]), str(report.missed.get(kind, 0)), *spreads)
    return table


def _shown(times: Sequence[float]) -> str:
    return " · ".join(f"{time:.2f}" for time in _spread(times)) if times else ""


def _updates(report: Report) -> Table:
    verdict = report.verdict
    table = Table(title="Updates", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows: list[tuple[str, object]] = [
        ("issued", verdict.issued),
        ("confirmed", verdict.confirmed),
        ("indeterminate (a worker died before it knew)", verdict.indeterminate),
        ("  of these applied", verdict.settled),
        ("applied", verdict.applied),
        ("lost", len(verdict.lost)),
        ("doubled", len(verdict.doubled)),
        ("versions, each made again from the history", verdict.versions),
        ("longest time without a new version", f"{report.longest_gap:.1f} s"),
    ]
    for what, value in rows:
        colour = "red" if what in {"lost", "doubled"} and value else "default"
        table.add_row(what, f"[{colour}]{value}[/]")
    return table
