"""What RabbitMQ refuses becomes an error that says what to do; what breaks is made again."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator

import pytest
from pika.adapters.utils.io_services_utils import _AsyncTransportBase

from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpWorkerTransport
from broker.errors import (
    AccessRefused,
    BrokerError,
    BrokerUnreachable,
    ConfigError,
    ConnectionLost,
    MessageTooLarge,
    TopologyMismatch,
    UnsupportedBroker,
)
from broker.messages import Reason
from broker.settings import BrokerConfig
from broker.topology import EVENTS, UPDATES, Topology
from broker.transport import Outgoing, Source
from tests.support.ends import Ends, confirmed, version
from tests.support.node import add_user, admin_of, channel, config_of, drain, fresh_topology, ready
from tests.support.waiting import PATIENCE, Inbox, wait_for

pytestmark = pytest.mark.broker

MIB = 2**20


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


@pytest.fixture
def topology() -> Topology:
    return fresh_topology("errors")


# ------------------------------------------------------------------------------------------------- refusals


def test_wrong_password_names_the_user_and_not_the_password(node: PrivateNode, ends: Ends, topology: Topology) -> None:
    config = config_of(node, url=node.url.replace(node.password, "wrong-secret"))
    with pytest.raises(AccessRefused, match=node.user) as caught:
        ends.worker(config, topology)
    assert "wrong-secret" not in str(caught.value)
    assert "broker.url" in str(caught.value)


def test_a_refusal_reaches_the_sink_of_a_transport_that_did_not_wait(node: PrivateNode, topology: Topology) -> None:
    config = config_of(node, url=node.url.replace(node.password, "wrong-secret"))
    worker, inbox = AmqpWorkerTransport(config, topology, worker="w1"), Inbox()
    worker.open(inbox)
    inbox.wait(inbox.failures)
    assert isinstance(inbox.failures()[0].error, AccessRefused)
    assert isinstance(worker.publish(Outgoing(body=b"a")).exception(PATIENCE), AccessRefused)
    worker.close()
    # Both links were refused; one word is enough.
    assert len(inbox.failures()) == 1


def test_unknown_virtual_host_is_named(node: PrivateNode, ends: Ends, topology: Topology) -> None:
    with pytest.raises(AccessRefused, match=r"no virtual host 'elsewhere'.*add_vhost"):
        ends.worker(config_of(node, url=f"{node.url}elsewhere"), topology)


def test_a_user_without_rights_to_the_virtual_host_is_told_the_command(
    node: PrivateNode, ends: Ends, topology: Topology
) -> None:
    name = f"{node.user}-bare"
    admin_of(node).put(f"/users/{name}", {"password": "pw", "tags": ""})
    config = config_of(node, url=node.url.replace(f"{node.user}:{node.password}", f"{name}:pw"))
    with pytest.raises(AccessRefused, match=f"{name}.*set_permissions -p / {name}"):
        ends.worker(config, topology)


def test_missing_configure_permission_stops_the_aggregator(node: PrivateNode, ends: Ends, topology: Topology) -> None:
    config = config_of(node, url=add_user(node, configure="", write=".*", read=".*"))
    with pytest.raises(AccessRefused, match=f"configure permission to declare exchange '{UPDATES}'"):
        ends.aggregator(config, topology)


def test_missing_read_permission_names_the_queue(node: PrivateNode, ends: Ends, topology: Topology) -> None:
    ends.aggregator(config_of(node), topology)
    config = config_of(node, url=add_user(node, configure=".*", write=".*", read=f"^({EVENTS}|fedmq.*notice.*)$"))
    _, inbox = ends.worker(config, topology)
    inbox.wait(inbox.failures)
    error = inbox.failures()[0].error
    assert isinstance(error, AccessRefused)
    assert f"read permission to consume from queue '{topology.parameters}'" in str(error)


def test_missing_write_permission_fails_the_update_and_the_worker(
    node: PrivateNode, ends: Ends, topology: Topology
) -> None:
    ends.aggregator(config_of(node), topology)
    config = config_of(node, url=add_user(node, configure=".*", write="^fedmq.*notice.*", read=".*"))
    worker, inbox = ends.worker(config, topology)
    update = Outgoing(body=b"a", message_id="a")
    outcomes = []

    def refused() -> bool:
        outcomes.append(worker.publish(update).exception(PATIENCE))
        return isinstance(outcomes[-1], AccessRefused)

    wait_for(refused, what="a refusal")
    assert "write permission to publish" in str(outcomes[-1])
    inbox.wait(inbox.failures)
    assert isinstance(worker.publish(update).exception(PATIENCE), AccessRefused)


def test_a_queue_of_another_type_is_named_with_what_to_do(node: PrivateNode, ends: Ends, topology: Topology) -> None:
    first, _ = ends.aggregator(config_of(node, queue_type="classic"), topology)
    first.close()
    with pytest.raises(TopologyMismatch) as caught:
        ends.aggregator(config_of(node, queue_type="quorum"), topology)
    text = str(caught.value)
    assert f"queue '{topology.updates}'" in text
    assert "set broker.queue_type to the type that it has" in text
    assert f"delete_queue {topology.updates}" in text


def test_an_exchange_of_another_type_is_named(node: PrivateNode, ends: Ends, topology: Topology) -> None:
    with channel(node) as inside:
        inside.exchange_declare(topology.parameters, "direct", durable=True)
    with pytest.raises(TopologyMismatch, match=f"exchange '{topology.parameters}'.*'type'"):
        ends.aggregator(config_of(node), topology)


def test_another_model_size_keeps_the_stream_that_is_there(node: PrivateNode, ends: Ends, topology: Topology) -> None:
    first, _ = ends.aggregator(config_of(node), topology, model_bytes=1000)
    first.broadcast(version(1)).result(PATIENCE)
    first.close()
    second, _ = ends.aggregator(config_of(node), topology, model_bytes=10 * MIB)
    second.broadcast(version(2)).result(PATIENCE)
    _, inbox = ends.worker(config_of(node), topology)
    inbox.wait(lambda: b"v2" in inbox.bodies(Source.PARAMETERS))


def test_quorum_queues_work_where_they_are_asked_for(node: PrivateNode, ends: Ends, topology: Topology) -> None:
    aggregator, inbox = ends.aggregator(config_of(node, queue_type="quorum"), topology)
    worker, _ = ends.worker(config_of(node), topology)
    confirmed(worker.publish, Outgoing(body=b"a", message_id="a"))
    delivery = inbox.wait_delivery()
    assert delivery.token is not None
    aggregator.reject(delivery.token, Reason.MALFORMED, "torn", delivery)
    wait_for(lambda: ready(node, topology.dead) == 1, what="a dead letter")


def test_a_broker_that_is_too_old_is_refused(
    node: PrivateNode, ends: Ends, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.amqp.session.OLDEST", (99, 0, 0))
    with pytest.raises(UnsupportedBroker, match=r"RabbitMQ \d+\.\d+\.\d+; fedmq needs"):
        ends.worker(config_of(node), topology)


def test_a_broker_that_is_newer_than_any_tested_is_used_with_a_warning(
    node: PrivateNode,
    ends: Ends,
    topology: Topology,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("broker.amqp.session.NEWEST_TESTED_MAJOR", 2)
    with caplog.at_level(logging.WARNING):
        ends.worker(config_of(node), topology)
    assert "not tested with it" in caplog.text


def test_a_message_that_cannot_be_written_down_fails_alone(node: PrivateNode, ends: Ends, topology: Topology) -> None:
    _, inbox = ends.aggregator(config_of(node), topology)
    worker, _ = ends.worker(config_of(node), topology)
    confirmed(worker.publish, Outgoing(body=b"a", message_id="a"))
    too_long = worker.publish(Outgoing(body=b"b", message_id="b" * 300))
    # A number that AMQP has no room for is left out.
    confirmed(worker.publish, Outgoing(body=b"c", message_id="c", headers={"n": 2**80, "m": 1}))
    confirmed(worker.publish, Outgoing(body=b"d", message_id="d"))
    assert isinstance(too_long.exception(PATIENCE), BrokerError)
    inbox.wait_delivery(3)
    assert inbox.bodies() == [b"a", b"c", b"d"]
    assert [item.headers.get("m") for item in inbox.deliveries()] == [None, 1, None]
    assert inbox.losses() == []


# -------------------------------------------------------------------------------------------------- distance


def test_nobody_there_is_unreachable_after_the_wait(ends: Ends, topology: Topology) -> None:
    config = BrokerConfig.model_validate({"url": "amqp://u:secret@127.0.0.1:1/"})
    end = AmqpWorkerTransport(config, topology, worker="w1")
    with pytest.raises(BrokerUnreachable, match=r"127\.0\.0\.1:1.*refused") as caught:
        end.open(Inbox(), wait=0.5)
    assert "secret" not in str(caught.value)
    assert isinstance(end.publish(Outgoing(body=b"a")).exception(PATIENCE), BrokerUnreachable)


def test_of_several_addresses_one_that_answers_is_enough(node: PrivateNode, ends: Ends, topology: Topology) -> None:
    config = config_of(node, url=f"amqp://u:p@127.0.0.1:1/,{node.url}")
    ends.worker(config, topology)


def test_an_unreadable_address_is_a_setting_that_is_wrong_and_stays_secret(topology: Topology) -> None:
    config = BrokerConfig.model_validate({"url": "amqp://u:secret@host:port/"})
    with pytest.raises(ConfigError, match=r"broker\.url") as caught:
        AmqpWorkerTransport(config, topology, worker="w1")
    assert "secret" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ disruptions


def test_nothing_confirmed_is_lost_when_an_operator_closes_connections(
    node: PrivateNode, ends: Ends, topology: Topology
) -> None:
    _, inbox = ends.aggregator(config_of(node), topology)
    worker, _ = ends.worker(config_of(node), topology)
    admin = admin_of(node)
    confirmed(worker.publish, Outgoing(body=b"first", message_id="first"))

    def ours() -> list[str]:
        return [
            connection["name"]
            for connection in admin.connections()
            if topology.run in str(connection.get("client_properties", {}).get("connection_name"))
        ]

    wait_for(lambda: len(ours()) == 4, what="four connections in the admin UI")

    def close_all() -> None:
        for name in ours():
            admin.close_connection(name, "a test")

    closer = threading.Thread(target=close_all)
    closer.start()
    names = {"first"}
    while closer.is_alive() or len(names) < 200:
        batch = {
            f"id-{len(names) + n}": Outgoing(body=bytes(20_000), message_id=f"id-{len(names) + n}") for n in range(20)
        }
        names |= set(batch)
        while batch:
            futures = {name: worker.publish(message) for name, message in batch.items()}
            errors = {name: future.exception(PATIENCE) for name, future in futures.items()}
            assert all(error is None or isinstance(error, ConnectionLost) for error in errors.values())
            batch = {name: message for name, message in batch.items() if errors[name]}
    closer.join()
    inbox.wait(lambda: len(inbox.connections()) == 2)
    assert "a test" in inbox.losses()[0].error
    confirmed(worker.publish, Outgoing(body=b"last", message_id="last"))
    inbox.wait(lambda: {str(d.headers["message_id"]) for d in inbox.deliveries()} == names | {"last"})


def test_a_deleted_queue_is_declared_again(
    node: PrivateNode, ends: Ends, topology: Topology, caplog: pytest.LogCaptureFixture
) -> None:
    _, inbox = ends.aggregator(config_of(node), topology)
    worker, _ = ends.worker(config_of(node), topology)
    confirmed(worker.publish, Outgoing(body=b"a", message_id="a"))
    inbox.wait_delivery()
    with caplog.at_level(logging.WARNING):
        admin_of(node).delete_queue(topology.updates)
        inbox.wait(lambda: len(inbox.connections()) == 2)
    assert "its queue was deleted" in caplog.text
    confirmed(worker.publish, Outgoing(body=b"b", message_id="b"))
    assert inbox.wait_delivery(2).body == b"b"


def test_a_deleted_stream_and_deleted_dead_letters_are_declared_again(
    node: PrivateNode, ends: Ends, topology: Topology
) -> None:
    aggregator, inbox = ends.aggregator(config_of(node), topology)
    worker, parameters = ends.worker(config_of(node), topology)
    confirmed(worker.publish, Outgoing(body=b"a", message_id="a"))
    delivery = inbox.wait_delivery()
    assert delivery.token is not None
    for name in (topology.parameters, topology.dead):
        admin_of(node).delete_queue(name)
    aggregator.reject(delivery.token, Reason.TOO_STALE, "late", delivery)
    aggregator.broadcast(version(1)).result(PATIENCE)
    assert parameters.wait_delivery(1, Source.PARAMETERS).body == b"v1"
    wait_for(lambda: ready(node, topology.dead) == 1, what="a dead letter")


def test_transports_come_back_after_the_broker_was_killed(node: PrivateNode, ends: Ends, topology: Topology) -> None:
    aggregator, updates = ends.aggregator(config_of(node), topology)
    worker, parameters = ends.worker(config_of(node), topology)
    confirmed(worker.publish, Outgoing(body=b"before", message_id="before"))
    aggregator.broadcast(version(1)).result(PATIENCE)
    parameters.wait_delivery(1, Source.PARAMETERS)
    updates.wait_delivery()
    try:
        node.kill()
        updates.wait(updates.losses)
        parameters.wait(parameters.losses)
        during = worker.publish(Outgoing(body=b"during", message_id="during"))
        newer = aggregator.broadcast(version(2))
    finally:
        node.start()
    assert newer.exception(60) is None
    if during.exception(60) is not None:
        confirmed(worker.publish, Outgoing(body=b"during", message_id="during"))
    updates.wait(lambda: {b"before", b"during"} <= set(updates.bodies()[1:]), 60)
    parameters.wait(lambda: b"v2" in parameters.bodies(Source.PARAMETERS), 60)
    assert parameters.bodies(Source.PARAMETERS) == [b"v1", b"v2"]


def test_a_broker_that_stops_in_order_is_waited_for_too(node: PrivateNode, ends: Ends, topology: Topology) -> None:
    _, inbox = ends.aggregator(config_of(node), topology)
    node.restart()
    inbox.wait(lambda: len(inbox.connections()) == 2, 60)
    assert inbox.failures() == []


def test_closing_does_not_hang_on_a_broker_that_is_frozen(node: PrivateNode, ends: Ends, topology: Topology) -> None:
    aggregator, _ = ends.aggregator(config_of(node), topology)
    worker, _ = ends.worker(config_of(node), topology)
    confirmed(worker.publish, Outgoing(body=b"a", message_id="a"))
    try:
        node.pause()
        future = worker.publish(Outgoing(body=b"b", message_id="b"))
        worker.close()
        aggregator.close()
    finally:
        node.resume()
    assert isinstance(future.exception(PATIENCE), ConnectionLost)


def test_a_memory_alarm_makes_publishing_wait_and_is_logged(
    node: PrivateNode, ends: Ends, topology: Topology, caplog: pytest.LogCaptureFixture
) -> None:
    _, inbox = ends.aggregator(config_of(node), topology)
    worker, _ = ends.worker(config_of(node), topology)
    confirmed(worker.publish, Outgoing(body=b"a", message_id="a"))
    with caplog.at_level(logging.WARNING):
        try:
            node.ctl("set_vm_memory_high_watermark", "0.000001")
            future = worker.publish(Outgoing(body=b"b", message_id="b"))
            wait_for(lambda: "takes no messages for now" in caplog.text, what="a warning")
            assert not future.done()
        finally:
            node.ctl("set_vm_memory_high_watermark", "0.4")
        future.result(PATIENCE)
        wait_for(lambda: "takes messages again" in caplog.text, what="the all-clear")
    assert inbox.wait_delivery(2).body == b"b"


def test_a_message_that_only_the_broker_finds_too_large(node: PrivateNode, ends: Ends, topology: Topology) -> None:
    config = config_of(node, max_message_bytes=200 * MIB)
    ends.aggregator(config, topology)
    worker, _ = ends.worker(config, topology)
    confirmed(worker.publish, Outgoing(body=b"a", message_id="a"))
    error = worker.publish(Outgoing(body=bytes(128 * MIB + 1), message_id="large")).exception(60)
    assert isinstance(error, MessageTooLarge)
    # The default of RabbitMQ up to 3.13, and from 4.0 on.
    assert f"up to {128 * MIB} bytes" in str(error) or f"up to {16 * MIB} bytes" in str(error)
    assert "max_message_size" in str(error)
    confirmed(worker.publish, Outgoing(body=b"b", message_id="b"))


def test_large_messages_are_read_in_large_pieces(
    node: PrivateNode, ends: Ends, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    receive = _AsyncTransportBase._sigint_safe_recv

    def counted(sock: socket.socket, size: int) -> bytes:
        data: bytes = receive(sock, size)
        sizes.append(len(data))
        return data

    _, inbox = ends.aggregator(config_of(node), topology)
    worker, _ = ends.worker(config_of(node), topology)
    confirmed(worker.publish, Outgoing(body=b"a", message_id="a"))
    monkeypatch.setattr(_AsyncTransportBase, "_sigint_safe_recv", staticmethod(counted))
    confirmed(worker.publish, Outgoing(body=bytes(8 * MIB), message_id="b"))
    inbox.wait_delivery(2)
    # With pika's own 4 KiB it takes 2048 reads.
    assert sum(sizes) > 8 * MIB
    assert len(sizes) < 700


# --------------------------------------------------------------------------------------- what operators see


def test_names_in_the_admin_ui_say_who_is_who(node: PrivateNode, ends: Ends, topology: Topology) -> None:
    ends.aggregator(config_of(node), topology)
    worker, _ = ends.worker(config_of(node), topology, "w7")
    worker.control(Outgoing(body=b"hello")).result(PATIENCE)
    admin = admin_of(node)

    def properties() -> dict[str, dict[str, object]]:
        found = [connection.get("client_properties", {}) for connection in admin.connections()]
        return {str(p["connection_name"]): p for p in found if topology.run in str(p.get("connection_name"))}

    wait_for(lambda: len(properties()) == 4, what="four connections in the admin UI")
    seen = properties()
    assert set(seen) == {
        f"fedmq {who} · run {topology.run} · {what}"
        for who in ("aggregator", "worker w7")
        for what in ("publish", "consume")
    }
    for one in seen.values():
        assert one["product"] == "fedmq"
        assert one["version"]
        assert str(one["platform"]).startswith("Python 3.")

    def tags() -> dict[str, str]:
        return {
            consumer["consumer_tag"]: consumer["queue"]["name"]
            for consumer in admin.consumers()
            if topology.run in consumer["queue"]["name"]
        }

    def settled() -> dict[str, str]:
        # The worker asks again and again while the stream is empty, so its consumer is not always there.
        found = tags()
        return found if len(found) == 6 else {}

    shown = wait_for(settled, what="six consumers in the admin UI")
    assert shown["aggregator"] == topology.updates
    assert shown["w7-parameters"] == topology.parameters
    kinds = {queue["name"]: queue["type"] for queue in admin.queues() if topology.run in queue["name"]}
    assert kinds[topology.parameters] == "stream"
    assert admin.overview()["rabbitmq_version"]


def test_a_dead_letter_carries_everything_an_operator_asks(node: PrivateNode, ends: Ends, topology: Topology) -> None:
    aggregator, inbox = ends.aggregator(config_of(node), topology)
    worker, _ = ends.worker(config_of(node), topology)
    confirmed(worker.publish, Outgoing(body=b"a", message_id="w1/i/3", headers={"seq": 3, "worker": "w1"}))
    delivery = inbox.wait_delivery()
    assert delivery.token is not None
    aggregator.reject(delivery.token, Reason.TOO_STALE, "x" * 900, delivery)
    wait_for(lambda: ready(node, topology.dead) == 1, what="a dead letter")
    ((properties, body),) = drain(node, topology.dead)
    assert body == b"a"
    assert (properties.message_id, properties.app_id, properties.type) == ("w1/i/3", "fedmq", "update")
    assert (properties.delivery_mode, properties.content_type) == (2, "application/msgpack")
    assert properties.user_id == properties.headers["user"] == node.user
    assert properties.timestamp is not None
    headers = properties.headers
    assert (headers["seq"], headers["worker"], headers["reason"]) == (3, "w1", "too-stale")
    assert len(headers["detail"]) == 500
    assert headers["time"] > 1_600_000_000


def test_the_admin_client_explains_refusals(node: PrivateNode) -> None:
    url = add_user(node, configure="", write="", read="")
    with pytest.raises(AccessRefused, match="monitoring"):
        admin_of(node).of(config_of(node, url=url)).overview()
    with pytest.raises(BrokerError, match="404"):
        admin_of(node).delete_queue("there-is-none")
    with pytest.raises(BrokerUnreachable, match=r"127\.0\.0\.1:1 "):
        admin_of(node).of(config_of(node, management_url="http://127.0.0.1:1")).overview()
