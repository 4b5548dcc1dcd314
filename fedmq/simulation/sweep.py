"""Several scenarios in one: variants, a grid of settings, seeds. Each cell is computed once, and kept.

A cell's file holds its result and the digest of its scenario, and appears when it is complete. A sweep that was cut
off goes on with the cells that are missing; one whose settings have changed is computed again.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import Field

from aggregator.config import AggregatorConfig
from broker.errors import ConfigError, FedmqError
from broker.messages import Scalar
from broker.settings import Flag, Origin, Table, load_tables
from fedmq.simulation.run import run_with_split
from fedmq.simulation.scenario import KINDS, Scenario, scenario_from

__all__ = ["Cell", "Outcome", "Sweep", "SweepTable", "load_sweep", "run_cells"]

#: Of the cells' files; another one is computed again. So are those of another release, which may calculate otherwise.
FORMAT = 2


class SweepTable(Table):
    """``[sweep]``: several scenarios in one file. Tables in it, ``variants`` and ``grid``, name other settings."""

    seeds: tuple[int, ...] = Field(default=(), max_length=1000)
    """Each variant is simulated once with each of these as ``run.seed``."""
    variants: dict[str, dict[str, Scalar | list[float]]] = {}  # noqa: RUF012 - pydantic copies defaults
    """Name of a variant, and its settings: ``"aggregator.rounds" = "synchronous"``."""
    grid: dict[str, list[Scalar]] = {}  # noqa: RUF012
    """A setting, and its values: every variant is simulated with each combination."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One scenario of a sweep."""

    variant: str
    scenario: Scenario

    @property
    def seed(self) -> int:
        """Of its chance."""
        return self.scenario.run.seed

    @property
    def file_name(self) -> str:
        """Of its result."""
        return f"{re.sub(r'[^A-Za-z0-9_.=-]+', '-', self.variant)}-seed{self.seed}.json"


@dataclass(frozen=True, slots=True)
class Sweep:
    """All cells, in the order of the file, and the setting that names them."""

    name: str
    cells: tuple[Cell, ...]
    is_sweep: bool
    """Whether the file has the table ``[sweep]``."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A cell that was computed, now or before: what its file holds."""

    variant: str
    seed: int
    result: Mapping[str, Any]
    split: Sequence[Sequence[int]] | None = None
    """Examples by worker and class."""
    took: float = 0.0
    """Seconds of real time."""


def load_sweep(file: Path, flags: Sequence[Flag] = ()) -> Sweep:
    """All scenarios of ``file``; each is checked before the first one is simulated.

    Raises :class:`ConfigError`; the message names the variant.
    """
    kinds: dict[str, type[Table]] = {**KINDS, "sweep": SweepTable}
    tables = load_tables(kinds, file=file, flags=flags)
    table, base = tables.pop("sweep"), scenario_from(tables)
    if not isinstance(table, SweepTable) or not table.model_fields_set:
        return Sweep(base.run.name, (Cell(base.run.name, base),), is_sweep=False)
    if table.seeds and any(flag[0] == "run.seed" for flag in flags):
        raise ConfigError(f"run.seed has no effect: [sweep] in {file} has seeds of its own; set sweep.seeds there")
    _require_effect(table, file)
    cells = []
    for variant, changes in _variants(table):
        for seed in table.seeds or (base.run.seed,):
            own = [(key, value, Origin("file", f"{file}, variant {variant}")) for key, value in changes.items()]
            wanted = load_tables(kinds, file=file, flags=[*own, ("run.seed", seed), *flags])
            cells.append(Cell(variant, scenario_from({name: wanted[name] for name in KINDS})))
    names = [cell.file_name for cell in cells]
    if len(set(names)) < len(names):
        raise ConfigError(f"{file}: two cells of [sweep] would have one name: give each seed and each value once")
    metrics = {cell.scenario.run.metric: cell.variant for cell in cells}
    if len(metrics) > 1 or len({cell.scenario.objective.kind for cell in cells}) > 1:
        raise ConfigError(
            f"{file}: the variants of [sweep] measure different things, so that they cannot stand in one "
            "table: give all of them the same objective.kind and run.metric"
        )
    return Sweep(base.run.name, tuple(cells), is_sweep=True)


def _require_effect(table: SweepTable, file: Path) -> None:
    """Raise :class:`ConfigError` for what would silently do nothing."""
    for name in itertools.chain(table.grid, *table.variants.values()):
        if name == "run.seed":
            raise ConfigError(f"{file}: run.seed in a variant or in sweep.grid has no effect: set sweep.seeds")
        if name.startswith("sweep."):
            raise ConfigError(f"{file}: {name} in a variant or in sweep.grid has no effect: set it in [sweep]")
    empty = [name for name, values in table.grid.items() if not values]
    if empty:
        raise ConfigError(f"{file}: sweep.grid has no value for {empty[0]}, so that there is nothing to simulate")


