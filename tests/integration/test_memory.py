"""An aggregator process takes the memory of a few models, however many updates make a round."""

from __future__ import annotations

import re
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from aggregator.history import read_history
from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpWorkerTransport
from broker.messages import Mode, ModelSpec, TensorSpec, Update, UpdateId
from broker.settings import BrokerConfig
from broker.transport import Outgoing
from broker.wire import encode
from tests.support.node import config_of
from tests.support.site import Site
from tests.support.waiting import wait_for

#: 48 MB in tensors of 8 MB: the budget is not hidden by what the interpreter takes, and one message holds an update.
MODEL = ModelSpec(tuple(TensorSpec(f"layer{index}.weight", (1000, 2000), "float32") for index in range(6)))
MB = 1_000_000
ROUNDS = 2

pytestmark = [
    pytest.mark.broker,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def peak_of(process: int) -> float:
    """The most memory that a process has had so far, in MB, files that it has mapped included."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / MB


def publish(config: BrokerConfig, place: Site, count: int) -> None:
    """Publish ``count`` updates from version 0, one after the other; all are confirmed when this returns."""
    tensors = {tensor.name: np.full(tensor.shape, 1e-3, np.float32) for tensor in MODEL.tensors}
    transport = AmqpWorkerTransport(config, place.topology, worker="w0")
    transport.open(lambda _item: None, wait=60)
    try:
        for seq in range(count):
            update = Update(
                run=place.topology.run,
                id=UpdateId("w0", "memory", seq),
                base_version=0,
                base_epoch=1,
                mode=Mode.DELTA,
                examples=1,
                model=MODEL,
                tensors=tensors,
            )
            confirmed: Future[None] = transport.publish(Outgoing(body=encode(update), message_id=str(update.id)))
            confirmed.result(60)
    finally:
        transport.close()


def peak(node: PrivateNode, folder: Path, size: int) -> float:
    """Peak memory in MB of an aggregator over rounds of ``size`` updates, with a commit after each update."""
    folder.mkdir()
    settings = {"buffer_size": size, "learning_rate": 1.0, "commit_count": 1, "linger": 0.0}
    with Site(folder, node.url, workers=1, settings={"aggregator": settings}, prefix="memory") as place:
        place.store.create(MODEL, {t.name: np.zeros(t.shape, np.float32) for t in MODEL.tensors}, now=time.time())
        aggregator = place.command("aggregator")
        wait_for(lambda: place.epochs() == [1], 60, what=f"its start; the log:\n{_log(place)}")
        publish(config_of(node), place, ROUNDS * size)
        wait_for(lambda: place.version() == ROUNDS, 120, what=f"{ROUNDS} versions; the log:\n{_log(place)}")
        found = peak_of(aggregator.pid)
        aggregator.terminate()
        assert aggregator.wait(30) == 0, place.log()[-3000:]
        updates = [line["updates"] for line in read_history(place.results / "history.jsonl") if "updates" in line]
        assert [len(entries) for entries in updates] == [size] * ROUNDS
    return found


def _log(place: Site) -> str:
    return place.log()[-3000:] if (place.folder / "log").exists() else ""


def test_the_aggregators_memory_is_a_few_models_whatever_the_size_of_a_round(node: PrivateNode, tmp_path: Path) -> None:
    few, many = (peak(node, tmp_path / f"k{size}", size) for size in (4, 16))

    bound = 3.5 * MODEL.nbytes / MB + 250
    assert max(few, many) <= bound, (few, many, bound)
    assert abs(many - few) <= 0.1 * few, (few, many)
