"""``report.html``: all of a run on one page that stands for itself, whatever names and numbers there were."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.history import read_history
from aggregator.report import try_report, write_report
from aggregator.report.charts import HUGE, Curve, Mark, bars, columns, curves, thinned
from aggregator.report.chronicle import MOST_EVENTS, Chronicle
from aggregator.results import Outcome, write_results
from tests.support.builders import RUN
from tests.support.runfolder import RunFolder

VOID = {"meta", "img", "br"}
NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=64)


class Page(HTMLParser):
    """Reads a page as strictly as XML would, and keeps what matters."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.text: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(self.text)


def page_of(run: RunFolder) -> Page:
    return Page(write_report(run.folder, run.store).read_text())


def a_run(folder: Path, versions: int = 3) -> RunFolder:
    run = RunFolder(folder)
    run.start()
    for seq in range(2 * versions):
        run.update(seq, worker=f"w{seq % 2}")
    return run


def test_it_tells_what_the_run_was(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    run.update(6, worker="w0", base_version=99)
    run.history.rejected({"w0": {"future-version": 1}}, version=3, now=20.0)
    run.start(now=30.0)
    (tmp_path / "config.toml").write_text(
        'run = "r"\n[aggregator]\nbuffer_size = 2\n[broker]\nurl = "amqp://u:hush@h/"\n'
    )
    (tmp_path / "contribution.json").write_text('{"workers": [{"worker": "w1", "contribution": -0.25}]}')

    page = page_of(run)

    head = run.store.head()
    for word in (RUN, head.digest, "w0", "w1", "-0.25", "buffer_size", "epoch 2", "Contribution of each worker"):
        assert word in page.words, word
    assert "2 starts of an aggregator" in page.words
    assert "No update was rejected" not in page.words
    assert page.tags["svg"] >= 6
    assert "amqp://u:***@h/" in page.words
    first = next(read_history(run.folder / "history.jsonl"))["software"]
    assert first["python"] in page.words
    assert first["numpy"] in page.words


def test_it_stands_for_itself(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    text = write_report(run.folder, run.store).read_text()

    page = Page(text)

    assert not page.tags.keys() & {"script", "link", "iframe", "object", "embed"}
    assert not [value for name, value in page.attributes if name in ("src", "href")]
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text


EVIL = "<img src=x onerror=alert(1)>\"'&\u202e\x1b[31m"


def test_whatever_the_names_are_they_are_text(tmp_path: Path) -> None:
    """As a history has them that somebody else has written."""
    run = a_run(tmp_path)
    entry = {"worker": EVIL, "staleness": 1, "examples": 3, "loss": 1.0, "cosine": -1.0, "norm": 1.0}
    version = {"kind": "version", "version": 4, "epoch": 1, "time": 30.0, "updates": [entry], "after": EVIL}
    lines = [
        version,
        {"kind": "evaluation", "version": 4, "worker": EVIL, "time": 31.0, "metrics": {EVIL: 0.5, "loss": None}},
        {"kind": "federated", "version": 4, "time": 31.0, "metrics": {EVIL: {"mean": 1.0, "min": None, "max": 2}}},
        {"kind": "command", "what": EVIL, "version": 4, "pending": True, "time": 31.0},
        {"kind": "quarantine", "worker": EVIL, "score": EVIL, "until": EVIL, "version": 4, "time": 31.0},
        {"kind": "rejected", "workers": {EVIL: {EVIL: 3}}, "version": 4, "time": 31.0},
        {"kind": "start", "epoch": EVIL, "version": 4, "time": EVIL, "software": {EVIL: EVIL}},
        {"kind": EVIL, "version": 4, "time": 31.0},
        {"kind": "evaluation", "version": 5, "metrics": "no"},
        {"kind": "version", "version": "6", "updates": 3},
    ]
    with (tmp_path / "history.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "config.toml").write_text(f"# {EVIL}\n")

    text = write_report(run.folder, run.store).read_text()

    page = Page(text)
    assert not page.tags["img"]
    assert "<img src=x onerror=alert(1)>" in page.words
    assert "\u202e" not in text
    assert "\x1b" not in text


def test_a_run_of_which_there_is_hardly_anything(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)

    page = page_of(run)

    assert "open" in page.words
    assert "No update was rejected" in page.words


def test_what_was_taken_back_does_not_count(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    snapshot = run.store.load()
    lines = [{"kind": "version", "version": 4, "epoch": 1, "time": 40.0, "updates": [], "source": 1}]
    lines[0] |= {"before": snapshot.digest, "after": "aa"}
    with (tmp_path / "history.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)

    page = page_of(run)

    assert "taken back to version 1" in page.words
    assert "each version begins where the one before has ended" in page.words


def test_a_chain_of_digests_that_is_broken_is_told(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    file = tmp_path / "history.jsonl"
    second = next(line for line in read_history(file) if line.get("version") == 2 and line["kind"] == "version")
    file.write_text(file.read_text().replace(f'"before": "{second["before"]}"', '"before": "00"'))

    assert "1 versions do not begin where" in page_of(run).words


def test_at_the_end_of_a_run_it_is_made_and_at_a_stop_it_is_not(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    outcome = Outcome("stopped", 3, 1, 6, {}, 6, {})
    parameters = run.machine.parameters

    write_results(tmp_path, run.store, outcome, parameters, seconds=1.0)
    assert not (tmp_path / "report.html").exists()
    write_results(tmp_path, run.store, Outcome("done", 3, 1, 6, {}, 6, {}), parameters, seconds=1.0)

    assert "</html>" in (tmp_path / "report.html").read_text()


def test_a_report_that_cannot_be_made_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = a_run(tmp_path)
    (tmp_path / "report.html").mkdir()

    with caplog.at_level(logging.WARNING):
        try_report(run.folder, run.store)

    assert "no report.html" in caplog.text
    assert f"fedmq report --run {RUN}" in caplog.text


def test_happenings_are_bounded_and_the_first_and_the_newest_stay() -> None:
    told = Chronicle()
    for number in range(3 * MOST_EVENTS):
        told.take({"kind": "command", "version": number, "what": f"c{number}", "time": float(number)}, None)

    early, left_out, late = told.events

    assert (early[0]["what"], late[-1]["what"]) == ("c0", f"c{3 * MOST_EVENTS - 1}")
    assert (len(early) + len(late), left_out) == (MOST_EVENTS, 2 * MOST_EVENTS)


# ------------------------------------------------------------------------------------------------------ figures


@given(st.lists(NUMBERS, max_size=200), st.integers(1, 50))
def test_a_thinned_curve_has_few_points_and_all_extremes(values: list[float], most: int) -> None:
    points = thinned(list(range(len(values))), values, most)

    finite = [min(max(value, -HUGE), HUGE) for value in values if math.isfinite(value)]
    assert len(points) == min(len(finite), most)
    if finite:
        assert min(low for _, low, _, _ in points) == min(finite)
        assert max(high for _, _, _, high in points) == max(finite)
    assert all(low <= middle <= high for _, low, middle, high in points if math.isfinite(middle))


@given(st.lists(st.tuples(st.integers(0, 10**6), NUMBERS), max_size=30), st.booleans())
def test_any_numbers_can_be_drawn_and_lie_within_the_picture(pairs: list[tuple[int, float]], wide: bool) -> None:
    pairs.sort()
    points = thinned([float(x) for x, _ in pairs], [y for _, y in pairs])

    svg = curves([Curve("a", points)], x_name="x", marks=[Mark(3.0, "m")], may_be_wide=wide)

    assert bool(svg) is bool(points)
    if svg:
        page = Page(svg)
        assert "nan" not in svg
        assert "inf" not in svg
        for name, value in page.attributes:
            if name == "points":
                for pair in value.split():
                    x, y = map(float, pair.split(","))
                    assert 0 <= x <= 640
                    assert 0 <= y <= 260


@given(st.dictionaries(st.text(max_size=40), NUMBERS, max_size=4))
def test_any_bars_can_be_drawn(values: dict[str, float]) -> None:
    svg = bars(values)

    shown = sum(map(math.isfinite, values.values()))
    assert Page(svg).tags["rect"] == shown
    assert [float(v) for n, v in Page(svg).attributes if n == "width" and float(v) < 0] == []


def test_columns_are_shares_and_the_last_stands_for_the_rest() -> None:
    page = Page(columns({0: 6, 2: 3, 99: 1}, x_name="x"))

    assert page.tags["rect"] == 3
    assert "0: 6 (60.0 %)" in page.words
    assert "30+: 1 (10.0 %)" in page.words
    assert columns({}, x_name="x") == ""
