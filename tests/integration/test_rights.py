"""What each account may do, tried on a real broker: what it needs is allowed, and everything beside that refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pika
import pika.exceptions
import pytest

from broker.amqp.node import PrivateNode
from broker.amqp.trial import Role, examine
from broker.topology import CONTROL, DEAD, EVENTS, UPDATES, Topology
from broker.transport import Outgoing
from tests.support.accounts import Site
from tests.support.ends import Ends
from tests.support.waiting import wait_for

pytestmark = pytest.mark.broker

RUN = Topology("digits")
Deed = Callable[[Any], object]


@pytest.fixture(scope="module")
def site(node: PrivateNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Accounts of all roles, and a run that an aggregator has declared with its own."""
    made, ends = Site(node, tmp_path_factory.mktemp("rights"), "w1", "w2"), Ends()
    try:
        made.setup()
        aggregator, _ = ends.aggregator(made.config("aggregator"), RUN)
        for worker in made.workers:
            aggregator.admit(worker)
            aggregator.notify(worker, Outgoing(body=b"a notice"))
        ends.worker(made.config(made.workers[1]), RUN, name=made.workers[1])
        notices = {RUN.notices(worker) for worker in made.workers}
        wait_for(lambda: notices <= {row["name"] for row in made.admin.queues(made.vhost)}, what="queues for notices")
        yield made
    finally:
        ends.close()
        made.clean_up()


@contextmanager
def channel_of(site: Site, name: str) -> Iterator[Callable[[], Any]]:
    """Makes channels of this account; a refusal ends the one on which it comes."""
    connection = pika.BlockingConnection(pika.URLParameters(site.config(name).urls()[0]))

    def confirming() -> Any:
        channel = connection.channel()
        channel.confirm_delivery()
        return channel

    try:
        yield confirming
    finally:
        if connection.is_open:
            connection.close()


def refused(channel: Any, deed: Deed) -> bool:
    """Whether the broker refuses for want of a right (403)."""
    try:
        deed(channel)
    except pika.exceptions.ChannelClosedByBroker as error:
        if error.reply_code != 403:
            raise
        return True
    except pika.exceptions.UnroutableError:
        return False
    return False


def publish(exchange: str, key: str) -> Deed:
    return lambda channel: channel.basic_publish(exchange, key, b"", pika.BasicProperties())


def declare(name: str, **arguments: Any) -> Deed:
    return lambda channel: channel.queue_declare(name, exclusive=True, arguments=arguments)


def bind(queue: str, exchange: str, key: str) -> Deed:
    return lambda channel: channel.queue_bind(queue, exchange, key)


def delete(queue: str) -> Deed:
    return lambda channel: channel.queue_delete(queue)


def purge(queue: str) -> Deed:
    return lambda channel: channel.queue_purge(queue)


def get(queue: str) -> Deed:
    return lambda channel: channel.basic_get(queue)


