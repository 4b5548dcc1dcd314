"""A password is planted in a real run, with every command and many mistakes, and then searched for everywhere."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

import pytest

from broker.amqp.node import PrivateNode
from broker.secretfiles import write_secret
from broker.topology import UPDATES, Topology
from tests.support.commands import LINE, Running, environment_of, running
from tests.support.node import GivenNode, admin_of, channel, drain, fresh_topology
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.broker, pytest.mark.slow]

#: Letters that occur nowhere else, between characters that mean something in an address. Whatever form it is in,
#: percent-encoded or not, cut in two at any of them: one of these words is left.
WORDS = ("Qx7vPl4nt", "kZ9wHidd3n", "mT5yW0rd")
PASSWORD = "{}@:/?{}#%&=+ [,]{}".format(*WORDS)
USER = "planted-user"
#: Several of these in one process: most of the time of a command goes into its start.
MANY = """
import json, os, sys
from broker import redaction
from fedmq.cli import app
for arguments, more in json.load(open(sys.argv[1])):
    before = dict(os.environ)
    os.environ.update(more)
    if "FEDMQ_BROKER_URL" in more:
        del os.environ["FEDMQ_BROKER_URL_FILE"]
    # What one command has learnt to hide, another has not.
    redaction._known.clear()
    print("$", *[word for word in arguments if "@" not in word], flush=True)
    try:
        app(arguments, prog_name="fedmq")
    except SystemExit as error:
        print("exit code", error.code, flush=True)
    os.environ.clear()
    os.environ.update(before)
"""


def forms_of(secret: str, user: str) -> list[bytes]:
    """How a secret may look: its words, and base64 of the whole wherever in a text it begins."""
    encoded = [base64.b64encode(f"{user}:{secret}".encode())]
    for skipped in range(3):
        # Only what does not depend on the letters around it.
        whole = base64.b64encode(b"\0" * skipped + secret.encode())
        encoded.append(whole[4 if skipped else 0 : len(whole) // 4 * 4 - 8])
    return [*(word.encode() for word in WORDS), *encoded]


FORMS = forms_of(PASSWORD, USER)


def found(content: bytes) -> list[bytes]:
    return [form for form in FORMS if form in content]


def test_the_search_finds_a_secret_in_each_of_its_forms() -> None:
    inside = f"a{USER}:{PASSWORD}b"
    assert found(PASSWORD.encode())
    assert found(quote(PASSWORD, safe="").encode())
    assert found(PASSWORD[:12].encode())
    assert all(found(base64.b64encode(inside[cut:].encode())) for cut in range(4))
    assert not found(b"nothing of the kind")


#: A task that quotes an address in its error.
TASK = f"""
from tests.support.tasks import Line

class Careless(Line):
    def data(self, shard):
        raise OSError("amqp://{USER}:{PASSWORD}@somewhere/ does not answer".replace(" [", "["))
"""


@dataclass
class Place:
    """Where the run is, and where its programs get the password from."""

    folder: Path
    node: PrivateNode
    run: str
    url: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "FEDMQ_RUN": self.run,
            "FEDMQ_BROKER_URL_FILE": str(self.folder / "url"),
            "FEDMQ_BROKER_MANAGEMENT_URL": self.node.management_url,
        }

    def start(self, stack: ExitStack, *arguments: str, name: str) -> Running:
        """A program that goes on."""
        command = running(self.folder, *arguments, "-v", url=None, name=name, environment=self.environment)
        return stack.enter_context(command)

    def many(self, name: str, commands: Sequence[tuple[Sequence[str], dict[str, str]]]) -> str:
        """Run these, one after the other; what they have printed."""
        script, work = self.folder / "many.py", self.folder / f"{name}.work"
        script.write_text(MANY)
        # The mistakes hold the password, and go to the process by a file.
        work.write_text(json.dumps(commands))
        with (self.folder / f"{name}.log").open("wb") as log:
            subprocess.run(
                [sys.executable, str(script), str(work)],
                cwd=self.folder,
                env=environment_of(None, self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=120,
                check=True,
            )
        work.unlink()
        return (self.folder / f"{name}.log").read_text()


@pytest.fixture
def place(node: PrivateNode, tmp_path: Path) -> Place:
    """A user with this password, and the address in a file."""
    admin = admin_of(node)
    admin.put(f"/users/{USER}", {"password": PASSWORD, "tags": "administrator"})
    admin.put(f"/permissions/%2F/{USER}", {"configure": ".*", "write": ".*", "read": ".*"})
    url = node.url.replace(f"{node.user}:{node.password}", f"{USER}:{quote(PASSWORD, safe='')}")
    write_secret(tmp_path / "url", url.encode())
    (tmp_path / "careless.py").write_text(TASK)
    return Place(tmp_path, node, fresh_topology("planted").run, url)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def asked(url: str) -> bytes:
    with urlopen(url, timeout=20) as answer:  # noqa: S310 (of this machine)
        return bytes(answer.read())


def command_lines() -> Iterator[tuple[str, bytes]]:
    """Of all processes, as any user of this machine sees them."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield str(file), file.read_bytes()
        except OSError:
            continue


