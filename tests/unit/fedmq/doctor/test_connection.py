"""What the doctor makes of how a broker greets and of what was tried."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from broker.amqp.trial import ROLES, Examination, Greeting, Role, Tls, Trial
from broker.errors import AccessRefused, BrokerUnreachable, ConnectionLost, TopologyMismatch, Unroutable
from broker.permissions import commands, rights_of
from fedmq.doctor.connection import (
    TESTED,
    of_greeting,
    of_power,
    of_sizes,
    of_trials,
    without_advice_of_power,
)
from fedmq.doctor.findings import Finding, Level, note, worst
from tests.support.commands import ROOT

GREETING = Greeting(
    "host:5672",
    "/",
    "anna",
    product="RabbitMQ 3.10.8",
    version=(3, 10, 8),
    channel_max=2047,
    frame_max=131072,
    heartbeat=30,
    seconds=0.01,
    tls=Tls("TLSv1.3", "TLS_AES_256_GCM_SHA384", 300.0),
)
REFUSED = AccessRefused("refused … topic): ACCESS_REFUSED - access to queue 'q' in vhost '/' refused")
OF_TOPIC = AccessRefused("refused … topic): ACCESS_REFUSED - access to topic 'r.w' in exchange 'fedmq.updates' refused")


def levels(findings: list[Finding]) -> dict[str, Level]:
    return {finding.area: finding.level for finding in findings}


def texts(findings: list[Finding], level: Level) -> str:
    return "\n".join(f"{finding.text} {finding.advice}" for finding in findings if finding.level is level)


def test_a_broker_as_it_should_be_gives_no_note() -> None:
    assert worst(of_greeting(GREETING, heartbeat=30)) is Level.OK


def test_on_this_machine_no_tls_is_needed() -> None:
    assert worst(of_greeting(replace(GREETING, address="127.0.0.1:5672", tls=None), heartbeat=30)) is Level.OK


def test_the_versions_that_count_as_tested_are_those_that_the_docs_name() -> None:
    page = (ROOT / "docs" / "rabbitmq-versions.md").read_text()

    for version in TESTED:
        assert f"\n| {'.'.join(map(str, version))} (" in page


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({"version": (3, 13, 7), "product": "RabbitMQ 3.13.7"}, Level.NOTE, "3.13.7"),
        ({"heartbeat": 0}, Level.PROBLEM, "heartbeat = 30"),
        ({"channel_max": 4}, Level.PROBLEM, "channel_max"),
        ({"frame_max": 4096}, Level.NOTE, "frame_max"),
        ({"seconds": 3.0}, Level.NOTE, "3.0 s"),
        ({"tls": None}, Level.NOTE, "without TLS: passwords and models can be read"),
        (
            {"tls": Tls("TLSv1.2", "some", 20.4)},
            Level.NOTE,
            "TLSv1.2 with some; the broker's certificate expires in 20",
        ),
        ({"error": BrokerUnreachable("host:5672: Connection refused")}, Level.PROBLEM, "Connection refused"),
        ({"error": REFUSED}, Level.PROBLEM, "refused"),
    ],
)
def test_what_is_otherwise_is_named_with_what_to_change(change: dict[str, object], level: Level, words: str) -> None:
    found = of_greeting(replace(GREETING, **change), heartbeat=30)  # type: ignore[arg-type]

    assert worst(found) is level
    assert words in texts(found, level)


def trials(aggregator: Exception | None, worker: Exception | None) -> Examination:
    return Examination(
        [GREETING],
        [Trial("aggregator", "declare it", aggregator), Trial("worker", "publish it", worker)],  # type: ignore[arg-type]
    )


def verdicts(examination: Examination, roles: tuple[Role, ...] = ROLES, *, is_asked: bool = False) -> list[Level]:
    found = of_trials(examination, "r", "w", roles=roles, is_asked=is_asked)
    return [finding.level for finding in found]


def test_what_was_not_tried_for_an_alarm_is_not_called_permitted() -> None:
    blocked = trials(None, None)
    blocked.is_blocked = True

    assert verdicts(blocked) == [Level.OK, Level.OK, Level.NOTE]


def test_of_two_roles_one_is_enough_unless_it_was_asked_for() -> None:
    assert verdicts(trials(None, None)) == [Level.OK, Level.OK]
    assert verdicts(trials(REFUSED, None)) == [Level.NOTE, Level.OK]
    assert verdicts(trials(None, REFUSED)) == [Level.OK, Level.NOTE]
    assert verdicts(trials(REFUSED, REFUSED)) == [Level.PROBLEM, Level.PROBLEM]
    assert verdicts(trials(REFUSED, None), ("aggregator",), is_asked=True) == [Level.PROBLEM]


def test_what_is_not_there_could_not_be_tried_and_is_no_refusal() -> None:
    (found,) = of_trials(trials(None, Unroutable("NOT_FOUND")), "r", "w", roles=("worker",), is_asked=True)

    assert found.level is Level.NOTE
    assert "publish it" in found.text


def test_an_object_of_another_kind_and_a_broken_connection_are_problems_of_their_own() -> None:
    mismatch = of_trials(trials(TopologyMismatch("queue 'q' exists"), None), "r", "w", roles=ROLES, is_asked=False)
    broken = of_trials(trials(ConnectionLost("no answer in 10 s"), None), "r", "w", roles=ROLES, is_asked=False)

    assert levels(mismatch)["objects"] is Level.PROBLEM
    assert "no answer" in texts(broken, Level.PROBLEM)


def test_a_command_gives_what_is_missing_and_topics_only_where_a_topic_was_refused() -> None:
    def advice(error: AccessRefused) -> str:
        (found,) = of_trials(trials(None, error), "r", "w", roles=("worker",), is_asked=True)
        return found.advice

    assert advice(REFUSED).startswith("rabbitmqctl set_permissions -p / anna ")
    assert "set_topic_permissions" not in advice(REFUSED)
    assert "set_topic_permissions -p / anna fedmq.updates '^r\\.w(\\.chunk)?$'" in advice(OF_TOPIC)


def test_odd_names_are_quoted_for_the_shell() -> None:
    first = commands(rights_of("worker", "o'neil; rm", run="r", worker="w"), "my host", "o'neil; rm")[0]

    assert shlex.split(first)[:5] == ["rabbitmqctl", "set_permissions", "-p", "my host", "o'neil; rm"]


def test_a_message_that_is_too_large_is_a_note_since_fedmq_cuts_smaller_ones() -> None:
    fits = of_sizes(Examination(largest=4_195_328), chunk_bytes=2**22)
    small = of_sizes(Examination(largest=4_195_328, limit=2**20), chunk_bytes=2**22)
    tiny = of_sizes(Examination(largest=4_195_328, limit=70_000), chunk_bytes=2**22)

    assert worst(fits) is Level.OK
    assert worst(small) is Level.NOTE
    assert "broker.chunk_bytes = 524288" in texts(small, Level.NOTE)
    assert worst(tiny) is Level.PROBLEM


def test_a_broker_that_takes_nothing_is_a_problem() -> None:
    assert worst(of_sizes(Examination(is_blocked=True), chunk_bytes=2**22)) is Level.PROBLEM


def test_a_workers_account_that_can_do_more_is_told_of() -> None:
    def found(user: str, tags: tuple[str, ...] = (), *excess: str, worker: str = "w1") -> list[Finding]:
        examination = Examination(greetings=[Greeting("h:1", "fed", user)], excess=list(excess))
        return of_power(examination, worker, tags)

    (well,) = found("w1")
    assert (well.level, "nothing that a worker does not need" in well.text) == (Level.OK, True)

    (much,) = found("w1", ("monitoring", "administrator"), "give the aggregator commands")
    assert much.level is Level.NOTE
    assert "log in to the admin UI as administrator, give the aggregator commands" in much.text
    assert much.advice == "an account of its own: fedmq broker add-worker w1 --vhost fed"

    _, other = found("anna")
    assert "wrong-user" in other.text
    assert "--name anna" in other.advice
    assert of_power(Examination(greetings=[Greeting("h:1", "/", "w1", ConnectionLost("gone"))]), "w1", ()) == []


def test_a_worker_is_not_advised_to_become_more_powerful() -> None:
    refused = note("management", "not looked at: alarms (user 'w1' may not use the admin UI at h: give it the tag …)")
    away = note("management", "not looked at: alarms (the admin UI at h does not answer)")
    other = note("limits", "few")

    (first, second) = without_advice_of_power([refused, other])
    assert (first, second.level) == (other, Level.OK)
    assert "tag" not in second.text
    assert without_advice_of_power([away, other]) == [away, other]
