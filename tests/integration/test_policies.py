"""``fedmq broker policies`` on a real broker: what is full is refused, and nothing of it lost."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import pytest

from broker.amqp.node import PrivateNode
from broker.errors import PublishRefused
from broker.transport import Outgoing
from tests.support.commands import assert_one_message, fedmq
from tests.support.ends import Ends
from tests.support.node import admin_of, config_of, fresh_topology
from tests.support.waiting import PATIENCE, wait_for

pytestmark = pytest.mark.broker


@pytest.fixture
def host(node: PrivateNode) -> str:
    """A virtual host of its own: policies are for all runs in one."""
    name = f"policies-{secrets.token_hex(3)}"
    admin_of(node).put(f"/vhosts/{name}", {})
    admin_of(node).put(f"/permissions/{name}/{node.user}", {"configure": ".*", "write": ".*", "read": ".*"})
    return name


def test_a_full_queue_refuses_and_keeps_what_is_in_it(node: PrivateNode, host: str, tmp_path: Path) -> None:
    """A process, for the command as it is given."""
    more = {"FEDMQ_BROKER_MANAGEMENT_URL": node.management_url}
    options = ("--update-bytes", "1000", "--apply")
    done = fedmq(tmp_path, "broker", "policies", *options, url=node.url + host, environment=more)
    assert (done.code, done.err) == (0, "")
    assert f"set in virtual host '{host}': fedmq-updates-wait-when-full" in done.out

    ends, topology = Ends(), fresh_topology("full")
    try:
        config = config_of(node, url=node.url + host)
        aggregator, _ = ends.aggregator(config, topology)
        aggregator.close()
        worker, _ = ends.worker(config, topology)

        def refused() -> bool:
            # A quorum queue may take a few more before it refuses.
            return isinstance(worker.publish(Outgoing(body=bytes(600))).exception(PATIENCE), PublishRefused)

        assert worker.publish(Outgoing(body=bytes(600))).exception(PATIENCE) is None
        wait_for(refused, what="a refusal")

        def shown() -> dict[str, object]:
            return {row["name"]: row for row in admin_of(node).queues(host)}[topology.updates]

        wait_for(lambda: shown().get("messages_ready", 0) and shown().get("policy"), what="counts and policy")
        assert shown()["policy"] == "fedmq-updates-wait-when-full"
        assert shown()["effective_policy_definition"] == {"max-length-bytes": 1000, "overflow": "reject-publish"}
    finally:
        ends.close()


def test_without_apply_nothing_is_asked_and_json_can_be_imported(node: PrivateNode, host: str, tmp_path: Path) -> None:
    done = fedmq(tmp_path, "broker", "policies", "--json", url=node.url + host)

    assert (done.code, done.err) == (0, "")
    assert {entry["vhost"] for entry in json.loads(done.out)["policies"]} == {host}
    assert admin_of(node).get(f"/policies/{host}") == []
    admin_of(node)._request("POST", "/definitions", body=json.loads(done.out))
    names = [row["name"] for row in admin_of(node).get(f"/policies/{host}")]  # type: ignore[attr-defined]
    assert sorted(names) == [
        "fedmq-dead-letters-oldest-go",
        "fedmq-listeners-oldest-go",
        "fedmq-updates-wait-when-full",
    ]


def test_without_a_management_api_the_commands_remain(tmp_path: Path) -> None:
    assert "rabbitmqctl set_policy" in fedmq(tmp_path, "broker", "policies").out
    no_api = {"FEDMQ_BROKER_MANAGEMENT_URL": "http://127.0.0.1:1"}
    assert_one_message(fedmq(tmp_path, "broker", "policies", "--apply", environment=no_api), 4, "does not answer")
