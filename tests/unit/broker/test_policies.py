"""Policies for the queues of all runs."""

from __future__ import annotations

import json
import re
import shlex

from broker.policies import policies
from broker.topology import Topology
from fedmq.doctor.findings import Level, worst
from fedmq.doctor.queues import of_policies

UPDATES, DEAD, LISTENERS = policies(update_bytes=5000, dead_bytes=6000)


def test_each_is_for_one_kind_of_queue_of_every_run_and_for_nothing_else() -> None:
    for run in ("digits", "a_b-c"):
        topology = Topology(run)
        names = [queue.name for queue in topology.queues("classic", 0)]
        own = [topology.own_queue(what, "dead") for what in ("notice", "events", "watch")]
        names += [topology.outbox("updates"), *own, f"x.{topology.updates}"]

        assert [name for name in names if re.search(UPDATES.pattern, name)] == [topology.updates]
        assert [name for name in names if re.search(DEAD.pattern, name)] == [topology.dead]
        assert [name for name in names if re.search(LISTENERS.pattern, name)] == own


def test_the_doctor_has_nothing_against_them_but_that_old_dead_letters_go() -> None:
    topology = Topology("digits")
    entries = [policy.entry("/") for policy in (UPDATES, DEAD, LISTENERS)]

    found = of_policies(topology, {}, entries, topology.queues("classic", 0))

    assert [finding.level for finding in found] == [Level.OK, Level.NOTE]
    assert worst(found) is Level.NOTE
    assert "dead letters" in found[1].text


def test_the_command_survives_a_shell() -> None:
    words = shlex.split(UPDATES.command("my host"))

    assert words[:5] == ["rabbitmqctl", "set_policy", "-p", "my host", UPDATES.name]
    assert words[5] == UPDATES.pattern
    assert json.loads(words[6]) == {"max-length-bytes": 5000, "overflow": "reject-publish"}
