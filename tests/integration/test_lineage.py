"""``fedmq history | replay | rollback`` as an operator gives them, to a run of real processes that goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pika
import pytest
from safetensors.numpy import load_file

from aggregator.checkpoint import CheckpointStore
from aggregator.core.ledger import Ledger
from broker.amqp.node import PrivateNode
from broker.messages import Update, UpdateId
from broker.topology import UPDATES
from broker.wire import decode, encode
from tests.support.builders import update_of
from tests.support.commands import Done, fedmq
from tests.support.letters import take
from tests.support.node import channel, ready
from tests.support.pair import Pair
from tests.support.tasks import CELLS
from tests.support.waiting import wait_for

# A dozen processes, one after the other, on a machine that may be busy.
pytestmark = [pytest.mark.broker, pytest.mark.timeout(400)]

KEEP = ("--set", "aggregator.keep_updates=true")
POISON = """
from tests.support.tasks import Counting

class Poison(Counting):
    def train(self, model, dataset, context):
        result = super().train(model, dataset, context)
        result.tensors["cells"] *= -1000.0
        return result
"""


@pytest.fixture
def pair(tmp_path: Path, node: PrivateNode) -> Pair:
    (tmp_path / "poison.py").write_text(POISON)
    return Pair(tmp_path, node)


def give(pair: Pair, *arguments: str) -> Done:
    done = fedmq(pair.folder, *arguments)  # no broker is needed
    assert done.code == 0, done
    return done


def ledger(pair: Pair) -> set[UpdateId]:
    return set(Ledger(CheckpointStore(pair.results / "checkpoints", pair.topology.run).load().ledger))


def cells(pair: Pair) -> list[float]:
    return list(CheckpointStore(pair.results / "checkpoints", pair.topology.run).load().parameters["cells"])


def publish(pair: Pair, version: int, epoch: int) -> UpdateId:
    """An update that starts from ``version``, as from a worker that was slow."""
    update = update_of(
        {"cells": np.ones(CELLS)}, worker="late", base_version=version, base_epoch=epoch, run=pair.topology.run
    )
    with channel(pair.node) as inside:
        inside.confirm_delivery()
        properties = pika.BasicProperties(
            delivery_mode=2, message_id=str(update.id), headers={"worker": "late"}, user_id=pair.node.user
        )
        inside.basic_publish(UPDATES, pair.topology.key("late"), encode(update), properties, mandatory=True)
    return update.id


def finish_and_check(pair: Pair, late: UpdateId) -> None:
    """All that was published and confirmed is in the model or in the dead letters, once, and the lineage is whole."""
    wait_for(lambda: ready(pair.node, pair.topology.updates) == 0, 60, what="an empty queue")
    letters = take(pair.node, pair.topology.dead)
    assert {(properties.headers or {})["reason"] for properties, _ in letters} == {"rolled-back"}
    dead = [update.id for update in (decode(body) for _, body in letters) if isinstance(update, Update)]
    assert late in dead
    applied = ledger(pair)
    assert not applied & set(dead)
    assert len(dead) == len(set(dead))
    outboxes = [json.loads(file.read_text()) for file in pair.results.glob("workers/*/outbox.json")]
    assert outboxes
    for outbox in outboxes:
        mine = [one for one in [*applied, *dead] if one.worker == outbox["worker"]]
        assert outbox["confirmed"] <= len(mine) <= outbox["next_seq"]
    give(pair, "checkpoint", "verify")
    assert "agree with the history" in give(pair, "replay").out


def test_a_poisoned_worker_is_taken_out_of_a_run_that_goes_on(pair: Pair) -> None:
    with pair.stack:
        first = pair.start("aggregator", "first", *KEEP)
        good = pair.start("worker", "good", "--name", "good", "--shard", "0/2")
        bad = pair.start("worker", "bad", "--name", "bad", "--shard", "1/2", "--task", "poison:Poison")
        wait_for(lambda: cells(pair)[1] < 0 < cells(pair)[0], 60, what="updates of both")
        assert bad.terminate() == 0
        pair.wait_progress("without the poisoned one")
        assert '"worker": "bad"' in give(pair, "history", "--worker", "bad", "--json").out
        before = ledger(pair)

        # When it is looked at first
        looked = give(pair, "replay", "--without", "bad", "--output", "clean.safetensors").out
        assert " left out, in versions" in looked
        clean = load_file(pair.folder / "clean.safetensors")["cells"]
        assert clean[1] == 0 < clean[0]

        # And then becomes the newest version
        told = give(pair, "replay", "--without", "bad", "--adopt", "--yes").out
        assert "without bad" in told
        wait_for(lambda: any("without" in line for line in pair.lines("version")), 60, what="the line in the history")
        (line,) = [line for line in pair.lines("version") if "without" in line]
        assert line["without"] == ["bad"]
        assert line["source"] == line["version"] - 1

        # The aggregator has taken it up by itself, and the worker goes on from there
        first.wait_log("has taken over")
        pair.wait_progress("after the poison was taken out")
        assert first.process.poll() is None
        late = publish(pair, line["version"] - 1, pair.epochs()[0])
        wait_for(lambda: ready(pair.node, pair.topology.dead) > 0, 60, what="a rejection")
        pair.wait_progress("after an update of another time")
        assert good.terminate() == 0, good.log
        wait_for(lambda: ready(pair.node, pair.topology.updates) == 0, 60, what="an empty queue")
        assert first.terminate() == 0, first.log

        assert before <= ledger(pair)
        assert cells(pair)[1] == 0
        assert cells(pair)[0] > clean[0]
        finish_and_check(pair, late)


def test_a_run_that_goes_on_is_taken_back(pair: Pair) -> None:
    with pair.stack:
        first = pair.start("aggregator", "first", *KEEP)
        second = pair.start("aggregator", "second", *KEEP)
        worker = pair.start("worker", "worker", "--name", "w0", "--shard", "0/1")
        wait_for(lambda: pair.version() >= 6, 60, what="versions")

        told = give(pair, "rollback", "2", "--yes").out

        assert "is version 2 again" in told
        wait_for(lambda: any("source" in line for line in pair.lines("version")), 60, what="the line in the history")
        (line,) = [line for line in pair.lines("version") if "source" in line]
        assert line["after"] == pair.lines("version")[1]["after"]
        pair.wait_progress("after version 2 came back")
        new = [version for version in pair.lines("version") if version["version"] > line["version"]]
        assert new[0]["before"] == line["after"]
        late = publish(pair, 4, pair.epochs()[0])
        wait_for(lambda: ready(pair.node, pair.topology.dead) > 0, 60, what="a rejection")
        pair.wait_progress("after an update of another time")
        assert worker.terminate() == 0, worker.log
        wait_for(lambda: ready(pair.node, pair.topology.updates) == 0, 60, what="an empty queue")
        for aggregator in (first, second):
            assert aggregator.terminate() == 0, aggregator.log

        finish_and_check(pair, late)
        assert "taken back to version 2" in give(pair, "history", "--version", str(line["version"])).out
