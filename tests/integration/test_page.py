"""The live page in a real browser: it follows a run, shows what is wrong at a glance, and nothing harms it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from broker.memory import MemoryBroker
from broker.messages import Action, Command, Event, EventKind
from broker.transport import Delivery, Outgoing, Source
from broker.wire import encode
from fedmq.dashboard.beside import page_of
from fedmq.dashboard.config import DashboardConfig
from fedmq.monitoring.facts import BrokerFacts, QueueFacts
from fedmq.monitoring.monitor import Monitor
from tests.support import together
from tests.support.browser import PATIENCE, Watched, watched
from tests.support.browser import browser as running_browser
from tests.support.tasks import Line

RUN = "digits"
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as running:
        yield running


class Run(Monitor):
    """A run that says what a test wants, at a time that the test sets."""

    def __init__(self) -> None:
        super().__init__(RUN)
        self.passed = 0.0

    def now(self) -> float:
        return super().now() + self.passed

    def hear(self, kind: EventKind, source: str = "aggregator", **data: Any) -> None:
        event = Event(run=RUN, kind=kind, source=source, time=0.0, data=data)
        self.take(Delivery(source=Source.EVENT, body=encode(event), headers={}))

    def made(self, version: int, loss: float | None) -> None:
        self.hear(EventKind.PROGRESS, what="version", version=version, loss=loss, updates=4, seconds=0.5)

    def evaluation(self, version: int, **metrics: float) -> None:
        self.hear(EventKind.EVALUATION, "evaluator", version=version, **metrics)

    def status(self, *rows: dict[str, Any], **data: Any) -> None:
        """The aggregator says how it stands, with a page of workers."""
        facts: dict[str, Any] = {
            "aggregator": "host/1",
            "active": True,
            "epoch": 1,
            "state": "running",
            "page": 0,
            "pages": 1,
        }
        facts |= {"state": "running", "version": self.snapshot()["version"]} | data
        for index, row in enumerate(rows):
            facts[f"row{index}"] = json.dumps({"role": "trainer", "present": True} | row)
        self.hear(EventKind.STATUS, **facts)

    def heartbeat(self, worker: str, **data: Any) -> None:
        self.hear(EventKind.HEARTBEAT, worker, **({"state": "training", "role": "trainer", "seconds": 0.5} | data))


class Site:
    """A run, and the server of its page, which can be stopped and started again."""

    def __init__(self, folder: Path | None = None) -> None:
        self.run = Run()
        self.folder = folder
        self.url = ""
        self._port = 0
        self._open = ExitStack()

    def start(self) -> str:
        config = DashboardConfig(port=self._port)
        self.url = self._open.enter_context(page_of(self.run, config, self.folder))
        self._port = int(self.url.rstrip("/").rpartition(":")[2])
        return self.url

    def stop(self) -> None:
        self._open.close()


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    made.start()
    try:
        yield made
    finally:
        made.stop()


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """The page, connected. What it says and asks for is judged at the end."""
    with watched(browser, **options) as seen:
        seen.page.goto(url)
        expect(seen.page.locator("#link")).to_have_text("live")
        yield seen.page
        judge(seen, url)


def judge(seen: Watched, url: str) -> None:
    """Nothing went wrong, nothing was asked of anybody else, and nothing from outside was executed."""
    assert seen.said == []
    assert {request for request in seen.asked if not request.startswith(url)} == set()
    assert seen.page.evaluate("globalThis.harmed") is None


def tile(page: Page, title: str) -> Any:
    """A key figure's value."""
    return page.locator("#figures div", has=page.locator("dt", has_text=re.compile(f"^{title}$"))).locator("dd").first


