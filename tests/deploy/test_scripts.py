"""The shell scripts: their syntax, the secrets that they make, what they do without RabbitMQ."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pika
import pytest

from broker.amqp.node import PrivateNode
from broker.settings import BrokerConfig
from tests.deploy import compose

ROOT = compose.ROOT
BASH = shutil.which("bash") or "/bin/bash"
SCRIPTS = [ROOT / ".ci" / "run", *sorted((ROOT / "deploy").glob("*.sh"))]


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_a_script_is_sound_and_stops_at_the_first_error(script: Path) -> None:
    done = subprocess.run([BASH, "-n", str(script)], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert script.stat().st_mode & stat.S_IXUSR
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in script.read_text()


def make_secrets(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BASH, str(ROOT / "deploy" / "make-secrets.sh"), str(folder)], capture_output=True, text=True, check=False
    )


def configuration(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}


def test_secrets_agree_and_only_their_owner_can_reach_them(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"

    done = make_secrets(folder)

    assert done.returncode == 0, done.stderr
    conf = configuration((folder / "rabbitmq.conf").read_text())
    password = conf["default_pass"]
    assert re.fullmatch(r"[A-Za-z0-9]{32}", password)
    assert (folder / "broker_url").read_text() == f"amqp://{conf['default_user']}:{password}@rabbitmq:5672/%2F\n"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    # Readable for the containers' users, to whom Compose shows the files and not the folder.
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o444}
    assert password not in done.stdout + done.stderr
    assert os.listdir(tmp_path) == ["secrets"]  # noqa: PTH208 names are enough


def test_secrets_are_those_that_compose_mounts(tmp_path: Path) -> None:
    make_secrets(tmp_path / "secrets")

    mounted = {Path(secret["file"]).name for secret in compose.load()["secrets"].values()}
    assert mounted == {path.name for path in (tmp_path / "secrets").iterdir()}


def test_secrets_are_random_and_never_replaced(tmp_path: Path) -> None:
    make_secrets(tmp_path / "one")
    make_secrets(tmp_path / "two")
    before = (tmp_path / "one" / "broker_url").read_text()

    again = make_secrets(tmp_path / "one")

    assert again.returncode == 0
    assert (tmp_path / "one" / "broker_url").read_text() == before
    assert (tmp_path / "two" / "broker_url").read_text() != before


def test_half_of_the_secrets_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    make_secrets(folder)
    (folder / "broker_url").unlink()

    done = make_secrets(folder)

    assert done.returncode == 1
    assert "broker_url" in done.stderr


@pytest.mark.broker
def test_a_node_with_this_configuration_lets_the_secret_in_and_not_guest(tmp_path: Path) -> None:
    # Given a node with what Compose mounts into RabbitMQ's conf.d
    make_secrets(tmp_path / "secrets")
    own = configuration((ROOT / "deploy" / "rabbitmq" / "20-fedmq.conf").read_text())
    user = configuration((tmp_path / "secrets" / "rabbitmq.conf").read_text())
    # The mode that it has behind the closed folder is taken from a container's mounts only.
    url_file = tmp_path / "secrets" / "broker_url"
    url_file.chmod(0o600)
    (url,) = BrokerConfig(url_file=url_file).urls()
    node = PrivateNode(plugins=(), settings=own | user)
    node.user, node.password = user["default_user"], user["default_pass"]

    with node:
        parameters = pika.URLParameters(url)
        here = pika.URLParameters(node.url)
        parameters.host, parameters.port = here.host, here.port

        # Then the address in the secret opens it, and RabbitMQ's well-known user does not exist
        pika.BlockingConnection(parameters).close()
        parameters.credentials = pika.PlainCredentials("guest", "guest")
        with pytest.raises(pika.exceptions.ProbableAuthenticationError):
            pika.BlockingConnection(parameters)


def install(
    tmp_path: Path, *, ci: bool, programs: dict[str, str], script: str = "install-rabbitmq.sh"
) -> subprocess.CompletedProcess[str]:
    """Run ``script`` where nothing but ``programs`` (name: text) and the basic tools can be found."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "env", "sh", "touch", "cat", "mkdir", "chmod"):
        (tools / name).symlink_to(f"/bin/{name}" if Path(f"/bin/{name}").exists() else f"/usr/bin/{name}")
    for name, text in programs.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    environment = {"PATH": str(tools), "RABBITMQ_PLACES": str(tmp_path / "rabbit*"), "LOG": str(tmp_path / "log")}
    if ci:
        environment["CI"] = "true"
    return subprocess.run(
        [BASH, str(ROOT / "deploy" / script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


USER = "echo 1000"
RECORD = 'printf "%s\\n" "$*" >>"$LOG"'
REFUSE = "exit 1"


def bring(tmp_path: Path) -> str:
    """A stand-in for sudo that records its command and, on an installation, brings a server."""
    place = tmp_path / "rabbit"
    return (
        f'{RECORD}\ncase "$*" in *install*) mkdir {place}; echo >{place}/rabbitmq-server; '
        f"chmod +x {place}/rabbitmq-server;; esac"
    )


def test_a_server_that_is_there_is_left_alone(tmp_path: Path) -> None:
    server = tmp_path / "rabbit" / "rabbitmq-server"
    server.parent.mkdir()
    server.touch(mode=0o755)

    done = install(tmp_path, ci=True, programs={"id": USER, "sudo": RECORD, "apt-get": RECORD})

    assert (done.returncode, done.stdout) == (0, "")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    "programs",
    [
        {"id": USER, "sudo": REFUSE, "apt-get": RECORD},
        {"id": USER, "apt-get": RECORD},
        {"id": USER, "sudo": RECORD},
        {"id": USER, "sudo": 'case "$*" in *apt-get*) exit 1;; esac', "apt-get": RECORD},
        {"id": USER, "sudo": "exit 0", "apt-get": RECORD},
    ],
    ids=["sudo asks for a password", "no sudo", "no apt-get", "apt-get fails", "apt-get brings nothing"],
)
@pytest.mark.parametrize("ci", [False, True])
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("install-rabbitmq.sh", ("RabbitMQ is not installed", "in-process broker")),
        ("install-chromium.sh", ("Chromium is not installed", "will be skipped")),
    ],
    ids=["rabbitmq", "chromium"],
)
def test_what_cannot_be_installed_is_done_without_at_home_and_stops_ci(
    tmp_path: Path, programs: dict[str, str], ci: bool, script: str, words: tuple[str, str]
) -> None:
    done = install(tmp_path, ci=ci, programs=programs, script=script)

    assert done.returncode == int(ci)
    assert words[0] in (done.stderr if ci else done.stdout)
    assert (words[1] in done.stdout) is not ci


