"""Makes the pictures in docs/figures/admin: a real run in RabbitMQ's admin UI, with what may go wrong in it.

    python docs/figures/make_admin.py [FOLDER]

It takes about three minutes, and needs RabbitMQ, Chromium, torch with scikit-learn, and the development tools. The run:
an aggregator, an evaluator and four workers on handwritten digits, of which w2 is slow, w3 is killed, and w4 has a
learning rate at which it diverges. Then the aggregator is stopped, and at last the broker is given too little memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import quote

from PIL import Image
from playwright.sync_api import FloatRect, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from broker.admin import Admin  # noqa: E402
from broker.amqp.node import PrivateNode  # noqa: E402
from tests.support.browser import require_chromium  # noqa: E402

RUN = "digits"
TASK = "worker_client.tasks.digits:Digits"
SETTINGS = f"""
run = "{RUN}"
[aggregator]
buffer_size = 4
commit_seconds = 2.0
updates_per_version = 20
max_norm = 20.0
[worker]
task = "{TASK}"
batch_size = 8
local_steps = 4
delay = 0.4
heartbeat_seconds = 1.0
"""
#: What differs from that.
ODD = {"w2": ("worker.delay=8",), "w4": ("worker.learning_rate=1000",)}
WORKERS = 4
PAGE = {"width": 1180, "height": 900}
PATIENCE = 240.0
HEADING = "#main h1, #main h2"
CHROMIUM = (
    "--no-sandbox",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def main(folder: Path) -> None:
    """All pictures, into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        node = stack.enter_context(PrivateNode(settings={"collect_statistics_interval": "5000"}))
        (place / "fedmq.toml").write_text(SETTINGS)
        fedmq(place, node, "broker", "policies", "--apply").wait()
        if fedmq(place, node, "init").wait():
            raise SystemExit((place / "init.log").read_text())
        processes = {"aggregator": stack.enter_context(running(place, node, "aggregator"))}
        processes["evaluator"] = stack.enter_context(running(place, node, "evaluate", "--name", "e1"))
        for number in range(1, WORKERS + 1):
            name = f"w{number}"
            odd = [word for pair in ODD.get(name, ()) for word in ("--set", pair)]
            shard = f"{number - 1}/{WORKERS}"
            processes[name] = stack.enter_context(
                running(place, node, "worker", "--name", name, "--shard", shard, *odd)
            )
        page = stack.enter_context(admin_ui(node))
        admin = Admin(node.management_url, node.user, node.password)

        wait_for(place, lambda: connections(admin) == 2 * (WORKERS + 2), "all connections")
        wait_for(place, lambda: count(admin, "dead") >= 2, "dead letters")
        processes["w3"].kill()
        wait_for(place, lambda: connections(admin) == 2 * (WORKERS + 1), "w3 gone")
        time.sleep(25)  # the rates are means
        shoot(page, folder / "connections.png", "#/connections", bottom="table.list")
        shoot(page, folder / "queues.png", "#/queues", bottom="table.list")
        shoot(page, folder / "lagging.png", f"#/connections/{quote(slow(admin), safe='')}", height=450)
        letters(page, folder / "dead-letter.png")

        processes["aggregator"].terminate()
        processes["aggregator"].wait()
        wait_for(place, lambda: count(admin, "updates") >= 15, "a growing queue")
        shoot(page, folder / "growing.png", f"#/queues/%2F/fedmq.{RUN}.updates", height=480)

        node.ctl("set_vm_memory_high_watermark", "absolute", "60MB")
        wait_for(place, lambda: blocked(admin) >= 2, "blocked connections")
        shoot(page, folder / "alarm.png", "#/", above="h2:has-text('Nodes')", bottom="table.list")
        shoot(page, folder / "blocked.png", "#/connections", bottom="table.list")
        node.ctl("set_vm_memory_high_watermark", "0.4")


