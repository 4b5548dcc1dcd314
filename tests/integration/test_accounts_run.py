"""Accounts given, renewed and taken while a run of real processes goes on, each with its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from aggregator.history import read_history
from broker.amqp.node import PrivateNode
from broker.topology import Topology
from tests.support.accounts import Site
from tests.support.commands import Running, fedmq, running
from tests.support.node import fresh_topology
from tests.support.waiting import wait_for

pytestmark = pytest.mark.broker

SETTINGS = """
[broker]
heartbeat = 5
login_grace = 30
[aggregator]
buffer_size = 1
max_staleness = 100000
stop_after_rounds = 100000
linger = 1.0
commit_seconds = 1.0
[worker]
task = "tests.support.tasks:Counting"
heartbeat_seconds = 0.5
delay = 0.05
"""


class Federation:
    """The processes of a run."""

    def __init__(self, folder: Path, site: Site, stack: ExitStack) -> None:
        self.folder, self.site, self.stack = folder, site, stack
        self.topology: Topology = fresh_topology("accounts")
        operator = site.names["operator"]
        text = SETTINGS.replace("linger", f'trusted_users = "{operator}"\nlinger')
        (folder / "fedmq.toml").write_text(f'run = "{self.topology.run}"\n{text}')
        assert fedmq(folder, "init").code == 0

    def as_(self, account: str) -> dict[str, str]:
        return {"FEDMQ_BROKER_URL_FILE": str(self.site.file(account))}

    def start(self, command: str, account: str, *words: str, **more: str) -> Running:
        environment = {**self.as_(account), **more}
        entered = running(self.folder, command, *words, url=None, name=account, environment=environment)
        return self.stack.enter_context(entered)

    def version(self) -> int:
        lines = read_history(self.folder / "runs" / self.topology.run / "history.jsonl")
        return max((line["version"] for line in lines if line["kind"] == "version"), default=0)

    def wait_progress(self, what: str) -> None:
        seen = self.version()
        wait_for(lambda: self.version() >= seen + 3, 60, what=f"three more versions {what}")

    def connections(self, account: str) -> list[str]:
        rows = self.site.admin.connections()
        return sorted(str(row["name"]) for row in rows if row.get("user") == account)


@pytest.fixture
def site(node: PrivateNode, tmp_path: Path) -> Iterator[Site]:
    made = Site(node, tmp_path, "w1")
    made.setup()
    yield made
    made.clean_up()


def test_a_run_with_an_account_for_each_goes_on_while_they_change(site: Site, tmp_path: Path) -> None:
    (w1,) = site.workers
    w2 = f"w2-{site.suffix}"
    with ExitStack() as stack:
        run = Federation(tmp_path, site, stack)
        aggregator = run.start("aggregator", "aggregator")
        first = run.start("worker", w1, "--name", w1)
        run.wait_progress("of one worker")

        site.command("add-worker", w2, "--folder", str(site.folder))
        second = run.start("worker", w2, "--name", w2, FEDMQ_BROKER_LOGIN_GRACE="0.5")
        second.wait_log("connected to")
        wait_for(lambda: len(run.connections(w1)) == 2, 60, what="connections of w1 in the management API")
        before = run.connections(w1)

        said = site.command("rotate", w1, "--folder", str(site.folder), "--close")
        assert "ended 2 connections" in said
        # The worker reads its file again, and goes on as it was.
        wait_for(lambda: len(set(run.connections(w1)) - set(before)) == 2, 60, what="new connections of w1")
        run.wait_progress("after a new password")

        site.command("remove-worker", w2)
        assert second.wait() == 4, second.log
        # RabbitMQ takes the permissions first and then the account: a login may come in between.
        said_why = "refused the login of user" in second.log or "may not use virtual host" in second.log
        assert said_why, second.log
        assert "Traceback" not in second.log
        run.wait_progress("after a worker was removed")

        for one in (first, aggregator):
            assert one.process.poll() is None, one.log
        assert "wrong-user" not in aggregator.log, aggregator.log
        assert "no-user" not in aggregator.log, aggregator.log
        done = fedmq(tmp_path, "stop", "--wait", "60", timeout=120, url=None, environment=run.as_("operator"))
        assert done.code == 0, done
        assert [one.wait() for one in (aggregator, first)] == [0, 0]
