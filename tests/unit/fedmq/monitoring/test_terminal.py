from __future__ import annotations

import io
import json
import math
import re

import pytest
from rich.console import Console

from broker.messages import Event, EventKind, Scalar
from broker.transport import Connected, Delivery, Source
from broker.wire import encode
from fedmq.monitoring.facts import BrokerFacts, QueueFacts
from fedmq.monitoring.monitor import Monitor
from fedmq.monitoring.terminal import Display, details, render
from fedmq.monitoring.worker import SILENT_SECONDS

FOOTER = "admin UI: http://127.0.0.1:15672\nuser guest, password guest"


def tell(monitor: Monitor, kind: EventKind, source: str, **data: Scalar) -> None:
    """The event as it comes in."""
    event = Event(run="test", kind=kind, source=source, time=1.0, data=data)
    monitor.take(Delivery(source=Source.EVENT, body=encode(event)))


def beat(monitor: Monitor, worker: str, **data: Scalar) -> None:
    tell(monitor, EventKind.HEARTBEAT, worker, **{"state": "training", "version": 3, "confirmed": 2, **data})


def folded(monitor: Monitor, worker: str, *staleness: int, fill: int = 1) -> None:
    text = " ".join(f"{worker}:{one}" for one in staleness)
    data: dict[str, Scalar] = {"what": "folded", "staleness": text, "fill": fill, "goal": 4}
    tell(monitor, EventKind.PROGRESS, "aggregator", version=3, **data)


