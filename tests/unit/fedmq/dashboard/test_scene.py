"""The picture of a run: what is heard now, before it what the folder tells, and neither breaks by what is in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker.messages import Event, EventKind
from broker.transport import Delivery, Source
from broker.wire import encode
from fedmq.dashboard.feed import Picture
from fedmq.dashboard.past import MOST_METRICS, POINTS, Past
from fedmq.dashboard.scene import Scene
from fedmq.monitoring.facts import BrokerFacts, QueueFacts
from fedmq.monitoring.monitor import Monitor

RUN = "digits"


def version_line(version: int, *, loss: float | None = None, time: float | None = None, **more: Any) -> dict[str, Any]:
    update = {"worker": "w0", "incarnation": "a", "seq": version, "base_version": version - 1, "staleness": 2}
    return {
        "kind": "version",
        "version": version,
        "epoch": 1,
        "time": 1000.0 + version if time is None else time,
        "seconds": 0.5,
        "loss": 1 / version if loss is None else loss,
        "updates": [update | {"examples": 8, "cosine": 0.5}],
        **more,
    }


def evaluation_line(version: int, **metrics: float | None) -> dict[str, Any]:
    return {"kind": "evaluation", "version": version, "worker": "evaluator", "time": 1000.0 + version} | {
        "metrics": metrics
    }


class Folder:
    """A run's folder, written line by line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "history.jsonl"

    def add(self, *lines: dict[str, Any], end: str = "\n") -> None:
        with self.file.open("a") as file:
            file.write("".join(json.dumps(line) + end for line in lines))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def hear(monitor: Monitor, kind: EventKind = EventKind.PROGRESS, source: str = "aggregator", **data: Any) -> None:
    event = Event(run=RUN, kind=kind, source=source, time=0.0, data=data)
    monitor.take(Delivery(source=Source.EVENT, body=encode(event), headers={}))


def ys(picture: Picture, name: str) -> list[Any]:
    return [point[2] for point in picture.series[name]]


def test_a_run_that_has_ended_is_shown_from_its_folder(folder: Folder) -> None:
    folder.add({"kind": "start", "epoch": 1, "version": 0, "time": 1000.0})
    folder.add(version_line(1), evaluation_line(1, accuracy=0.5), version_line(2), evaluation_line(2, accuracy=0.75))
    folder.add({"kind": "rejected", "version": 2, "workers": {"w9": {"not-finite": 3}}, "time": 1002.0})
    folder.add({"kind": "quarantine", "version": 2, "worker": "w9", "score": 3.0, "until": 2000.0, "time": 1002.0})
    (folder.folder / "summary.json").write_text('{"outcome": "done"}')
    (folder.folder / "contribution.json").write_text('{"workers": [{"worker": "w0", "contribution": 0.25}]}')

    picture = Scene(Monitor(RUN), Past(folder.folder)).look()

    view = picture.view
    assert (view["state"], view["version"], view["loss"]) == ("done", 2, 0.5)
    assert view["evaluation"] == {"version": 2, "metrics": {"accuracy": 0.75}}
    assert (view["workers"]["w0"]["updates"], view["workers"]["w0"]["contribution"]) == (2, 0.25)
    assert view["workers"]["w9"]["remarks"] == ["3 rejected: not-finite"]
    assert view["rejected"] == {"not-finite": 3}
    assert str(folder.folder) in view["missing"][0]
    assert picture.series["loss"] == [[1, 1001.0, 1.0], [2, 1002.0, 0.5]]
    assert (ys(picture, "held:accuracy"), ys(picture, "staleness")) == ([0.5, 0.75], [2.0, 2.0])
    assert [line["text"] for line in picture.log][-1].startswith("w9 is in quarantine")


def test_curves_begin_with_the_folder_and_go_on_with_what_is_heard(folder: Folder) -> None:
    folder.add(version_line(1), version_line(2))
    monitor = Monitor(RUN)
    scene = Scene(monitor, Past(folder.folder))

    hear(monitor, what="version", version=2, loss=0.5, updates=1, seconds=0.1)
    hear(monitor, what="version", version=3, loss=0.25, updates=1, seconds=0.1)
    assert [point[0] for point in scene.look().series["loss"]] == [1, 2, 3]

    folder.add(version_line(3, loss=0.25))
    scene.note()
    picture = scene.look()
    assert [point[::2] for point in picture.series["loss"]] == [[1, 1.0], [2, 0.5], [3, 0.25]]
    assert picture.view["state"] == "running"


def test_evaluations_that_come_late_stand_where_they_belong(folder: Folder) -> None:
    folder.add(*(evaluation_line(version, accuracy=version / 10) for version in (1, 3, 2)))

    assert ys(Scene(Monitor(RUN), Past(folder.folder)).look(), "held:accuracy") == [0.1, 0.2, 0.3]


