"""How a data set is cut for the workers of a scenario. The same seed gives the same cut."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.errors import ConfigError
from fedmq.simulation.randomness import stream
from fedmq.simulation.scenario import DataTable
from worker_client.tasks.partition import dirichlet, iid

__all__ = ["by_groups", "by_label", "by_quantity", "cut"]

Indices = NDArray[np.int64]
Array = NDArray[Any]


def cut(
    table: DataTable, length: int, workers: int, *, labels: Array | None, groups: Array | None, seed: int
) -> list[Indices]:
    """The examples of each worker, as ``[data]`` says; every example is somebody's.

    Args:
        table: the kind of partition, not ``task``.
        length: number of examples.
        workers: how many parts.
        labels: classes of the examples, of shape (length,); None if they have none.
        groups: their natural groups, of shape (length,); None if they have none.
        seed: of the scenario.

    Raises:
        ConfigError: it cannot be cut so.
    """
    if length < workers * table.minimum:
        raise ConfigError(
            f"data.partition: {length} examples cannot be cut for {workers} workers with at least data.minimum = "
            f"{table.minimum} each; take fewer population.workers"
        )
    if table.partition in ("dirichlet", "label") and labels is None:
        raise ConfigError(f"data.partition = {table.partition!r} needs classes, and this task's examples have none")
    match table.partition:
        case "iid":
            return iid(length, workers, seed=seed)
        case "dirichlet" if labels is not None:
            return dirichlet(labels, workers, alpha=table.alpha, seed=seed, minimum=table.minimum)
        case "label" if labels is not None:
            return by_label(labels, workers, each=table.labels, seed=seed)
        case "quantity":
            return by_quantity(length, workers, alpha=table.alpha, minimum=table.minimum, seed=seed)
        case _ if groups is None:
            raise ConfigError(
                "data.partition = 'groups' needs natural groups: give the task a method groups(dataset) that names "
                "the group of each example"
            )
        case _:
            return by_groups(groups, workers, seed=seed)


def by_label(labels: Array, workers: int, *, each: int, seed: int) -> list[Indices]:
    """About ``each`` classes for every worker.

    The examples in the order of their classes are cut into ``workers * each`` pieces, and everybody gets ``each`` of
    them at random (McMahan et al. 2017, section 3, with two).

    Raises :class:`ConfigError` if there are more classes for each than there are, or fewer examples than pieces.
    """
    known = len(np.unique(labels))
    if each > known:
        raise ConfigError(f"data.labels = {each}, but the data have {known} classes")
    if len(labels) < workers * each:
        raise ConfigError(f"{len(labels)} examples cannot be cut into {workers} x {each} pieces; take fewer workers")
    generator = stream(seed, "partition")
    shuffled = generator.permutation(len(labels))
    ordered = shuffled[np.argsort(labels[shuffled], kind="stable")]
    pieces = np.array_split(ordered, workers * each)
    deal = generator.permutation(len(pieces)).reshape(workers, each)
    return [np.sort(np.concatenate([pieces[piece] for piece in row])) for row in deal]


def by_quantity(length: int, workers: int, *, alpha: float, minimum: int, seed: int) -> list[Indices]:
    """Unlike amounts of alike examples.

    Everybody has ``minimum``, and of the rest a share from a symmetric Dirichlet distribution (Li et al. 2022,
    "Federated learning on non-IID data silos", section IV-C).
    """
    generator = stream(seed, "partition")
    shares = generator.dirichlet(np.full(workers, alpha))
    rest = length - workers * minimum
    ends = np.rint(np.cumsum(shares) * rest).astype(np.int64) + minimum * np.arange(1, workers + 1)
    ends[-1] = length
    order = generator.permutation(length)
    return [np.sort(part) for part in np.split(order, ends[:-1])]


def by_groups(groups: Array, workers: int, *, seed: int) -> list[Indices]:
    """Whole groups, in turn and in random order, so that nobody has more than one group more than another.

    Raises :class:`ConfigError` if there are fewer groups than workers.
    """
    names = np.unique(groups)
    if len(names) < workers:
        raise ConfigError(f"the data have {len(names)} natural groups: too few for {workers} workers")
    order = stream(seed, "partition").permutation(len(names))
    owner = np.empty(len(names), np.int64)
    owner[order] = np.arange(len(names)) % workers
    owners = owner[np.searchsorted(names, groups)]
    return [np.flatnonzero(owners == worker) for worker in range(workers)]
