"""Whatever is heard, and for however long: what comes out is bounded, valid JSON, harmless, and as documented."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.messages import Event, EventKind, Scalar
from fedmq.monitoring import view as view_module
from fedmq.monitoring.curve import Curve
from fedmq.monitoring.facts import BrokerFacts, QueueFacts
from fedmq.monitoring.log import ROOM
from fedmq.monitoring.text import clean
from fedmq.monitoring.view import SILENT_SECONDS, View
from fedmq.monitoring.worker import MISSED_BEATS

SCHEMA = json.loads((Path(__file__).parents[4] / "docs" / "status.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def event(kind: EventKind, source: str = "aggregator", **data: Scalar) -> Event:
    return Event(run="r", kind=kind, source=source, time=0.0, data=data)


def status(**data: Scalar) -> Event:
    facts: dict[str, Scalar] = {"aggregator": "host/1", "active": True, "epoch": 1, "version": 3, "page": 0, "pages": 1}
    return Event(run="r", kind=EventKind.STATUS, source="aggregator", time=0.0, data={**facts, **data})


def check(view: View, now: float) -> dict[str, Any]:
    """The snapshot, if it is what is documented, and all that comes out is JSON."""
    snapshot = view.snapshot(now)
    json.dumps([snapshot, view.series(), [entry.snapshot() for entry in view.log()]], allow_nan=False)
    VALIDATOR.validate(snapshot)
    return snapshot


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=40), st.integers(2**60, 2**70)
)
WORDS = st.sampled_from(["folded", "version", "rejected", "quarantine", "release", "command", "federated", "other"])
ROWS = st.dictionaries(
    st.sampled_from(["name", "role", "seen", "left", "updates", "pace", "rejected", "score", "until", "state", "loss"]),
    st.one_of(SCALARS, st.dictionaries(st.text(max_size=5), SCALARS, max_size=3), st.lists(SCALARS, max_size=2)),
    max_size=11,
)
KEYS = [
    *("version", "epoch", "state", "fill", "goal", "rounds", "applied", "loss", "evaluated", "updates_per_second"),
    *(
        "rounds_per_minute",
        "staleness_median",
        "staleness_p95",
        "checkpoints",
        "disk_free",
        "page",
        "pages",
        "aggregator",
    ),
    *(
        "active",
        "leaves",
        "reason",
        "worker",
        "score",
        "accepted",
        "text",
        "staleness",
        "updates",
        "seconds",
        "confirmed",
    ),
    *("role", "accuracy", "rejected", "metrics"),
]
DATA = st.dictionaries(st.sampled_from(KEYS), SCALARS, max_size=12)


@st.composite
def events(draw: st.DrawFn) -> Event:
    data = dict(draw(DATA))
    if draw(st.booleans()):
        data["what"] = draw(WORDS)
    for index in range(draw(st.integers(0, 2))):
        data[f"row{index}"] = json.dumps(draw(ROWS), skipkeys=True)
    for key in ("rejected", "metrics"):
        if draw(st.booleans()):
            data[key] = json.dumps(draw(st.dictionaries(st.text(max_size=5), SCALARS, max_size=3)))
    source = draw(st.sampled_from(["a", "b", "aggregator"]))
    return Event(run="r", kind=draw(st.sampled_from(EventKind)), source=source, time=0.0, data=data)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(events(), st.floats(0, 30)), max_size=6))
def test_whatever_is_heard_gives_a_valid_snapshot(heard: list[tuple[Event, float]]) -> None:
    view, now = View("r"), 1e9
    for one, passed in heard:
        now += passed
        view.take(one, now)
        view.tick(now)
    check(view, now)


@given(st.text())
def test_texts_are_one_line_of_what_can_be_printed(text: str) -> None:
    shown = clean(text)
    assert shown.isprintable()
    assert len(shown) <= 80
    if text.isprintable() and len(text) <= 80:
        assert shown == text


@given(st.lists(st.integers(), min_size=1, max_size=200), st.sampled_from([2, 4, 10]))
def test_a_curve_is_bounded_and_has_its_first_and_newest_point(values: list[int], room: int) -> None:
    curve = Curve(("i", "value"), room)
    for index, value in enumerate(values):
        curve.add(index, value)
    columns = curve.columns()
    assert len(columns["i"]) <= room + 1
    assert (columns["i"][0], columns["i"][-1]) == (0, len(values) - 1)
    assert columns["value"] == [values[index] for index in columns["i"]]
    steps = {after - before for before, after in zip(columns["i"], columns["i"][1:-1], strict=False)}
    assert len(steps) <= 1


def test_nothing_has_been_heard_yet() -> None:
    snapshot = check(View("r"), 0.0)
    assert (snapshot["state"], snapshot["version"], snapshot["workers"], snapshot["alarms"]) == ("waiting", 0, [], None)
    assert "no aggregator has been heard" in snapshot["missing"][0]


def test_what_the_broker_knows_is_shown_where_no_aggregator_speaks() -> None:
    view = View("r")
    queue = QueueFacts("fedmq.r.updates", "updates", ready=7, consumers=0)
    facts = BrokerFacts((queue,), dead_letters=2, aggregators=(("host/9", False),), newest=(4, 12), is_declared=True)
    view.observe(facts, 0.0)
    snapshot = check(view, 0.0)
    assert (snapshot["version"], snapshot["epoch"], snapshot["dead_letters"]) == (12, 4, 2)
    assert snapshot["queues"][0]["ready"] == 7
    assert snapshot["aggregators"] == [{"name": "host/9", "active": False, "epoch": None, "seen_seconds": None}]


def test_a_run_that_is_done_is_told_by_the_broker() -> None:
    view = View("r")
    view.observe(BrokerFacts(newest=(4, 12), is_done=True, is_declared=True), 0.0)
    snapshot = check(view, 0.0)
    assert (snapshot["state"], snapshot["version"]) == ("done", 12)
    assert snapshot["missing"] == [
        "no aggregator is heard, as the run is done: its workers and figures are in its folder"
    ]
    view.take(status(state="running"), 1.0)
    assert check(view, 1.0)["state"] == "running"


def test_a_run_that_nobody_has_declared_is_told() -> None:
    view = View("r")
    view.observe(BrokerFacts(is_declared=False), 0.0)
    assert check(view, 0.0)["missing"] == ["no aggregator has ever declared run r on this broker"]


def test_an_alarm_is_told_when_it_comes_and_when_it_goes() -> None:
    view = View("r")
    for alarms in ((), ("n: memory alarm",), ("n: memory alarm",), None, ()):
        view.observe(BrokerFacts(alarms=alarms), 0.0)
    assert [(entry.level, entry.text) for entry in view.log()] == [
        ("error", "n: memory alarm"),
        ("info", "the alarm is over"),
    ]


def test_an_aggregator_that_is_not_heard_is_silent_and_its_figures_old() -> None:
    view = View("r")
    view.take(status(state="paused"), 0.0)
    assert check(view, SILENT_SECONDS)["state"] == "paused"
    snapshot = check(view, SILENT_SECONDS + 1)
    assert (snapshot["state"], snapshot["heard_seconds"]) == ("silent", SILENT_SECONDS + 1)
    assert "has not been heard for 16 s" in snapshot["missing"][0]


def test_a_worker_with_slow_heartbeats_is_not_taken_for_silent() -> None:
    view = View("r")
    for time in (0.0, 20.0):
        view.take(event(EventKind.HEARTBEAT, "w", state="training"), time)
    assert check(view, 20.0 + MISSED_BEATS * 20)["workers"][0]["state"] == "training"
    assert check(view, 21.0 + MISSED_BEATS * 20)["workers"][0]["state"] == "silent"


def test_silence_and_its_end_are_told_once() -> None:
    view = View("r")
    view.take(event(EventKind.HEARTBEAT, "w", state="training"), 0.0)
    for now in (5.0, 11.0, 12.0, 13.0):
        view.tick(now)
    view.take(event(EventKind.HEARTBEAT, "w", state="training"), 14.0)
    assert [entry.text for entry in view.log()] == ["w is silent", "w is heard again"]
    assert [entry.number for entry in view.log(since=1)] == [2]


def test_of_two_workers_the_slow_one_is_told() -> None:
    view = View("r")
    for name, seconds in (("fast", 1.0), ("slow", 6.0)):
        view.take(event(EventKind.HEARTBEAT, name, state="training", seconds=seconds), 0.0)
    remarks = {worker["name"]: worker["remarks"] for worker in check(view, 0.0)["workers"]}
    assert remarks == {"fast": [], "slow": ["slow: 6.0 times the median's seconds an update"]}


def test_of_one_that_is_silent_it_is_not_said_that_it_is_slow() -> None:
    view = View("r")
    for now in (0.0, 20.0):
        view.take(event(EventKind.HEARTBEAT, "fast", state="training", seconds=1.0), now)
    view.take(event(EventKind.HEARTBEAT, "gone", state="training", seconds=6.0), 0.0)
    remarks = {worker["name"]: worker["remarks"] for worker in check(view, 20.0)["workers"]}
    assert remarks == {"fast": [], "gone": ["silent for 20 s"]}


@pytest.mark.parametrize(
    ("seconds", "role"), [((0.001, 0.05), "trainer"), ((1.0, 1.9), "trainer"), ((1.0, 60.0), "evaluator")]
)
def test_who_is_not_much_slower_or_does_not_train_is_not_slow(seconds: tuple[float, float], role: str) -> None:
    view = View("r")
    for name, one, which in (("a", seconds[0], "trainer"), ("b", seconds[1], role)):
        view.take(event(EventKind.HEARTBEAT, name, state="training", seconds=one, role=which), 0.0)
    assert [worker["remarks"] for worker in check(view, 0.0)["workers"]] == [[], []]


def test_names_are_shown_harmlessly() -> None:
    view = View("r")
    name = "[red]\x1b[2J\u202evil\n</script>"
    row = json.dumps({"name": name, "left": "a\nb", "rejected": {"x\x00": 3}})
    view.take(status(row0=row, aggregator=name, state="\x07"), 0.0)
    view.take(event(EventKind.PROGRESS, what="rejected", worker=name, reason="r\r\n"), 0.0)
    snapshot = check(view, 0.0)
    texts = [snapshot["workers"][0]["name"], snapshot["aggregators"][0]["name"], snapshot["state"], view.log()[-1].text]
    assert all(text.isprintable() for text in texts)
    assert (
        snapshot["workers"][0]["name"]
        == "[red]\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}vil\N{REPLACEMENT CHARACTER}</script>"
    )


def test_memory_is_bounded_however_many_workers_come_and_however_long_it_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(view_module, "MOST_WORKERS", 20)
    view = View("r")
    for index in range(100):
        view.take(event(EventKind.HEARTBEAT, f"w{index}", state="training"), float(index))
    for version in range(1100):
        names = f"n{version}:0 w1:{version}"
        view.take(event(EventKind.PROGRESS, what="folded", version=version, staleness=names, fill=1, goal=2), 1e6)
        view.take(event(EventKind.PROGRESS, what="version", version=version, loss=0.5), 1e6 + version)
        view.take(event(EventKind.EVALUATION, "e", version=version, accuracy=0.5), 1e6 + version)
        view.take(event(EventKind.PROGRESS, what="rejected", version=version, worker="w", reason=f"r{version}"), 1e6)
        view.take(status(aggregator=f"host/{version}", version=version), 1e6 + version)
    snapshot = check(view, 1e6 + 1100)
    assert len(view.workers) == 20
    assert len(snapshot["aggregators"]) == 20
    assert len(view.log()) == ROOM
    series = view.series()
    assert all(len(column) <= 1001 for curve in series.values() for column in curve.values())
    assert series["versions"]["version"][-1] == 1099
    assert len(view.rejected) <= 65


def test_a_figure_that_is_no_number_is_null() -> None:
    view = View("r")
    view.take(event(EventKind.EVALUATION, "e", version=1, accuracy=math.nan, loss=math.inf), 0.0)
    assert check(view, 0.0)["evaluation"] == {"version": 1, "metrics": {"accuracy": None, "loss": None}}
    assert view.series()["evaluations"]["metrics"] == [{"accuracy": None, "loss": None}]


def test_an_aggregator_of_before_tells_by_its_events() -> None:
    """One of 0.1 tells no status; what can be known without is shown, and what cannot is said."""
    view = View("r")
    view.take(event(EventKind.HEARTBEAT, "w", state="training", confirmed=4), 0.0)
    for second in range(1, 31):
        view.take(
            event(EventKind.PROGRESS, what="folded", version=second, updates=2, staleness="w:1 w:3"), float(second)
        )
        view.take(event(EventKind.PROGRESS, what="version", version=second, loss=0.5), float(second))
    snapshot = check(view, 30.0)
    assert (snapshot["state"], snapshot["version"], snapshot["epoch"]) == ("running", 30, 0)
    assert snapshot["rates"] == {"updates_per_second": 2.0, "rounds_per_minute": 60.0}
    assert snapshot["staleness"] == {"median": 3.0, "p95": 3.0, "max": 3.0}
    assert (snapshot["workers"][0]["sent"], snapshot["workers"][0]["staleness"]) == (4, 2.0)
    assert "tells no status" in snapshot["missing"][0]
