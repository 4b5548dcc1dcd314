"""The page beside a command: what it needs, and what happens without."""

from __future__ import annotations

import ssl
import sys
import urllib.request
from contextlib import ExitStack, closing
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from broker.certificates import Authority
from broker.errors import ConfigError
from broker.tls import client_context
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


def test_the_page_over_tls_and_for_those_only_who_show_a_certificate(tmp_path: Path) -> None:
    authority = Authority.new(tmp_path)
    authority.server(["127.0.0.1"])
    authority.client("operator")
    ca, files = tmp_path / "ca.pem", {"certificate_file": tmp_path / "broker.pem", "key_file": tmp_path / "broker.key"}
    mine = client_context(ca_file=ca, certificate_file=tmp_path / "operator.pem", key_file=tmp_path / "operator.key")

    def asked(url: str, context: ssl.SSLContext) -> int:
        with urllib.request.urlopen(url, timeout=20, context=context) as answer:  # noqa: S310 - of this machine
            return int(answer.status)

    config = DashboardConfig.model_validate({"port": 0, **files})
    with page_of(Monitor("digits"), config) as url:
        assert url.startswith("https://127.0.0.1:")
        assert asked(url, client_context(ca_file=ca)) == 200
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            asked(url, client_context())
    with page_of(Monitor("digits"), config.model_copy(update={"client_ca_file": ca})) as url:
        assert asked(url, mine) == 200
        with pytest.raises(OSError, match=r"(?i)certificate required|reset|broken pipe|eof|closed"):
            asked(url, client_context(ca_file=ca))


def test_who_can_see_the_page_is_warned_of_unless_they_must_show_who_they_are(tmp_path: Path) -> None:
    everywhere = DashboardConfig(address="10.0.0.1")
    assert "and is not encrypted" in everywhere.exposure()
    encrypted = everywhere.model_copy(update={"certificate_file": tmp_path})
    assert "encrypted" not in encrypted.exposure() != ""
    assert encrypted.model_copy(update={"client_ca_file": tmp_path}).exposure() == ""
