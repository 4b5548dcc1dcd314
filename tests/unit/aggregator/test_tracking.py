"""A run's numbers in trackers: all of them, once, in order, whatever tracker, disk or aggregator do meanwhile."""

from __future__ import annotations

import json
import logging
import sys
import threading
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from aggregator.config import AggregatorConfig
from aggregator.tracking import Place, Point, tracker_names, trackers_of
from aggregator.tracking.follow import MOST_TRIES, Follower, follow, tracking
from aggregator.tracking.mlflow import MlFlow
from aggregator.tracking.scalars import point_of
from aggregator.tracking.tensorboard import TensorBoard
from aggregator.tracking.wandb import WeightsAndBiases
from broker.errors import ConfigError
from tests.support.waiting import wait_for

Line = dict[str, Any]


def version(number: int, **more: Any) -> Line:
    entries = [{"worker": w, "staleness": s, "norm": 2.0 * s, "cosine": None} for w, s in (("a", 0), ("b", 3))]
    known = {"kind": "version", "version": number, "time": 100.0 + number, "loss": 1.0 / number, "seconds": 0.5}
    return {**known, "updates": entries, **more}


def evaluation(number: int) -> Line:
    metrics = {"accuracy": number / 10, "loss": None}
    return {"kind": "evaluation", "version": number, "time": 100.5 + number, "worker": "e", "metrics": metrics}


class Notes:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.places: list[Place] = []
        self.fails = 0
        self.closed = 0

    def __call__(self, place: Place) -> Notes:
        self.places.append(place)
        return self

    def track(self, points: list[Point]) -> None:
        if self.fails:
            self.fails -= 1
            raise OSError("the server is away")
        self.points += points

    def close(self) -> None:
        self.closed += 1

    @property
    def versions(self) -> list[int]:
        return [point.version for point in self.points if "train/loss" in point.values]


