"""``fedmq runs`` against a real broker, with its management API and without."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.amqp.node import PrivateNode
from broker.settings import Origin, Settings
from broker.transport import Outgoing
from fedmq.runs import _look
from tests.support.commands import SECRET, assert_one_message, fedmq
from tests.support.ends import Ends, version
from tests.support.node import admin_of, channel, config_of, fresh_topology
from tests.support.waiting import wait_for

pytestmark = pytest.mark.broker
NO_API = {"FEDMQ_BROKER_MANAGEMENT_URL": "http://127.0.0.1:1"}


@pytest.fixture(scope="module")
def host(node: PrivateNode) -> str:
    """A second virtual host."""
    name = f"runs {secrets.token_hex(3)}"
    admin_of(node).put(f"/vhosts/{name.replace(' ', '%20')}", {})
    rights = {"configure": ".*", "write": ".*", "read": ".*"}
    admin_of(node).put(f"/permissions/{name.replace(' ', '%20')}/{node.user}", rights)
    return name


@pytest.fixture(scope="module")
def there(node: PrivateNode, host: str) -> Iterator[dict[str, str]]:
    """Run ``a``: version 7, two aggregators, a worker, an update that waits. Run ``b`` elsewhere, with nothing."""
    ends, a, b = Ends(), fresh_topology("runs-a"), fresh_topology("runs-b")
    ends.aggregator(config_of(node, url=node.url + host.replace(" ", "%20")), b)
    ends.close()
    aggregator, _ = ends.aggregator(config_of(node), a)
    ends.aggregator(config_of(node), a)
    worker, _ = ends.worker(config_of(node), a, "w1")
    worker.control(Outgoing(body=b"hello")).result(20)
    aggregator.broadcast(version(7)).result(20)
    with channel(node) as inside:
        inside.basic_publish("fedmq.updates", a.key("w1"), b"an update")
        inside.basic_publish("fedmq.dead", a.key("w1"), b"a letter")
    yield {"a": a.run, "b": b.run}
    ends.close()


def test_all_runs_of_all_virtual_hosts(node: PrivateNode, host: str, there: dict[str, str], tmp_path: Path) -> None:
    """A process, for the output; the API's numbers come a second late."""
    more = {"FEDMQ_BROKER_MANAGEMENT_URL": node.management_url}

    def listed() -> dict[str, Any]:
        done = fedmq(tmp_path, "runs", "--json", url=node.url, environment=more)
        assert (done.code, done.err) == (0, "")
        found = json.loads(done.out)
        assert found["missing"] == []
        return {one["run"]: one for one in found["runs"]}

    runs = wait_for(lambda: (found := listed())[there["a"]]["standby"] and found[there["a"]]["unacked"] and found)
    a, b = runs[there["a"]], runs[there["b"]]
    assert (a["version"], a["epoch"], a["active"], a["standby"], a["workers"]) == (7, 1, True, 1, ["w1"])
    assert (a["waiting"], a["unacked"], a["dead"], a["vhost"]) == (0, 1, 1, "/")
    assert a["bytes"] >= len(b"an update") + len(b"a letter")
    assert (b["version"], b["active"], b["vhost"]) == (None, False, host)


def test_one_run_without_a_management_api(node: PrivateNode, there: dict[str, str], tmp_path: Path) -> None:
    done = fedmq(tmp_path, "runs", "--run", there["a"], url=node.url, environment=NO_API)

    assert done.code == 0
    row = done.out.splitlines()[1]
    assert row.split()[:6] == [there["a"], "active,", "1", "standing", "by", "7"]
    assert "not known: who the workers are" in done.err


def test_all_runs_without_a_management_api_are_not_to_be_had(node: PrivateNode, tmp_path: Path) -> None:
    done = fedmq(tmp_path, "runs", url=node.url, environment=NO_API)

    assert_one_message(done, 4, "runs cannot be listed", "--run", "rabbitmq_management")


def test_without_a_broker_one_message_tells_so(tmp_path: Path) -> None:
    done = fedmq(tmp_path, "runs", "--run", "a", environment=NO_API)

    assert_one_message(done, 4, "127.0.0.1:1")
    assert SECRET not in done.err


def test_a_run_that_is_not_there_is_no_error(node: PrivateNode) -> None:

    read = Settings("none", {"broker": config_of(node)}, {"run": Origin("flag", "--run")})

    assert _look(read, "none") == ([], [])
