"""Accuracy against bytes: the same training with updates in each code.

    python -m benchmarks.accuracy --tasks digits text --seeds 3

A federation in virtual time: the product's round machine, wire format, codecs and trainer, with four workers that are
equally fast, so that figures do not depend on the machine. Everybody takes each version whole. ``digits`` are the
images of handwritten digits, unlike for each worker; ``text`` is a small transformer that says which character of
Python's manual comes next. Accuracy is that of the last version on what was held out, in percent; the difference is
to the same seeds without a code, and its error is the standard error of its mean over the seeds.

Figures and versions: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from aggregator.config import AggregatorConfig
from benchmarks.lessons import sow
from fedmq.simulation.run import simulate
from fedmq.simulation.scenario import (
    AttackTable,
    DataTable,
    FaultsTable,
    NetworkTable,
    ObjectiveTable,
    PopulationTable,
    RunTable,
    Scenario,
)
from worker_client.config import WorkerConfig

CODECS = ("", "bf16", "fp16", "int8", "eden:4", "eden:3", "eden:2", "eden:1", "topk:0.1", "topk:0.01")
WORKERS = 4
MB = 1_000_000


@dataclass(frozen=True, slots=True)
class Course:
    """What is learned, and how."""

    versions: int
    worker: Mapping[str, Any]


COURSES = {
    "digits": Course(
        40, {"task": "benchmarks.lessons:Images", "local_epochs": 2, "learning_rate": 0.05, "batch_size": 32}
    ),
    "text": Course(
        25,
        {
            "task": "benchmarks.lessons:Characters",
            "local_steps": 40,
            "batch_size": 8,
            "optimizer": "adamw",
            "learning_rate": 0.003,
            "clip_norm": 1.0,
        },
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One task in one code."""

    task: str
    codec: str
    seeds: int
    megabytes_up: float
    """Of all updates together, a run."""
    accuracy: float
    """Percent, the mean over the seeds."""
    difference: float
    """Points, to the same without a code."""
    error: float
    """Of the difference; NaN for one seed."""


def scenario_of(course: Course, codec: str, seed: int, versions: int) -> Scenario:
    """A training in which four workers send one update for each version."""
    return Scenario(
        run=RunTable(name="accuracy", seed=seed, versions=versions, evaluate_every=versions),
        aggregator=AggregatorConfig(
            rounds="synchronous", minimum_updates=WORKERS, update_codec=codec, seed=seed, stop_after_rounds=versions
        ),
        worker=WorkerConfig(**course.worker),
        population=PopulationTable(workers=WORKERS),
        network=NetworkTable(),
        faults=FaultsTable(),
        data=DataTable(),
        attack=AttackTable(),
        objective=ObjectiveTable(kind="task"),
    )


def train(course: Course, codec: str, seed: int, versions: int) -> tuple[float, float]:
    """Bytes that workers have sent, and the accuracy of the last version."""
    sow(seed)
    result = simulate(scenario_of(course, codec, seed, versions))
    return float(result.bytes_up), result.points[-1].metrics["accuracy"]


def row_of(task: str, codec: str, runs: Sequence[tuple[float, float]], plain: Sequence[tuple[float, float]]) -> Row:
    """The figures of ``runs``, beside those of the same seeds in no code."""
    differences = [100 * (mine - other) for (_, mine), (_, other) in zip(runs, plain, strict=True)]
    spread = statistics.stdev(differences) if len(differences) > 1 else math.nan
    return Row(
        task=task,
        codec=codec,
        seeds=len(runs),
        megabytes_up=statistics.mean(nbytes for nbytes, _ in runs) / MB,
        accuracy=100 * statistics.mean(accuracy for _, accuracy in runs),
        difference=statistics.mean(differences),
        error=spread / math.sqrt(len(runs)),
    )


def shown(row: Row, plain: Row) -> str:
    """A line of the table."""
    error = "" if math.isnan(row.error) else f" ± {row.error:.2f}"
    difference = "" if not row.codec else f"{row.difference:+.2f}{error}"
    times = f"{plain.megabytes_up / row.megabytes_up:.1f}"
    codec = row.codec or "(none)"
    return f"| {row.task} | {codec} | {row.megabytes_up:.2f} | {times} | {row.accuracy:.2f} | {difference} |"


def main() -> None:
    """Train and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=sorted(COURSES), default=sorted(COURSES))
    parser.add_argument("--codecs", nargs="+", default=[codec for codec in CODECS if codec], help="beside none at all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--versions", type=int, help="for a first look: versions of each training")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    print("| task | code of updates | MB up | times less | accuracy % | points to none |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for task in arguments.tasks:
        course = COURSES[task]
        if arguments.versions:
            course = dataclasses.replace(course, versions=arguments.versions)
        plain = [train(course, "", seed, course.versions) for seed in range(arguments.seeds)]
        first = row_of(task, "", plain, plain)
        for codec in ("", *arguments.codecs):
            runs = [train(course, codec, seed, course.versions) for seed in range(arguments.seeds)] if codec else plain
            rows.append(row_of(task, codec, runs, plain))
            print(shown(rows[-1], first), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
