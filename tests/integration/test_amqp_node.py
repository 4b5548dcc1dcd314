"""A private node disturbs nobody and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path

import pika
import pytest

from broker.amqp.node import PrivateNode
from broker.errors import BrokerError
from tests.support.node import admin_of, require_rabbitmq
from tests.support.waiting import wait_for

pytestmark = pytest.mark.broker


def processes(folder: str) -> list[str]:
    """Command lines of processes whose home is ``folder``, which is what ties them to the node."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if f"HOME={folder}".encode() in environment.split(b"\0") and command:
                found.append(command)
    return found


def test_a_node_has_its_own_everything_and_goes_without_a_trace() -> None:
    require_rabbitmq()
    with PrivateNode(plugins=("rabbitmq_management", "rabbitmq_prometheus")) as node:
        folder = node.folder
        conf = folder / "rabbitmq.conf"
        assert stat.S_IMODE(conf.stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        if os.geteuid() == 0:
            assert conf.stat().st_uid != 0
        running = processes(str(folder))
        assert any("beam" in command for command in running)
        assert any("epmd" in command for command in running)
        assert node.password not in " ".join(running)
        with urllib.request.urlopen(node.prometheus_url, timeout=10) as answer:  # noqa: S310
            assert b"rabbitmq_identity_info" in answer.read()
        assert admin_of(node).overview()["rabbitmq_version"]
        with PrivateNode(plugins=()) as other:
            assert other.url != node.url
            assert other.folder != folder
        pika.BlockingConnection(pika.URLParameters(node.url)).close()
    assert not folder.exists()
    wait_for(lambda: not processes(str(folder)), what="the end of all processes")


OWNER = """
import os, signal, sys
from broker.amqp.node import PrivateNode

# Whoever runs the tests in the background may have it ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
with PrivateNode(plugins=()) as node:
    print(node.folder, flush=True)
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_nothing_is_left_when_the_owner_is_ended_by(name: str) -> None:
    require_rabbitmq()
    done = subprocess.run(
        [sys.executable, "-c", OWNER, name],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode in {-signal.SIGKILL, -signal.SIGINT, 1, 130}, done.stderr
    folder = done.stdout.strip()
    assert folder, done.stderr
    wait_for(lambda: not Path(folder).exists() and not processes(folder), what="the end of the node")


def test_data_survive_a_kill_and_ports_stay() -> None:
    require_rabbitmq()
    with PrivateNode(plugins=()) as node:
        url = node.url
        connection = pika.BlockingConnection(pika.URLParameters(url))
        channel = connection.channel()
        channel.confirm_delivery()
        channel.queue_declare("kept", durable=True)
        channel.basic_publish("", "kept", b"kept", pika.BasicProperties(delivery_mode=2))
        # The message was confirmed, but RabbitMQ confirms a declaration before its own log of it is on disk: killed in
        # the same moment, it has forgotten the queue.
        node.ctl("eval", "mnesia:sync_log().")
        node.kill()
        with pytest.raises(pika.exceptions.AMQPError):
            channel.queue_declare("kept", passive=True)
        node.start()
        assert node.url == url
        again = pika.BlockingConnection(pika.URLParameters(url))
        assert again.channel().basic_get("kept", auto_ack=True)[2] == b"kept"
        again.close()


def test_a_node_that_cannot_start_says_what_its_log_says() -> None:
    require_rabbitmq()
    node = PrivateNode(plugins=(), settings={"no_such_setting": "1"})
    with pytest.raises(BrokerError, match="no_such_setting"):
        node.start()
    with pytest.raises(BrokerError, match="not been started"):
        node.folder  # noqa: B018 - it raises


def test_a_machine_without_rabbitmq_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.amqp.node.PLACES", ("/nowhere/sbin",))
    available, reason = PrivateNode.available()
    assert not available
    assert "apt-get install" in reason
    with pytest.raises(BrokerError, match="not installed"):
        PrivateNode().start()
