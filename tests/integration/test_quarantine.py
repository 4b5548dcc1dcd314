"""A worker that sends nonsense, kept out and let in again by a command: real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.amqp.node import PrivateNode
from tests.support.commands import fedmq
from tests.support.pair import Pair
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.broker, pytest.mark.timeout(300)]

POISON = """
from tests.support.tasks import Counting

class Poison(Counting):
    def train(self, model, dataset, context):
        result = super().train(model, dataset, context)
        result.tensors["cells"] *= 1000.0
        return result
"""


def test_a_bad_worker_is_kept_out_and_told_until_it_is_released(node: PrivateNode, tmp_path: Path) -> None:
    (tmp_path / "poison.py").write_text(POISON)
    pair = Pair(tmp_path, node)
    with pair.stack:
        limits = ("--set", "aggregator.quarantine_score=1.5", "--set", "aggregator.max_norm=10")
        aggregator = pair.start("aggregator", "aggregator", *limits)
        bad = pair.start("worker", "bad", "--name", "w1", "--shard", "1/2", "--task", "poison:Poison")
        wait_for(lambda: pair.lines("quarantine"), 90, what="a quarantine")
        assert pair.lines("quarantine")[0]["worker"] == "w1"
        bad.wait_log("quarantined")

        done = fedmq(tmp_path, "release", "w1", "--wait", "50", url=node.url)

        assert done.code == 0, done
        assert "release worker=w1: in force" in done.out
        wait_for(lambda: pair.lines("release"), 60, what="the release")
        for process in (bad, aggregator):
            assert process.terminate() == 0, process.log
