"""``fedmq broker certificates``, as somebody uses it who has no CA."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from broker.certificatecommand import lines_of
from broker.cli import app
from tests.support.commands import ROOT
from tests.support.tls import SETTINGS

runner = CliRunner()


def certificates(folder: Path, *arguments: str, code: int = 0) -> str:
    result = runner.invoke(app, ["certificates", "--folder", str(folder), *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_an_authority_a_broker_and_workers_and_more_of_them_later(tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    said = certificates(folder, "--broker-host", "mq.example.org", "--broker-host", "10.0.0.1", "--worker", "w1")
    assert {path.name for path in folder.iterdir()} == {
        *("ca.pem", "ca.key", "broker.pem", "broker.key", "w1.pem", "w1.key")
    }
    assert "for the broker: mq.example.org, 10.0.0.1" in said
    assert "\n".join(lines_of()) in said

    before = (folder / "ca.pem").read_bytes()
    said = certificates(folder, "--worker", "w2", "--worker", "aggregator", "--days", "30")
    assert "listeners" not in said
    assert (folder / "ca.pem").read_bytes() == before
    assert (folder / "aggregator.key").stat().st_mode & 0o777 == 0o600
    certificates(folder, "--worker", "w3", "--worker", "w2", code=2)
    assert not (folder / "w3.key").exists()


def test_what_cannot_be_made_makes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    certificates(folder, code=2)
    certificates(folder, "--broker-host", "amqps://h", code=2)
    certificates(folder, "--worker", "w1", "--worker", "w1", code=2)
    certificates(folder, "--worker", "../w1", code=2)
    assert not folder.exists()


def test_the_lines_are_those_that_the_page_has_and_the_tests_run_with() -> None:
    page = (ROOT / "docs" / "tls.md").read_text()
    lines = [line for line in lines_of() if not line.startswith("#")]
    assert "\n".join(lines) in page
    keys = {line.partition(" = ")[0] for line in lines}
    # A node of the tests has further ports, and takes passwords, too.
    assert {key for key in keys if key.startswith("ssl_")} - set(SETTINGS) == {
        "ssl_options.versions.1",
        "ssl_options.versions.2",
    }
