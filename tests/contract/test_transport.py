"""What both brokers do alike. Whoever works over one works over the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from broker.errors import BrokerUnreachable, MessageTooLarge, PublishRefused, Unroutable
from broker.messages import Reason
from broker.transport import Outgoing, Source, Token
from tests.contract.backends import (
    MAX_MESSAGE_BYTES,
    AggregatorEnd,
    Backend,
    Dead,
    MemoryBackend,
    RabbitBackend,
    WorkerEnd,
)
from tests.support.waiting import PATIENCE, Inbox, wait_for


@pytest.fixture(params=["memory", pytest.param("rabbitmq", marks=pytest.mark.broker)])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    made: Backend = MemoryBackend() if request.param == "memory" else RabbitBackend(request.getfixturevalue("node"))
    yield made
    made.close()


def aggregator_of(backend: Backend, *, prefetch: int = 64) -> tuple[AggregatorEnd, Inbox]:
    end, inbox = backend.aggregator(prefetch=prefetch), Inbox()
    end.open(inbox, wait=PATIENCE)
    return end, inbox


def worker_of(backend: Backend, name: str = "w1") -> tuple[WorkerEnd, Inbox]:
    end, inbox = backend.worker(name), Inbox()
    end.open(inbox, wait=PATIENCE)
    return end, inbox


def publish(worker: WorkerEnd, *bodies: bytes) -> None:
    """Publish as a worker does: what was not taken because the run was not there yet, again."""
    for body in bodies:
        message = Outgoing(body=body, message_id=f"id-{body.decode()}", headers={"base_version": 7})
        wait_for(lambda m=message: worker.publish(m).exception(PATIENCE) is None, what="a confirmed publish")  # type: ignore[misc]


def version(epoch: int, number: int, attempt: int = 0) -> Outgoing:
    body = f"{epoch}.{number}.{attempt}".encode()
    return Outgoing(body=body, headers={"epoch": epoch, "version": number, "attempt": attempt})


def token_of(inbox: Inbox, number: int) -> Token:
    token = inbox.wait_delivery(number).token
    assert token is not None
    return token


def test_an_update_arrives_once_with_its_headers_and_its_id(backend: Backend) -> None:
    _, inbox = aggregator_of(backend)
    worker, _ = worker_of(backend)
    publish(worker, b"a", b"b")
    inbox.wait_delivery(2)
    assert inbox.bodies() == [b"a", b"b"]
    first = inbox.deliveries()[0]
    assert first.headers["base_version"] == 7
    assert first.headers["message_id"] == "id-a"
    assert first.user == worker.account
    assert first.user
    assert not first.redelivered


def test_what_was_acknowledged_does_not_come_again(backend: Backend) -> None:
    aggregator, inbox = aggregator_of(backend)
    worker, _ = worker_of(backend)
    publish(worker, b"a", b"b")
    inbox.wait_delivery(2)
    aggregator.ack(token_of(inbox, 1))
    aggregator.close()
    _, second = aggregator_of(backend)
    assert second.wait_delivery().body == b"b"
    publish(worker, b"c")
    second.wait_delivery(2)
    assert second.bodies() == [b"b", b"c"]


def test_what_was_not_acknowledged_comes_again_after_a_cut(backend: Backend) -> None:
    aggregator, inbox = aggregator_of(backend)
    worker, _ = worker_of(backend)
    publish(worker, b"a")
    before = inbox.wait_delivery()
    aggregator.drop()
    again = inbox.wait_delivery(2)
    assert again.body == b"a"
    assert again.redelivered
    assert not before.redelivered
    assert again.token is not None
    assert before.token is not None
    assert again.token.generation > before.token.generation
    assert inbox.connections() == [before.token.generation, again.token.generation]
    assert [loss.generation for loss in inbox.losses()] == [before.token.generation]


def test_the_token_of_a_lost_connection_acknowledges_nothing(backend: Backend) -> None:
    aggregator, inbox = aggregator_of(backend)
    worker, _ = worker_of(backend)
    publish(worker, b"a")
    stale = token_of(inbox, 1)
    aggregator.drop()
    inbox.wait_delivery(2)
    aggregator.ack(stale)
    aggregator.reject(stale, Reason.MALFORMED, "stale", inbox.deliveries()[0])
    aggregator.close()
    _, second = aggregator_of(backend)
    assert second.wait_delivery().body == b"a"
    assert backend.dead() == []


def test_acknowledging_twice_or_something_unknown_does_no_harm(backend: Backend) -> None:
    aggregator, inbox = aggregator_of(backend)
    worker, _ = worker_of(backend)
    publish(worker, b"a", b"b")
    token = token_of(inbox, 1)
    inbox.wait_delivery(2)
    aggregator.ack(token)
    aggregator.ack(token)
    aggregator.ack(Token(token.generation, 999))
    publish(worker, b"c")
    inbox.wait_delivery(3)
    assert inbox.bodies() == [b"a", b"b", b"c"]
    assert inbox.losses() == []


def test_no_more_than_the_prefetch_is_in_hand(backend: Backend) -> None:
    aggregator, inbox = aggregator_of(backend, prefetch=2)
    worker, _ = worker_of(backend)
    publish(worker, b"a", b"b", b"c", b"d", b"e")
    inbox.wait_delivery(2)
    wait_for(lambda: backend.waiting() == 3, what="three updates left in the queue")
    assert len(inbox.deliveries()) == 2
    aggregator.ack(token_of(inbox, 1))
    inbox.wait_delivery(3)
    wait_for(lambda: backend.waiting() == 2, what="two updates left in the queue")
    assert inbox.bodies() == [b"a", b"b", b"c"]


def test_a_rejected_update_lands_in_the_dead_letters_with_its_reason(backend: Backend) -> None:
    aggregator, inbox = aggregator_of(backend)
    worker, _ = worker_of(backend)
    publish(worker, b"bad", b"good")
    inbox.wait_delivery(2)
    bad = inbox.deliveries()[0]
    aggregator.reject(token_of(inbox, 1), Reason.NOT_FINITE, "layer.weight holds NaN", bad)
    dead = wait_for(backend.dead, what="a dead letter")
    assert dead == [Dead(b"bad", "id-bad", "not-finite", "layer.weight holds NaN")]
    aggregator.close()
    _, second = aggregator_of(backend)
    assert second.wait_delivery().body == b"good"


def test_updates_of_one_worker_keep_their_order(backend: Backend) -> None:
    _, inbox = aggregator_of(backend, prefetch=200)
    worker, _ = worker_of(backend)
    publish(worker, b"0")
    bodies = [str(number).encode() for number in range(1, 100)]
    futures = [worker.publish(Outgoing(body=body)) for body in bodies]
    for future in futures:
        future.result(PATIENCE)
    inbox.wait_delivery(100)
    assert inbox.bodies() == [b"0", *bodies]


def test_a_version_reaches_present_workers_and_late_ones(backend: Backend) -> None:
    aggregator, _ = aggregator_of(backend)
    _, first = worker_of(backend, "w1")
    _, second = worker_of(backend, "w2")
    aggregator.broadcast(version(1, 1)).result(PATIENCE)
    for inbox in (first, second):
        assert inbox.wait_delivery(1, Source.PARAMETERS).body == b"1.1.0"
    aggregator.broadcast(version(1, 2)).result(PATIENCE)
    for inbox in (first, second):
        inbox.wait_delivery(2, Source.PARAMETERS)
    _, late = worker_of(backend, "w3")
    late.wait(lambda: b"1.2.0" in late.bodies(Source.PARAMETERS))
    assert late.bodies(Source.PARAMETERS)[-1] == b"1.2.0"
    assert first.bodies(Source.PARAMETERS) == [b"1.1.0", b"1.2.0"]


def test_the_newest_version_waits_for_workers_while_no_aggregator_is_there(backend: Backend) -> None:
    aggregator, _ = aggregator_of(backend)
    aggregator.broadcast(version(1, 1)).result(PATIENCE)
    aggregator.close()
    _, inbox = worker_of(backend)
    assert inbox.wait_delivery(1, Source.PARAMETERS).body == b"1.1.0"


def test_nothing_older_is_handed_over_after_something_newer(backend: Backend) -> None:
    aggregator, _ = aggregator_of(backend)
    _, inbox = worker_of(backend)
    aggregator.broadcast(version(2, 5)).result(PATIENCE)
    inbox.wait_delivery(1, Source.PARAMETERS)
    for message in (version(1, 9), version(2, 4), version(2, 5), version(2, 5, 1), version(3, 0)):
        aggregator.broadcast(message).result(PATIENCE)
    inbox.wait(lambda: b"3.0.0" in inbox.bodies(Source.PARAMETERS))
    assert inbox.bodies(Source.PARAMETERS) == [b"2.5.0", b"2.5.1", b"3.0.0"]


def test_a_worker_that_reconnects_does_not_get_the_same_version_again(backend: Backend) -> None:
    aggregator, _ = aggregator_of(backend)
    worker, inbox = worker_of(backend)
    aggregator.broadcast(version(1, 1)).result(PATIENCE)
    inbox.wait_delivery(1, Source.PARAMETERS)
    worker.drop()
    inbox.wait(lambda: len(inbox.connections()) == 2)
    aggregator.broadcast(version(1, 2)).result(PATIENCE)
    inbox.wait_delivery(2, Source.PARAMETERS)
    assert inbox.bodies(Source.PARAMETERS) == [b"1.1.0", b"1.2.0"]


def test_control_messages_arrive_and_ask_for_no_acknowledgement(backend: Backend) -> None:
    _, inbox = aggregator_of(backend)
    worker, _ = worker_of(backend)
    hello = Outgoing(body=b"hello")
    wait_for(lambda: worker.control(hello).exception(PATIENCE) is None, what="a confirmed hello")
    delivery = inbox.wait_delivery(1, Source.CONTROL)
    assert delivery.body == b"hello"
    assert delivery.token is None


def test_a_hello_waits_for_an_aggregator_that_is_away(backend: Backend) -> None:
    aggregator, _ = aggregator_of(backend)
    aggregator.close()
    worker, _ = worker_of(backend)
    wait_for(lambda: worker.control(Outgoing(body=b"hello")).exception(PATIENCE) is None, what="a confirmed hello")
    _, inbox = aggregator_of(backend)
    assert inbox.wait_delivery(1, Source.CONTROL).body == b"hello"


def test_a_workers_events_reach_the_aggregator(backend: Backend) -> None:
    _, inbox = aggregator_of(backend)
    worker, _ = worker_of(backend)
    publish(worker, b"a")
    worker.event("heartbeat", Outgoing(body=b"alive"))
    worker.event("evaluation", Outgoing(body=b"0.9"))
    inbox.wait_delivery(2, Source.EVENT)
    assert inbox.bodies(Source.EVENT) == [b"alive", b"0.9"]
    assert all(delivery.token is None for delivery in inbox.deliveries(Source.EVENT))


def test_a_notice_reaches_its_worker_only(backend: Backend) -> None:
    aggregator, _ = aggregator_of(backend)
    _, first = worker_of(backend, "w1")
    _, second = worker_of(backend, "w2")

    # Notices are lossy: one that is sent before the worker listens is gone.
    def notified(name: str, inbox: Inbox) -> bool:
        aggregator.notify(name, Outgoing(body=name.encode()))
        return bool(inbox.deliveries(Source.EVENT))

    wait_for(lambda: notified("w1", first), what="a notice to w1")
    wait_for(lambda: notified("w2", second), what="a notice to w2")
    assert set(first.bodies(Source.EVENT)) == {b"w1"}
    assert set(second.bodies(Source.EVENT)) == {b"w2"}


def test_a_worker_that_comes_first_is_refused_and_served_later(backend: Backend) -> None:
    worker, inbox = worker_of(backend)
    early = worker.publish(Outgoing(body=b"early"))
    assert isinstance(early.exception(PATIENCE), Unroutable)
    assert isinstance(worker.control(Outgoing(body=b"hello")).exception(PATIENCE), Unroutable)
    aggregator, updates = aggregator_of(backend)
    publish(worker, b"a")
    assert updates.wait_delivery().body == b"a"
    aggregator.broadcast(version(1, 0)).result(PATIENCE)
    assert inbox.wait_delivery(1, Source.PARAMETERS).body == b"1.0.0"


def test_a_message_over_the_limit_fails_and_the_next_one_does_not(backend: Backend) -> None:
    aggregator, inbox = aggregator_of(backend)
    worker, _ = worker_of(backend)
    publish(worker, b"a")
    large = Outgoing(body=bytes(MAX_MESSAGE_BYTES + 1))
    assert isinstance(worker.publish(large).exception(PATIENCE), MessageTooLarge)
    assert isinstance(aggregator.broadcast(large).exception(PATIENCE), MessageTooLarge)
    worker.publish(Outgoing(body=bytes(MAX_MESSAGE_BYTES))).result(PATIENCE)
    assert len(inbox.wait_delivery(2).body) == MAX_MESSAGE_BYTES


def test_of_two_aggregators_one_consumes_and_the_other_takes_over(backend: Backend) -> None:
    first, active = aggregator_of(backend)
    _, standby = aggregator_of(backend)
    worker, _ = worker_of(backend)
    publish(worker, b"a", b"b")
    for body in (b"x", b"y"):
        worker.control(Outgoing(body=body)).result(PATIENCE)
    active.wait_delivery(2)
    active.wait_delivery(2, Source.CONTROL)
    assert standby.deliveries() == []
    assert standby.deliveries(Source.CONTROL) == []
    first.ack(token_of(active, 1))
    first.close()
    taken = standby.wait_delivery()
    assert (taken.body, taken.redelivered) == (b"b", True)


def test_a_transport_that_is_not_open_says_so_and_closes_as_often_as_one_likes(backend: Backend) -> None:
    worker, aggregator = backend.worker("w1"), backend.aggregator()
    for end in (worker, aggregator):
        end.close()
    assert isinstance(worker.publish(Outgoing(body=b"a")).exception(PATIENCE), BrokerUnreachable)
    worker.event("heartbeat", Outgoing(body=b"alive"))
    opened, _ = worker_of(backend)
    opened.close()
    opened.close()
    assert isinstance(opened.publish(Outgoing(body=b"a")).exception(PATIENCE), BrokerUnreachable)


def test_of_the_versions_that_come_while_one_is_on_its_way_the_newest_arrives(backend: Backend) -> None:
    """Each is settled; none waits for ever, and the last one is what workers get."""
    aggregator = backend.aggregator()
    aggregator.open(Inbox(), wait=PATIENCE)
    worker, inbox = backend.worker("w0"), Inbox()
    worker.open(inbox, wait=PATIENCE)

    futures = [aggregator.broadcast(version(1, number)) for number in range(50)]

    errors = [future.exception(PATIENCE) for future in futures]
    assert errors[-1] is None
    assert all(error is None or isinstance(error, PublishRefused) for error in errors)
    inbox.wait(lambda: inbox.bodies(Source.PARAMETERS)[-1:] == [b"1.49.0"])
    worker.close()
    aggregator.close()
