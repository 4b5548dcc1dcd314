"""Every hostile message is refused for its own reason, soon and in little memory, and the run does not notice."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pika
import pytest

from aggregator.checkpoint import CheckpointStore
from aggregator.core import events as on
from aggregator.reading import from_aside, read_update
from aggregator.senders import Senders
from broker.amqp.node import PrivateNode
from broker.errors import WireError
from broker.messages import Hello, Reason
from broker.topology import CONTROL, EVENTS, UPDATES, Topology
from broker.transport import Delivery, Source, Token
from broker.wire import encode
from fedmq.monitoring.monitor import Monitor
from tests.attacks.corpus import CHUNK, MODEL, Author, Hostile, corpus
from tests.support.commands import environment_of
from tests.support.node import channel, fresh_topology, ready
from tests.support.waiting import wait_for
from worker_client.reading import read

EVENT_KEY = "{run}.heartbeat.m"
MEMORY = 64 * 2**20
#: Each takes a few milliseconds; what this guards against takes minutes.
SECONDS = 1.0
#: What the reader cannot know: the run's model, its versions, the values.
BY_THE_RUN = {
    Reason.WRONG_RUN,
    Reason.WRONG_MODE,
    Reason.MODEL_MISMATCH,
    Reason.NO_EXAMPLES,
    Reason.NOT_FINITE,
    Reason.FUTURE_VERSION,
}
EVERYTHING = list(corpus(lambda number: Author("run", "mallory")))
IDS = [hostile.name for hostile in EVERYTHING]


def test_there_are_many_and_no_two_alike() -> None:
    assert len(EVERYTHING) >= 100
    assert len(set(IDS)) == len(IDS)


def delivery_of(hostile: Hostile, source: Source = Source.UPDATE) -> Delivery:
    headers = {**hostile.headers, "worker": "mallory", "message_id": "mallory/i/0"}
    chunks = hostile.chunks if hostile.headers else None
    return Delivery(source=source, body=hostile.body, headers=headers, user="mallory", chunks=chunks)


@pytest.mark.parametrize("hostile", EVERYTHING, ids=IDS)
def test_the_aggregator_s_reader_refuses_it_soon_and_in_little_memory(hostile: Hostile) -> None:
    tracemalloc.start()
    before = time.process_time()
    event = read_update(Token(1, 1), delivery_of(hostile), Senders("aggregator"))
    seconds = time.process_time() - before
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < MEMORY
    assert seconds < SECONDS
    if isinstance(event, on.Unreadable):
        expected = {hostile.reason, Reason.MALFORMED} if hostile.reason is Reason.INCOMPLETE else {hostile.reason}
        assert event.reason in expected, event.detail
        assert event.worker == "mallory"
        assert len(event.detail) < 1000
    else:
        assert hostile.reason in BY_THE_RUN


@pytest.mark.parametrize("hostile", EVERYTHING, ids=IDS)
def test_all_other_receivers_pass_it_over(hostile: Hostile) -> None:
    """As a control message, an event, and a version."""
    monitor = Monitor("run")
    for source in (Source.CONTROL, Source.EVENT):
        delivery = delivery_of(hostile, source)
        try:
            heard = from_aside(delivery, "run", 3, senders=Senders("aggregator"))
        except WireError:
            heard = None
        assert heard is None or isinstance(heard, on.Joined), heard
        monitor.take(delivery)
    try:
        version = read(delivery_of(hostile, Source.PARAMETERS), "run")
    except WireError:
        version = None
    assert version is None
    assert monitor.snapshot()["workers"] == []


# ------------------------------------------------------------------------------------------------ a real run


def publish_good(raw: pika.adapters.blocking_connection.BlockingChannel, run: str, user: str, seq: int) -> None:
    """The good worker's update number ``seq``: the same values in every run."""
    update = Author(run, "good").update(seq, value=0.1 * (seq + 1))
    properties = pika.BasicProperties(delivery_mode=2, message_id=str(update.id), user_id=user)
    raw.basic_publish(UPDATES, f"{run}.good", encode(update), properties, mandatory=True)


