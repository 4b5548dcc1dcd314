"""A federation's accounts on the node that all tests share, made by the commands that a user gives."""

from __future__ import annotations

import logging
import secrets
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from typer.testing import CliRunner

from broker.amqp.node import PrivateNode
from broker.cli import app
from broker.settings import BrokerConfig
from tests.support.node import admin_of, config_of

__all__ = ["Site"]

runner = CliRunner()


@contextmanager
def logging_as_before() -> Iterator[None]:
    """A command sets up the log, for its process: here the next test wants its own."""
    loggers = [logging.getLogger(name) for name in ("", "fedmq", "fedmq.broker")]
    levels, handlers, hook = [one.level for one in loggers], list(loggers[0].handlers), sys.excepthook
    thread_hook = threading.excepthook
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
        loggers[0].handlers[:] = handlers
        sys.excepthook, threading.excepthook = hook, thread_hook


class Site:
    """A virtual host of its own, and the folder with the addresses."""

    def __init__(self, node: PrivateNode, folder: Path, *workers: str) -> None:
        self.node, self.admin = node, admin_of(node)
        self.vhost = f"federation-{secrets.token_hex(3)}"
        # Accounts are the broker's, not the virtual host's, and other tests have theirs.
        self.suffix = secrets.token_hex(3)
        self.folder = folder / "accounts"
        self.names = {role: f"{role}-{self.suffix}" for role in ("aggregator", "monitor", "operator")}
        self.workers = [f"{name}-{self.suffix}" for name in workers]

    def command(self, *words: str, code: int = 0) -> str:
        """``fedmq broker WORDS`` as the node's administrator; what it says."""
        return self.command_of(self.node.url, *words, code=code)

    def command_of(self, url: str, *words: str, code: int = 0) -> str:
        """As :meth:`command`, as whom ``url`` names."""
        more = {"FEDMQ_BROKER_URL": url, "FEDMQ_BROKER_MANAGEMENT_URL": self.node.management_url}
        with logging_as_before():
            result = runner.invoke(app, [*words, "--vhost", self.vhost], env=more)
        assert result.exit_code == code, result.output
        # What stands in a file is not shown.
        assert not [file for file in self.folder.glob("*.url") if file.read_text().strip() in result.output]
        return result.output

    def setup(self, *words: str) -> str:
        """``fedmq broker setup`` with all accounts."""
        roles = [word for role, name in self.names.items() for word in (f"--{role}", name)]
        return self.command("setup", *roles, "--worker", ",".join(self.workers), "--folder", str(self.folder), *words)

    def file(self, name: str) -> Path:
        """Where the address of a role or of an account is."""
        return self.folder / f"{self.names.get(name, name)}.url"

    def config(self, name: str, **more: object) -> BrokerConfig:
        """The table ``[broker]`` of a role or of a worker."""
        return config_of(self.node, url=self.file(name).read_text().strip(), **more)

    def clean_up(self) -> None:
        """Take all of it away."""
        self.admin.delete(f"/vhosts/{self.vhost}")
        for user in self.admin.listed("/users"):
            if str(user["name"]).endswith(self.suffix):
                self.admin.delete(f"/users/{user['name']}")
