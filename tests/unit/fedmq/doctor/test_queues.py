"""What the doctor makes of a run's queues and of policies."""

from __future__ import annotations

from typing import Any

import pytest

from broker.topology import DEAD, Topology
from fedmq.doctor.findings import Level, worst
from fedmq.doctor.queues import effective_policy, of_dead_letters, of_objects, of_policies, of_timeouts

TOPOLOGY = Topology("r")
DECLARED = TOPOLOGY.queues("classic", 1_000_000)


def present(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The queues as the management API shows them; ``changes`` by the last part of the name."""
    return {
        queue.name: {
            "name": queue.name,
            "type": queue.type,
            "arguments": dict(queue.arguments),
            "state": "running",
            "messages": 0,
            "effective_policy_definition": {},
            **changes.get(queue.name.rpartition(".")[2], {}),
        }
        for queue in DECLARED
    }


def policy(definition: dict[str, Any], pattern: str = r"^fedmq\.", **more: Any) -> dict[str, Any]:
    return {"name": "p", "pattern": pattern, "apply-to": "queues", "priority": 0, "definition": definition, **more}


@pytest.mark.parametrize(
    ("name", "definition", "level"),
    [
        ("updates", {"max-length-bytes": 10, "overflow": "reject-publish"}, Level.OK),
        ("updates", {"max-length": 10}, Level.PROBLEM),
        ("updates", {"max-length": 10, "overflow": "reject-publish-dlx"}, Level.PROBLEM),
        ("updates", {"message-ttl": 60000}, Level.PROBLEM),
        ("updates", {"expires": 60000}, Level.PROBLEM),
        ("updates", {"delivery-limit": 3}, Level.PROBLEM),
        ("updates", {"queue-mode": "lazy"}, Level.OK),
        ("control", {"max-length": 10, "overflow": "reject-publish"}, Level.PROBLEM),
        ("turn", {"message-ttl": 60000}, Level.PROBLEM),
        ("dead", {"max-length": 10}, Level.NOTE),
        ("dead", {"message-ttl": 10}, Level.NOTE),
        ("dead", {"expires": 10}, Level.PROBLEM),
        ("parameters", {"max-length-bytes": 10}, Level.PROBLEM),
        ("parameters", {"max-length-bytes": 10**12}, Level.OK),
        ("chunks", {"max-age": "1h"}, Level.NOTE),
    ],
)
def test_a_policy_counts_before_and_after_the_run_is_there(name: str, definition: dict[str, Any], level: Level) -> None:
    in_force = present(**{name: {"effective_policy_definition": definition, "policy": "p"}})
    to_come = [policy(definition, rf"^fedmq\.r\.{name}$")]

    assert worst(of_policies(TOPOLOGY, in_force, None, DECLARED)) is level
    assert worst(of_policies(TOPOLOGY, {}, to_come, DECLARED)) is level
    assert worst(of_policies(TOPOLOGY, None, to_come, DECLARED)) is level
    # What is in force counts, where it is known.
    assert worst(of_policies(TOPOLOGY, present(), to_come, DECLARED)) is Level.OK


def test_a_length_on_a_queue_that_refuses_by_its_own_argument_loses_nothing() -> None:
    quorum = TOPOLOGY.queues("quorum", 0)
    in_force = {TOPOLOGY.updates: {"effective_policy_definition": {"max-length": 10}, "policy": "p"}}

    assert worst(of_policies(TOPOLOGY, in_force, None, quorum[:1])) is Level.OK


def test_the_advice_names_policy_and_virtual_host() -> None:
    bad = [policy({"message-ttl": 1}, "updates$", name="my policy")]

    (found,) = of_policies(TOPOLOGY, {}, bad, DECLARED, vhost="my host")

    assert found.advice.startswith("rabbitmqctl clear_policy -p 'my host' 'my policy'")


def test_the_matching_policy_of_highest_priority_is_in_force() -> None:
    policies = [
        policy({"max-length": 1}, priority=1, name="low"),
        policy({"max-length": 2}, priority=5, name="high"),
        policy({"max-length": 3}, "^other", priority=9),
        policy({"max-length": 4}, priority=9, **{"apply-to": "exchanges"}),
        policy({"max-length": 5}, "(?no expression", priority=9),
    ]

    assert effective_policy(policies, "fedmq.r.updates", "classic") == ("high", {"max-length": 2})
    assert effective_policy([], "fedmq.r.updates", "classic") == ("", {})
    assert effective_policy([policy({"a": 1}, **{"apply-to": "streams"})], "fedmq.r.chunks", "stream")[0] == "p"
    assert effective_policy([policy({"a": 1}, **{"apply-to": "quorum_queues"})], "fedmq.r.dead", "classic")[0] == ""


def test_the_runs_queues_are_compared_with_what_would_be_declared() -> None:
    assert worst(of_objects(present(), DECLARED, "r")) is Level.OK
    assert worst(of_objects({}, DECLARED, "r")) is Level.NOTE
    assert of_objects(None, DECLARED, "r") == []

    missing = present()
    del missing[TOPOLOGY.turn]
    other_type = of_objects(present(updates={"type": "quorum"}), DECLARED, "r")
    no_dlx = of_objects(present(updates={"arguments": {"x-single-active-consumer": True}}), DECLARED, "r")
    too_small = of_objects(present(chunks={"arguments": {"x-max-length-bytes": 1}}), DECLARED, "r")
    down = of_objects(present(dead={"state": "down"}), DECLARED, "r")

    assert worst(of_objects(missing, DECLARED, "r")) is Level.PROBLEM
    assert 'broker.queue_type = "quorum"' in other_type[0].advice
    assert "x-dead-letter-exchange is None, not 'fedmq.dead'" in no_dlx[0].text
    assert "x-max-length-bytes" in too_small[0].text
    assert "its state is down" in down[0].text


def test_more_room_in_a_stream_than_is_needed_is_no_finding() -> None:
    arguments = dict.fromkeys(("x-max-length-bytes", "x-stream-max-segment-size-bytes"), 10**12)

    assert worst(of_objects(present(chunks={"arguments": arguments}), DECLARED, "r")) is Level.OK


def test_dead_letters_must_lead_somewhere_and_are_counted() -> None:
    bound = [{"source": DEAD, "destination": TOPOLOGY.dead}]

    assert worst(of_dead_letters(TOPOLOGY, present(), bound)) is Level.OK
    assert worst(of_dead_letters(TOPOLOGY, present(), [])) is Level.PROBLEM
    assert worst(of_dead_letters(TOPOLOGY, present(), None)) is Level.OK
    (waiting,) = of_dead_letters(TOPOLOGY, present(dead={"messages": 1200}), bound)
    assert (waiting.level, waiting.advice) == (Level.NOTE, "fedmq dead list --run r")
    assert "1,200" in waiting.text


def test_time_to_acknowledge() -> None:
    short = present(updates={"effective_policy_definition": {"consumer-timeout": 60_000}})

    assert worst(of_timeouts(None, DECLARED, commit_seconds=60)) is Level.OK
    (found,) = of_timeouts(short, DECLARED, commit_seconds=60)
    assert (found.level, found.advice) == (Level.PROBLEM, "aggregator.commit_seconds = 6")
    assert worst(of_timeouts(short, DECLARED, commit_seconds=10)) is Level.OK