def files_below(folder: Path, but: Collection[str] = ()) -> Iterator[tuple[str, bytes]]:
    for file in folder.rglob("*"):
        if file.is_file() and file.name not in but:
            try:
                yield str(file), file.read_bytes()
            except FileNotFoundError:
                continue


def messages(node: PrivateNode, run: str) -> Iterator[tuple[str, bytes]]:
    """What is in the run's queues."""
    names = [str(row["name"]) for row in admin_of(node).queues(columns=("name", "type")) if row["type"] != "stream"]
    for name in (name for name in names if f".{run}." in name):
        for properties, body in drain(node, name):
            yield name, f"{properties} {properties.headers}".encode() + body


def of_the_broker(node: PrivateNode) -> Iterator[tuple[str, bytes]]:
    """What the broker knows and shows of its clients, has logged, and has on its disk: the messages, streams too."""
    admin = admin_of(node)
    yield "connections", json.dumps(admin.connections()).encode()
    yield "queues and consumers", json.dumps([admin.queues(), admin.consumers()]).encode()
    if not isinstance(node, GivenNode):
        yield from files_below(node.folder)


def mistakes(place: Place) -> list[tuple[list[str], dict[str, str]]]:
    """Commands with what people do wrong."""
    encoded = quote(PASSWORD, safe="")
    host = place.url.rpartition("@")[2].rstrip("/")
    fast = ("--set", "broker.connect_timeout=2", "-v")
    unreachable = f"amqp://{USER}:{encoded}@127.0.0.1:1/"
    addresses = {
        f"amqp://{USER}:{encoded}x@{host}/": (
            "broker check",
            "status",
            "doctor",
            "runs",
            "aggregator",
            f"worker {LINE[0]} {LINE[1]}",
        ),
        unreachable: ("dead list", "doctor"),
        f"amqp://{USER}:{encoded}@nowhere.invalid/": ("dead list",),
        f"amqp://{USER}:{encoded}@{host}/absent": ("dead list", "doctor"),
        f"amqps://{USER}:{encoded}@{host}/": ("dead list", "doctor"),
        # Not encoded, or not all of it, and what else is no address.
        f"amqp://{USER}:{PASSWORD}@{host}/": ("broker check", "dead list", "runs", "config", "status"),
        f"amqp://{USER}:{encoded}/{WORDS[0]}@{host}/": ("broker check",),
        f"amqp://{USER}:{encoded}@127.0.0.1:port/": ("broker check", "runs", "config", "doctor"),
        f"http://{USER}:{encoded}@{host}/": ("dead list", "config"),
        f"{USER}:{encoded}@{host}/": ("dead list", "config"),
        f"amqp://{USER}:{encoded}": ("dead list", "config"),
        f"{place.url},{PASSWORD}": ("dead list", "config"),
    }
    result: list[tuple[list[str], dict[str, str]]] = [
        ([*line.split(), *fast], {"FEDMQ_BROKER_URL": address})
        for address, lines in addresses.items()
        for line in lines
    ]
    exposed = place.folder / "exposed.toml"
    exposed.write_text(f"[broker]\nurl = '{unreachable}'\n")
    exposed.chmod(0o644)
    torn = place.folder / "torn.toml"
    torn.touch(mode=0o600)
    torn.write_text(f"[broker]\nurl = 'amqp://{USER}:{PASSWORD}@h/\n")
    result += [
        (["config", "--set", f"broker.url {unreachable}"], {}),
        (["config", "--set", f"broker.url={unreachable}"], {}),
        (["config", "--set", f"broker.ulr={unreachable}"], {}),
        (["config", "--set", f"broker.heartbeat={unreachable}"], {}),
        (["config", "--set", f"broker.url_file={unreachable}"], {}),
        (["dead", "list", "--set", f"broker.url_file={USER}:{PASSWORD}@{host}"], {}),
        (["dead", "list", "--broker", unreachable], {}),
        (["runs", "--set", f"broker.management_url=http://{USER}:{encoded}@{host}"], {}),
        (["config", "--config", str(exposed)], {}),
        (["config", "--config", str(torn)], {}),
        (["set", f"broker.url={unreachable}", "-v"], {}),
    ]
    return result