class Run:
    """A folder whose history grows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tell(self, *lines: Line, half: str = "") -> None:
        with (self.folder / "history.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.write(half)

    def follower(self, opens: Any, name: str = "notes") -> Follower:
        return Follower(name, opens, run="r", folder=self.folder, settings={"aggregator": {"buffer_size": 2}})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


# ------------------------------------------------------------------------------------------------- the numbers


def test_a_version_has_loss_round_staleness_and_norm() -> None:
    point = point_of(version(4), Counter())

    assert point == Point(
        4,
        104.0,
        {
            "train/loss": 0.25,
            "round/seconds": 0.5,
            "round/updates": 2.0,
            "round/workers": 2.0,
            "staleness/mean": 1.5,
            "staleness/median": 1.5,
            "staleness/min": 0.0,
            "staleness/max": 3.0,
            "norm/mean": 3.0,
            "norm/median": 3.0,
            "norm/min": 0.0,
            "norm/max": 6.0,
        },
    )


def test_what_is_not_finite_is_no_number() -> None:
    assert point_of(evaluation(3), Counter()) == Point(3, 103.5, {"held_out/accuracy": 0.3})
    assert point_of({"kind": "evaluation", "version": 3, "time": float("nan"), "metrics": {"a": 1}}, Counter()) is None
    assert point_of({"kind": "version", "version": None}, Counter()) is None
    assert point_of({}, Counter()) is None


def test_rejections_are_counted_over_the_lines() -> None:
    rejected: Counter[str] = Counter()
    line = {"kind": "rejected", "version": 3, "time": 1.0, "workers": {"a": {"x": 2}, "b": {"x": 1, "y": 1}}}

    first, second = point_of(line, rejected), point_of(line, rejected)

    assert first is not None
    assert first.values == {"rejected/x": 3.0, "rejected/y": 1.0}
    assert second is not None
    assert second.values == {"rejected/x": 6.0, "rejected/y": 2.0}


# ------------------------------------------------------------------------------------------------- the follower


def test_each_line_is_handed_over_once_also_after_a_restart(run: Run) -> None:
    run.tell(version(1), evaluation(1), version(2), half='{"kind": "ver')
    notes = Notes()
    assert run.follower(notes).step() == 3

    run.tell(half='sion"}\n')
    run.tell(version(2), version(3))
    again = run.follower(notes)
    assert again.step() == 3
    assert again.step() == 0

    assert notes.versions == [1, 2, 3]
    assert [place.newest for place in notes.places] == [0, 2]
    assert notes.places[0].settings == {"aggregator": {"buffer_size": 2}}


def test_a_tracker_that_fails_gets_it_again(run: Run) -> None:
    run.tell(version(1))
    notes = Notes()
    follower = run.follower(notes)
    notes.fails = 2
    for _ in range(2):
        with pytest.raises(OSError, match="away"):
            follower.step()
    run.tell(version(2))

    follower.step()

    assert notes.versions == [1, 2]
    assert (len(notes.places), notes.closed) == (3, 2)


def test_what_it_never_takes_is_left_out_and_counted(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.tell(version(1), evaluation(1))
    notes = Notes()
    follower = run.follower(notes)
    notes.fails = MOST_TRIES
    for _ in range(MOST_TRIES - 1):
        with pytest.raises(OSError, match="away"):
            follower.step()
    assert follower.step() == 2
    run.tell(version(2))
    follower.step()

    assert notes.versions == [2]
    assert run.follower(notes).left_out == 2
    assert "does not take 2 lines" in caplog.text


def test_a_history_from_a_backup_is_not_tracked_twice(run: Run) -> None:
    run.tell(version(1), version(2))
    notes = Notes()
    run.follower(notes).step()
    (run.folder / "history.jsonl").write_text(json.dumps(version(1)) + "\n")

    assert run.follower(notes).step() == 0
    run.tell(version(3))
    run.follower(notes).step()

    assert notes.versions == [1, 2, 3]


def test_damage_in_history_or_state_stops_nothing(run: Run) -> None:
    run.tell(version(1), half="\x00no\n[1]\n")
    run.tell(version(2))
    notes = Notes()
    assert run.follower(notes).step() == 4
    (run.folder / "tracking" / "notes.json").write_text("{")
    assert run.follower(notes).step() == 4
    assert notes.versions == [1, 2, 1, 2]


def test_only_who_leads_tracks(run: Run) -> None:
    run.tell(version(1))
    notes, leave, leads = Notes(), threading.Event(), threading.Event()
    thread = threading.Thread(target=follow, args=(run.follower(notes), leave, leads.is_set))
    leave.set()
    thread.start()
    thread.join(30)
    assert not notes.points

    leads.set()
    follow(run.follower(notes), leave, leads.is_set)
    assert notes.versions == [1]
    assert notes.closed == 1


def test_a_tracker_that_hangs_holds_up_nobody(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aggregator.tracking.follow.LEAVE_SECONDS", 0.05)
    run.tell(version(1))
    notes, release, hangs = Notes(), threading.Event(), threading.Event()

    class Hangs(Notes):
        def track(self, points: list[Point]) -> None:
            hangs.set()
            release.wait(60)

    trackers: Any = {"notes": notes, "hangs": Hangs()}
    with (
        caplog.at_level(logging.WARNING),
        tracking(trackers, run="r", folder=run.folder, settings={}, leads=lambda: True),
    ):
        wait_for(lambda: notes.versions == [1] and hangs.is_set(), 30)
    release.set()

    assert "hangs is behind; 'fedmq track hangs --run r' goes on" in caplog.text


# -------------------------------------------------------------------------------------------------- TensorBoard


def events(folder: Path) -> Iterator[Event]:
    """What TensorBoard reads: records of length, checksum, event, checksum."""
    for file in sorted((folder / "tensorboard").glob("events.*")):
        content = file.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = Event()
            event.ParseFromString(content[12 : 12 + length])
            yield event
            content = content[12 + length + 4 :]


def test_tensorboard_has_all_points_and_goes_on_after_a_restart(run: Run) -> None:
    run.tell(version(1), evaluation(1), version(2))
    first = run.follower(TensorBoard, "tensorboard")
    first.step()
    first.close()
    run.tell(evaluation(2), version(3))
    second = run.follower(TensorBoard, "tensorboard")
    second.step()
    second.close()

    read = list(events(run.folder))
    # Two files of one second are read in any order, which TensorBoard does not mind.
    scalars = sorted((v.tag, e.step, v.simple_value, e.wall_time) for e in read for v in e.summary.value)
    assert [(step, round(value, 4), time) for tag, step, value, time in scalars if tag == "train/loss"] == [
        (1, 1.0, 101.0),
        (2, 0.5, 102.0),
        (3, 0.3333, 103.0),
    ]
    assert [step for tag, step, _, _ in scalars if tag == "held_out/accuracy"] == [1, 2]
    # What the first had written beyond version 2 would come again, and is to count once.
    assert [e.step for e in read if e.session_log.status] == [3]


# ------------------------------------------------------- MLflow and W&B: modules with the functions that are used


class FakeMlflow:
    """As MLflow 3 answers, as far as it is asked."""

    def __init__(self) -> None:
        self.runs: dict[str, list[Any]] = {}
        self.params: dict[str, str] = {}
        self.uris: list[str] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        entities, package = types.ModuleType("mlflow.entities"), types.ModuleType("mlflow")
        entities.Metric = lambda *facts: facts  # type: ignore[attr-defined]
        entities.Param = lambda *facts: facts  # type: ignore[attr-defined]
        package.MlflowClient = self.client  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "mlflow", package)
        monkeypatch.setitem(sys.modules, "mlflow.entities", entities)

    def client(self, uri: str) -> FakeMlflow:
        self.uris.append(uri)
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return types.SimpleNamespace(experiment_id="7") if self.runs else None

    def create_experiment(self, name: str) -> str:
        assert name == "fedmq"
        return "7"

    def create_run(self, experiment: str, *, run_name: str) -> Any:
        assert (experiment, run_name) == ("7", "r")
        identity = f"id{len(self.runs)}"
        self.runs[identity] = []
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=identity))

    def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
        self.runs[run] += metrics
        self.params.update(params)


def test_mlflow_goes_on_with_the_same_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    server = FakeMlflow()
    server.install(monkeypatch)
    run.tell(version(1), evaluation(1))
    run.follower(MlFlow, "mlflow").step()
    run.tell({"kind": "evaluation", "version": 2, "time": 9.0, "metrics": {"a:b": 0.5}})
    run.follower(MlFlow, "mlflow").step()

    (metrics,) = server.runs.values()
    assert ("train/loss", 1.0, 101_000, 1) in metrics
    assert metrics[-1] == ("held_out/a-b", 0.5, 9_000, 2)
    assert server.params == {"aggregator.buffer_size": "2"}
    assert server.uris[0] == f"sqlite:///{run.folder.resolve()}/mlflow.db"


def test_wandb_resumes_by_an_id_of_the_folder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, float]] = []
    begun: list[dict[str, Any]] = []

    def init(**facts: Any) -> Any:
        begun.append(facts)
        return types.SimpleNamespace(define_metric=lambda *_, **__: None, log=logged.append, finish=lambda: None)

    package = types.ModuleType("wandb")
    package.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", package)
    for number in (1, 2):
        run.tell(version(number))
        follower = run.follower(WeightsAndBiases, "wandb")
        follower.step()
        follower.close()

    assert [point["version"] for point in logged] == [1, 2]
    assert logged[0]["train/loss"] == 1.0
    assert begun[0]["id"] == begun[1]["id"]
    assert begun[0]["resume"] == "allow"
    assert begun[0]["config"] == {"aggregator": {"buffer_size": 2}}


# ------------------------------------------------------------------------------------------------- the settings


def test_an_unknown_tracker_is_refused_with_the_nearest() -> None:
    assert AggregatorConfig(tracking=" tensorboard, wandb,").tracking == "tensorboard,wandb"
    with pytest.raises(ValueError, match="did you mean 'tensorboard'"):
        AggregatorConfig(tracking="tensorbord")
    assert tracker_names("") == ()


def test_what_is_not_installed_is_said_before_anything_begins(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    trackers = trackers_of(["tensorboard"])
    with (
        pytest.raises(ConfigError, match=r"pip install \"fedmq\[tensorboard\]\""),
        tracking(trackers, run="r", folder=run.folder, settings={}, leads=lambda: True),
    ):
        pytest.fail("it has begun")


def test_a_tracker_of_ones_own_is_named_by_its_path(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("own_tracker")
    module.Own = Notes()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_tracker", module)
    config = AggregatorConfig(tracking="own_tracker:Own")
    run.tell(version(1))
    follower = run.follower(trackers_of([config.tracking])[config.tracking], config.tracking)
    follower.step()

    assert module.Own.versions == [1]
    assert (run.folder / "tracking" / "own_tracker-Own.json").exists()
