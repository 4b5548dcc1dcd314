from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from broker.errors import ConfigError
from broker.messages import NAME_PATTERN
from broker.settings import load
from worker_client.config import WorkerConfig, host_name, shard_of


def read(**values: Any) -> WorkerConfig:
    flags = [(f"worker.{key}", value) for key, value in values.items()]
    return load({"worker": WorkerConfig}, flags=flags, environment={}).table("worker", WorkerConfig)


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_defaults_are_valid() -> None:
    assert read().shard == "0/1"
    assert read().name == host_name()


@pytest.mark.parametrize("host", ["node.example.org", "büro pc", "x" * 100, "...", "-a-"])
def test_any_hosts_name_becomes_a_workers_name(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: host)

    assert re.fullmatch(NAME_PATTERN, host_name())


def test_values_from_the_command_line_are_text() -> None:
    config = read(local_steps="7", learning_rate="0.1", folder="here", device="cuda:1")

    assert (config.local_steps, config.learning_rate, config.folder, config.device) == (7, 0.1, Path("here"), "cuda:1")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shard", "4/4"),
        ("shard", "1/0"),
        ("shard", "auto"),
        ("shard", "-1/4"),
        ("batch_size", 0),
        ("learning_rate", 0),
        ("momentum", 1),
        ("optimizer", "lion"),
        ("device", "gpu"),
        ("heartbeat_seconds", 0),
        ("name", "two words"),
        ("threads", 0),
    ],
)
def test_a_wrong_value_names_its_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"worker.{key}"):
        read(**{key: value})


def test_a_shard_has_an_index_and_a_count() -> None:
    assert shard_of("2/4", "any") == (2, 4)


def test_auto_spreads_workers_over_the_shards_the_same_way_each_time() -> None:
    indices = [shard_of("auto/4", f"worker-{n}") for n in range(100)]

    assert {count for _, count in indices} == {4}
    assert {index for index, _ in indices} == {0, 1, 2, 3}
    assert indices == [shard_of("auto/4", f"worker-{n}") for n in range(100)]
