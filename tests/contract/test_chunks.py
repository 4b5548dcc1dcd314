"""What both brokers do alike with messages in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from broker.errors import Unroutable
from broker.messages import Reason
from broker.transport import Delivery, Outgoing, Source
from tests.contract.backends import AggregatorEnd, Backend, Dead, MemoryBackend, RabbitBackend, WorkerEnd
from tests.support.waiting import PATIENCE, Inbox, wait_for

CHUNKS = tuple(f"chunk {index} ".encode() * 100 for index in range(20))


@pytest.fixture(params=["memory", pytest.param("rabbitmq", marks=pytest.mark.broker)])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    made: Backend = MemoryBackend() if request.param == "memory" else RabbitBackend(request.getfixturevalue("node"))
    yield made
    made.close()


@pytest.fixture
def ends(backend: Backend) -> tuple[AggregatorEnd, Inbox, WorkerEnd, Inbox]:
    aggregator, updates, worker, versions = backend.aggregator(), Inbox(), backend.worker("w1"), Inbox()
    aggregator.open(updates, wait=PATIENCE)
    aggregator.admit("w1")
    worker.open(versions, wait=PATIENCE)
    return aggregator, updates, worker, versions


def update(seq: int = 0, chunks: tuple[bytes, ...] = CHUNKS) -> Outgoing:
    headers: dict[str, str | int] = {"worker": "w1", "chunks": len(chunks), "bytes": sum(map(len, chunks))}
    return Outgoing(body=f"manifest {seq}".encode(), chunks=chunks, message_id=f"w1/i/{seq}", headers=headers)


def version(number: int, attempt: int = 0) -> Outgoing:
    headers: dict[str, str | int] = {"epoch": 1, "version": number, "attempt": attempt, "chunks": len(CHUNKS)}
    chunks = tuple(f"{number}".encode() + chunk for chunk in CHUNKS)
    return Outgoing(body=f"{number}.{attempt}".encode(), chunks=chunks, message_id=f"r/1/{number}", headers=headers)


def publish(worker: WorkerEnd, message: Outgoing) -> None:
    # The outbox may not be there yet: sent again, as a worker does.
    wait_for(lambda: worker.publish(message).exception(PATIENCE) is None, what="a confirmed update")


def fetched(aggregator: AggregatorEnd, inbox: Inbox, manifest: Delivery) -> Delivery:
    count = len(inbox.deliveries())
    aggregator.fetch(manifest)
    return inbox.wait_delivery(count + 1)


def test_an_update_in_chunks_is_announced_and_complete_when_it_was_fetched(
    ends: tuple[AggregatorEnd, Inbox, WorkerEnd, Inbox],
) -> None:
    aggregator, inbox, worker, _ = ends
    publish(worker, update())
    manifest = inbox.wait_delivery(1)
    assert manifest.body == b"manifest 0"
    assert manifest.chunks is None
    whole = fetched(aggregator, inbox, manifest)
    assert whole.chunks == CHUNKS
    assert (whole.token, whole.body, whole.lost) == (manifest.token, manifest.body, "")


def test_updates_are_fetched_one_by_one_and_come_again_until_they_are_acknowledged(
    backend: Backend, ends: tuple[AggregatorEnd, Inbox, WorkerEnd, Inbox]
) -> None:
    aggregator, inbox, worker, _ = ends
    for seq in range(3):
        publish(worker, update(seq, CHUNKS[seq:]))
    inbox.wait_delivery(3)
    manifests = inbox.deliveries()
    for seq, manifest in enumerate(manifests):
        assert fetched(aggregator, inbox, manifest).chunks == CHUNKS[seq:]
    assert manifests[0].token is not None
    aggregator.ack(manifests[0].token)
    aggregator.close()
    second, again = backend.aggregator(), Inbox()
    second.open(again, wait=PATIENCE)
    again.wait_delivery(2)
    assert [d.body for d in again.deliveries()] == [b"manifest 1", b"manifest 2"]
    assert fetched(second, again, again.deliveries()[0]).chunks == CHUNKS[1:]
    assert fetched(second, again, again.deliveries()[1]).chunks == CHUNKS[2:]


def test_a_rejected_update_leaves_its_reason_and_not_its_chunks(
    backend: Backend, ends: tuple[AggregatorEnd, Inbox, WorkerEnd, Inbox]
) -> None:
    aggregator, inbox, worker, _ = ends
    publish(worker, update(0))
    publish(worker, update(1, CHUNKS[5:]))
    inbox.wait_delivery(2)
    first, second = inbox.deliveries()
    assert first.token is not None
    aggregator.reject(first.token, Reason.TOO_STALE, "of old", first)
    dead: list[Dead] = []

    def look() -> bool:
        dead.extend(backend.dead())
        return bool(dead)

    wait_for(look, what="a dead letter")
    assert (dead[0].reason, dead[0].message_id) == ("too-stale", "w1/i/0")
    assert len(dead[0].body) < 100
    assert fetched(aggregator, inbox, second).chunks == CHUNKS[5:]


def test_a_version_in_chunks_is_there_for_whoever_asks_for_it(
    backend: Backend, ends: tuple[AggregatorEnd, Inbox, WorkerEnd, Inbox]
) -> None:
    aggregator, _, worker, inbox = ends
    aggregator.prepare(version(1))
    aggregator.broadcast(version(1)).result(PATIENCE)
    offer = inbox.wait_delivery(1, Source.PARAMETERS)
    assert (offer.source, offer.body, offer.chunks) == (Source.PARAMETERS, b"1.0", None)
    worker.fetch(offer)
    assert inbox.wait_delivery(2, Source.PARAMETERS).chunks == version(1).chunks
    late, later = backend.worker("w2"), Inbox()
    late.open(later, wait=PATIENCE)
    late.fetch(later.wait_delivery(1, Source.PARAMETERS))
    assert later.wait_delivery(2, Source.PARAMETERS).chunks == version(1).chunks


def offered(inbox: Inbox, body: bytes) -> Delivery:
    """The offer with this body. A worker may have come too late for those before it."""

    def found() -> Delivery | None:
        offers = [d for d in inbox.deliveries(Source.PARAMETERS) if d.chunks is None and d.body == body]
        return offers[0] if offers else None

    offer = inbox.wait(found)
    assert offer is not None
    return offer


def downloaded(inbox: Inbox) -> Delivery:
    """The first version that has come with its chunks."""
    inbox.wait(lambda: any(d.chunks for d in inbox.deliveries(Source.PARAMETERS)))
    return next(d for d in inbox.deliveries(Source.PARAMETERS) if d.chunks)


def test_a_version_that_is_told_again_need_not_be_sent_again(
    ends: tuple[AggregatorEnd, Inbox, WorkerEnd, Inbox],
) -> None:
    aggregator, _, worker, inbox = ends
    aggregator.broadcast(version(1)).result(PATIENCE)
    aggregator.broadcast(version(1, attempt=1)).result(PATIENCE)
    worker.fetch(offered(inbox, b"1.1"))
    whole = downloaded(inbox)
    assert (whole.body, whole.chunks) == (b"1.1", version(1).chunks)


def test_the_newest_of_several_versions_is_complete(ends: tuple[AggregatorEnd, Inbox, WorkerEnd, Inbox]) -> None:
    aggregator, _, worker, inbox = ends
    for number in range(1, 4):
        aggregator.broadcast(version(number)).result(PATIENCE)
    worker.fetch(offered(inbox, b"3.0"))
    assert downloaded(inbox).chunks == version(3).chunks


def test_a_cut_connection_does_not_stop_what_is_on_its_way(ends: tuple[AggregatorEnd, Inbox, WorkerEnd, Inbox]) -> None:
    aggregator, _, worker, inbox = ends
    sent = aggregator.broadcast(version(1))
    aggregator.drop()
    sent.result(PATIENCE)
    worker.drop()
    offer = inbox.wait_delivery(1, Source.PARAMETERS)
    worker.fetch(offer)
    worker.drop()
    assert downloaded(inbox).chunks == version(1).chunks


def test_an_update_whose_chunks_are_not_there_is_given_up(
    backend: Backend, ends: tuple[AggregatorEnd, Inbox, WorkerEnd, Inbox]
) -> None:
    aggregator, inbox, worker, _ = ends
    publish(worker, replace(update(), chunks=()))
    lost = fetched(aggregator, inbox, inbox.wait_delivery(1))
    assert lost.chunks is None
    assert lost.lost


def test_without_an_outbox_an_update_waits_with_its_worker(backend: Backend) -> None:
    aggregator, inbox, worker = backend.aggregator(), Inbox(), backend.worker("w1")
    aggregator.open(inbox, wait=PATIENCE)
    worker.open(Inbox(), wait=PATIENCE)
    if isinstance(backend, RabbitBackend):
        assert isinstance(worker.publish(update()).exception(PATIENCE), Unroutable)
        aggregator.admit("w1")
    publish(worker, update())
    assert fetched(aggregator, inbox, inbox.wait_delivery(1)).chunks == CHUNKS
