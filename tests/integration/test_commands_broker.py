"""Commands and the broker: absent, refusing, or with a run that the worker cannot serve."""

from __future__ import annotations

import secrets
import signal
from pathlib import Path

import pytest

from broker.amqp.node import PrivateNode
from tests.support.commands import LINE, SECRET, WRONG_TASKS, assert_one_message, fedmq, running
from tests.support.node import add_user, channel, fresh_topology


@pytest.mark.parametrize("command", [("broker", "check"), ("demo",)], ids=" ".join)
def test_an_absent_broker_is_told_in_time(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = fedmq(tmp_path, *command, "--set", "broker.connect_timeout=0.5", timeout=40)
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
    if "aggregator" in command:
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
def test_a_worker_that_cannot_serve_the_run_says_why(tmp_path: Path, node: PrivateNode) -> None:
    folder = tmp_path
    (folder / "wrong.py").write_text(WRONG_TASKS)
    run = f"run-{secrets.token_hex(4)}"
    assert fedmq(folder, "init", "--run", run, *LINE).code == 0
    with running(folder, "aggregator", "--run", run, url=node.url) as aggregator:
        aggregator.wait_log("leads run")

        other = fedmq(folder, "worker", "--run", run, "--task", "wrong:Wider", "--name", "w1", url=node.url)
        broken = fedmq(folder, "worker", "--run", run, "--task", "wrong:BadTraining", "--name", "w2", url=node.url)

        assert_one_message(other, 3, "weight", "[1, 4]", "[1, 5]", "Wider")
        assert_one_message(broken, 3, "BadTraining.train raised RuntimeError: the loss is a banana (wrong.py:19)")
        assert node.password not in other.err + broken.err
        assert aggregator.terminate() == 0