def test_a_worker_does_what_workers_do_and_nothing_else(site: Site) -> None:
    me, other = site.workers
    own = RUN.notices(me)
    allowed: dict[str, Deed] = {
        "its updates": publish(UPDATES, RUN.key(me)),
        "its chunks": publish(UPDATES, RUN.chunk_key(me)),
        "its hello": publish(CONTROL, RUN.key(me)),
        "its heartbeat": publish(EVENTS, RUN.event_key("heartbeat", me)),
        "what was noticed": get(own),
    }
    theirs = [RUN.updates, RUN.control, RUN.turn, RUN.dead, RUN.outbox(me), RUN.outbox(other)]
    forbidden: dict[str, Deed] = {
        "another's updates": publish(UPDATES, RUN.key(other)),
        "another's chunks": publish(UPDATES, RUN.chunk_key(other)),
        "another's hello": publish(CONTROL, RUN.key(other)),
        "another's heartbeat": publish(EVENTS, RUN.event_key("heartbeat", other)),
        "a command": publish(CONTROL, RUN.command_key),
        "the turn": publish(CONTROL, RUN.turn_key),
        "a notice to another": publish(EVENTS, RUN.notice_key(other)),
        "the aggregator's status": publish(EVENTS, RUN.event_key("status", "aggregator")),
        "a version": publish(RUN.parameters, ""),
        "chunks of a version": publish(RUN.chunks, ""),
        "a dead letter": publish(DEAD, RUN.key(me)),
        "straight into a queue": publish("", RUN.updates),
        "an exchange that everybody has": publish("amq.topic", "a"),
        "its notices' queue": declare(own),
        "its notices": bind(own, EVENTS, RUN.notice_key(me)),
        "all events": bind(own, EVENTS, "#"),
        "another's notices": bind(own, EVENTS, RUN.notice_key(other)),
        "all updates": bind(own, UPDATES, "#"),
        "another's chunks, copied": bind(own, UPDATES, RUN.chunk_key(other)),
        "a queue of any name": declare("mine"),
        "a queue that the broker names": declare(""),
        "a queue like another's": declare(RUN.own_queue("notice", f"{other}.c1")),
        "a queue of a name that is its own": declare(RUN.own_queue("notice", f"{me}.c0")),
        "dead-lettering to a queue": declare(
            RUN.own_queue("notice", f"{me}.c1"), **{"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "q"}
        ),
        "a copy of everything": lambda channel: channel.exchange_declare("fedmq.tap", "fanout"),
        "the end of an exchange": lambda channel: channel.exchange_delete(UPDATES),
        "the end of the stream": delete(RUN.parameters),
        **{f"what is in {queue}": get(queue) for queue in theirs},
        **{f"the end of {queue}": delete(queue) for queue in theirs},
        **{f"emptying {queue}": purge(queue) for queue in theirs},
    }
    with channel_of(site, me) as channel:
        assert [what for what, deed in allowed.items() if refused(channel(), deed)] == []
        assert [what for what, deed in forbidden.items() if not refused(channel(), deed)] == []
        # Reading the stream of versions is a right to empty a queue, which a stream is not.
        with pytest.raises(pika.exceptions.AMQPError):
            channel().queue_purge(RUN.parameters)


def test_who_looks_may_look_and_an_operator_command(site: Site) -> None:
    w1 = site.workers[0]
    own = RUN.own_queue("watch", "c0ffee00")
    looks: dict[str, Deed] = {"its queue": declare(own), "all events": bind(own, EVENTS, "digits.#"), "them": get(own)}
    commands: dict[str, Deed] = {
        "a command": publish(CONTROL, RUN.command_key),
        "a dead letter, again": publish(UPDATES, RUN.key(w1)),
        "the dead letters": get(RUN.dead),
    }
    nobody: dict[str, Deed] = {
        "an event": publish(EVENTS, RUN.event_key("heartbeat", w1)),
        "chunks": publish(UPDATES, RUN.chunk_key(w1)),
        "the turn": publish(CONTROL, RUN.turn_key),
        "a version": publish(RUN.parameters, ""),
        "the updates": get(RUN.updates),
        "an outbox": get(RUN.outbox(w1)),
        "all updates": bind(own, UPDATES, "#"),
        "another queue": declare("mine"),
    }
    for name, allowed, forbidden in (
        ("monitor", looks, nobody | commands),
        ("operator", looks | commands, nobody),
    ):
        with channel_of(site, name) as channel:
            assert [what for what, deed in allowed.items() if refused(channel(), deed)] == [], name
            assert [what for what, deed in forbidden.items() if not refused(channel(), deed)] == [], name


def test_an_aggregator_touches_nothing_but_what_is_fedmqs(site: Site) -> None:
    forbidden = {
        "straight into a queue": publish("", RUN.updates),
        "another queue": declare("orders"),
        "another exchange": lambda channel: channel.exchange_declare("orders"),
    }
    with channel_of(site, "aggregator") as channel:
        assert [what for what, deed in forbidden.items() if not refused(channel(), deed)] == []


def test_the_doctors_trials_pass_with_the_accounts_that_were_made(site: Site) -> None:
    worker = site.workers[0]
    tried: tuple[tuple[str, Role], ...] = (("aggregator", "aggregator"), (worker, "worker"))
    for name, role in tried:
        found = examine(site.config(name), RUN, worker, roles=(role,))
        assert [trial for trial in found.trials if trial.error is not None] == [], name


def test_the_doctor_finds_a_workers_account_with_too_much_power_and_none_in_one_that_was_made(site: Site) -> None:
    worker = site.workers[0]
    assert examine(site.config(worker), RUN, worker, roles=("worker",)).excess == []

    found = examine(site.config("aggregator"), RUN, worker, roles=("worker",))
    assert [trial for trial in found.trials if trial.error is not None] == []
    words = " | ".join(found.excess)
    for word in ("another worker's updates", "commands", "as the aggregator", RUN.updates, RUN.dead, "declare"):
        assert word in words
    assert "default exchange" not in words
