"""Commands as processes: what a user meets who makes a mistake, and what is printed for one who asks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.commands import LINE, SECRET, WRONG_TASKS, Done, assert_one_message, fedmq


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "wrong.py").write_text(WRONG_TASKS)
    return tmp_path


# ------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[aggregator]\nbufer_size = 8", ["fedmq.toml", "aggregator.bufer_size", "did you mean 'buffer_size'"]),
        ("[agregator]\nbuffer_size = 8", ["fedmq.toml", "agregator", "did you mean 'aggregator'", "run, broker"]),
        (
            "[aggregator]\nbuffer_size = 'many'",
            ["fedmq.toml: aggregator.buffer_size = 'many'", "a whole number is wanted"],
        ),
        ("[aggregator]\nbuffer_size = 0", ["fedmq.toml: aggregator.buffer_size = 0", "at least 1 is wanted"]),
        ("[aggregator]\noptimizer = 'lion'", ["aggregator.optimizer = 'lion'", "there are sgd, adam, adamw"]),
        ("[aggregator]\nminimum_updates = 99", ["fedmq.toml: aggregator: minimum_updates is larger than buffer_size"]),
        ("aggregator = 3", ["fedmq.toml: 'aggregator' is a table", "[aggregator]"]),
        ("run = 'two words'", ["run (from fedmq.toml) = 'two words'", "letters, digits"]),
        ("run = ", ["fedmq.toml: not TOML", "Invalid value"]),
    ],
)
def test_a_wrong_file_names_key_file_and_what_is_allowed(tmp_path: Path, content: str, words: list[str]) -> None:
    (tmp_path / "fedmq.toml").write_text(content)
    assert_one_message(fedmq(tmp_path, "config"), 2, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set", "aggregator.bufer_size=8"), ["--set aggregator.bufer_size", "did you mean 'buffer_size'"]),
        (("--set", "aggregator.buffer_size"), ["--set 'aggregator.buffer_size'", "table.key=value"]),
        (("--set", f"broker.url amqp://u:{SECRET}@h/"), ["table.key=value"]),
        (("--set", "worker.batch_size=-1"), ["--set worker.batch_size", "'-1'", "at least 1 is wanted"]),
        (("--config", "nowhere.toml"), ["nowhere.toml: no such file"]),
        (("--config", "."), [".: cannot be read"]),
        (("--broker", f"http://u:{SECRET}@h/"), ["broker.url", "begins with amqp://"]),
        (("--set", "broker.url_file=secret.txt"), ["broker.url_file = 'secret.txt'", "No such file"]),
    ],
)
def test_a_wrong_flag_says_what_is_allowed(tmp_path: Path, arguments: tuple[str, ...], words: list[str]) -> None:
    command = ("broker", "check") if "broker" in arguments[-1] or "--broker" in arguments else ("config",)
    assert_one_message(fedmq(tmp_path, *command, *arguments), 2, *words)


def test_a_wrong_variable_is_named(tmp_path: Path) -> None:
    done = fedmq(tmp_path, "config", environment={"FEDMQ_AGGREGATOR_BUFER_SIZE": "8"})
    assert_one_message(done, 2, "environment variable FEDMQ_AGGREGATOR_BUFER_SIZE", "did you mean 'buffer_size'")
    done = fedmq(tmp_path, "config", environment={"FEDMQ_WORKER_BATCH_SIZE": "lots"})
    assert_one_message(
        done, 2, "environment variable FEDMQ_WORKER_BATCH_SIZE: worker.batch_size = 'lots'", "whole number"
    )


def test_config_shows_values_and_where_they_are_set(tmp_path: Path) -> None:
    (tmp_path / "fedmq.toml").write_text(
        "run = 'mine'\n[aggregator]\nbuffer_size = 2\ncommit_count = 3\nseed = 4\n[worker]\nbatch_size = 5\n"
    )
    variables = {"FEDMQ_AGGREGATOR_BUFFER_SIZE": "20", "FEDMQ_AGGREGATOR_COMMIT_COUNT": "30"}

    done = fedmq(tmp_path, "config", "--json", "--set", "aggregator.buffer_size=200", environment=variables)

    assert done.code == 0, done.err
    assert SECRET not in done.out
    rows = {row["key"]: (row["value"], row["from"]) for row in json.loads(done.out)}
    assert rows["run"] == ("mine", "fedmq.toml")
    assert rows["aggregator.buffer_size"] == (200, "--set aggregator.buffer_size")
    assert rows["aggregator.commit_count"] == (30, "environment variable FEDMQ_AGGREGATOR_COMMIT_COUNT")
    assert rows["aggregator.seed"] == (4, "fedmq.toml")
    assert rows["worker.batch_size"] == (5, "fedmq.toml")
    assert rows["worker.optimizer"] == ("sgd", "default")
    assert rows["aggregator.folder"] == (None, "default")
    assert rows["broker.url"] == ("amqp://someone:***@127.0.0.1:1/", "environment variable FEDMQ_BROKER_URL")


def test_config_as_a_table_has_one_line_for_each_setting(tmp_path: Path) -> None:
    done = fedmq(tmp_path, "config", "--set", "worker.task=a_package.with_a_long_name.and_modules:AndAnAttribute")

    assert done.code == 0, done.err
    assert SECRET not in done.out
    lines = {line.split()[0]: line.rstrip().split(maxsplit=2)[1:] for line in done.out.splitlines()}
    assert lines["setting"] == ["value", "from"]
    assert lines["worker.task"][0] == "a_package.with_a_long_name.and_modules:AndAnAttribute"
    assert lines["aggregator.stop_after_rounds"][0] == "-"
    assert lines["broker.url"][0] == "amqp://someone:***@127.0.0.1:1/"
    assert lines["broker.url"][1] == "environment variable FEDMQ_BROKER_URL"


# ----------------------------------------------------------------------------------------------------- help


def test_the_version_is_told(tmp_path: Path) -> None:
    done = fedmq(tmp_path, "--version")
    assert done.code == 0, done.err
    assert done.out.startswith("fedmq ")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ([], "aggregator"),
        (["demo"], "--rounds"),
        (["init"], "--exist-ok"),
        (["config"], "--json"),
        (["aggregator"], "--folder"),
        (["worker"], "--shard"),
        (["evaluate"], "--task"),
        (["broker"], "check"),
        (["broker", "check"], "--broker"),
        (["broker", "node"], "--verbose"),
    ],
)
def test_each_command_has_help(tmp_path: Path, command: list[str], option: str) -> None:
    # TERM=dumb: without it rich colours what goes into a pipe on some CI systems.
    done = fedmq(tmp_path, *command, "--help", environment={"TERM": "dumb"})
    assert done.code == 0, done.err
    assert option in done.out
    assert "\x1b[" not in done.out


@pytest.mark.parametrize(
    ("module", "own", "front"),
    [
        ("aggregator", (), ("aggregator",)),
        ("broker", ("check",), ("broker", "check")),
        ("worker_client", ("run",), ("worker",)),
        ("worker_client", ("evaluate",), ("evaluate",)),
    ],
)
def test_each_rooms_module_is_the_same_as_its_subcommand(
    tmp_path: Path, module: str, own: tuple[str, ...], front: tuple[str, ...]
) -> None:
    def told(done: Done) -> list[str]:
        assert done.code == 0, done.err
        return [line for line in done.out.splitlines() if line.strip() and "Usage:" not in line]

    assert told(fedmq(tmp_path, *own, "--help", module=module)) == told(fedmq(tmp_path, *front, "--help"))
    wrong = ("--set", "broker.heartbeat=soon")
    mine, other = fedmq(tmp_path, *own, *wrong, module=module), fedmq(tmp_path, *front, *wrong)
    assert_one_message(mine, 2, "broker.heartbeat = 'soon'")
    assert mine.err == other.err


# ---------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize(
    ("command", "task", "words"),
    [
        ("worker", "wrnog:NoModel", ["there is no module 'wrnog'", "did you mean 'wrong'"]),
        ("worker", "wrong:NoModle", ["has no attribute 'NoModle'", "did you mean 'NoModel'"]),
        ("init", "wrong:NoModel", ["NoModel.model raised ValueError: no layers (wrong.py:7)"]),
        ("worker", "wrong:NoData", ["NoData.data raised FileNotFoundError: patients.csv (wrong.py:11)"]),
        ("worker", "wrong:Empty", ["shard 0/1", "no examples"]),
        ("evaluate", "wrong:Empty", ["test_data", "no examples"]),
    ],
)
def test_a_task_that_does_not_work_says_where(folder: Path, command: str, task: str, words: list[str]) -> None:
    assert_one_message(fedmq(folder, command, "--task", task), 3, *words)


# -------------------------------------------------------------------------------------------------- folders


def test_an_aggregator_without_a_checkpoint_says_how_to_make_one(tmp_path: Path) -> None:
    assert_one_message(fedmq(tmp_path, "aggregator", "--run", "mine"), 5, "fedmq init --run mine --task")


def test_a_run_is_initialised_once_and_belongs_to_its_folder(tmp_path: Path) -> None:
    first = fedmq(tmp_path, "init", "--run", "mine", *LINE)
    assert (first.code, "5 numbers in 2 tensors" in first.out) == (0, True), first
    before = {file: file.read_bytes() for file in (tmp_path / "runs").rglob("*.safetensors")}
    again = ("init", "--run", "mine", *LINE)
    other = ("--folder", "runs/mine", "--run", "other")

    assert_one_message(fedmq(tmp_path, *again), 5, "has been initialised", "fedmq aggregator", "--folder")
    assert fedmq(tmp_path, *again, "--exist-ok").code == 0
    for command in (("init", *LINE), ("init", "--exist-ok", *LINE), ("aggregator",)):
        assert_one_message(fedmq(tmp_path, *command, *other), 5, "holds run 'mine', not 'other'", "--folder")
    assert {file: file.read_bytes() for file in (tmp_path / "runs").rglob("*.safetensors")} == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    # A file where the folder should be: unlike permissions, that stops root too.
    (tmp_path / "blocked").touch()
    blocked = ("--folder", "blocked")
    assert_one_message(fedmq(tmp_path, "init", *blocked, *LINE), 5, "blocked/checkpoints", "make the folder writable")
    assert_one_message(fedmq(tmp_path, "aggregator", *blocked), 5, "blocked/checkpoints", "no checkpoint")
    assert_one_message(fedmq(tmp_path, "worker", *blocked, *LINE), 5, "blocked", "must be able to write there")