def test_it_is_found_nowhere(place: Place) -> None:
    ports = free_port(), free_port()
    quick = ("--set", "aggregator.buffer_size=1", "--set", f"metrics.port={ports[0]}")
    slow = ("--set", "worker.delay=0.1", "--set", f"metrics.port={ports[1]}")
    seen: dict[str, bytes] = {}
    told = place.many("first", [(["init", *LINE, "-v"], {}), (["broker", "check", "-v"], {})])
    assert told.count("exit code 0") == 2, told

    with ExitStack() as stack:
        # Given a run with all that may take part in it
        members = [
            place.start(stack, "aggregator", *quick, name="aggregator"),
            place.start(stack, "worker", *LINE, "--name", "w1", *slow, name="worker"),
            place.start(stack, "evaluate", *LINE, "--name", "e1", name="evaluator"),
            place.start(stack, "dashboard", "--port", "0", name="page"),
        ]
        with channel(place.node) as inside:
            wait_for(lambda: "version 3" in members[0].log, 60, what="a version")
            inside.basic_publish(UPDATES, Topology(place.run).key("w1"), b"no update")

        # When everybody looks at it, and much goes wrong
        told = place.many("second", [*looks(), *((["worker", "--task", "careless:Careless", "--name", "w2"], {}),)])
        assert told.count("exit code 0") == len(looks()), told
        wrong = mistakes(place)
        told = place.many("third", wrong)
        assert told.count("exit code") == len(wrong)
        page = members[3].log.partition("http://")[2].split()[0]
        for path in ("", "state.json"):
            seen[f"page {path}"] = asked(f"http://{page.rstrip('/')}/{path}")
        for port in ports:
            seen[f"metrics {port}"] = asked(f"http://127.0.0.1:{port}/metrics")
        seen |= dict(command_lines()) | dict(of_the_broker(place.node))
        for member in reversed(members):
            assert member.terminate() == 0, member.log
    report = place.many("last", [(["report", "-v"], {}), (["track", "tensorboard", "-v"], {})])
    assert report.count("exit code 0") == 2, report

    # Then the search has looked at what there is, and has found it where it was planted
    seen |= dict(messages(place.node, place.run)) | dict(of_the_broker(place.node)) | dict(files_below(place.folder))
    planted = {str(place.folder / name) for name in ("url", "careless.py", "exposed.toml", "torn.toml")}
    names = {Path(name).name for name in seen}
    assert names >= {"history.jsonl", "config.toml", "report.html", "aggregator.log", "worker.log", "page.log"}
    assert any("tfevents" in name for name in names)
    assert f"fedmq.{place.run}.dead" in seen
    assert {name for name, content in seen.items() if found(content)} == planted


def looks() -> list[tuple[list[str], dict[str, str]]]:
    """Every command that reads something, and some that give one."""
    words = (
        *("status", "status --json", "runs", "workers", "history", "doctor", "config", "config --json"),
        *("set learning_rate=0.5", "pause", "resume", "dead list", "broker policies", "checkpoint list"),
    )
    return [([*line.split(), "-v"], {}) for line in words]
