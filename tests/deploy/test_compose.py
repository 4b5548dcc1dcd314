"""docker-compose.yml is valid, closed by default, and its commands are commands of fedmq."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from aggregator.config import AggregatorConfig
from broker import settings
from tests.deploy import compose
from worker_client.config import WorkerConfig

ROOT = compose.ROOT
OURS = ("init", "aggregator", "evaluator", "worker")
MONITORING = ("prometheus", "grafana")
ALL = ("rabbitmq", *OURS, *MONITORING)


def test_it_follows_the_compose_specification() -> None:
    schema = json.loads((Path(__file__).parent / "compose_spec" / "compose-spec.json").read_text())

    jsonschema.Draft202012Validator(schema).validate(compose.load())


def test_its_services_are_these() -> None:
    assert set(compose.services()) == set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_a_service_gives_up_all_rights_that_it_does_not_need(name: str) -> None:
    service = compose.services()[name]

    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")
    assert service["logging"]["options"].keys() >= {"max-size", "max-file"}
    assert service["restart"] in {"unless-stopped", "on-failure", "on-failure:3"}


@pytest.mark.parametrize("name", [*OURS, *MONITORING])
def test_services_write_to_volumes_and_tmp_only(name: str) -> None:
    service = compose.services()[name]

    assert service["read_only"] is True
    assert [mount.partition(":")[0] for mount in service["tmpfs"]] == ["/tmp"]  # noqa: S108 the container's
    where = {"prometheus": "/prometheus", "grafana": "/var/lib/grafana"}.get(name, "/var/lib/fedmq")
    for mount in service.get("volumes", []):
        assert mount.partition(":")[2] == where


def test_rabbitmq_runs_as_its_own_user_under_a_name_that_stays() -> None:
    service = compose.services()["rabbitmq"]

    assert service["user"] == "rabbitmq"
    assert service["hostname"]
    assert service["image"] == "rabbitmq:4-management"
    assert "rabbitmq:/var/lib/rabbitmq" in service["volumes"]


@pytest.mark.parametrize("name", ALL)
def test_an_image_has_a_version_and_is_built_from_a_stage_that_exists(name: str) -> None:
    service = compose.services()[name]
    tag = service["image"].partition(":")[2]

    assert tag.removeprefix("v")[:1].isdigit()
    if name in OURS:
        assert service["build"]["target"] in compose.stages()
        assert (ROOT / service["build"]["context"] / "Dockerfile").is_file()
        assert service["image"].startswith(f"fedmq-{service['build']['target']}:")


def test_only_the_aggregator_does_without_torch() -> None:
    targets = {name: compose.services()[name]["build"]["target"] for name in OURS}

    assert targets == {"init": "worker", "aggregator": "aggregator", "evaluator": "worker", "worker": "worker"}


@pytest.mark.parametrize("name", ALL)
def test_volumes_are_named_and_declared(name: str) -> None:
    declared = compose.load()["volumes"]

    for mount in compose.services()[name].get("volumes", []):
        assert mount.partition(":")[0] in declared


def test_init_writes_where_the_aggregator_reads() -> None:
    services = compose.services()

    assert services["init"]["volumes"] == services["aggregator"]["volumes"]
    folders = [
        services[name]["command"][services[name]["command"].index("--folder") + 1] for name in ("init", "aggregator")
    ]
    assert folders == ["/var/lib/fedmq", "/var/lib/fedmq"]


def test_secrets_are_files_and_nothing_secret_stands_in_the_file() -> None:
    document = compose.load()

    for secret in document["secrets"].values():
        assert secret["file"].startswith("./secrets/")
    for name, service in document["services"].items():
        assert "env_file" not in service
        for variable in service.get("environment", {}):
            assert "PASS" not in variable, name
            assert variable.endswith("_FILE") or "URL" not in variable, name
    assert "amqp://" not in (ROOT / "docker-compose.yml").read_text()
    assert "/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def test_every_file_that_it_mounts_from_the_repository_is_there() -> None:
    for config in compose.load()["configs"].values():
        assert (ROOT / config["file"]).is_file()


def test_ports_are_open_to_this_machine_only() -> None:
    for name, service in compose.services().items():
        ports = service.get("ports", [])
        assert (ports == []) == (name in OURS)
        assert all(port.startswith("127.0.0.1:") for port in ports)


def test_ports_can_be_opened_on_purpose() -> None:
    opened = compose.load({"BIND_ADDRESS": "192.0.2.1", "AMQP_PORT": "5673"})["services"]["rabbitmq"]["ports"]

    assert opened[0] == "192.0.2.1:5673:5672"


def test_what_asks_for_no_password_is_never_open_to_others() -> None:
    everywhere = compose.load({"BIND_ADDRESS": "0.0.0.0"})["services"]  # noqa: S104 - that it is not opened

    for name in MONITORING:
        assert everywhere[name]["profiles"] == ["monitoring"]
        assert all(port.startswith("127.0.0.1:") for port in everywhere[name]["ports"])
    assert all("profiles" not in everywhere[name] for name in ("rabbitmq", *OURS))


def test_workers_can_be_scaled() -> None:
    worker = compose.services()["worker"]

    assert worker.keys().isdisjoint({"container_name", "hostname", "ports"})
    assert "--name" not in worker["command"]
    assert WorkerConfig().name == socket.gethostname().partition(".")[0] or "." in socket.gethostname()


@pytest.mark.parametrize("name", ["aggregator", "evaluator", "worker"])
def test_a_service_waits_for_a_healthy_broker_and_the_first_checkpoint(name: str) -> None:
    assert compose.services()[name]["depends_on"] == {
        "rabbitmq": {"condition": "service_healthy"},
        "init": {"condition": "service_completed_successfully"},
    }


def test_the_health_check_tells_a_fresh_sign_of_life_from_an_old_one(tmp_path: Path) -> None:
    # Given the check's command with the state folder moved here
    kind, command = compose.services()["aggregator"]["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    command = command.replace("/var/lib/fedmq", str(tmp_path))
    alive = tmp_path / "alive"

    def healthy() -> bool:
        done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, check=False)
        return done.returncode == 0

    # Then nothing, a fresh file and an old one are told apart
    assert not healthy()
    alive.touch()
    assert healthy()
    long_ago = alive.stat().st_mtime - 130
    os.utime(alive, (long_ago, long_ago))
    assert not healthy()


@pytest.mark.parametrize("name", OURS)
def test_a_command_is_one_that_fedmq_takes(name: str) -> None:
    # An unknown command or option is an error even beside --help.
    command = compose.services()[name]["command"]

    done = subprocess.run(
        [sys.executable, "-m", "fedmq.cli", *command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize("name", OURS)
def test_settings_of_the_file_and_of_the_environment_are_settings_of_fedmq(name: str, tmp_path: Path) -> None:
    # Given a service's environment, its secret moved to where this test can write
    environment = dict(compose.services()[name]["environment"])
    secret = tmp_path / "broker_url"
    secret.write_text("amqp://user:password@rabbitmq:5672/%2F\n")
    secret.chmod(0o600)
    assert environment["FEDMQ_BROKER_URL_FILE"] == "/run/secrets/broker_url"
    environment["FEDMQ_BROKER_URL_FILE"] = str(secret)

    # When
    loaded = settings.load(
        {"aggregator": AggregatorConfig, "worker": WorkerConfig},
        file=ROOT / "deploy" / "fedmq.toml",
        environment=environment,
    )

    # Then
    assert loaded.run == "digits"
    assert loaded.broker.urls() == ("amqp://user:password@rabbitmq:5672/%2F",)


def test_init_starts_as_a_plain_process_and_does_nothing_the_second_time(tmp_path: Path) -> None:
    service = compose.services()["init"]
    command = [
        part.replace("/etc/fedmq", str(ROOT / "deploy")).replace("/var/lib/fedmq", str(tmp_path))
        for part in service["command"]
    ]

    def start() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fedmq.cli", *command],
            cwd=ROOT,
            env=os.environ | {"FEDMQ_RUN": "digits"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    first = start()
    assert first.returncode == 0, first.stderr
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before

    second = start()
    assert second.returncode == 0, second.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
