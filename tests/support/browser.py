"""A real browser without a window, for the tests of pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

__all__ = ["Watched", "browser", "require_chromium", "watched"]

#: As deploy/install-chromium.sh.
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
#: It asks nobody for anything.
ARGUMENTS = [
    *("--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-dev-shm-usage",
]
#: Milliseconds that a busy machine may take for what should come at once.
PATIENCE = 30_000


def require_chromium() -> str:
    """Where the browser is. Skips the test where none is installed; in CI that is a failure."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    reason = "no Chromium is installed (deploy/install-chromium.sh)"
    if os.environ.get("CI"):
        pytest.fail(f"CI needs a browser: {reason}")
    pytest.skip(reason)


@contextmanager
def browser() -> Iterator[Browser]:
    """One that runs until the block is left. Meanwhile no asyncio may be used on this thread."""
    path = require_chromium()
    # Its sandbox does not work for root.
    arguments = [*ARGUMENTS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=arguments, timeout=PATIENCE)
        yield running
        running.close()


@dataclass
class Watched:
    """A page, and what it said and asked for."""

    page: Page
    context: BrowserContext
    said: list[str] = field(default_factory=list)
    """What came to the console as a warning or an error, and exceptions that nobody caught."""
    asked: list[str] = field(default_factory=list)
    """Addresses of all requests."""


@contextmanager
def watched(browser: Browser, **options: Any) -> Iterator[Watched]:
    """An empty page with ``options`` of ``Browser.new_context``."""
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    found = Watched(page, context)
    bad = {"warning", "error"}
    page.on("console", lambda message: found.said.append(message.text) if message.type in bad else None)
    page.on("pageerror", lambda error: found.said.append(str(error)))
    page.on("request", lambda request: found.asked.append(request.url))
    try:
        yield found
    finally:
        context.close()
