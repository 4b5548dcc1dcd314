"""``fedmq set | pause | resume | stop`` as an operator gives them, to a run of real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.amqp.node import PrivateNode
from fedmq.monitoring.watching import watching
from tests.support.commands import assert_one_message, fedmq
from tests.support.node import config_of, fresh_topology
from tests.support.pair import Pair
from tests.support.waiting import wait_for

pytestmark = pytest.mark.broker


def test_a_run_is_changed_paused_resumed_and_stopped_while_it_goes_on(node: PrivateNode, tmp_path: Path) -> None:
    pair = Pair(tmp_path, node)

    def give(*arguments: str) -> str:
        done = fedmq(tmp_path, *arguments, url=node.url)
        assert done.code == 0, done
        return done.out

    with pair.stack:
        monitor = pair.stack.enter_context(watching(config_of(node), pair.topology.run))
        first = pair.start("aggregator", "first")
        worker = pair.start("worker", "worker", "--name", "w0", "--shard", "0/1")
        pair.wait_progress("before any command")

        # When the buffer is made larger, the next rounds are
        assert "in force" in give("set", "buffer_size=4", "server_lr=4")
        wait_for(
            lambda: [len(line["updates"]) for line in pair.lines("version")][-2:] == [4, 4], 60, what="rounds of 4"
        )
        assert pair.lines("version")[-1]["settings"]["learning_rate"] == 4.0
        assert pair.lines("version")[0]["settings"]["learning_rate"] == 2.0

        # What makes no sense is refused, by whoever notices first
        assert_one_message(fedmq(tmp_path, "set", "buffer_size=none", url=node.url), 2, "buffer_size")
        assert_one_message(fedmq(tmp_path, "set", "minimum_updates=9", url=node.url), 2, "refused", "minimum_updates")
        assert_one_message(fedmq(tmp_path, "set", "mode=delta", url=node.url), 2, "cannot be changed")
        assert_one_message(fedmq(tmp_path, "set", "buffer_size", url=node.url), 2, "NAME=VALUE")

        # When it is paused, nothing closes, over a restart as well
        give("pause")
        first.process.kill()
        second = pair.start("aggregator", "second")
        second.wait_log("leads run")
        assert "still in force: buffer_size=4, learning_rate=4.0" in second.log
        paused_at = pair.version()
        wait_for(
            lambda: [w["state"] for w in monitor.snapshot()["workers"]] == ["waiting"], 30, what="a worker that waits"
        )
        assert pair.version() == paused_at
        give("resume")
        pair.wait_progress("after the pause")
        assert len(pair.lines("version")[-1]["updates"]) >= 4

        # When the aggregator is away, the command waits for it
        assert second.terminate() == 0
        away = fedmq(tmp_path, "set", "buffer_size=", "learning_rate=", "--wait", "0.5", url=node.url)
        assert (away.code, away.out) == (6, "")
        assert "waits in the run's queue" in away.err
        third = pair.start("aggregator", "third")
        wait_for(
            lambda: [len(line["updates"]) for line in pair.lines("version")][-2:] == [2, 2], 60, what="rounds of 2"
        )

        # When it is stopped, everybody leaves in good order
        give("stop")
        assert third.wait() == 0
        assert worker.wait() == 0
        commands = [line["what"] for line in pair.lines("command")]
        assert commands == [
            "set buffer_size=4, learning_rate=4",
            "pause",
            "resume",
            "set buffer_size taken back, learning_rate taken back",
            "stop",
        ]

        # And it goes on if somebody says so
        again = pair.start("aggregator", "again", "--drop-changes")
        again.wait_log("leads run")
        worker = pair.start("worker", "worker-again", "--name", "w0", "--shard", "0/1")
        pair.wait_progress("after the end")
        assert worker.terminate() == 0
        assert again.terminate() == 0


def test_a_command_for_a_run_that_nobody_knows_says_so(node: PrivateNode, tmp_path: Path) -> None:
    done = fedmq(tmp_path, "pause", "--run", fresh_topology().run, url=node.url)

    assert_one_message(done, 4, "no aggregator has ever declared run")


def test_a_command_without_a_broker_says_so(tmp_path: Path) -> None:
    done = fedmq(tmp_path, "pause", "--set-nothing")

    assert done.code == 2
    (tmp_path / "fedmq.toml").write_text("[broker]\nconnect_timeout = 1\n")
    assert_one_message(fedmq(tmp_path, "pause"), 4, "did not take the command")