def fedmq(place: Path, node: PrivateNode, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a command in ``place``; what it says goes to a file there."""
    more = {"FEDMQ_BROKER_URL": node.url, "FEDMQ_BROKER_MANAGEMENT_URL": node.management_url, "PYTHONPATH": str(ROOT)}
    with (place / f"{'-'.join(arguments[:3])}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fedmq", *arguments],
            cwd=place,
            env={**os.environ, **more, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


@contextmanager
def running(place: Path, node: PrivateNode, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command that is killed at the end, if it is still there."""
    process = fedmq(place, node, *arguments)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(place: Path, condition: object, what: str) -> None:
    """Wait until ``condition`` holds."""
    end = time.monotonic() + PATIENCE
    while not condition():  # type: ignore[operator]
        if time.monotonic() > end:
            logs = "".join(f"{log.name}: {log.read_text()[-600:]}\n" for log in sorted(place.glob("*.log")))
            raise SystemExit(f"{what}: not within {PATIENCE:g} s\n{logs}")
        time.sleep(0.5)


def count(admin: Admin, queue: str) -> int:
    """How many messages are in one of the run's queues."""
    found = {row["name"]: row.get("messages", 0) for row in admin.queues()}
    return int(found.get(f"fedmq.{RUN}.{queue}", 0))


def connections(admin: Admin) -> int:
    """Of the run."""
    names = [row.get("client_properties", {}).get("connection_name", "") for row in admin.connections()]
    return sum(f"run {RUN} " in name for name in names)


def blocked(admin: Admin) -> int:
    """Connections that may not publish."""
    return sum(row.get("state") in {"blocked", "blocking"} for row in admin.connections())


@contextmanager
def admin_ui(node: PrivateNode) -> Iterator[Page]:
    """The admin UI, logged in."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=require_chromium(), args=list(CHROMIUM))
        page = browser.new_page(viewport=PAGE)
        page.goto(node.management_url)
        page.fill("input[name=username]", node.user)
        page.fill("input[name=password]", node.password)
        page.click("input[type=submit]")
        page.wait_for_selector("#tabs")
        try:
            yield page
        finally:
            browser.close()


def slow(admin: Admin) -> str:
    """The connection over which the slow worker publishes."""
    for row in admin.connections():
        if row.get("client_properties", {}).get("connection_name") == f"fedmq worker w2 · run {RUN} · publish":
            return str(row["name"])
    raise SystemExit("the slow worker is not there")


def shoot(page: Page, file: Path, where: str, *, above: str = HEADING, bottom: str = "", height: int = 0) -> None:
    """One page of the UI from the top of ``above`` to the end of ``bottom``, or ``height`` pixels."""
    page.evaluate(f"window.location.hash = {where!r}")
    time.sleep(12)  # it asks for news every five seconds
    page.evaluate("window.scrollTo(0, 0)")
    top, last = box_of(page, above), box_of(page, bottom or "#main")
    end = top["y"] + height if height else last["y"] + last["height"] + 10
    area = FloatRect(x=0, y=top["y"] - 4, width=PAGE["width"], height=end - top["y"] + 4)
    page.screenshot(path=file, full_page=True, clip=area)
    shrink(file)


def box_of(page: Page, selector: str) -> FloatRect:
    """Where the first of these is on the page."""
    box = page.locator(selector).first.bounding_box()
    if box is None:
        raise SystemExit(f"{selector} is not to be seen")
    return box


def letters(page: Page, file: Path) -> None:
    """The newest dead letter, as *Get messages* shows it."""
    page.evaluate(f"window.location.hash = '#/queues/%2F/fedmq.{RUN}.dead'")
    time.sleep(4)
    page.locator("h2", has_text="Get messages").click()
    page.click("input[value='Get Message(s)']")
    page.wait_for_selector("#msg-wrapper table")
    time.sleep(1)
    page.evaluate("window.scrollTo(0, 0)")
    top = page.locator("h2", has_text="Get messages").first.bounding_box()
    if top is None:
        raise SystemExit("the letter is not to be seen")
    area = FloatRect(x=0, y=top["y"] - 10, width=760, height=680)
    page.screenshot(path=file, full_page=True, clip=area)
    shrink(file)


def shrink(file: Path) -> None:
    """64 colours are enough."""
    image = Image.open(file).convert("RGB").quantize(64)
    image.save(file, optimize=True)
    print(f"{file}: {image.size}, {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "admin")
