"""What the doctor makes of a run's queues: arguments, dead letters, and policies that would lose updates."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from broker.topology import DEAD, Queue, Topology
from fedmq.doctor.findings import Finding, note, ok, problem

__all__ = ["effective_policy", "of_dead_letters", "of_objects", "of_policies", "of_timeouts"]

Facts = Mapping[str, Any]

#: Set by the model's size; more than is needed serves as well.
ROOM = {"x-max-length-bytes", "x-stream-max-segment-size-bytes"}
LENGTHS = ("max-length", "max-length-bytes")


def effective_policy(policies: Sequence[Facts], name: str, kind: str) -> tuple[str, dict[str, Any]]:
    """Name and definition of the policy that RabbitMQ applies to queue ``name``: the matching one of highest priority.

    ``kind`` is the queue's type, by which newer versions choose, too.
    """
    wanted = {"all", "queues", f"{kind}_queues", "streams" if kind == "stream" else "queues"}
    matching = []
    for policy in policies:
        try:
            is_meant = re.search(str(policy.get("pattern", "")), name) is not None
        except re.error:
            continue  # Erlang takes expressions that Python does not
        if is_meant and policy.get("apply-to") in wanted and isinstance(policy.get("definition"), dict):
            matching.append(policy)
    best = max(matching, key=lambda policy: _number(policy.get("priority")), default=None)
    return ("", {}) if best is None else (str(best.get("name", "")), dict(best["definition"]))


def of_policies(
    topology: Topology,
    queues: Mapping[str, Facts] | None,
    policies: Sequence[Facts] | None,
    declared: Sequence[Queue],
    *,
    vhost: str = "/",
) -> list[Finding]:
    """Policies on the run's queues: those in force where the queue is there, those that would be where it is not."""
    if queues is None and policies is None:
        return []
    found: list[Finding] = []
    for queue in declared:
        facts = (queues or {}).get(queue.name)
        in_force = (facts or {}).get("effective_policy_definition")
        if facts is not None and isinstance(in_force, dict):
            name, definition = str(facts.get("policy") or facts.get("operator_policy") or "a policy"), in_force
        elif policies is not None:
            name, definition = effective_policy(policies, queue.name, queue.type)
        else:
            continue
        clear = shlex.join(["rabbitmqctl", "clear_policy", "-p", vhost, name])
        found += _of_policy(topology, queue, name, definition, f"{clear}, or give it a narrower pattern")
    if not found:
        found.append(ok("policies", f"no policy would lose updates or versions of run {topology.run!r}"))
    return found


def _of_policy(topology: Topology, queue: Queue, name: str, definition: Facts, clear: str) -> list[Finding]:
    found: list[Finding] = []
    what = f"policy {name!r} on {queue.name}"
    lengths = [key for key in LENGTHS if key in definition]
    is_update = queue.name == topology.updates
    if "expires" in definition:
        found.append(problem("policies", f"{what} deletes the queue when nobody uses it (expires)", clear))
    if queue.type == "stream":
        return found + _of_stream(queue, what, definition, clear)
    if queue.name == topology.dead:
        if lengths or "message-ttl" in definition:
            text = f"{what} drops dead letters ({', '.join(definition)}): they cannot be replayed then"
            found.append(note("policies", text, "nothing, if that is meant"))
        return found
    if "message-ttl" in definition:
        where = "go to the dead letters" if is_update else "vanish"
        text = f"{what} gives messages {definition['message-ttl']} ms: what waits longer for an aggregator {where}"
        found.append(problem("policies", text, clear))
    # The queue's own argument goes before a policy.
    overflow = str(queue.arguments.get("x-overflow") or definition.get("overflow", "drop-head"))
    if lengths and overflow != "reject-publish":
        if is_update:
            text = f"{what} bounds the queue, and what is too much goes to the dead letters ({overflow})"
            found.append(problem("policies", text, 'add "overflow": "reject-publish" to it: workers wait then'))
        else:
            text = f"{what} bounds the queue and drops what is in it ({overflow}): hellos or the turn would be lost"
            found.append(problem("policies", text, clear))
    elif lengths and not is_update:
        found.append(
            problem("policies", f"{what} bounds a queue of a few messages: hellos or the turn are refused", clear)
        )
    elif lengths:
        found.append(ok("policies", f"{what} bounds the backlog, and workers wait when it is full"))
    limit = definition.get("delivery-limit")
    if _number(limit) and _number(limit) < 20:
        text = f"{what} gives up on a message after {limit} returns; each crash of an aggregator is one"
        found.append(problem("policies", text, clear))
    return found


