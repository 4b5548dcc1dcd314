"""``fedmq dashboard`` as a user starts it: with a broker or a folder, and how it ends."""

from __future__ import annotations

import json
import re
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpAggregatorTransport
from broker.messages import Event, EventKind, Scalar
from broker.transport import Outgoing
from broker.wire import encode
from tests.support.commands import Running, assert_one_message, fedmq, running
from tests.support.node import config_of, fresh_topology
from tests.support.waiting import Inbox, wait_for


def address_of(command: Running) -> str:
    command.wait_log("http://")
    found = re.search(r"http://127\.0\.0\.1:\d+/", command.log)
    assert found, command.log
    return found[0]


def state(url: str) -> Any:
    with asked(url, "state.json") as answer:
        return json.load(answer)


def asked(url: str, path: str) -> Any:
    return urlopen(f"{url}{path}", timeout=60)  # noqa: S310 (of this machine)


def history_in(folder: Path) -> Path:
    line = {"kind": "version", "version": 7, "epoch": 1, "time": 1e9, "seconds": 0.5, "loss": 0.25, "updates": []}
    folder.mkdir(parents=True)
    (folder / "history.jsonl").write_text(json.dumps(line) + "\n")
    return folder


@pytest.mark.broker
def test_it_shows_what_comes_through_the_broker_and_leaves_with_streams_open(node: PrivateNode, tmp_path: Path) -> None:
    topology = fresh_topology("page")
    transport = AmqpAggregatorTransport(config_of(node), topology, model_bytes=8, prefetch=1)
    data: dict[str, Scalar] = {"what": "version", "version": 3, "loss": 0.5, "updates": 1, "seconds": 0.1}
    event = Event(run=topology.run, kind=EventKind.PROGRESS, source="aggregator", time=0.0, data=data)
    with closing(transport):
        transport.open(Inbox(), wait=30)
        with running(tmp_path, "dashboard", "--run", topology.run, "--port", "0", url=node.url) as command:
            url = address_of(command)
            assert "history" not in command.log

            def has_come() -> bool:
                # Again: an event that nobody watches for is gone.
                transport.event("progress", Outgoing(body=encode(event), headers={"run": topology.run}))
                return bool(state(url)["view"]["version"] == 3)

            wait_for(has_come, 60, what="the version on the page")
            with asked(url, "events") as stream:
                assert stream.readline().startswith(b"retry:")
                assert command.terminate() == 0, command.log
                assert b'"version":3' in stream.read()
            assert node.password not in command.log


def test_a_folder_is_enough_others_may_look_with_a_warning_and_a_port_that_is_taken_is_an_error(tmp_path: Path) -> None:
    folder = history_in(tmp_path / "runs" / "digits")
    everybody = ("--address", "0.0.0.0")  # noqa: S104
    with running(tmp_path, "dashboard", "--run", "digits", "--port", "0", *everybody) as command:
        url = address_of(command)
        assert f"with the history in {folder.relative_to(tmp_path)}" in command.log
        assert "warning: whoever can reach 0.0.0.0 can see this run" in command.log
        assert state(url)["view"]["version"] == 7
        port = url.rstrip("/").rpartition(":")[2]

        taken = fedmq(tmp_path, "dashboard", "--run", "digits", "--port", port)
        assert_one_message(taken, 2, f"port {port}", "is taken", "--port")

        assert command.terminate() == 0
        assert "Traceback" not in command.log


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    assert_one_message(fedmq(tmp_path, "dashboard", "--folder", "nowhere"), 2, "nowhere is no folder", "--folder")
