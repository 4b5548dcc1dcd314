"""An aggregator process takes the memory of a few models, however many updates make a round."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from aggregator.history import read_history
from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpWorkerTransport
from broker.messages import Hello, Mode, ModelSpec, TensorSpec, Update, UpdateId
from broker.settings import CHUNK_BYTES, BrokerConfig
from broker.transport import Outgoing
from broker.wire import encode, encode_in_chunks
from tests.support.ends import confirmed
from tests.support.node import config_of
from tests.support.site import Site
from tests.support.waiting import wait_for

#: 48 MB in tensors of 8 MB: a second copy of anything shows beside what the interpreter takes.
MODEL = ModelSpec(tuple(TensorSpec(f"layer{index}.weight", (1000, 2000), "float32") for index in range(6)))
MB = 1_000_000

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
    """Publish ``count`` updates from version 0 in chunks, one after the other; all are confirmed when this returns."""
    tensors = {tensor.name: np.full(tensor.shape, 1e-3, np.float32) for tensor in MODEL.tensors}
    transport = AmqpWorkerTransport(config, place.topology, worker="w0")
    transport.open(lambda _item: None, wait=60)
    try:
        confirmed(transport.control, Outgoing(body=encode(Hello(run=place.topology.run, worker="w0", incarnation="m"))))
        for seq in range(count):
            update = Update(
                run=place.topology.run,
                id=UpdateId("w0", "m", seq),
                base_version=0,
                base_epoch=1,
                mode=Mode.DELTA,
                examples=1,
                model=MODEL,
                tensors=tensors,
            )
            body, chunks = encode_in_chunks(update, str(update.id), CHUNK_BYTES)
            assert len(chunks) > 1
            headers: dict[str, str | int] = {"chunks": len(chunks), "bytes": MODEL.nbytes}
            message = Outgoing(body=body, chunks=chunks, message_id=str(update.id), headers=headers)
            # The outbox may not be there yet, which is an error that passes.
            confirmed(transport.publish, message)
    finally:
        transport.close()


def peak(node: PrivateNode, folder: Path, *, size: int, rounds: int) -> float:
    """Peak memory in MB of an aggregator over rounds of ``size`` updates, with a commit after each update."""
    folder.mkdir()
    settings = {"buffer_size": size, "learning_rate": 1.0, "commit_count": 1, "linger": 0.0}
    with Site(folder, node.url, workers=1, settings={"aggregator": settings}, prefix="memory") as place:
        place.store.create(MODEL, {t.name: np.zeros(t.shape, np.float32) for t in MODEL.tensors}, now=time.time())
        aggregator = place.command("aggregator")
        wait_for(lambda: place.epochs() == [1], 60, what="its start")
        publish(config_of(node), place, rounds * size)
        wait_for(lambda: place.version() == rounds, 120, what=f"{rounds} versions")
        found = peak_of(aggregator.pid)
        aggregator.terminate()
        assert aggregator.wait(30) == 0, place.log()[-3000:]
        updates = [line["updates"] for line in read_history(place.results / "history.jsonl") if "updates" in line]
        assert [len(entries) for entries in updates] == [size] * rounds
    return found


def test_the_aggregators_memory_is_a_few_models_whatever_the_size_of_a_round(node: PrivateNode, tmp_path: Path) -> None:
    few = peak(node, tmp_path / "few", size=4, rounds=4)
    many = peak(node, tmp_path / "many", size=16, rounds=2)

    bound = 3.5 * MODEL.nbytes / MB + 250
    assert max(few, many) <= bound, (few, many, bound)
    # A tenth, which is less than one model: twelve updates more in a round would be twelve.
    assert many - few <= 0.1 * bound, (few, many)