def fits(page: Page) -> bool:
    """Whether nothing has to be scrolled to from the side."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


# ------------------------------------------------------------------------------------------------------ a run


def test_the_page_follows_a_run_without_being_loaded_again(browser: Browser, site: Site) -> None:
    with opened(browser, site.url) as page:
        expect(page.locator("h1")).to_have_text(RUN)
        expect(page.locator("#state")).to_have_text("waiting")
        page.evaluate("globalThis.stayed = true")

        for version in range(1, 4):
            site.run.made(version, 1 / version)
            site.run.evaluation(version, accuracy=version / 4, loss=0.5)

        expect(tile(page, "Round")).to_have_text("3")
        expect(tile(page, "Training loss")).to_have_text("0.333")
        expect(tile(page, "Accuracy")).to_have_text("0.75")
        expect(page.locator("#state")).to_have_text("running")
        loss = page.get_by_role("img", name=re.compile("^Loss: training from 1 .version 1. to 0.3333 .version 3."))
        expect(loss).to_be_visible()
        expect(loss.locator(".curve path")).to_have_count(2)
        expect(page.get_by_role("img", name=re.compile("^Accuracy: held out from 0.25"))).to_be_visible()
        expect(page.locator("#log li").first).to_contain_text("round 3")

        site.run.made(4, None)
        expect(tile(page, "Round")).to_have_text("4")
        expect(tile(page, "Training loss")).to_have_text("\N{EN DASH}")
        expect(page).to_have_title(f"{RUN} · round 4 · running")
        assert page.evaluate("globalThis.stayed")


def test_a_run_that_really_trains_is_followed_until_it_is_told_to_stop(browser: Browser, tmp_path: Path) -> None:
    broker, monitor = MemoryBroker(), Monitor(together.RUN)
    broker.watch(together.RUN, monitor.take)
    rounds = {"buffer_size": 2, "stop_after_rounds": 100_000}
    workers: dict[str, dict[str, Any]] = {"a": {}, "b": {}}
    with (
        ThreadPoolExecutor(1) as pool,
        page_of(monitor, DashboardConfig(port=0), tmp_path) as url,
        opened(browser, url) as page,
    ):
        expect(page.locator("#state")).to_have_text("waiting")
        run = pool.submit(together.federate, tmp_path, Line(), rounds, workers, place=broker, delay=0.05)
        try:
            expect(tile(page, "Round")).to_have_text(re.compile("[1-9]"))
            expect(tile(page, "Round")).not_to_have_text(tile(page, "Round").inner_text())
            expect(page.locator("#state")).to_have_text("running")
            expect(page.locator(".workers tbody tr")).to_have_count(2)
        finally:
            stop = Command(run=together.RUN, id="end", action=Action.STOP)
            broker.command(together.RUN, Outgoing(body=encode(stop)))
            version = run.result(PATIENCE / 1000).outcome.version

        expect(tile(page, "Round")).to_have_text(f"{version:,}")
        expect(page.locator("#state")).to_have_text("done")
        curve = re.compile(rf"^Loss: training from .* .version 1. to .* .version {version:,}.")
        expect(page.get_by_role("img", name=curve)).to_be_visible()


def test_the_slow_the_crashed_and_the_poisoned_worker_are_seen_at_a_glance(browser: Browser, site: Site) -> None:
    run = site.run
    run.heartbeat("crashed")
    run.passed += 40
    run.made(1, 0.5)
    for name in ("fine-1", "fine-2", "fine-3", "poisoned"):
        run.heartbeat(name)
    run.heartbeat("slow", seconds=2.5)
    run.status({"name": "poisoned", "rejected": {"not-finite": 12}, "until": run.now() + 600, "score": 3.0, "seen": 0})
    run.observe(BrokerFacts((QueueFacts("fedmq.digits.updates", "updates", 5, 2),), 12, ("memory alarm on rabbit@a",)))

    with opened(browser, site.url) as page:
        odd = page.get_by_role("list", name="Workers to look at").get_by_role("listitem")
        expect(odd).to_have_count(3)
        expect(odd.nth(0)).to_contain_text("crashed")
        expect(odd.nth(0)).to_contain_text("silent for")
        expect(odd.nth(1)).to_contain_text("poisoned")
        expect(odd.nth(1)).to_contain_text("in quarantine until")
        expect(odd.nth(2)).to_contain_text("slow: 5.0 times")
        rows = page.locator(".workers tbody tr")
        expect(rows).to_have_count(6)
        expect(rows.nth(1)).to_contain_text("12 rejected: not-finite")
        expect(page.locator("#workers-words")).to_have_text("5 of 6 workers here, 3 to look at")
        expect(page.get_by_role("alert")).to_have_text("memory alarm on rabbit@a")
        expect(tile(page, "Dead letters")).to_have_text("12")
        expect(page.get_by_role("row", name=re.compile("^updates 5 2"))).to_be_visible()

        # By name, backwards, and only those that are asked for
        page.get_by_role("button", name="Worker").click()
        page.get_by_role("button", name="Worker").click()
        expect(rows.first).to_contain_text("slow")
        expect(page.get_by_role("columnheader", name="Worker")).to_have_attribute("aria-sort", "descending")
        page.get_by_role("searchbox").fill("FINE")
        expect(rows).to_have_count(3)


def test_hundreds_of_workers_are_shown_when_asked_for(browser: Browser, site: Site) -> None:
    for index in range(300):
        site.run.heartbeat(f"w{index}")

    with opened(browser, site.url) as page:
        rows = page.locator(".workers tbody tr")
        expect(page.locator("#workers-words")).to_have_text("300 of 300 workers here")
        expect(rows).to_have_count(60)
        # As people count, not w1, w10, w100
        expect(rows.nth(10)).to_contain_text("w10")
        page.get_by_role("button", name="Show all 300").click()
        expect(rows).to_have_count(300)


HOSTILE = ("__proto__", "constructor", "<img src=x onerror=harmed=1>", "</script><script>harmed=1</script>", "{{7*7}}")


def test_hostile_names_and_figures_are_text_and_nothing_else(browser: Browser, site: Site) -> None:
    run = site.run
    run.made(1, float("nan"))
    for name in HOSTILE:
        run.status({"name": name, "rejected": {name: 3}, "left": name, "loss": float("inf"), "seen": 0})
    run.heartbeat("__proto__", loss=float("nan"))
    run.heartbeat("hasOwnProperty", state="constructor")
    odd = {"__proto__": 1.0, "a.b/c:d": float("inf"), "toString": -0.0, "accuracy": float("nan"), "loss": 1e300}
    for version in (1, 2):
        run.evaluation(version, **odd, huge=1.7e308 * (-1) ** version)
    run.status(rejected=json.dumps({HOSTILE[2]: 5}), aggregator=HOSTILE[3], loss=float("-inf"), fill=-3, goal=-1)
    queues = (QueueFacts(HOSTILE[2], HOSTILE[3], -1, None, 10**15),)
    run.observe(BrokerFacts(queues, None, (HOSTILE[2],), missing=HOSTILE))

    with opened(browser, site.url) as page:
        expect(page.locator(".workers tbody tr")).to_have_count(len(HOSTILE) + 1)
        for name in (*HOSTILE, "hasOwnProperty"):
            expect(page.locator(".workers th").get_by_text(name, exact=True)).to_be_visible()
        expect(page.get_by_role("alert")).to_have_text(HOSTILE[2])
        expect(page.get_by_role("img", name=re.compile("^__proto__: held out"))).to_be_visible()
        expect(page.locator("[data-key='metric accuracy'] .nothing")).to_be_visible()
        assert page.locator("main img, main script").count() == 0
        run.made(2, 0.25)
        expect(tile(page, "Round")).to_have_text("2")


# ------------------------------------------------------------------------------------------------ the readers


def test_it_fits_a_phone_and_a_narrow_window(browser: Browser, site: Site) -> None:
    site.run.made(1, 0.5)
    site.run.made(2, 0.25)
    site.run.status({"name": "a" * 64, "rejected": {"norm-too-large": 9}, "seen": 0, "cosine": -0.5, "updates": 10**9})
    site.run.observe(BrokerFacts((QueueFacts("q" * 64, "dead letters", 10**9, 10**9, 10**15),), 10**9, ("x" * 90,)))
    with opened(browser, site.url, **PHONE) as page:
        expect(page.locator(".workers tbody tr")).to_contain_text("9 rejected")
        expect(page.locator(".chart svg").first).to_be_visible()
        assert fits(page)
        # A worker is a card with words beside its figures
        before = "cell => getComputedStyle(cell, '::before').content"
        assert page.locator(".workers td.of-updates").evaluate(before) == '"Updates"'
        for width in (320, 600, 800, 1000):
            page.set_viewport_size({"width": width, "height": 700})
            assert fits(page), width


def luminance(colour: str) -> float:
    """Of ``rgb(1, 2, 3)``, as WCAG 2 has it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


