"""What the doctor makes of RabbitMQ's nodes: memory, disk, plugins, clock, limits. Every fact may be missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from fedmq.doctor.findings import Finding, note, ok, problem

__all__ = ["of_clock", "of_limits", "of_nodes", "of_plugins"]

Facts = Mapping[str, Any]

FULL = 0.8
#: RabbitMQ's own disk limit, at which it is too late for messages of megabytes.
DEFAULT_DISK_LIMIT = 50_000_000
FLAGS = {"stream_queue", "quorum_queue"}
CLOCK_NOTE, CLOCK_PROBLEM = 3.0, 60.0
#: Connections of one aggregator or worker, and queues of a run with one worker that sends chunks.
CONNECTIONS, QUEUES = 2, 9


def of_nodes(nodes: Sequence[Facts], *, model_bytes: int = 0) -> list[Finding]:
    """Alarms, and how near they are; ``model_bytes`` is the size of a version, 0 if not known."""
    found: list[Finding] = []
    for node in nodes:
        name = str(node.get("name", "a node"))
        if node.get("running") is False:
            found.append(problem("broker", f"node {name} does not run", "start it, or remove it from the cluster"))
            continue
        if node.get("partitions"):
            found.append(
                problem(
                    "broker", f"node {name} does not see {node['partitions']}", "a network partition: mend it first"
                )
            )
        found += _of_memory(name, node) + _of_disk(name, node, model_bytes)
        for what, used, most in (("file descriptors", "fd_used", "fd_total"), ("processes", "proc_used", "proc_total")):
            share = _share(node, used, most)
            if share is not None and share > FULL:
                found.append(
                    note("limits", f"node {name} uses {share:.0%} of its {what}", "raise the limit of the service")
                )
    return found


def _of_memory(name: str, node: Facts) -> list[Finding]:
    if node.get("mem_alarm") is True:
        return [
            problem(
                "memory",
                f"node {name} has a memory alarm: it takes no messages",
                "let queues run empty, or raise vm_memory_high_watermark in its rabbitmq.conf",
            )
        ]
    share = _share(node, "mem_used", "mem_limit")
    if share is None:
        return []
    text = f"node {name} uses {share:.0%} of the {_size(node['mem_limit'])} at which it takes no more messages"
    if share > FULL:
        return [note("memory", text, "let queues run empty, or raise vm_memory_high_watermark in its rabbitmq.conf")]
    return [ok("memory", text)]


def _of_disk(name: str, node: Facts, model_bytes: int) -> list[Finding]:
    free, limit = node.get("disk_free"), node.get("disk_free_limit")
    if node.get("disk_free_alarm") is True:
        return [
            problem("disk", f"node {name} has a disk alarm: it takes no messages", "make room on the broker's disk")
        ]
    if not _is_number(free) or not _is_number(limit):
        return []
    text = f"node {name} has {_size(free)} of free disk, and takes no more messages below {_size(limit)}"
    # Eight versions, and four updates of each of some workers: docs/operating.md.
    if free < limit + 16 * model_bytes or free < 2 * limit:
        return [note("disk", text, "make room on the broker's disk")]
    if limit <= DEFAULT_DISK_LIMIT:
        return [note("disk", f"{text}: too late for large messages", "disk_free_limit.absolute = 2GB in rabbitmq.conf")]
    return [ok("disk", text)]


def of_plugins(nodes: Sequence[Facts], flags: Sequence[Facts] | None) -> list[Finding]:
    """Plugins that help, and the feature flag without which there are no streams."""
    found: list[Finding] = []
    plugins = next((node["enabled_plugins"] for node in nodes if isinstance(node.get("enabled_plugins"), list)), None)
    if plugins is not None and "rabbitmq_prometheus" not in plugins:
        found.append(
            note(
                "plugins",
                "rabbitmq_prometheus is not enabled: dashboards and alerts know nothing of the broker",
                "rabbitmq-plugins enable rabbitmq_prometheus",
            )
        )
    elif plugins is not None:
        found.append(ok("plugins", "rabbitmq_management and rabbitmq_prometheus are enabled"))
    off = [str(flag["name"]) for flag in flags or () if flag.get("name") in FLAGS and flag.get("state") == "disabled"]
    if off:
        text = f"feature flags are off, as after an upgrade: {', '.join(off)}"
        found.append(problem("plugins", text, "rabbitmqctl enable_feature_flag all"))
    return found


def of_clock(ahead: float | None) -> list[Finding]:
    """``ahead``: seconds by which the broker's clock is before ours."""
    if ahead is None:
        return []
    if abs(ahead) <= CLOCK_NOTE:
        return [ok("clock", "the broker's clock and this machine's agree")]
    text = f"the broker's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
    advice = "let an NTP client set both (timedatectl set-ntp true)"
    if abs(ahead) <= CLOCK_PROBLEM:
        return [note("clock", text, advice)]
    return [problem("clock", f"{text}: times in history, logs and dead letters do not go together", advice)]


def of_limits(
    what: str, limits: Sequence[Facts], *, connections: int | None, queues: int | None, setter: str
) -> list[Finding]:
    """Limits of a virtual host or a user (``what``), against what is there; ``setter`` is the command for them."""
    values: dict[str, Any] = {}
    for entry in limits:
        value = entry.get("value")
        values |= value if isinstance(value, dict) else {}
    found: list[Finding] = []
    for name, present, needed, whom in (
        ("max-connections", connections, CONNECTIONS, "an aggregator or worker"),
        ("max-queues", queues, QUEUES, "a run"),
    ):
        most = values.get(name)
        if not _is_number(most) or most < 0:
            continue
        text = f"{what} may have {most} {name.removeprefix('max-')}"
        if present is not None:
            text += f", and has {present}"
        text += f"; {whom} needs {needed}"
        if most < needed + (present or 0):
            found.append(problem("limits", text, f"{setter} '{{\"{name}\": {(present or 0) + 10 * needed}}}'"))
        else:
            found.append(ok("limits", text))
    most = values.get("max-channels")
    if _is_number(most) and 0 <= most < 8:
        found.append(
            problem("limits", f"{what} may have {most} channels", f"{setter} '{{\"max-channels\": 64}}'"),
        )
    return found


def _share(node: Facts, used: str, most: str) -> float | None:
    part, whole = node.get(used), node.get(most)
    return part / whole if _is_number(part) and _is_number(whole) and whole > 0 else None


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _size(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