def shown(monitor: Monitor, width: int = 80, *, rounds: int | None = 20) -> list[str]:
    """The lines of the panel on a terminal of this width."""
    monitor.rounds = rounds
    console = Console(width=width, height=50, record=True, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(render(monitor.snapshot(), title="fedmq · run test", footer=FOOTER))
    return capture.get().splitlines()


def row(lines: list[str], first: str) -> list[str]:
    """The cells of the line that begins with ``first``."""
    (line,) = [line for line in lines if re.match(rf"│ +{re.escape(first)} ", line)]
    return re.split(r" {2,}", line.strip("│ "))


def test_nothing_has_been_heard_yet() -> None:
    lines = shown(Monitor("test"))
    assert row(lines, "round") == ["round", "0 of 20"]
    assert row(lines, "buffer") == ["buffer", "-"]
    assert row(lines, "staleness") == ["staleness", "-"]
    assert row(lines, "held-out") == ["held-out", "-"]


def test_a_run_in_full_swing_fits_in_eighty_columns() -> None:
    monitor = Monitor("test")
    beat(monitor, "w0", loss=0.25, seconds=1.5)
    beat(monitor, "evaluator", role="evaluator", state="evaluating", loss=0.3, seconds=0.1)
    folded(monitor, "w0", 0, 1, fill=1)
    folded(monitor, "w0", 5, fill=2)
    tell(monitor, EventKind.PROGRESS, "aggregator", what="version", version=7, loss=0.75)
    folded(monitor, "w0", 0, fill=3)
    tell(
        monitor, EventKind.EVALUATION, "evaluator", version=7, accuracy=0.5, loss=0.5, examples=9, seconds=1.0, epoch=1
    )
    for _ in range(2):
        tell(monitor, EventKind.PROGRESS, "aggregator", what="rejected", version=7, worker="w0", reason="too-stale")

    lines = shown(monitor)

    assert {len(line) for line in lines} == {80}
    assert "…" not in "".join(lines)
    assert row(lines, "round")[:2] == ["round", "7 of 20"]
    assert row(lines, "buffer")[:2] == ["buffer", "3 of 4"]
    assert row(lines, "staleness") == ["staleness", "median 1, p95 5, largest 5"]
    assert row(lines, "training loss") == ["training loss", "0.7500"]
    assert row(lines, "held-out")[:2] == ["held-out", "accuracy 0.5000, loss 0.5000 (version 7)"]
    assert row(lines, "rejected") == ["rejected", "2 too-stale"]
    assert row(lines, "w0") == ["w0", "training", "3", "2", "0.2500", "1.50", "1.5"]
    assert row(lines, "evaluator") == ["evaluator", "evaluating", "3", "-", "0.3000", "0.10", "-"]
    assert "admin UI: http://127.0.0.1:15672" in lines[-4]


def test_a_late_worker_is_announced_until_it_is_heard() -> None:
    monitor = Monitor("test")
    monitor.expect("w3", "after round 5")
    assert row(shown(monitor), "w3") == ["w3", "after round 5", "-", "0", "-", "-", "-"]
    beat(monitor, "w3", state="waiting", version=-1, confirmed=0, seconds=0.0)
    monitor.expect("w3", "starting")
    assert row(shown(monitor), "w3") == ["w3", "waiting", "-", "0", "-", "-", "-"]


def test_a_worker_is_silent_only_after_it_was_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = Monitor("test")
    beat(monitor, "w0")
    folded(monitor, "w1", 2)
    assert row(shown(monitor), "w0")[1] == "training"

    later = monitor.now() + SILENT_SECONDS + 1
    monkeypatch.setattr(monitor, "now", lambda: later)

    assert row(shown(monitor), "w0")[1] == "silent"
    assert row(shown(monitor), "w1")[1] == "-"


def test_what_is_no_number_does_not_stop_the_display() -> None:
    monitor = Monitor("test")
    beat(monitor, "w0", loss=0.25)
    tell(monitor, EventKind.PROGRESS, "aggregator", what="version", version=1, loss=0.5)

    beat(monitor, "w0", loss=None)
    tell(monitor, EventKind.PROGRESS, "aggregator", what="version", version=2, loss=None)
    tell(monitor, EventKind.EVALUATION, "evaluator", version=2, accuracy=math.nan, loss=math.inf)

    lines = shown(monitor)
    assert row(lines, "w0")[4] == "-"
    assert row(lines, "training loss") == ["training loss", "-"]
    assert row(lines, "held-out") == ["held-out", "accuracy no number, loss no number (version 2)"]


def test_an_evaluation_that_comes_late_does_not_replace_a_newer_one() -> None:
    monitor = Monitor("test")
    for version in (4, 3):
        tell(monitor, EventKind.EVALUATION, "evaluator", version=version, loss=float(version))
    assert row(shown(monitor), "held-out")[1] == "loss 4.0000 (version 4)"


def test_long_names_leave_the_figures_readable() -> None:
    monitor = Monitor("test")
    name = "a-hospital-with-a-name-that-goes-on-and-on-and-on"
    beat(monitor, name, loss=0.25, seconds=100.25, state="backing-off")
    lines = shown(monitor)
    assert {len(line) for line in lines} == {80}
    assert row(lines, f"{name[:13]}…") == [f"{name[:13]}…", "backing-off", "3", "2", "0.2500", "100.25", "-"]
    assert row(shown(monitor, 120), name)[1] == "backing-off"


def test_bytes_that_are_no_event_are_passed_over() -> None:
    monitor = Monitor("test")
    monitor.take(Delivery(source=Source.EVENT, body=b"\xff not ours"))
    monitor.take(Connected(1))
    assert row(shown(monitor, rounds=None), "round") == ["round", "0"]


def test_where_there_is_no_terminal_a_round_is_a_line() -> None:
    monitor = Monitor("test")
    console = Console(width=40, force_terminal=False, color_system=None)
    with console.capture() as capture, Display(monitor, console, details, kinds=("version",)) as live:
        tell(monitor, EventKind.EVALUATION, "evaluator", version=0, accuracy=0.5)
        tell(monitor, EventKind.PROGRESS, "aggregator", what="version", version=1, loss=0.5)
        live.refresh()
        tell(monitor, EventKind.PROGRESS, "aggregator", what="version", version=2, loss=None)
    assert capture.get().splitlines() == [
        "round 1: training loss 0.5000, staleness 0.0; version 0 held out: accuracy 0.5000",
        "round 2: training loss unknown, staleness 0.0; version 0 held out: accuracy 0.5000",
    ]


def detailed(monitor: Monitor, width: int = 250, most: int | None = None) -> str:
    """All that is known, as it comes out of a terminal of this width, control sequences and all."""
    console = Console(width=width, height=50, force_terminal=True, color_system=None, file=io.StringIO())
    console.print(details(monitor.snapshot(), most=most))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def told(monitor: Monitor, *rows: dict[str, object], **more: Scalar) -> None:
    """An aggregator's status with these rows of workers."""
    facts: dict[str, Scalar] = {"aggregator": "host/1", "active": True, "epoch": 2, "version": 7, "state": "running"}
    facts |= {"page": 0, "pages": 1, "applied": 30, "staleness_median": 1, "staleness_p95": 4, "staleness_max": 6}
    facts |= {
        "updates_per_second": 2.5,
        "rounds_per_minute": 10.0,
        "fill": 1,
        "goal": 4,
        "rejected": '{"not-finite": 12}',
    }
    facts |= {"checkpoints": 2, "checkpoint_bytes": 12_300_000, "disk_free": 5e9, "disk_total": 10**11}
    facts |= {f"row{index}": json.dumps(row) for index, row in enumerate(rows)} | more
    event = Event(run="test", kind=EventKind.STATUS, source="aggregator", time=1.0, data=facts)
    monitor.take(Delivery(source=Source.EVENT, body=encode(event)))


def test_everything_that_is_known_is_told_and_who_is_in_trouble_comes_first() -> None:
    monitor = Monitor("test")
    told(
        monitor,
        {"name": "a-good-one", "seen": 1.0, "updates": 9, "state": "training", "last": 1.0, "loss": 0.25},
        {"name": "crashed", "seen": 40.0, "updates": 9, "state": "training"},
        {"name": "poisoned", "seen": 1.0, "rejected": {"not-finite": 12}, "until": 1.9e9, "score": 6.0},
        {"name": "slow", "seen": 1.0, "updates": 9, "state": "training", "seconds": 6.0},
        disk_free=5_000_000_000,
    )
    queue = QueueFacts("fedmq.test.updates", "updates", 3, 2, 4_500_000, 1)
    facts = BrokerFacts(
        (queue,), 12, ("n: memory alarm",), (("host/1", True), ("host/2", False)), missing=("the moon",)
    )
    monitor.observe(facts)

    text = detailed(monitor)

    for words in (
        r"run +test, running",
        r"aggregator +host/1 \(active, epoch 2\)",
        r"host/2 \(stands by\)",
        r"rates +10 rounds a minute, 2.5 updates a second",
        r"staleness +median 1, p95 4, largest 6",
        r"updates +30 applied, 12 rejected; 12 in the dead letters",
        r"disk +2 checkpoints, 12.3 MB; 5 GB of 100 GB free",
        r"alarms +n: memory alarm",
        r"fedmq.test.updates +updates +3 +2 +4.5 MB +1",
        r"not known: the moon",
        r"crashed +silent +40 s .* silent for 40 s",
        r"poisoned +quarantine .* in quarantine until 2030-03-17 17:46:40 UTC; 12 rejected: not-finite; score 6.0",
        r"slow +training .* slow: 6.0 times the median's seconds an update",
    ):
        assert re.search(words, text), (words, text)
    names = re.findall(r"^(a-good-one|crashed|poisoned|slow) ", text, re.MULTILINE)
    assert names == ["crashed", "poisoned", "slow", "a-good-one"]
    assert "… and 3 more" in detailed(monitor, most=1)


def test_no_name_is_markup_or_moves_the_cursor() -> None:
    monitor = Monitor("test")
    name = "[bold]x[/bold]\x1b[2J\r\u202e[link=http://x]"
    told(monitor, {"name": name, "seen": 1.0, "left": name, "rejected": {name: 3}}, aggregator=name)
    monitor.observe(BrokerFacts((QueueFacts(name, name, 1),), alarms=(name,), missing=(name,)))
    for text in (detailed(monitor), "\n".join(shown(monitor))):
        assert "\x1b[2J" not in text
        assert "\u202e" not in text
        assert "[bold]x[/bold]" in text
