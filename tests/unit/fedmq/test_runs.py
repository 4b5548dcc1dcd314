"""The runs that the queues of a broker tell of."""

from __future__ import annotations

from typing import Any

import pytest

from broker.amqp.look import Count
from broker.console import say_table
from broker.errors import BrokerError
from broker.topology import Topology
from fedmq.runs import run_of, runs_in, table_of


def row(name: str, vhost: str = "/", **facts: Any) -> dict[str, Any]:
    return {"name": name, "vhost": vhost, "messages": 0, "consumers": 0, "message_bytes": 0, **facts}


def test_a_runs_queues_add_up_and_foreign_ones_do_not_count() -> None:
    found = runs_in(
        [
            row("fedmq.b.updates", messages_ready=3, messages_unacknowledged=2, message_bytes=50, consumers=1),
            row("fedmq.b.turn", consumers=3),
            row("fedmq.b.dead", messages=4, message_bytes=40),
            row("fedmq.b.outbox.w1", messages=9, message_bytes=900),
            row("fedmq.b.notice.w2", consumers=1),
            row("fedmq.b.notice.w1", consumers=2),
            row("fedmq.b.notice.w0"),
            row("fedmq.a.parameters", vhost="other"),
            row("fedmq.watch"),
            row("fedmq.x.y.updates"),
            row("myfedmq.b.updates", messages_ready=7),
            row("fedmq.b.elsewhere", messages=5),
        ]
    )

    first, second = found
    assert (first.run, first.vhost, first.active, first.workers) == ("b", "/", True, ["w1", "w2"])
    assert (first.waiting, first.unacked, first.dead, first.bytes, first.standby) == (3, 2, 4, 990, 2)
    assert (second.run, second.vhost, second.active, second.standby, second.workers) == ("a", "other", False, 0, [])


def test_a_virtual_host_may_be_called_anything(capfd: pytest.CaptureFixture[str]) -> None:
    say_table(table_of(runs_in([row("fedmq.a.updates"), row("fedmq.a.updates", vhost="[/]:bug:\x1b[2J")])))
    out, _ = capfd.readouterr()
    assert "[/]:bug:\N{REPLACEMENT CHARACTER}[2J" in out
    assert "\x1b" not in out


def test_facts_that_are_missing_count_as_none_of_them() -> None:
    """As in the first second of a queue, and with statistics switched off."""
    (found,) = runs_in([{"name": "fedmq.a.updates", "vhost": "/", "messages_ready": "many"}])

    assert (found.waiting, found.unacked, found.active) == (0, 0, False)


@pytest.mark.parametrize("answer", [{"error": "no"}, ["fedmq.a.updates"], None, "x"])
def test_an_answer_of_another_kind_is_refused(answer: object) -> None:
    with pytest.raises(BrokerError, match="another version"):
        runs_in(answer)


def test_over_amqp_alone_names_and_bytes_are_not_known() -> None:
    topology = Topology("a")

    found = run_of(
        topology, "/", {topology.updates: Count(5, 1), topology.turn: Count(0, 2), topology.dead: Count(1, 0)}
    )

    assert (found.waiting, found.active, found.standby, found.dead) == (5, True, 1, 1)
    assert (found.unacked, found.workers, found.bytes) == (None, None, None)
