"""Two aggregator processes of one run: one leads, the other takes over when it dies, hangs or is superseded."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from broker.amqp.node import PrivateNode
from tests.support.commands import running
from tests.support.pair import Pair
from tests.support.waiting import wait_for

pytestmark = pytest.mark.broker


@pytest.fixture
def pair(tmp_path: Path, node: PrivateNode) -> Pair:
    return Pair(tmp_path, node)


def test_the_second_aggregator_takes_over_when_the_first_is_killed(pair: Pair) -> None:
    with pair.stack:
        first = pair.start("aggregator", "first")
        first.wait_log("leads run")
        second = pair.start("aggregator", "second")
        second.wait_log("standing by")
        worker = pair.start("worker", "worker", "--name", "w0", "--shard", "0/1")
        pair.wait_progress("under the first")
        assert pair.epochs() == [1]

        first.process.kill()

        wait_for(lambda: pair.epochs() == [1, 2], 60, what="the second's epoch")
        pair.wait_progress("under the second")
        third = pair.start("aggregator", "third")
        third.wait_log("standing by")
        pair.finish(third, second, worker=worker)
        assert "run" in third.log


def test_one_that_hangs_is_replaced_and_stands_by_when_it_wakes(pair: Pair) -> None:
    with pair.stack:
        first = pair.start("aggregator", "first")
        first.wait_log("leads run")
        second = pair.start("aggregator", "second")
        second.wait_log("standing by")
        worker = pair.start("worker", "worker", "--name", "w0", "--shard", "0/1")
        pair.wait_progress("under the first")

        first.process.send_signal(signal.SIGSTOP)
        wait_for(lambda: pair.epochs() == [1, 2], 90, what="the second's epoch")
        pair.wait_progress("under the second")
        first.process.send_signal(signal.SIGCONT)

        first.wait_log("has taken over")
        first.wait_log("standing by")
        pair.wait_progress("with both awake")
        assert pair.epochs() == [1, 2]

        second.process.kill()
        wait_for(lambda: pair.epochs() == [1, 2, 3], 60, what="the first leads again")
        pair.wait_progress("under the first again")
        pair.finish(first, worker=worker)


def test_two_that_lead_in_one_folder_over_two_brokers_do_not_fight_for_ever(pair: Pair) -> None:
    """As two virtual hosts here. One of them gives up and says why; the run goes on under the other."""
    pair.node.ctl("add_vhost", "elsewhere")
    pair.node.ctl("set_permissions", "-p", "elsewhere", pair.node.user, ".*", ".*", ".*")
    try:
        with pair.stack:
            first = pair.start("aggregator", "first")
            first.wait_log("leads run")
            other = pair.node.url.rpartition("/")[0] + "/elsewhere"
            second = pair.stack.enter_context(running(pair.folder, "aggregator", url=other, name="second"))

            wait_for(lambda: any(p.process.poll() is not None for p in (first, second)), 90, what="one that gives up")
            loser, winner = (first, second) if first.process.poll() is not None else (second, first)
            assert loser.wait() == 5
            assert "uses another broker" in loser.log
            assert winner.process.poll() is None
            assert winner.terminate() == 0
    finally:
        pair.node.ctl("delete_vhost", "elsewhere")


def test_a_standby_with_other_settings_is_refused_when_it_joins_and_not_at_the_takeover(pair: Pair) -> None:
    with pair.stack:
        first = pair.start("aggregator", "first")
        first.wait_log("leads run")
        worker = pair.start("worker", "worker", "--name", "w0", "--shard", "0/1")
        pair.wait_progress("under the first")

        second = pair.start("aggregator", "second", "--set", "aggregator.mode=gradient")

        assert second.wait() == 2
        assert "the mode of a run cannot change" in second.log
        pair.finish(first, worker=worker)
