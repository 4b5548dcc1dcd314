"""What only the in-process broker has: a limit that is easily reached, watching, a look from outside."""

from __future__ import annotations

import threading

from broker.errors import PublishRefused, Unroutable
from broker.memory import MemoryAggregatorTransport, MemoryBroker, MemoryWorkerTransport
from broker.messages import Reason
from broker.transport import Outgoing, Source
from tests.support.waiting import Inbox

RUN = "test"


def aggregator_of(broker: MemoryBroker, *, prefetch: int = 64) -> tuple[MemoryAggregatorTransport, Inbox]:
    end, inbox = broker.aggregator(RUN, prefetch=prefetch), Inbox()
    end.open(inbox)
    return end, inbox


def worker_of(broker: MemoryBroker, name: str = "w0") -> tuple[MemoryWorkerTransport, Inbox]:
    end, inbox = broker.worker(RUN, name), Inbox()
    end.open(inbox)
    return end, inbox


def message(body: bytes, **headers: str | int) -> Outgoing:
    return Outgoing(body=body, headers=headers, message_id=body.decode())


def test_a_full_queue_refuses_until_there_is_room_again() -> None:
    broker = MemoryBroker(max_waiting=2)
    aggregator, inbox = aggregator_of(broker, prefetch=1)
    worker, _ = worker_of(broker)
    # One update is in the aggregator's hands, two wait.
    outcomes = [worker.publish(message(body)).exception() for body in (b"a", b"b", b"c", b"d")]
    assert outcomes[:3] == [None, None, None]
    assert isinstance(outcomes[3], PublishRefused)
    assert outcomes[3].retryable
    assert broker.depth(RUN) == 2

    assert worker.control(message(b"hello")).exception() is None  # the limit is the update queue's
    token = inbox.deliveries()[0].token
    assert token is not None
    aggregator.ack(token)

    assert worker.publish(message(b"d")).exception() is None
    assert inbox.bodies() == [b"a", b"b"]
    assert inbox.bodies(Source.CONTROL) == [b"hello"]


def test_what_comes_back_unacknowledged_is_not_lost_at_the_limit() -> None:
    broker = MemoryBroker(max_waiting=1)
    aggregator, _ = aggregator_of(broker, prefetch=2)
    worker, _ = worker_of(broker)
    assert [worker.publish(message(body)).exception() for body in (b"a", b"b", b"c")] == [None, None, None]
    aggregator.close()
    assert broker.depth(RUN) == 3
    assert isinstance(worker.publish(message(b"d")).exception(), PublishRefused)
    _, second = aggregator_of(broker)
    assert [(d.body, d.redelivered) for d in second.deliveries()] == [(b"a", True), (b"b", True), (b"c", False)]


def test_nobody_can_publish_to_a_run_without_an_aggregator() -> None:
    broker = MemoryBroker()
    worker, _ = worker_of(broker)
    assert isinstance(worker.publish(message(b"a")).exception(), Unroutable)
    assert broker.depth(RUN) == 0


def test_a_watcher_sees_events_and_notices_of_its_run_only() -> None:
    broker = MemoryBroker()
    seen, other = Inbox(), Inbox()
    broker.watch(RUN, seen)
    broker.watch("other", other)
    aggregator, inbox = aggregator_of(broker)
    first, first_inbox = worker_of(broker, "w0")
    _, second_inbox = worker_of(broker, "w1")

    first.event("heartbeat", message(b"beat"))
    aggregator.event("progress", message(b"folded"))
    aggregator.notify("w1", message(b"notice"))
    first.publish(message(b"update"))
    aggregator.broadcast(message(b"version", epoch=1, version=1))

    assert seen.bodies(Source.EVENT) == [b"beat", b"folded", b"notice"]
    assert len(seen.items) == 3
    assert other.items == []
    assert inbox.bodies(Source.EVENT) == [b"beat"]
    assert first_inbox.bodies(Source.EVENT) == []
    assert second_inbox.bodies(Source.EVENT) == [b"notice"]


def test_events_of_a_transport_that_is_closed_are_dropped() -> None:
    broker = MemoryBroker()
    seen = Inbox()
    broker.watch(RUN, seen)
    aggregator, _ = aggregator_of(broker)
    worker, _ = worker_of(broker)
    worker.close()
    aggregator.close()
    worker.event("heartbeat", message(b"beat"))
    aggregator.event("progress", message(b"folded"))
    aggregator.notify("w0", message(b"notice"))
    assert seen.items == []


def test_dead_letters_can_be_looked_at() -> None:
    broker = MemoryBroker()
    aggregator, inbox = aggregator_of(broker)
    worker, _ = worker_of(broker)
    worker.publish(message(b"a", base_version=3))
    (delivery,) = inbox.deliveries()
    assert delivery.token is not None
    aggregator.reject(delivery.token, Reason.MALFORMED, "torn", delivery)
    (dead,) = broker.dead_letters(RUN)
    assert (dead.delivery.body, dead.reason, dead.detail) == (b"a", Reason.MALFORMED, "torn")
    assert dead.delivery.headers == {"base_version": 3, "message_id": "a"}


def test_what_a_sink_causes_is_delivered_after_what_caused_it() -> None:
    """A sink may call the broker back: its messages follow, in order, and nothing is handed over twice."""
    broker = MemoryBroker()
    aggregator = broker.aggregator(RUN, prefetch=1)
    handled: list[bytes] = []

    def ack_at_once(item: object) -> None:
        body, token = getattr(item, "body", None), getattr(item, "token", None)
        if body is not None and token is not None:
            handled.append(body)
            aggregator.ack(token)

    aggregator.open(ack_at_once)
    worker, _ = worker_of(broker)
    for number in range(5):
        worker.publish(message(str(number).encode()))
    assert handled == [b"0", b"1", b"2", b"3", b"4"]
    assert broker.depth(RUN) == 0


def test_many_threads_lose_nothing_and_keep_each_workers_order() -> None:
    broker = MemoryBroker()
    _, inbox = aggregator_of(broker, prefetch=1000)
    workers = {name: worker_of(broker, name)[0] for name in ("w0", "w1", "w2", "w3")}

    def publish(name: str) -> None:
        for number in range(50):
            workers[name].publish(message(f"{name}/{number}".encode()))

    threads = [threading.Thread(target=publish, args=(name,)) for name in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for name in workers:
        mine = [body for body in inbox.bodies() if body.startswith(name.encode())]
        assert mine == [f"{name}/{number}".encode() for number in range(50)]
