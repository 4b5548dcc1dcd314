"""``fedmq doctor`` against a real broker: what it tries, that it leaves nothing, and that its advice helps."""

from __future__ import annotations

import json
import secrets
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from broker.admin import Admin
from broker.amqp.node import PrivateNode
from broker.amqp.trial import Role, examine
from broker.permissions import commands, rights_of
from broker.settings import BrokerConfig
from broker.topology import Topology
from fedmq.doctor.asking import Asking
from fedmq.doctor.connection import of_sizes, of_trials
from fedmq.doctor.findings import Level, worst
from tests.support.commands import SECRET, fedmq
from tests.support.ends import Ends
from tests.support.node import admin_of, channel, config_of, fresh_topology, ready
from tests.support.waiting import wait_for

pytestmark = pytest.mark.broker
RUN = Topology("digits")


@pytest.fixture(scope="module")
def vhost(node: PrivateNode) -> str:
    """A virtual host with nothing in it."""
    name = f"doctor-{secrets.token_hex(3)}"
    admin_of(node).put(f"/vhosts/{name}", {})
    admin_of(node).put(f"/permissions/{name}/{node.user}", {"configure": ".*", "write": ".*", "read": ".*"})
    return name


@pytest.fixture
def config(node: PrivateNode, vhost: str) -> BrokerConfig:
    return config_of(node, url=node.url + vhost)


def objects(node: PrivateNode, vhost: str) -> set[str]:
    """What is in a virtual host besides what RabbitMQ makes itself."""
    names = {str(row["name"]) for row in admin_of(node).queues(vhost)}
    exchanges: Any = admin_of(node).get(f"/exchanges/{vhost}")
    return names | {row["name"] for row in exchanges if row["name"] and not row["name"].startswith("amq.")}


def test_an_administrator_may_do_everything_and_nothing_is_left(
    node: PrivateNode, vhost: str, config: BrokerConfig
) -> None:
    found = examine(config, RUN, "w1")

    assert [trial for trial in found.trials if trial.error is not None] == []
    assert len(found.trials) > 35
    assert (found.left, found.is_there, found.is_blocked, found.limit) == ([], False, False, None)
    assert found.largest is not None
    wait_for(lambda: objects(node, vhost) == set(), what="an empty virtual host")


@pytest.mark.parametrize("role", ["aggregator", "worker"])
def test_a_user_is_refused_until_the_advised_commands_were_given(
    node: PrivateNode, vhost: str, config: BrokerConfig, role: Role
) -> None:
    """With no permission at all, then with those of the advice: they are enough, and what is needed of them is said."""
    admin, user, password = admin_of(node), f"user-{secrets.token_hex(3)}", secrets.token_hex(8)
    admin.put(f"/users/{user}", {"password": password, "tags": ""})
    admin.put(f"/permissions/{vhost}/{user}", {"configure": "^$", "write": "^$", "read": "^$"})
    mine = config_of(node, url=node.url.replace(f"{node.user}:{node.password}", f"{user}:{password}") + vhost)

    def tried(*roles: Role) -> list[Any]:
        return of_trials(examine(mine, RUN, "w1", roles=roles), "digits", "w1", roles=roles, is_asked=True)

    (refused,) = tried(role)
    assert refused.level is Level.PROBLEM
    first, *topics = commands(rights_of(role, user, run="digits", worker="w1"), vhost, user)
    assert refused.advice == first

    *_, configure, write, read = shlex.split(first)
    admin.put(f"/permissions/{vhost}/{user}", {"configure": configure, "write": write, "read": read})
    for command in topics:
        *_, exchange, key, of_reading = shlex.split(command)
        rights = {"exchange": exchange, "write": key, "read": of_reading}
        admin.put(f"/topic-permissions/{vhost}/{user}", rights)
    end = run_declared(config)  # a worker's trials need a run that is there
    try:
        (allowed,) = tried(role)
        assert allowed.level is Level.OK, allowed
        other: Role = "worker" if role == "aggregator" else "aggregator"
        if role == "worker":
            assert tried(other)[0].level is Level.PROBLEM
            # Under another worker's name it may not publish.
            wrong = of_trials(
                examine(mine, RUN, "w2", roles=("worker",)), "digits", "w2", roles=("worker",), is_asked=True
            )
            assert "set_topic_permissions" in wrong[0].advice
    finally:
        end()


def run_declared(config: BrokerConfig) -> Any:
    """The run on the broker; returns what takes it away."""
    ends = Ends()
    ends.aggregator(config, RUN)

    def end() -> None:
        ends.close()
        with channel_of(config) as inside:
            for queue in RUN.queues("classic", 0):
                inside.queue_delete(queue.name)
            for exchange in RUN.exchanges():
                inside.exchange_delete(exchange.name)

    return end


@contextmanager
def channel_of(config: BrokerConfig) -> Iterator[Any]:
    import pika  # noqa: PLC0415

    connection = pika.BlockingConnection(pika.URLParameters(config.urls()[0]))
    try:
        yield connection.channel()
    finally:
        connection.close()


def test_what_waits_in_a_run_stays_as_it_is(node: PrivateNode) -> None:
    config, topology, ends = config_of(node), fresh_topology("doctor"), Ends()
    try:
        ends.aggregator(config, topology)
        ends.close()
        with channel(node) as inside:
            inside.basic_publish("fedmq.updates", topology.key("w1"), b"an update")
            inside.basic_publish("fedmq.control", topology.key("w1"), b"a hello")
        wait_for(lambda: ready(node, topology.updates) == 1 and ready(node, topology.control) == 1)

        found = examine(config, topology, "w1")

        assert found.is_there
        assert [trial for trial in found.trials if trial.error is not None] == []
        assert ready(node, topology.updates) == ready(node, topology.control) == 1
        with channel(node) as inside:
            method, _, body = inside.basic_get(topology.updates)
            assert (body, method.redelivered) == (b"an update", False)
    finally:
        ends.close()