class Run:
    """A run with an aggregator's process, which closes a round at each good update."""

    def __init__(self, node: PrivateNode, folder: Path) -> None:
        self.node, self.folder, self.topology = node, folder, fresh_topology("hostile")
        self.results = folder / "runs" / self.topology.run
        self.store = CheckpointStore(self.results / "checkpoints", self.topology.run)
        parameters = {"w": np.zeros(30_000, np.float32), "v": np.zeros(2, np.float32)}
        self.store.create(MODEL, parameters, now=time.time())
        (folder / "fedmq.toml").write_text(
            f'run = "{self.topology.run}"\n[broker]\nheartbeat = 10\nchunk_bytes = {CHUNK}\n'
            "[aggregator]\nbuffer_size = 1\nmax_staleness = 1000000\nlinger = 1.0\n"
        )

    def start(self) -> None:
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fedmq", "aggregator"],
                cwd=self.folder,
                env=environment_of(self.node.url),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def status(self, field: str) -> int:
        """A figure of the aggregator's process, in bytes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field))

    def version(self) -> int:
        return self.store.load().version

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(60) == 0, (self.folder / "log").read_text()

    def parameters(self) -> bytes:
        return b"".join(np.asarray(array).tobytes() for _, array in sorted(self.store.load().parameters.items()))


@pytest.fixture
def runs(node: PrivateNode, tmp_path: Path) -> Iterator[tuple[Run, Run]]:
    made = []
    for name in ("attacked", "quiet"):
        (tmp_path / name).mkdir()
        made.append(Run(node, tmp_path / name))
        made[-1].start()
    yield made[0], made[1]
    for run in made:
        if run.process.poll() is None:
            run.process.kill()
        run.process.wait()


def exists(node: PrivateNode, queue: str) -> bool:
    try:
        ready(node, queue)
    except pika.exceptions.ChannelClosedByBroker:
        return False
    return True


def admit(raw: pika.adapters.blocking_connection.BlockingChannel, run: Run, worker: str) -> None:
    """Say hello as ``worker``, so that it has an outbox for chunks."""
    hello = Hello(run=run.topology.run, worker=worker, incarnation="i")
    properties = pika.BasicProperties(user_id=run.node.user)
    raw.basic_publish(CONTROL, run.topology.key(worker), encode(hello), properties, mandatory=True)
    wait_for(lambda: exists(run.node, run.topology.outbox(worker)), what="an outbox")


def attack(raw: pika.adapters.blocking_connection.BlockingChannel, run: Run, hostile: Hostile, worker: str) -> None:
    """Send it wherever a worker may send anything."""
    topology, user = run.topology, run.node.user
    for index, chunk in enumerate(hostile.chunks):
        properties = pika.BasicProperties(message_id=f"{worker}/i/0#{index}", user_id=user, delivery_mode=2)
        raw.basic_publish(UPDATES, topology.chunk_key(worker), chunk, properties)
    headers = {**hostile.headers, "worker": worker}
    properties = pika.BasicProperties(message_id=f"{worker}/i/0", headers=headers, user_id=user, delivery_mode=2)
    raw.basic_publish(UPDATES, topology.key(worker), hostile.body, properties, mandatory=True)
    raw.basic_publish(CONTROL, topology.key(worker), hostile.body, properties, mandatory=True)
    raw.basic_publish(EVENTS, topology.event_key("heartbeat", worker), hostile.body, properties)


def reasons(node: PrivateNode, topology: Topology) -> dict[str, str]:
    """The reason of each dead letter by its worker, once all are there."""
    found = {}
    with channel(node) as raw:
        while (got := raw.basic_get(topology.dead, auto_ack=True))[0] is not None:
            found[got[1].headers["worker"]] = got[1].headers["reason"]
    return found


@pytest.mark.broker
@pytest.mark.slow
def test_a_run_takes_all_of_them_and_ends_with_the_same_parameters(runs: tuple[Run, Run], node: PrivateNode) -> None:
    attacked, quiet = runs
    hostiles = list(corpus(lambda number: Author(attacked.topology.run, f"m{number}")))
    for run in runs:
        wait_for(lambda run=run: exists(node, run.topology.dead), what="the run's queues")  # type: ignore[misc]
    with channel(node) as raw:
        # Given a good worker, in both runs
        raw.confirm_delivery()
        for run in runs:
            publish_good(raw, run.topology.run, node.user, 0)
            wait_for(lambda run=run: run.version() == 1, what="the first version")  # type: ignore[misc]
        for number, hostile in enumerate(hostiles):
            if hostile.chunks:
                admit(raw, attacked, f"m{number}")
        before = attacked.status("VmRSS")

        # When everything hostile comes to one of them, good updates in between
        for number, hostile in enumerate(hostiles):
            attack(raw, attacked, hostile, f"m{number}")
            if number % 10 == 9:
                for run in runs:
                    publish_good(raw, run.topology.run, node.user, 1 + number // 10)
        rounds = 1 + len(hostiles) // 10
        for run in runs:
            wait_for(lambda run=run: run.version() == rounds, what=f"version {rounds}")  # type: ignore[misc]
        wait_for(lambda: ready(node, attacked.topology.dead) == len(hostiles), what="a dead letter for each")
        grown = attacked.status("VmHWM") - before

    # Then each is in the dead letters for its own reason
    found = reasons(node, attacked.topology)
    assert {h.name: found[f"m{n}"] for n, h in enumerate(hostiles)} == {h.name: h.reason.value for h in hostiles}
    assert ready(node, quiet.topology.dead) == 0
    # And the aggregator has neither grown nor ended, and has made the same of the good ones
    assert grown < MEMORY
    for run in runs:
        run.stop()
    assert attacked.parameters() == quiet.parameters()
    assert Counter(found.values())[Reason.MALFORMED.value] > 80
    log = (attacked.folder / "log").read_text()
    assert "Traceback" not in log
    assert "\x1b" not in log
    assert "\u202e" not in log


# ------------------------------------------------------------------------------------------ hostile properties


class Table(pika.BasicProperties):  # type: ignore[misc]
    """Properties whose headers are these bytes, whatever they mean."""

    def __init__(self, encoded: bytes, **more: object) -> None:
        super().__init__(headers={}, **more)
        self._encoded = encoded

    def encode(self) -> list[bytes]:
        pieces: list[bytes] = super().encode()
        empty = bytes(4)
        return [self._encoded if piece == empty else piece for piece in pieces]


def table_of(entries: bytes) -> bytes:
    return struct.pack(">I", len(entries)) + entries


def entry(kind: bytes, value: bytes) -> bytes:
    return b"\x06worker" + kind + value


def nested(levels: int) -> bytes:
    inner = table_of(b"")
    for _ in range(levels):
        inner = table_of(entry(b"F", inner))
    return inner


#: Each costs a reader that believes pika its connection, and the message comes again.
TABLES = {
    "a float that is NaN": table_of(entry(b"d", struct.pack(">d", float("nan")))),
    "an infinite float": table_of(entry(b"d", struct.pack(">d", float("inf")))),
    "a time that no calendar has": table_of(entry(b"T", b"\x7f" + b"\xff" * 7)),
    "tables nested 2,000 deep": nested(2000),
    "a text that is no UTF-8": table_of(entry(b"S", struct.pack(">I", 2) + b"\xff\xfe")),
    "a list": table_of(entry(b"A", struct.pack(">I", 3) + b"t\x01V")),
    "5,000 headers": table_of(b"".join(b"\x05h" + f"{n:04d}".encode() + b"V" for n in range(5000))),
    "as much as a frame holds": table_of(entry(b"S", struct.pack(">I", 130_900) + b"w" * 130_900)),
    "many texts, as much as a frame holds": table_of(
        b"".join(b"\x05h" + f"{n:04d}".encode() + b"S" + struct.pack(">I", 119) + b"t" * 119 for n in range(1000))
    ),
    "a name that is no UTF-8, as long as one can be": table_of(b"\xff" + b"\xfe" * 255 + b"S\0\0\0\0"),
    "the largest number": table_of(entry(b"l", struct.pack(">q", -(2**63)))),
    "a float of 1e300": table_of(entry(b"d", struct.pack(">d", 1e300))),
    "the largest decimal": table_of(entry(b"D", b"\xff\x7f\xff\xff\xff")),
    "a number without sign": table_of(entry(b"L", struct.pack(">Q", 2**64 - 1))),
}


def is_taken(node: PrivateNode, exchange: str, key: str, properties: pika.BasicProperties) -> bool:
    """Whether RabbitMQ takes it, and does not end the connection."""
    with channel(node) as raw:
        raw.confirm_delivery()
        try:
            raw.basic_publish(exchange, key, b"FdMQ", properties)
        except pika.exceptions.AMQPConnectionError:
            return False
    return True


@pytest.mark.broker
def test_headers_that_pika_stumbles_over_stop_nobody(runs: tuple[Run, Run], node: PrivateNode) -> None:
    run = runs[0]
    user, topology = node.user, run.topology
    wait_for(lambda: exists(node, topology.dead), what="the run's queues")
    with channel(node) as raw:
        raw.confirm_delivery()
        publish_good(raw, topology.run, user, 0)
        wait_for(lambda: run.version() == 1, what="the first version")

        taken = 0
        for exchange, key in ((CONTROL, topology.key("m")), (EVENTS, EVENT_KEY), (UPDATES, topology.key("m"))):
            for encoded in TABLES.values():
                properties = Table(encoded, message_id=b"\xff" * 255, type=b"\xff" * 255, user_id=user, delivery_mode=2)
                taken += is_taken(node, exchange, key.format(run=topology.run), properties)
        publish_good(raw, topology.run, user, 1)

        wait_for(lambda: run.version() == 2, what="the second version")
        wait_for(lambda: 3 * ready(node, topology.dead) == taken, what="a dead letter for each")
    assert taken >= 3 * 4  # RabbitMQ itself refuses the others
    run.stop()
    log = (run.folder / "log").read_text()
    assert "connecting again" not in log
    assert "Traceback" not in log