def _variants(table: SweepTable) -> Iterator[tuple[str, dict[str, Any]]]:
    variants: Mapping[str, Mapping[str, Any]] = table.variants or {"": {}}
    for (name, changes), values in itertools.product(variants.items(), itertools.product(*table.grid.values())):
        setting = dict(zip(table.grid, values, strict=True))
        shown = [f"{key.rpartition('.')[2]}={value}" for key, value in setting.items()]
        yield " ".join([name, *shown]).strip() or "base", {**changes, **setting}


def run_cells(
    sweep: Sweep, folder: Path, *, jobs: int, done: Callable[[Outcome, bool], None]
) -> tuple[list[Outcome], list[FedmqError]]:
    """Compute what ``folder`` lacks, in ``jobs`` processes.

    Args:
        sweep: what to compute.
        folder: where the cells' files are.
        jobs: processes; with one, all is computed in this one.
        done: hears of each cell, and whether it was there before.

    Returns:
        The outcomes in the order of the cells, and the errors of those that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Outcome] = {}
    missing = []
    for cell in sweep.cells:
        kept = _kept(folder / cell.file_name, cell)
        if kept is None:
            missing.append(cell)
        else:
            found[cell.file_name] = kept
            done(kept, True)
    failed: list[FedmqError] = []
    with closing(_computed(missing, folder, jobs)) as computed:
        for cell, outcome in computed:
            if isinstance(outcome, FedmqError):
                failed.append(outcome)
            else:
                found[cell.file_name] = outcome
                done(outcome, False)
    return [found[cell.file_name] for cell in sweep.cells if cell.file_name in found], failed


def _computed(cells: Sequence[Cell], folder: Path, jobs: int) -> Generator[tuple[Cell, Outcome | FedmqError]]:
    if min(jobs, len(cells)) <= 1:
        for cell in cells:
            yield cell, _compute(cell, folder / cell.file_name)
        return
    others = set(multiprocessing.active_children())
    # Fresh processes: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(cells)), mp_context=context, initializer=_leave_signals) as pool:
        running = {pool.submit(_compute, cell, folder / cell.file_name): cell for cell in cells}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except BrokenProcessPool:
            open_ = [
                f"{cell.variant}, seed {cell.seed}" for future, cell in running.items() if not _is_computed(future)
            ]
            raise FedmqError(
                f"a process of the sweep was killed, perhaps because there was no memory left; {len(open_)} cells are "
                f"not computed: {'; '.join(open_[:3])}. What is computed is kept: run it again, with a smaller --jobs"
            ) from None
        except BaseException:
            # What is being computed may take hours, and nobody waits for it any more.
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def _is_computed(future: Future[Outcome | FedmqError]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _leave_signals() -> None:
    """Ctrl-C reaches every process of the terminal; it is the first one's to end the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _compute(cell: Cell, file: Path) -> Outcome | FedmqError:
    try:
        # A process of its own knows no part that the file has named by its path; to read the settings again names it.
        AggregatorConfig.model_validate(cell.scenario.aggregator.model_dump())
        result, split, took = run_with_split(cell.scenario)
    except FedmqError as error:
        # Not an instance of its own class: not all of them can be sent from one process to another.
        failed = FedmqError(f"{cell.variant}, seed {cell.seed}: {error}")
        failed.exit_code = error.exit_code
        return failed
    outcome = Outcome(cell.variant, cell.seed, result.plain(), split, took)
    _keep(file, cell, outcome)
    return outcome


def _keep(file: Path, cell: Cell, outcome: Outcome) -> None:
    content = {
        "format": FORMAT,
        "fedmq": _release(),
        "scenario": cell.scenario.digest,
        "result": outcome.result,
        "split": outcome.split,
        "took": outcome.took,
    }
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(file)


def _release() -> str:
    try:
        return version("fedmq")
    except PackageNotFoundError:
        return ""


def _kept(file: Path, cell: Cell) -> Outcome | None:
    """None if it is not there, not readable, or of another scenario or release."""
    try:
        content = json.loads(file.read_text())
        if (content["format"], content["fedmq"], content["scenario"]) != (FORMAT, _release(), cell.scenario.digest):
            return None
        return Outcome(cell.variant, cell.seed, content["result"], content["split"], content["took"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
