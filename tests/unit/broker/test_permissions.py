"""What each role may do, as the expressions say it; that a broker keeps to them is tried elsewhere."""

from __future__ import annotations

import re
import shlex

import pytest

from broker.permissions import ACCOUNT_ROLES, AccountRole, Rights, commands, rights_of
from broker.topology import CONTROL, DEAD, EVENTS, UPDATES, Topology

RUN = Topology("digits")
ALL = {
    *(exchange.name for exchange in RUN.exchanges()),
    *(queue.name for queue in RUN.queues("classic", 0)),
    *(RUN.outbox(worker) for worker in ("w1", "w2")),
    *(RUN.notices(worker) for worker in ("w1", "w2")),
    *(RUN.own_queue(what, "c0ffee00") for what in ("events", "watch")),
}


def covered(expression: str) -> set[str]:
    return {name for name in ALL if re.search(expression, name)}


def may(rights: Rights, exchange: str, key: str, name: str, *, read: bool = False) -> bool:
    """As RabbitMQ decides: an exchange without an entry is open."""
    for topic in rights.topics:
        if topic.exchange == exchange:
            return bool(re.search((topic.read if read else topic.write).replace("{username}", name), key))
    return True


def test_a_worker_declares_nothing_and_reads_versions_and_its_own_notices() -> None:
    rights = rights_of("worker", "w1")

    assert covered(rights.configure) == set()
    assert not re.search(rights.configure, "amq.gen-7")
    assert covered(rights.write) == {UPDATES, CONTROL, EVENTS}
    assert covered(rights.read) == {RUN.parameters, RUN.chunks, RUN.notices("w1")}
    assert rights.tags == ()


@pytest.mark.parametrize("name", ["w1", "w", "w10", "W1", "w1-evaluator"])
def test_under_its_own_name_a_worker_says_what_workers_say_and_under_no_other(name: str) -> None:
    rights = rights_of("worker", name)

    for own in (RUN.key(name), RUN.chunk_key(name)):
        assert may(rights, UPDATES, own, name)
    assert may(rights, CONTROL, RUN.key(name), name)
    for kind in ("heartbeat", "progress", "evaluation", "check"):
        assert may(rights, EVENTS, RUN.event_key(kind, name), name)
        assert not may(rights, EVENTS, RUN.event_key(kind, "w2"), name)
    for key in (RUN.key("w2"), RUN.chunk_key("w2"), f"{RUN.key(name)}x", f"a.{RUN.key(name)}", "#", ""):
        assert not may(rights, UPDATES, key, name)
    for key in (RUN.key("w2"), RUN.command_key, RUN.turn_key, RUN.chunk_key(name)):
        assert not may(rights, CONTROL, key, name)
    for kind in ("notice", "status"):
        assert not may(rights, EVENTS, RUN.event_key(kind, name), name)
    for key in ("#", "digits.#", "digits.*.*", RUN.notice_key(name), RUN.event_key("heartbeat", name)):
        assert not may(rights, EVENTS, key, name, read=True)


def test_who_looks_reads_events_and_nothing_else() -> None:
    rights, own = rights_of("monitor", "monitor"), RUN.own_queue("watch", "c0ffee00")

    assert covered(rights.configure) == covered(rights.write) == {own}
    assert covered(rights.read) == {EVENTS, RUN.parameters, own}
    assert may(rights, EVENTS, "digits.#", "monitor", read=True)
    assert not may(rights, EVENTS, RUN.event_key("heartbeat", "w1"), "monitor")


def test_an_operator_commands_and_has_the_dead_letters() -> None:
    rights, own = rights_of("operator", "operator"), RUN.own_queue("watch", "c0ffee00")

    assert covered(rights.configure) == {own}
    assert covered(rights.write) == {UPDATES, CONTROL, own}
    assert covered(rights.read) == {EVENTS, RUN.parameters, RUN.dead, own}
    assert may(rights, CONTROL, RUN.command_key, "operator")
    assert not may(rights, CONTROL, RUN.turn_key, "operator")
    assert may(rights, UPDATES, RUN.key("w2"), "operator")
    assert not may(rights, UPDATES, RUN.chunk_key("w2"), "operator")


def test_an_aggregator_has_all_of_fedmq_and_nothing_beside_it() -> None:
    rights = rights_of("aggregator", "aggregator")

    for expression in (rights.configure, rights.write, rights.read):
        assert covered(expression) == ALL
        assert not [name for name in ("amq.default", "amq.topic", "orders", "xfedmq.a") if re.search(expression, name)]


@pytest.mark.parametrize("role", ACCOUNT_ROLES)
def test_of_one_run_they_are_for_no_other(role: AccountRole) -> None:
    rights = rights_of(role, "me", run="digits")

    for expression in (rights.configure, rights.write, rights.read):
        assert not re.search(expression, Topology("other").own_queue("watch", "c0"))
        assert not re.search(expression, Topology("other").parameters)
    for exchange in (UPDATES, CONTROL, DEAD, EVENTS):
        assert role != "aggregator" or not may(rights, exchange, "other.me", "me")


def test_as_commands_they_are_whole_words_for_a_shell() -> None:
    first, *topics = commands(rights_of("worker", "w1"), "my host", "w1")

    assert first.startswith("rabbitmqctl set_permissions -p 'my host' w1 '^$' '^fedmq")
    assert [shlex.split(line)[5] for line in topics] == [UPDATES, CONTROL, EVENTS]
    assert all("{username}" in line for line in topics)
