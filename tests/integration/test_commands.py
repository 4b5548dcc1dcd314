"""Commands as processes: what a user meets who makes a mistake, and what is printed for one who asks."""

from __future__ import annotations

import json
import secrets
import signal
from pathlib import Path

import pytest

from broker.amqp.node import PrivateNode
from tests.support.commands import SECRET, Done, fedmq, running
from tests.support.node import add_user, channel, fresh_topology

LINE = ("--task", "tests.support.tasks:Line")

#: A user's module with one task for each thing that can go wrong in it.
WRONG_TASKS = """
from torch import nn
from tests.support.tasks import Line

class NoModel(Line):
    def model(self):
        raise ValueError("no layers")

class NoData(Line):
    def data(self, shard):
        raise FileNotFoundError("patients.csv")

class Empty(Line):
    def data(self, shard):
        return []

class BadTraining(Line):
    def train(self, model, dataset, context):
        raise RuntimeError("the loss is a banana")

class Wider(Line):
    def model(self):
        return nn.Linear(5, 1)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "wrong.py").write_text(WRONG_TASKS)
    return tmp_path


def assert_one_message(done: Done, code: int, *words: str) -> None:
    """One error on stderr, with these words, and neither a traceback nor a password."""
    assert done.code == code, done
    assert done.err.count("error: ") == 1, done.err
    assert "Traceback" not in done.err
    assert SECRET not in done.err + done.out
    for word in words:
        assert word in done.err, done.err


# ------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[aggregator]\nbufer_size = 8", ["fedmq.toml", "aggregator.bufer_size", "did you mean 'buffer_size'"]),
        ("[agregator]\nbuffer_size = 8", ["fedmq.toml", "agregator", "did you mean 'aggregator'", "run, broker"]),
        ("[aggregator]\nbuffer_size = 'many'", ["fedmq.toml: aggregator.buffer_size = 'many'", "integer"]),
        ("[aggregator]\nbuffer_size = 0", ["fedmq.toml: aggregator.buffer_size = 0", "greater than or equal to 1"]),
        ("[aggregator]\noptimizer = 'lion'", ["aggregator.optimizer = 'lion'", "'sgd' or 'adam'"]),
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
        (("--set", "worker.batch_size=-1"), ["--set worker.batch_size", "'-1'", "greater than or equal to 1"]),
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
    assert_one_message(done, 2, "environment variable FEDMQ_WORKER_BATCH_SIZE: worker.batch_size = 'lots'", "integer")


def test_config_shows_values_and_where_they_are_set(tmp_path: Path) -> None:
    (tmp_path / "fedmq.toml").write_text(
        "run = 'mine'\n[aggregator]\nbuffer_size = 2\ncommit_count = 3\nseed = 4\n[worker]\nbatch_size = 5\n"
    )
    done = fedmq(
        tmp_path,
        "config",
        "--json",
        "--set",
        "aggregator.buffer_size=200",
        FEDMQ_AGGREGATOR_BUFFER_SIZE="20",
        FEDMQ_AGGREGATOR_COMMIT_COUNT="30",
    )

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
        ("worker", "wrong", ["package.module:attribute"]),
        ("init", "wrong:NoModel", ["NoModel.model raised ValueError: no layers (wrong.py:7)"]),
        ("worker", "wrong:NoModel", ["NoModel.model raised ValueError: no layers (wrong.py:7)"]),
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
    assert_one_message(fedmq(tmp_path, "aggregator", *blocked), 5, "blocked/checkpoints", "make the folder writable")
    assert_one_message(fedmq(tmp_path, "worker", *blocked, *LINE), 5, "blocked", "must be able to write there")


# --------------------------------------------------------------------------------------------------- broker


def test_the_check_of_an_absent_broker_ends_in_time(tmp_path: Path) -> None:
    done = fedmq(tmp_path, "broker", "check", "--set", "broker.connect_timeout=0.5", timeout=20)
    assert_one_message(done, 4, "127.0.0.1:1", "is RabbitMQ running there?", "***")
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("command", ["aggregator", "worker"])
def test_an_absent_broker_is_waited_for_until_sigterm(tmp_path: Path, command: str) -> None:
    if command == "aggregator":
        assert fedmq(tmp_path, "init", *LINE).code == 0
    task = () if command == "aggregator" else LINE
    with running(tmp_path, command, *task) as started:
        started.wait_log("127.0.0.1:1")
        started.wait_log("next attempt in")
        assert started.terminate(timeout=10, number=signal.SIGTERM) == 0
        assert SECRET not in started.log
        assert "Traceback" not in started.log


@pytest.fixture
def secret_user(node: PrivateNode) -> tuple[str, str]:
    """The address of a user who may do nothing, and the password in it."""
    url = add_user(node, configure="", write="", read="")
    return url, url.rpartition("@")[0].rpartition(":")[2]


def refused(folder: Path, *command: str, url: str, password: str) -> str:
    done = fedmq(folder, *command, url=url)
    assert done.code == 4, done
    assert done.err.splitlines()[-1].startswith("error: "), done.err
    assert "Traceback" not in done.err
    assert password not in done.err + done.out
    return done.err.splitlines()[-1]


@pytest.mark.broker
@pytest.mark.parametrize("command", [("broker", "check"), ("aggregator",), ("worker", *LINE)], ids=" ".join)
def test_a_broker_that_refuses_is_explained(
    tmp_path: Path, node: PrivateNode, secret_user: tuple[str, str], command: tuple[str, ...]
) -> None:
    assert fedmq(tmp_path, "init", *LINE).code == 0
    user, password = secret_user
    # A worker meets its run's refusals only once the run is there.
    assert fedmq(tmp_path, "broker", "check", url=node.url).code == 0

    wrong = refused(tmp_path, *command, url=user.replace(password, SECRET), password=SECRET)
    assert "refused the login of user 'user-" in wrong

    elsewhere = refused(tmp_path, *command, url=f"{node.url}nowhere", password=node.password)
    assert "there is no virtual host 'nowhere'" in elsewhere
    assert "rabbitmqctl add_vhost nowhere" in elsewhere

    forbidden = refused(tmp_path, *command, url=user, password=password)
    assert "permission" in forbidden
    assert "rabbitmqctl set_permissions" in forbidden


@pytest.mark.broker
def test_a_queue_with_other_arguments_is_named(tmp_path: Path, node: PrivateNode) -> None:
    topology = fresh_topology()
    with channel(node) as inside:
        inside.queue_declare(topology.updates, durable=True, arguments={"x-max-length": 3})
    assert fedmq(tmp_path, "init", "--run", topology.run, *LINE).code == 0
    for command in (("broker", "check"), ("aggregator",)):
        told = refused(tmp_path, *command, "--run", topology.run, url=node.url, password=node.password)
        assert f"queue '{topology.updates}' exists" in told
        assert f"delete_queue {topology.updates}" in told


@pytest.mark.broker
def test_the_check_of_a_good_broker_declares_the_run(tmp_path: Path, node: PrivateNode) -> None:
    topology = fresh_topology()
    done = fedmq(tmp_path, "broker", "check", "--run", topology.run, url=node.url)
    assert done.code == 0, done
    assert f"run '{topology.run}'" in done.out
    assert node.password not in done.out + done.err
    with channel(node) as inside:
        assert inside.queue_declare(topology.updates, passive=True).method.message_count == 0


@pytest.mark.broker
def test_a_worker_that_cannot_serve_the_run_says_why(folder: Path, node: PrivateNode) -> None:
    run = f"run-{secrets.token_hex(4)}"
    assert fedmq(folder, "init", "--run", run, *LINE).code == 0
    with running(folder, "aggregator", "--run", run, url=node.url) as aggregator:
        aggregator.wait_log("connected to the broker")

        other = fedmq(folder, "worker", "--run", run, "--task", "wrong:Wider", "--name", "w1", url=node.url)
        broken = fedmq(folder, "worker", "--run", run, "--task", "wrong:BadTraining", "--name", "w2", url=node.url)

        assert_one_message(other, 3, "weight", "[1, 4]", "[1, 5]", "Wider")
        assert_one_message(broken, 3, "BadTraining.train raised RuntimeError: the loss is a banana (wrong.py:19)")
        assert node.password not in other.err + broken.err
        assert aggregator.terminate() == 0