CONTRASTS = """() => {
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (colour.startsWith("rgb(")) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  return [...document.querySelectorAll("h1, h2, h3, p, dt, dd, th, td, td span, li span, time, button, a, label")]
    .filter((element) => element.checkVisibility() && element.innerText.trim())
    .map((element) => [element.tagName + "." + element.className, getComputedStyle(element).color, ground(element)]);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_told_from_its_ground_by_day_and_by_night(browser: Browser, site: Site, scheme: Any) -> None:
    site.run.made(1, 0.5)
    site.run.heartbeat("here")
    site.run.heartbeat("slow", seconds=9.0)
    site.run.status({"name": "bad", "rejected": {"not-finite": 9}, "seen": 0}, rejected='{"not-finite": 9}')
    with opened(browser, site.url, color_scheme=scheme) as page:
        expect(page.locator(".remark.warn").first).to_be_visible()
        expect(page.locator(".remark.bad").first).to_be_visible()
        ground = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert (ground < 0.1) is (scheme == "dark")
        for what, ink, behind in page.evaluate(CONTRASTS):
            lighter, darker = sorted((luminance(ink), luminance(behind)), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (what, ink, behind)


def test_everything_can_be_done_from_the_keyboard(browser: Browser, site: Site) -> None:
    for version in range(1, 6):
        site.run.made(version, 1 / version)
    with opened(browser, site.url) as page:
        loss = page.get_by_role("img", name=re.compile("^Loss"))
        loss.focus()
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#cursor-words")).to_have_text("version 4: training 0.25")
        page.keyboard.press("Home")
        expect(page.locator("#cursor-words")).to_have_text("version 1: training 1")
        expect(page.locator("[data-key=loss] .legend .value")).to_have_text("1")
        # All charts show the same place
        expect(page.locator("[data-key=seconds] .cursor line")).to_have_count(1)
        page.keyboard.press("Escape")
        expect(page.locator("[data-key=loss] .legend .value")).to_have_text("0.2")

        page.get_by_role("radio", name="by version").focus()
        page.keyboard.press("ArrowRight")
        expect(page.get_by_role("img", name=re.compile(r"^Loss: training from 1 \(at \d\d:"))).to_be_visible()
        focused = "document.activeElement.matches(':focus-visible')"
        assert page.evaluate(focused)


# ----------------------------------------------------------------------------------------------- the server


def test_it_comes_back_by_itself_when_the_server_does(browser: Browser, site: Site) -> None:
    site.run.made(1, 0.5)
    with watched(browser) as seen:
        page = seen.page
        page.goto(site.url)
        expect(tile(page, "Round")).to_have_text("1")
        page.evaluate("globalThis.stayed = true")

        site.stop()
        expect(page.locator("#link")).to_contain_text("not connected; as of")
        # What was known stays
        expect(tile(page, "Round")).to_have_text("1")
        site.run.made(2, 0.25)
        site.start()

        expect(page.locator("#link")).to_have_text("live")
        expect(tile(page, "Round")).to_have_text("2")
        assert page.evaluate("globalThis.stayed")
        # The browser itself complains of the refused connection, and of nothing else.
        assert all("ERR_CONNECTION_REFUSED" in text or "INCOMPLETE_CHUNKED" in text for text in seen.said), seen.said


def test_a_run_that_has_ended_is_shown_from_its_folder(browser: Browser, tmp_path: Path) -> None:
    lines = [
        {"kind": "version", "version": version, "epoch": 1, "time": 1e9 + version, "seconds": 0.5, "loss": 1 / version}
        | {"updates": [{"worker": HOSTILE[2], "staleness": 1}]}
        for version in range(1, 201)
    ]
    never = {"kind": "command", "what": "an hour that no clock has", "version": 1, "time": 1e300}
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, never]))
    (tmp_path / "summary.json").write_text('{"outcome": "done"}')
    site = Site(tmp_path)
    site.start()
    try:
        with opened(browser, site.url) as page:
            expect(page.locator("#state")).to_have_text("done")
            expect(page.get_by_role("img", name=re.compile("^Loss.*from 1 .version 1.*version 200"))).to_be_visible()
            expect(page.locator(".workers tbody tr")).to_contain_text(HOSTILE[2])
            expect(page.locator("#rest")).to_contain_text("nothing is heard of this run now")
            expect(page.locator("#log")).to_contain_text("an hour that no clock has")
            page.get_by_text("by time").click()
            expect(page.get_by_role("img", name=re.compile("^Loss.*from 1 .at "))).to_be_visible()
    finally:
        site.stop()
