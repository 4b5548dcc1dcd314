"""SIGTERM at the worst moments: whoever is asked to leave leaves, with exit code 0."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from broker.amqp.node import PrivateNode
from tests.support.node import admin_of
from tests.support.proxy import Proxy
from tests.support.site import Site
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.broker, pytest.mark.slow]

LONG = 120.0


class Scene:
    """A run with an aggregator and a worker as processes, each behind its own proxy."""

    def __init__(self, folder: Path, node: PrivateNode, stack: ExitStack) -> None:
        self.node = node
        self.near_aggregator, self.near_worker = (stack.enter_context(Proxy.to(node.url)) for _ in range(2))
        # The worker has always something to publish.
        settings: dict[str, dict[str, object]] = {
            "broker": {"heartbeat": 30},
            "aggregator": {"buffer_size": 2, "learning_rate": 2.0, "updates_per_version": 100_000, "linger": 0.0},
        }
        self.place = stack.enter_context(Site(folder, node.url, workers=1, settings=settings, prefix="stop"))
        self.place.initialise()
        self.stack = stack

    def start_aggregator(self) -> None:
        self.aggregator = self.place.command("aggregator", url=self.near_aggregator.url(self.node.url), log="agg")

    def start_worker(self) -> None:
        self.worker = self.place.worker(0, url=self.near_worker.url(self.node.url), log="w0")

    def start(self) -> None:
        """Both are at work."""
        self.start_aggregator()
        self.start_worker()
        wait_for(lambda: self.place.version() >= 2, LONG, what=f"two versions: {self.logs}")

    def wait_log(self, log: str, text: str) -> None:
        wait_for(lambda: text in self.place.log(log), LONG, what=f"{text!r} in {log}")

    @property
    def logs(self) -> str:
        return self.place.log("agg")[-2000:] + self.place.log("w0")[-2000:]


def never_there(scene: Scene) -> None:
    """The broker cannot be reached from the start."""
    scene.near_aggregator.refuse()
    scene.near_worker.refuse()
    scene.start_aggregator()
    scene.start_worker()
    for log in ("agg", "w0"):
        scene.wait_log(log, "no connection")


def away(scene: Scene) -> None:
    """The broker went away while all were at work."""
    scene.start()
    for proxy in (scene.near_aggregator, scene.near_worker):
        proxy.refuse()
        proxy.cut()
    for log in ("agg", "w0"):
        scene.wait_log(log, "no connection")


def black_hole(scene: Scene) -> None:
    """The network swallows everything, and nobody has noticed yet."""
    scene.start()
    for proxy in (scene.near_aggregator, scene.near_worker):
        proxy.hole()


def black_hole_from_the_start(scene: Scene) -> None:
    """Whoever connects gets no answer."""
    for proxy in (scene.near_aggregator, scene.near_worker):
        proxy.hole()
    scene.start_aggregator()
    scene.start_worker()
    wait_for(
        lambda: scene.near_aggregator.connections >= 2 and scene.near_worker.connections >= 2, LONG, what="all four"
    )


def memory_alarm(scene: Scene) -> None:
    """The broker takes no messages: neither an update nor a version."""
    scene.start()
    scene.node.ctl("set_vm_memory_high_watermark", "absolute", "1")
    scene.stack.callback(scene.node.ctl, "set_vm_memory_high_watermark", "0.4")
    scene.wait_log("w0", "takes no messages for now")


def full_queue(scene: Scene) -> None:
    """The worker backs off, since nobody empties the queue."""
    scene.start()
    scene.aggregator.send_signal(signal.SIGTERM)
    assert scene.aggregator.wait(LONG) == 0, scene.logs
    queue = scene.place.topology.updates
    admin, path = admin_of(scene.node), f"/policies/%2F/{queue}"
    limit = {"max-length": 1, "overflow": "reject-publish"}
    admin.put(path, {"pattern": f"^{queue}$", "definition": limit, "apply-to": "queues"})
    scene.stack.callback(admin._request, "DELETE", path)
    scene.wait_log("w0", "is published again: PublishRefused")


STATES: list[Callable[[Scene], None]] = [
    never_there,
    away,
    black_hole,
    black_hole_from_the_start,
    memory_alarm,
    full_queue,
]


@contextmanager
def scene_of(folder: Path, node: PrivateNode) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(folder, node, stack)


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_whoever_is_asked_to_leave_leaves(state: Callable[[Scene], None], node: PrivateNode, tmp_path: Path) -> None:
    with scene_of(tmp_path, node) as scene:
        state(scene)
        for process in (scene.worker, scene.aggregator):
            process.send_signal(signal.SIGTERM)
        # Without a second signal, and without the broker's help.
        assert scene.worker.wait(LONG) == 0, scene.logs
        assert scene.aggregator.wait(LONG) == 0, scene.logs
        assert "Traceback" not in scene.logs
        for proxy in (scene.near_aggregator, scene.near_worker):
            proxy.heal()
        if scene.place.outbox(0).exists():
            outbox = json.loads(scene.place.outbox(0).read_text())
            assert 0 <= outbox["next_seq"] - outbox["confirmed"] <= 1