def test_a_worker_of_a_run_that_is_not_there_is_told_what_could_not_be_tried(config: BrokerConfig) -> None:
    (found,) = of_trials(examine(config, RUN, "w", roles=("worker",)), "digits", "w", roles=("worker",), is_asked=True)

    assert found.level is Level.NOTE
    assert "no aggregator has declared run 'digits' yet" in found.text


def test_a_broker_that_takes_no_messages_is_noticed_and_does_not_hold_the_doctor(
    node: PrivateNode, config: BrokerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three seconds, of rabbitmqctl alone."""
    monkeypatch.setattr("broker.amqp.trial.SECONDS", 0.5)
    node.ctl("set_vm_memory_high_watermark", "absolute", "1")
    try:
        found = examine(config, RUN, "w1")
    finally:
        node.ctl("set_vm_memory_high_watermark", "0.4")

    assert found.is_blocked
    assert worst(of_sizes(found, chunk_bytes=config.chunk_bytes)) is Level.PROBLEM
    assert found.left == []
    assert [trial for trial in found.trials if trial.error is not None] == []


def test_an_address_that_does_not_answer_stands_beside_one_that_does(node: PrivateNode, vhost: str) -> None:
    config = config_of(node, url=f"amqp://a:b@127.0.0.1:1/,{node.url}{vhost}", connect_timeout=2)

    first, second = examine(config, RUN, "w1", roles=("worker",)).greetings

    assert first.error is not None
    assert (second.error, second.user, second.vhost) == (None, node.user, vhost)
    assert second.version > (3, 9)


# -------------------------------------------------------------------------------------------- the management API


class Odd(BaseHTTPRequestHandler):
    """An API of another kind: lists of words, pages, nothing at all."""

    answer = b'["no", "objects"]'
    asked: list[str] = []  # noqa: RUF012 (of one test)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.answer:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.answer)
        else:
            threading.Event().wait(1.0)

    def log_message(self, *_arguments: object) -> None:
        pass


@contextmanager
def odd(answer: bytes) -> Iterator[Asking]:
    Odd.answer, Odd.asked = answer, []
    server = HTTPServer(("127.0.0.1", 0), Odd)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Asking(Admin(f"http://127.0.0.1:{server.server_port}", "u", "p", timeout=0.3))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("answer", "words", "times"),
    [(b'["no"]', "another version", 2), (b"<html>", "does not answer", 1), (b"", "timed out", 1)],
)
def test_an_api_of_another_kind_or_a_slow_one_is_told_once(answer: bytes, words: str, times: int) -> None:
    with odd(answer) as asking:
        assert asking.some("/nodes", "alarms") is None
        assert asking.some("/overview", "connections") is None
        (found,) = asking.untold()

    assert "not looked at: alarms, connections" in found.text
    assert words in found.text
    assert len(Odd.asked) == times


def test_a_user_who_may_not_ask_is_told_so_once(node: PrivateNode, vhost: str) -> None:
    admin_of(node).put("/users/nobody-in-particular", {"password": "pw", "tags": ""})
    asking = Asking(Admin(node.management_url, "nobody-in-particular", "pw"))

    assert (asking.some("/nodes", "alarms"), asking.some("/overview", "connections")) == (None, None)
    (found,) = asking.untold()
    assert "rabbitmqctl set_user_tags nobody-in-particular monitoring" in found.text


def has_settled(admin: Admin, topology: Topology) -> bool:
    """Whether the API knows all of the run's queues, and of no alarm."""
    states = {queue["name"]: queue.get("state") for queue in admin.queues()}
    wanted = {queue.name for queue in topology.queues("classic", 1000)}
    calm = not any(one.get("mem_alarm") or one.get("disk_free_alarm") for one in admin.nodes())
    return calm and all(states.get(name) == "running" for name in wanted)


def test_the_command_of_a_run_that_is_there(node: PrivateNode, tmp_path: Path) -> None:
    """A process, for exit code and output. It takes one and a half seconds."""
    ends, topology = Ends(), fresh_topology("doctor")
    try:
        ends.aggregator(config_of(node), topology)
        # What the API says is some time ago: of an alarm of the test before this, and of queues that are new.
        wait_for(lambda: has_settled(admin_of(node), topology), what="the API's knowledge of the run")
        more = {"FEDMQ_BROKER_MANAGEMENT_URL": node.management_url}
        done = fedmq(tmp_path, "doctor", "--run", topology.run, "--json", url=node.url, environment=more)
    finally:
        ends.close()

    assert (done.code, done.err) == (0, ""), done.out
    found = json.loads(done.out)
    assert found["worst"] == "note"
    areas = {finding["area"]: finding["level"] for finding in found["findings"] if finding["level"] != "note"}
    assert areas.keys() >= {"broker", "permissions", "limits", "objects", "policies", "dead letters", "clock", "python"}
    assert set(areas.values()) == {"ok"}


def test_the_command_without_a_broker(tmp_path: Path) -> None:
    """A process, for exit code 1 and that the password stays where it is."""
    done = fedmq(tmp_path, "doctor", "--set", "broker.connect_timeout=1")

    assert (done.code, done.err) == (1, "")
    assert "no connection: 127.0.0.1:1" in done.out
    assert "not looked at: " in done.out
    assert SECRET not in done.out
