"""The page beside a command: what it needs, and what happens without."""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from io import StringIO

import pytest
from rich.console import Console

from broker.errors import ConfigError
from fedmq import demo
from fedmq.dashboard.beside import page_of, require_server
from fedmq.dashboard.config import DashboardConfig
from fedmq.dashboard.serving import PortTaken, listen
from fedmq.monitoring.monitor import Monitor


@pytest.mark.parametrize("name", ["starlette", "uvicorn"])
def test_what_is_not_installed_is_said_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(ConfigError, match=r'pip install "fedmq\[dashboard\]"'):
        require_server()


def test_the_demonstration_goes_on_without_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    settings = demo.demo_settings(None, [("run", "digits")])
    out = StringIO()

    with ExitStack() as stack:
        demo._show_page(Monitor("digits"), settings, Console(file=out), stack)

    assert out.getvalue().startswith('no live page: the live page needs a web server: pip install "fedmq[dashboard]"')


def test_another_port_is_taken_only_by_who_wants_any() -> None:
    with closing(listen("127.0.0.1", 0)) as other:
        config = DashboardConfig(port=other.getsockname()[1])
        with pytest.raises(PortTaken), page_of(Monitor("digits"), config):
            pass
        with page_of(Monitor("digits"), config, any_port=True) as url:
            assert not url.endswith(f":{config.port}/")
