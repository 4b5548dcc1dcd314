"""The pictures of the live page: ``python docs/figures/make_page.py``, from ``fedmq demo --trouble``.

Takes some minutes, a RabbitMQ and a Chromium, and writes ``page-*.png`` beside itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).resolve().parent
PICTURES: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1240, "height": 1210}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1240, "height": 1210}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 1210}, "color_scheme": "light", "is_mobile": True},
}
#: Workers with a remark, and rounds, from which on there is something to see.
REMARKABLE, ROUNDS = 3, 60


def wait(until: Callable[[], Any], what: str, seconds: float = 600) -> Any:
    """The first true value of ``until``, which is called ``what``."""
    end = time.monotonic() + seconds
    while not (value := until()):
        if time.monotonic() > end:
            raise SystemExit(f"{what} did not come")
        time.sleep(0.5)
    return value


def main() -> None:
    """Let the run happen, and look at it."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
        command = [sys.executable, "-m", "fedmq", "demo", "--trouble", "--run", "digits", "--set", "dashboard.port=0"]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log) as demo:
            try:
                said = Path(log.name)
                found = wait(lambda: re.search(r"live page .*?(http://\S+)", said.read_text()), "the live page")
                wait(lambda: is_remarkable(found[1]), "a run with something to see")
                shoot(found[1])
            finally:
                demo.terminate()


def is_remarkable(url: str) -> bool:
    """Whether rounds were made, and something is remarked about each of the workers in trouble."""
    with urlopen(f"{url}state.json", timeout=30) as answer:  # noqa: S310 (of this machine)
        view = json.load(answer)["view"]
    return view["version"] >= ROUNDS and sum(bool(w["remarks"]) for w in view["workers"].values()) >= REMARKABLE


def shoot(url: str) -> None:
    """Take the pictures."""
    with sync_playwright() as playwright:
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=root)
        for name, options in PICTURES.items():
            page = browser.new_context(**options).new_page()
            page.goto(url)
            page.locator(".chart path").first.wait_for()
            page.wait_for_timeout(1500)
            picture = Image.open(BytesIO(page.screenshot())).convert("RGB")
            picture.quantize(255, dither=Image.Dither.NONE).save(HERE / f"page-{name}.png", optimize=True)
        browser.close()


if __name__ == "__main__":
    main()