def test_without_a_folder_it_shows_what_is_heard() -> None:
    monitor = Monitor(RUN)
    scene = Scene(monitor)
    hear(monitor, what="version", version=1, loss=0.5, updates=1, seconds=0.1)
    hear(monitor, EventKind.EVALUATION, "evaluator", version=1, accuracy=0.5, loss=float("nan"))
    hear(monitor, EventKind.HEARTBEAT, "__proto__", state="training")

    picture = scene.look()

    assert ys(picture, "loss") == [0.5]
    assert (ys(picture, "held:accuracy"), ys(picture, "held:loss")) == ([0.5], [None])
    assert picture.view["workers"]["__proto__"]["state"] == "training"
    json.dumps([picture.view, picture.series, list(picture.log)], allow_nan=False)


def test_how_long_the_queues_are_makes_curves() -> None:
    monitor = Monitor(RUN)
    scene = Scene(monitor)
    for ready in (0, 7):
        monitor.observe(BrokerFacts((QueueFacts("fedmq.digits.updates", "updates", ready),), dead_letters=ready + 1))
        scene.note()

    picture = scene.look()

    assert (ys(picture, "waiting"), ys(picture, "dead")) == ([0, 7], [1, 8])


def test_the_log_is_told_once_whether_it_is_heard_or_read(folder: Folder) -> None:
    command = {"kind": "command", "what": "pause", "version": 1, "pending": False}
    folder.add({**command, "time": 1000.0})
    monitor = Monitor(RUN)
    scene = Scene(monitor, Past(folder.folder))
    hear(monitor, what="command", version=1, accepted=True, text="resume: in force at version 1")
    folder.add({**command, "what": "resume", "time": monitor.now() + 1})
    scene.note()

    first, second = scene.look().log, scene.look().log

    assert [line["text"].partition(":")[0] for line in first] == ["pause", "resume"]
    assert [line["number"] for line in first] == [1, 2]
    assert first == second


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: folder.file.write_bytes(b"\xff\xfe nonsense\n[1, 2]\n" + b'{"kind": "version"}\n' * 3),
        lambda folder: folder.add({"kind": "version", "version": "x", "updates": [1, None, {}], "loss": "high"}),
        lambda folder: folder.add({"kind": "evaluation", "version": 2, "metrics": ["a"]}, {"kind": []}, {"kind": None}),
        lambda folder: folder.add({"kind": "rejected", "workers": {"w0": 3, "w1": {"bad": "x"}}}),
        lambda folder: folder.add({"kind": "federated", "version": 1, "metrics": {"loss": 3, "a": {"mean": None}}}),
        lambda folder: (folder.folder / "summary.json").write_text("[]"),
        lambda folder: (folder.folder / "contribution.json").write_text('{"workers": [3]}'),
        lambda folder: folder.file.mkdir(),
    ],
    ids=["bytes", "version", "evaluation", "rejected", "federated", "summary", "contribution", "no file"],
)
def test_a_damaged_folder_shows_what_can_be_read(folder: Folder, damage: Callable[[Folder], object]) -> None:
    damage(folder)
    monitor = Monitor(RUN)
    scene = Scene(monitor, Past(folder.folder))
    if folder.file.is_file() or not folder.file.exists():
        folder.add(version_line(7))
        scene.note()

    picture = scene.look()

    json.dumps([picture.view, picture.series, list(picture.log)], allow_nan=False)
    if folder.file.is_dir():
        assert any("history.jsonl" in text for text in picture.view["missing"])
    else:
        assert picture.view["version"] == 7


def test_half_a_line_waits_for_its_other_half_and_a_file_that_was_replaced_is_read_anew(folder: Folder) -> None:
    past = Past(folder.folder)
    folder.add(version_line(1))
    text = json.dumps(version_line(2)) + "\n"
    with folder.file.open("a") as file:
        file.write(text[:40])
    past.read()
    assert past.version == 1

    with folder.file.open("a") as file:
        file.write(text[40:])
    past.read()
    assert (past.version, len(past.curves["loss"])) == (2, 2)

    folder.file.rename(folder.folder / "old")
    folder.add(version_line(1, loss=9.0))
    past.read()
    assert (past.version, past.loss) == (1, 9.0)


def test_however_long_the_run_and_however_many_the_metrics_memory_is_bounded(folder: Folder) -> None:
    folder.add(*(version_line(version) for version in range(1, 3 * POINTS)))
    folder.add(*(evaluation_line(version, **{f"m{version}": 0.5}) for version in range(100)))

    picture = Scene(Monitor(RUN), Past(folder.folder)).look()

    assert len(picture.series["loss"]) <= POINTS + 1
    assert picture.series["loss"][0][0] == 1
    assert picture.series["loss"][-1][0] == 3 * POINTS - 1
    assert sum(name.startswith("held:") for name in picture.series) == MOST_METRICS