def test_a_browser_that_is_there_is_left_alone_and_one_that_is_not_is_installed(tmp_path: Path) -> None:
    browser = tmp_path / "bin" / "chromium"
    brings = f'{RECORD}\ncase "$*" in *install*) echo >{browser}; chmod +x {browser};; esac'

    done = install(
        tmp_path,
        ci=True,
        programs={"id": USER, "sudo": brings, "apt-get": RECORD},
        script="install-chromium.sh",
    )

    assert done.returncode == 0, done.stderr
    assert "--no-install-recommends chromium" in (tmp_path / "log").read_text()
    (tmp_path / "log").unlink()
    again = subprocess.run(
        [BASH, str(ROOT / "deploy" / "install-chromium.sh")],
        env={"PATH": str(tmp_path / "bin"), "LOG": str(tmp_path / "log"), "CI": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert not (tmp_path / "log").exists()


def test_it_installs_quietly_and_starts_no_service(tmp_path: Path) -> None:
    done = install(tmp_path, ci=True, programs={"id": USER, "sudo": bring(tmp_path), "apt-get": RECORD})

    assert done.returncode == 0, done.stderr
    commands = (tmp_path / "log").read_text().splitlines()
    order = [i for i, line in enumerate(commands) if "policy-rc.d" in line or " install " in line]
    installed = next(i for i, line in enumerate(commands) if " install " in line)
    assert "--no-install-recommends rabbitmq-server" in commands[installed]
    assert "DEBIAN_FRONTEND=noninteractive" in commands[installed]
    assert any("update" in line for line in commands[:installed])
    if not Path("/usr/sbin/policy-rc.d").exists():
        assert "tee /usr/sbin/policy-rc.d" in commands[order[0]]
        assert order[0] < installed
        assert commands[-1] == "-n rm -f /usr/sbin/policy-rc.d"
