"""The federation that is attacked, and what its run would be without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.amqp.node import PrivateNode
from tests.attacks import others, outsiders, workers
from tests.attacks.harness import Federation, Run
from tests.attacks.table import ATTACKS

#: A round after each attack, and some attacks wait for one themselves.
ROUNDS = 2 * len(ATTACKS)
DEEDS = (outsiders, workers, others)


@pytest.fixture(scope="module")
def federation(node: PrivateNode) -> Iterator[Federation]:
    made = Federation(node)
    yield made
    made.close()


@pytest.fixture(scope="module")
def digests(federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of the first versions of a run that nobody attacks."""
    folder: Path = tmp_path_factory.mktemp("calm")
    with Run(federation, folder, "calm") as calm:
        return [calm.head(0).digest, *(calm.round() for _ in range(ROUNDS))]


@pytest.fixture(scope="module")
def siege(federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The run that is attacked."""
    with Run(federation, tmp_path_factory.mktemp("siege"), "siege") as run:
        yield run
