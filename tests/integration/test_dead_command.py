"""``fedmq dead`` as an operator uses it, on a real RabbitMQ and with a real aggregator."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pika
import pytest

from aggregator.checkpoint import CheckpointStore
from broker.amqp.node import PrivateNode
from broker.messages import Update
from broker.topology import UPDATES, Topology
from broker.wire import encode
from tests.support.builders import update_of, vector
from tests.support.commands import PATIENCE, Done, assert_one_message, environment_of, fedmq, running
from tests.support.letters import bury, declared, ids_in, update
from tests.support.node import add_user, channel, fresh_topology, ready
from tests.support.tasks import CELLS
from tests.support.waiting import wait_for

COUNTING = ("--task", "tests.support.tasks:Counting")
MANY = 3000


@pytest.fixture
def topology(node: PrivateNode) -> Topology:
    return declared(node)


def dead(folder: Path, node: PrivateNode, topology: Topology, *arguments: str) -> Done:
    return fedmq(folder, "dead", *arguments, "--run", topology.run, url=node.url)


def listed(folder: Path, node: PrivateNode, topology: Topology, *arguments: str) -> list[dict[str, Any]]:
    done = dead(folder, node, topology, "list", "--json", *arguments)
    assert done.code == 0, done
    rows: list[dict[str, Any]] = json.loads(done.out)
    return rows


# ------------------------------------------------------------------------------------------ with an aggregator


def counting(topology: Topology, index: int) -> Update:
    """What shard ``index`` of the task ``Counting`` sends: 1 in its cell, from version 0."""
    cells = vector(*(float(cell == index) for cell in range(CELLS)), dtype=np.float64)
    return update_of({"cells": cells}, worker=f"w{index}", run=topology.run)


def send(node: PrivateNode, topology: Topology, one: Update) -> None:
    properties = pika.BasicProperties(
        delivery_mode=2,
        message_id=str(one.id),
        type="update",
        headers={"worker": one.id.worker},
        user_id=node.user,
    )
    with channel(node) as inside:
        inside.confirm_delivery()
        inside.basic_publish(UPDATES, topology.key(one.id.worker), encode(one), properties, mandatory=True)


@pytest.mark.broker
def test_a_rejected_update_is_seen_mended_and_replayed_and_counts_once(tmp_path: Path, node: PrivateNode) -> None:
    topology = fresh_topology("replay")
    run = ("--run", topology.run)
    rules = [f"--set=aggregator.{rule}" for rule in ("buffer_size=1", "learning_rate=1.0", "staleness=constant")]
    store = CheckpointStore(tmp_path / "runs" / topology.run / "checkpoints", topology.run)

    def applied() -> list[int]:
        return [int(n) for n in store.load().parameters["cells"]][:3]

    assert fedmq(tmp_path, "init", *run, *COUNTING).code == 0
    # Given an aggregator that takes nothing stale, and an update that is
    strict = [*rules, "--set=aggregator.max_staleness=0"]
    with running(tmp_path, "aggregator", *run, *strict, url=node.url, name="strict") as aggregator:
        aggregator.wait_log("leads run")
        send(node, topology, counting(topology, 0))
        wait_for(lambda: applied() == [1, 0, 0], PATIENCE, what="the first update applied")
        send(node, topology, counting(topology, 1))
        wait_for(lambda: ready(node, topology.dead) == 1, PATIENCE, what="the second rejected")
        # A replay before anything is mended is rejected again, and tells why it was before.
        replayed = dead(tmp_path, node, topology, "replay", "--all")
        assert "what is rejected again comes back: fedmq dead list" in replayed.out
        wait_for(lambda: ready(node, topology.dead) == 1, PATIENCE, what="the second rejected again")
        assert "too-stale (before: too-stale)" in dead(tmp_path, node, topology, "list").out
        assert aggregator.terminate() == 0

    # When an operator looks
    done = dead(tmp_path, node, topology, "list")
    assert done.code == 0, done
    for word in ("w1/i/0", "too-stale", "20", "1 rejected updates: too-stale 1"):
        assert word in done.out
    (row,) = listed(tmp_path, node, topology)
    assert (row["worker"], row["reason"], row["base_version"], row["origin"]) == ("w1", "too-stale", 0, "aggregator")
    assert row["time"] is not None

    # and mends it, and replays, and replays a copy that a crash has left
    with running(tmp_path, "aggregator", *run, *rules, url=node.url, name="patient") as aggregator:
        aggregator.wait_log("leads run")
        done = dead(tmp_path, node, topology, "replay", "--id", "w1/i/0")
        assert done.code == 0, done
        assert "replayed" in done.out
        wait_for(lambda: applied() == [1, 1, 0], PATIENCE, what="the second update applied")
        bury(node, topology, counting(topology, 1), reason="too-stale")
        assert dead(tmp_path, node, topology, "replay", "--all").code == 0
        send(node, topology, counting(topology, 2))
        wait_for(lambda: applied()[2] == 1, PATIENCE, what="the third update applied")
        assert aggregator.terminate() == 0

    # Then each counts once, and nothing is left anywhere
    assert applied() == [1, 1, 1]
    assert ready(node, topology.updates) == ready(node, topology.dead) == 0


# ----------------------------------------------------------------------------------------------- list and show


@pytest.mark.broker
def test_the_list_has_a_line_a_letter_and_a_summary(tmp_path: Path, node: PrivateNode, topology: Topology) -> None:
    bury(node, topology, *(update(topology, seq) for seq in range(4)))
    bury(node, topology, update(topology, 1, worker="w2"), reason="malformed", body=b"\x1b[2Jpoison")

    done = dead(tmp_path, node, topology, "list")

    assert done.code == 0, done
    lines = done.out.splitlines()
    assert len(lines) == 1 + 5 + 1
    assert "2026-08-01 12:00:00" in lines[1]
    assert "w1/i/0" in lines[1]
    assert "w2/i/1" in lines[5]
    assert lines[-1] == f"run '{topology.run}': 5 rejected updates: not-finite 4, malformed 1"
    few = dead(tmp_path, node, topology, "list", "--limit", "1", "--reason", "not-finite").out.splitlines()
    assert few[-2:] == [
        "… and 3 more (--limit, or --json)",
        f"run '{topology.run}': 4 rejected updates: not-finite 4",
    ]
    none = dead(tmp_path, node, topology, "list", "--reason", "run-done").out
    assert "none of the 5 rejected updates matches (not-finite 4, malformed 1)" in none
    assert [row["id"] for row in listed(tmp_path, node, topology, "--worker", "w2")] == ["w2/i/1"]
    assert listed(tmp_path, node, topology, "--before", "2026-08-01") == []
    assert [row["id"] for row in listed(tmp_path, node, topology, "--limit", "1")] == ["w1/i/0"]
    assert len(listed(tmp_path, node, topology, "--older-than", "1s", "--before", "2026-08-02")) == 5


@pytest.mark.broker
def test_an_empty_queue_is_said_to_be_empty(tmp_path: Path, node: PrivateNode, topology: Topology) -> None:
    assert dead(tmp_path, node, topology, "list").out == f"run '{topology.run}': no rejected updates\n"
    assert listed(tmp_path, node, topology) == []
    assert dead(tmp_path, node, topology, "replay", "--all").out == f"run '{topology.run}': no rejected updates\n"


@pytest.mark.broker
def test_one_letter_is_shown_in_full(tmp_path: Path, node: PrivateNode, topology: Topology) -> None:
    broken = update_of(
        {"w": vector(3.0, float("nan"), 4.0)}, run=topology.run, worker="w1", seq=5, metrics={"loss": 0.25}
    )
    bury(node, topology, update(topology, 1), broken)

    done = dead(tmp_path, node, topology, "show", "2")

    assert done.code == 0, done
    for word in ("w1/i/5", "not-finite", "a test", "2026-08-01T12:00:00", "'loss': 0.25", "float32", "[3]", "5"):
        assert word in done.out, done.out
    as_json = json.loads(dead(tmp_path, node, topology, "show", "w1/i/5", "--json").out)
    assert as_json["tensors"] == [{"name": "w", "shape": [3], "dtype": "float32", "norm": 5.0, "not_finite": 1}]
    assert as_json["update"]["metrics"] == {"loss": 0.25}
    assert_one_message(dead(tmp_path, node, topology, "show", "3"), 2, "no letter 3", "it has 2")
    assert_one_message(dead(tmp_path, node, topology, "show", "w1/i/6"), 2, "no letter w1/i/6")
    assert_one_message(dead(tmp_path, node, topology, "show", "third"), 2, "WORKER/INCARNATION/SEQ")
    assert ready(node, topology.dead) == 2


# -------------------------------------------------------------------------------------------------------- drop


@pytest.mark.broker
def test_what_is_selected_is_dropped_and_the_rest_stays(tmp_path: Path, node: PrivateNode, topology: Topology) -> None:
    bury(node, topology, *(update(topology, seq) for seq in range(3)))
    bury(node, topology, update(topology, 1, worker="w2"), reason="malformed")
    assert_one_message(dead(tmp_path, node, topology, "drop", "--all"), 2, "--yes")

    done = dead(tmp_path, node, topology, "drop", "--worker", "w1", "--reason", "not-finite", "--yes")

    assert done.code == 0, done
    assert done.out.splitlines()[-1] == f"run '{topology.run}': 3 dropped: not-finite 3"
    assert "w1/i/0" not in done.out
    assert ids_in(node, topology.dead) == ["w2/i/1"]


@pytest.mark.broker
@pytest.mark.parametrize(("answer", "left"), [("y", 0), ("n", 2)])
def test_on_a_terminal_a_drop_is_asked_for(
    tmp_path: Path, node: PrivateNode, topology: Topology, answer: str, left: int
) -> None:
    bury(node, topology, update(topology, 1), update(topology, 2))
    terminal, inner = pty.openpty()
    try:
        os.write(terminal, f"{answer}\n".encode())
        done = subprocess.run(
            [sys.executable, "-m", "fedmq", "dead", "drop", "--all", "--run", topology.run],
            cwd=tmp_path,
            env=environment_of(node.url),
            stdin=inner,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    finally:
        os.close(inner)
        os.close(terminal)
    assert done.returncode == 0, done
    assert "Delete 2 for good?" in done.stderr
    assert ("2 dropped" if not left else "nothing was dropped") in done.stdout
    assert ready(node, topology.dead) == left


# ------------------------------------------------------------------------------------------------------- faults


@pytest.mark.broker
def test_a_replay_killed_in_the_middle_loses_nothing(tmp_path: Path, node: PrivateNode, topology: Topology) -> None:
    everything = [f"w1/i/{seq}" for seq in range(MANY)]
    bury(node, topology, *(update(topology, seq) for seq in range(MANY)))
    with running(tmp_path, "dead", "replay", "--all", "--run", topology.run, url=node.url) as replay:
        wait_for(lambda: ready(node, topology.updates) > 0, PATIENCE, what="the first replayed")
        replay.process.kill()
        assert replay.wait() == -signal.SIGKILL

    wait_for(
        lambda: ready(node, topology.dead) + ready(node, topology.updates) >= MANY, PATIENCE, what="all letters back"
    )
    replayed, left = ids_in(node, topology.updates), ids_in(node, topology.dead)
    assert set(replayed) | set(left) == set(everything)
    assert len(replayed) == len(set(replayed))
    assert left == sorted(left, key=everything.index)


@pytest.mark.broker
def test_two_operators_who_replay_at_once_publish_each_update_once(
    tmp_path: Path, node: PrivateNode, topology: Topology
) -> None:
    everything = [f"w1/i/{seq}" for seq in range(MANY)]
    bury(node, topology, *(update(topology, seq) for seq in range(MANY)))
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda _: dead(tmp_path, node, topology, "replay", "--all"), range(2)))
    for done in both:
        # The one sees the other, or both get a part.
        if done.code:
            assert_one_message(done, 4, "somebody else reads", "try again")
    assert {done.code for done in both} in ({0}, {0, 4})
    assert sorted(ids_in(node, topology.updates)) == sorted(everything)
    assert ready(node, topology.dead) == 0


@pytest.mark.broker
def test_what_was_not_replayed_is_an_error(tmp_path: Path, node: PrivateNode, topology: Topology) -> None:
    bury(node, topology, update(topology, 1), body=b"", headers={"body": "99999999 bytes, left out"})
    bury(node, topology, update(topology, 2))

    done = dead(tmp_path, node, topology, "replay", "--all")

    assert_one_message(done, 4, "1 of 2 were not replayed")
    assert "refused   w1/i/1 (not-finite): its body was too large to be kept" in done.out
    assert f"run '{topology.run}': 1 replayed: not-finite 1" in done.out
    assert "w1/i/2" not in done.out
    bury(node, topology, update(topology, 3))
    assert "replayed  w1/i/3 (not-finite)" in dead(tmp_path, node, topology, "replay", "-v", "--id", "w1/i/3").out


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("replay",), ("say which", "--worker", "--all")),
        (("drop", "--yes"), ("say which",)),
        (("replay", "--all", "--worker", "w1"), ("contradict",)),
        (("replay", "--id", "w1"), ("WORKER/INCARNATION/SEQ",)),
        (("replay", "--reason", "bogus"), ("--reason 'bogus'", "too-stale", "'broker: delivery-limit'")),
        (("list", "--older-than", "yesterday"), ("--older-than", "7d")),
        (("list", "--before", "noon"), ("--before", "2026-08-01")),
        (("list", "--run", "a.b"), ("run",)),
    ],
    ids=lambda value: " ".join(value) if value and value[0] in {"replay", "drop", "list"} else "",
)
def test_options_that_make_no_sense_are_explained(
    tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_one_message(fedmq(tmp_path, "dead", *arguments), 2, *words)


def test_an_absent_broker_is_told(tmp_path: Path) -> None:
    assert_one_message(fedmq(tmp_path, "dead", "list"), 4, "127.0.0.1:1", "is RabbitMQ running there?", "***")


@pytest.mark.broker
def test_a_run_or_a_right_that_is_not_there_is_told(tmp_path: Path, node: PrivateNode, topology: Topology) -> None:
    unknown = fedmq(tmp_path, "dead", "list", "--run", "nobody", url=node.url)
    assert_one_message(unknown, 4, "no queue 'fedmq.nobody.dead'", "no aggregator has declared run 'nobody'")
    bury(node, topology, update(topology, 1))
    user = add_user(node, configure="", write="", read=".*")
    done = fedmq(tmp_path, "dead", "replay", "--all", "--run", topology.run, url=user)
    assert_one_message(done, 4, "write permission to publish", "set_permissions")
    assert ready(node, topology.dead) == 1


def test_the_help_shows_the_commands(tmp_path: Path) -> None:
    done = fedmq(tmp_path, "dead", "--help")
    assert done.code == 0
    for command in ("list", "show", "replay", "drop"):
        assert command in done.out
