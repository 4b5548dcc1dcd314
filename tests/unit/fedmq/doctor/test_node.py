"""What the doctor makes of nodes, limits and clocks, also where facts are missing or of another kind."""

from __future__ import annotations

from typing import Any

import pytest

from fedmq.doctor.findings import Level, worst
from fedmq.doctor.node import of_clock, of_limits, of_nodes, of_plugins

NODE: dict[str, Any] = {
    "name": "rabbit@a",
    "running": True,
    "partitions": [],
    "mem_used": 1e8,
    "mem_limit": 4e9,
    "mem_alarm": False,
    "disk_free": 5e10,
    "disk_free_limit": 2e9,
    "disk_free_alarm": False,
    "fd_used": 100,
    "fd_total": 65536,
    "proc_used": 500,
    "proc_total": 1048576,
    "enabled_plugins": ["rabbitmq_management", "rabbitmq_prometheus"],
}


def test_a_node_as_it_should_be() -> None:
    assert worst(of_nodes([NODE], model_bytes=100_000_000) + of_plugins([NODE], [])) is Level.OK


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({"mem_alarm": True}, Level.PROBLEM, "vm_memory_high_watermark"),
        ({"mem_used": 3.9e9}, Level.NOTE, "98%"),
        ({"disk_free_alarm": True}, Level.PROBLEM, "make room"),
        ({"disk_free": 2.5e9}, Level.NOTE, "make room"),
        ({"disk_free_limit": 5e7}, Level.NOTE, "disk_free_limit"),
        ({"running": False}, Level.PROBLEM, "does not run"),
        ({"partitions": ["rabbit@b"]}, Level.PROBLEM, "partition"),
        ({"fd_used": 65000}, Level.NOTE, "file descriptors"),
    ],
)
def test_what_is_wrong_with_a_node(change: dict[str, Any], level: Level, words: str) -> None:
    found = of_nodes([{**NODE, **change}])

    assert worst(found) is level
    assert words in "".join(finding.text + finding.advice for finding in found if finding.level is level)


def test_room_is_measured_by_the_model() -> None:
    assert worst(of_nodes([NODE], model_bytes=10_000_000_000)) is Level.NOTE


@pytest.mark.parametrize(
    "facts", [{}, {"mem_used": "much", "mem_limit": None, "disk_free": "disk_free_monitoring_off"}]
)
def test_a_node_that_tells_nothing_or_something_else_gives_no_finding(facts: dict[str, Any]) -> None:
    """As in the first seconds of a node, with statistics switched off, and in other versions."""
    assert of_nodes([facts]) == of_plugins([facts], None) == []


def test_plugins_and_feature_flags() -> None:
    without = of_plugins([{"enabled_plugins": ["rabbitmq_management"]}], [])
    off = of_plugins([], [{"name": "stream_queue", "state": "disabled"}, {"name": "other", "state": "disabled"}])

    assert "rabbitmq-plugins enable rabbitmq_prometheus" in without[0].advice
    assert (worst(off), len(off)) == (Level.PROBLEM, 1)


@pytest.mark.parametrize(
    ("ahead", "level"), [(0.0, Level.OK), (-2.0, Level.OK), (20.0, Level.NOTE), (-3600.0, Level.PROBLEM)]
)
def test_the_clock(ahead: float, level: Level) -> None:
    assert worst(of_clock(ahead)) is level


def limits(value: dict[str, Any], **present: int | None) -> list[Any]:
    now = {"connections": 10, "queues": 12, **present}
    return of_limits("the host", [{"vhost": "/", "value": value}], setter="rabbitmqctl set_vhost_limits", **now)


def test_limits_are_compared_with_what_is_there() -> None:
    assert limits({}) == limits({"max-connections": -1}) == of_limits("x", [], connections=1, queues=1, setter="")
    assert worst(limits({"max-connections": 100, "max-queues": 100})) is Level.OK
    assert worst(limits({"max-connections": 11})) is Level.PROBLEM
    assert worst(limits({"max-queues": 20})) is Level.PROBLEM
    assert worst(limits({"max-queues": 20}, queues=None)) is Level.OK
    assert worst(limits({"max-channels": 2})) is Level.PROBLEM
    assert limits({"max-connections": 11})[0].advice == "rabbitmqctl set_vhost_limits '{\"max-connections\": 30}'"
    assert limits({"max-connections": "many"}) == []
