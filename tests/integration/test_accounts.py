"""``fedmq broker setup`` and its companions on a real broker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pika
import pytest

from broker.admin import Admin
from broker.amqp.node import PrivateNode
from broker.errors import AccessRefused
from broker.topology import Topology
from tests.support.accounts import Site
from tests.support.waiting import wait_for

pytestmark = pytest.mark.broker


@pytest.fixture
def site(node: PrivateNode, tmp_path: Path) -> Iterator[Site]:
    made = Site(node, tmp_path, "w1", "w2")
    yield made
    made.clean_up()


def may_log_in(site: Site, name: str) -> bool:
    """Whether the password in the file is the account's: the API tells a wrong one from a missing tag."""
    admin = Admin.of(site.config(name))
    try:
        admin.get("/whoami")
    except AccessRefused as error:
        return "refused the login" not in str(error)
    return True


def test_set_up_twice_is_set_up_once(site: Site) -> None:
    said = site.setup("--max-queues", "77")

    w1 = site.workers[0]
    assert f"made virtual host '{site.vhost}'" in said
    assert f"made account '{w1}' (worker)" in said
    assert str(site.file(w1)) in said.replace("\n", "")
    assert sorted(path.stem for path in site.folder.iterdir()) == sorted([*site.names.values(), *site.workers])
    assert all(may_log_in(site, name) for name in [*site.names, *site.workers])
    limits = site.admin.listed(f"/vhost-limits/{site.vhost}")[0]["value"]
    assert limits == {"max-connections": 2000, "max-queues": 77}
    assert site.admin.listed(f"/user-limits/{w1}")[0]["value"] == {"max-connections": 8, "max-channels": 128}
    assert len(site.admin.listed(f"/policies/{site.vhost}")) == 3
    before = site.admin.one("/definitions")

    assert "nothing to change" in site.setup("--max-queues", "77")
    assert site.admin.one("/definitions") == before


def test_what_somebody_changed_is_set_right_and_passwords_stay(site: Site) -> None:
    site.setup()
    w1 = site.workers[0]
    site.admin.put(f"/permissions/{site.vhost}/{w1}", {"configure": ".*", "write": ".*", "read": ".*"})
    site.admin.put(f"/user-limits/{w1}/max-connections", {"value": 1000})
    password = site.admin.one(f"/users/{w1}")["password_hash"]
    site.file(w1).unlink()

    said = site.setup()

    assert f"account '{w1}' has the rights of a worker now, and no others" in said
    assert f"limited account '{w1}': max-connections 8" in said
    assert site.admin.one(f"/users/{w1}")["password_hash"] == password
    assert not site.file(w1).exists()  # what nobody knows is not made up


def test_an_account_with_more_power_than_its_role_is_warned_of_and_left(site: Site) -> None:
    w1 = site.workers[0]
    site.admin.put(f"/users/{w1}", {"password": "some-word-or-other", "tags": "administrator"})

    said = site.setup()

    assert f"'{w1}' was there with the tags administrator" in said
    assert f"rabbitmqctl set_user_tags {w1}" in said


def test_a_worker_is_added_rotated_listed_and_removed(site: Site) -> None:
    site.setup()
    name, folder = f"w3-{site.suffix}", ("--folder", str(site.folder))
    said = site.command("add-worker", name, *folder)
    assert f"made account '{name}' (worker)" in said
    assert "fedmq worker --name" in said
    assert "keeps its password" in site.command("add-worker", name, *folder)
    first = site.file(name).read_text()

    site.command("rotate", name, *folder)
    assert site.file(name).read_text() != first
    assert may_log_in(site, name)
    assert site.admin.listed(f"/user-limits/{name}") != []  # a new password takes no limits away

    shown = json.loads(site.command("users", "--json"))["users"]
    assert {row["name"]: row["role"] for row in shown if row["name"] in (name, *site.names.values())} == {
        name: "worker",
        **{account: role for role, account in site.names.items()},
    }

    assert f"removed account '{name}'" in site.command("remove-worker", name)
    assert f"there is no account '{name}'" in site.command("remove-worker", name)
    assert not may_log_in(site, name)
    operator = site.names["operator"]
    assert "other rights" in site.command("remove-worker", operator, code=2)
    assert may_log_in(site, "operator")


def test_what_a_removed_worker_left_goes_with_it(site: Site) -> None:
    site.setup()
    (w1, w2), run = site.workers, Topology("left")
    connection = pika.BlockingConnection(pika.URLParameters(site.config("aggregator").urls()[0]))
    channel = connection.channel()
    for name in (run.outbox(w1), run.outbox(w2), run.notices(w1), run.updates):
        channel.queue_declare(name, durable=True)

    said = site.command("remove-worker", w1)
    assert f"deleted queue {run.outbox(w1)}" in said
    assert f"deleted queue {run.notices(w1)}" in said
    assert {row["name"] for row in site.admin.queues(site.vhost)} == {run.outbox(w2), run.updates}

    channel.basic_consume(run.updates, lambda *_message: None)  # as of a run that goes on
    wait_for(
        lambda: site.admin.one(f"/queues/{site.vhost}/{run.updates}").get("consumers"), 60, what="a consumer in the API"
    )
    assert f"emptied queue {run.outbox(w2)}; its run goes on" in site.command("remove-worker", w2)
    connection.close()


def test_without_a_folder_the_address_is_shown_once(site: Site) -> None:
    site.setup()
    name = f"w4-{site.suffix}"

    said = site.command("add-worker", name, "--address", "amqps://rabbit.example:5671")

    assert f"amqps://{name}:" in said
    assert f"@rabbit.example:5671/{site.vhost}" in said
    assert "amqps://" not in site.command("add-worker", name, "--address", "amqps://rabbit.example:5671")


def test_who_is_no_administrator_is_told_so(site: Site) -> None:
    site.setup()
    address = site.file("operator").read_text().strip()
    assert "'administrator'" in site.command_of(address, "add-worker", "w5", code=4)


def test_the_same_as_a_file_that_rabbitmq_imports(site: Site, tmp_path: Path) -> None:
    """Imported into a running node, it is what the commands make."""
    file = tmp_path / "definitions.json"
    said = site.setup("--definitions", str(file))
    assert f"wrote {file}" in said.replace("\n", "")
    made = json.loads(file.read_text())
    # Its administrator is of no name of ours, and this node is everybody's.
    made["users"] = [user for user in made["users"] if user["name"] != "administrator"]
    made["permissions"] = [row for row in made["permissions"] if row["user"] != "administrator"]

    site.admin.post("/definitions", made)

    assert all(may_log_in(site, name) for name in [*site.names, *site.workers])
    assert "nothing to change" in site.setup()