def _of_stream(queue: Queue, what: str, definition: Facts, clear: str) -> list[Finding]:
    found: list[Finding] = []
    room = queue.arguments["x-max-length-bytes"]
    limit = definition.get("max-length-bytes")
    if _number(limit) and _number(limit) < _number(room):
        text = f"{what} keeps {limit:,} bytes; versions need {room:,}: slow workers would never get one"
        found.append(problem("policies", text, clear))
    if "max-age" in definition:
        text = f"{what} drops versions by age ({definition['max-age']}): who joins after a pause finds none"
        found.append(note("policies", text, clear))
    return found


def of_objects(queues: Mapping[str, Facts] | None, declared: Sequence[Queue], run: str) -> list[Finding]:
    """Whether the run's queues are what this release would declare."""
    if queues is None:
        return []
    there = [queue for queue in declared if queue.name in queues]
    if not there:
        return [note("objects", f"run {run!r} is not on this broker yet", "fedmq aggregator declares it")]
    found: list[Finding] = []
    for queue in declared:
        facts = queues.get(queue.name)
        if facts is None:
            text = f"queue {queue.name} is missing, while others of the run are there"
            found.append(problem("objects", text, "start the aggregator, which declares it again within seconds"))
            continue
        known = facts.get("arguments")
        arguments = known if isinstance(known, dict) else {}
        wrong = [
            f"{key} is {arguments.get(key)!r}, not {value!r}"
            for key, value in queue.arguments.items()
            if (arguments.get(key) != value if key not in ROOM else _number(arguments.get(key)) < _number(value))
        ]
        kind = str(facts.get("type", arguments.get("x-queue-type", "classic")))
        if kind != queue.type:
            wrong.insert(0, f"its type is {kind}, not {queue.type}")
        if facts.get("state") not in {None, "running", "idle", "flow"}:
            wrong.append(f"its state is {facts['state']}")
        if wrong:
            advice = "let it run empty, stop the run's aggregators, delete it (rabbitmqctl delete_queue), start again"
            if kind != queue.type:
                advice = f'broker.queue_type = "{kind}", or {advice}'
            found.append(problem("objects", f"queue {queue.name}: {'; '.join(wrong)}", advice))
    return found or [ok("objects", f"the {len(there)} queues and streams of run {run!r} are as they should be")]


def of_dead_letters(
    topology: Topology, queues: Mapping[str, Facts] | None, bindings: Sequence[Facts] | None
) -> list[Finding]:
    """Whether what is rejected arrives somewhere, and whether something has."""
    found: list[Finding] = []
    if queues is None or topology.dead not in queues:
        return found
    if bindings is not None and not any(
        binding.get("source") == DEAD and binding.get("destination") == topology.dead for binding in bindings
    ):
        text = f"nothing leads from exchange {DEAD} to {topology.dead}: what RabbitMQ itself gives up on would vanish"
        found.append(problem("dead letters", text, "start the aggregator, which binds it again within seconds"))
    count = _number(queues[topology.dead].get("messages"))
    if count:
        text = f"{count:,.0f} rejected updates wait for somebody to look at them"
        found.append(note("dead letters", text, f"fedmq dead list --run {topology.run}"))
    return found or [ok("dead letters", "rejected updates are kept; there are none")]


def of_timeouts(
    queues: Mapping[str, Facts] | None, declared: Sequence[Queue], *, commit_seconds: float
) -> list[Finding]:
    """Whether updates are acknowledged before the broker takes them away.

    What rabbitmq.conf says cannot be asked for: only a policy's and a queue's own time-out are known.
    """
    stated = None
    for queue in declared[:1]:
        facts = (queues or {}).get(queue.name) or {}
        for where, key in (("effective_policy_definition", "consumer-timeout"), ("arguments", "x-consumer-timeout")):
            values = facts.get(where)
            value = _number(values.get(key)) if isinstance(values, dict) else 0
            stated = min(stated or value, value) if value else stated
    limit = 1800.0 if stated is None else stated / 1000
    how = "RabbitMQ's default, if consumer_timeout in its rabbitmq.conf says nothing else" if stated is None else "set"
    text = f"updates are acknowledged after {commit_seconds:g} s at the latest; the broker waits {limit:,.0f} s ({how})"
    if commit_seconds * 2 > limit:
        return [problem("time-outs", text, f"aggregator.commit_seconds = {max(1, int(limit / 10))}")]
    return [ok("time-outs", text)]


def _number(value: object) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else 0
