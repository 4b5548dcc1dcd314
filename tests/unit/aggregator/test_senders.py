"""Who may speak in whose name, by the account that the broker vouches for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from aggregator.core import events as on
from aggregator.reading import from_aside, read_update
from aggregator.senders import Senders
from broker.errors import ConfigError, WireError
from broker.messages import Event, EventKind, Goodbye, Hello, Reason, Role
from broker.transport import Delivery, Source, Token
from broker.wire import encode
from tests.support.builders import RUN, update_of, vector

SENDERS = Senders("aggregator", frozenset({"olga"}))
TOKEN = Token(1, 1)


def update_from(user: str, worker: str = "w1", body: bytes | None = None) -> Delivery:
    content = encode(update_of({"w": vector(1.0)}, worker=worker)) if body is None else body
    return Delivery(source=Source.UPDATE, body=content, headers={"worker": worker}, user=user, token=TOKEN)


@pytest.mark.parametrize("user", ["w1", "aggregator", "olga"])
def test_a_worker_s_own_account_the_aggregator_s_and_a_trusted_one_may(user: str) -> None:
    assert isinstance(read_update(TOKEN, update_from(user), SENDERS), on.Arrived)


@pytest.mark.parametrize("user", ["w2", "W1", "w1 ", "monitor"])
def test_any_other_account_may_not_and_answers_for_it_itself(user: str) -> None:
    refused = read_update(TOKEN, update_from(user), SENDERS)
    assert isinstance(refused, on.Unreadable)
    assert (refused.reason, refused.worker, refused.update) == (Reason.WRONG_USER, user, None)
    assert repr(user) in refused.detail
    assert "'w1'" in refused.detail


def test_nobody_answers_for_what_the_broker_vouches_for_nobody() -> None:
    refused = read_update(TOKEN, update_from(""), Senders(""))
    assert isinstance(refused, on.Unreadable)
    assert (refused.reason, refused.worker, refused.update) == (Reason.NO_USER, "", None)


def test_for_what_cannot_be_read_its_sender_answers_and_not_whom_it_names() -> None:
    broken = read_update(TOKEN, update_from("w2", "w1", b"broken"), SENDERS)
    assert isinstance(broken, on.Unreadable)
    assert (broken.reason, broken.worker) == (Reason.MALFORMED, "w2")
    shared = read_update(TOKEN, update_from("aggregator", "w1", b"broken"), SENDERS)
    assert isinstance(shared, on.Unreadable)
    assert shared.worker == "w1"


MESSAGES: list[Callable[[], Hello | Goodbye | Event]] = [
    lambda: Hello(run=RUN, worker="w1", incarnation="i", role=Role.TRAINER),
    lambda: Goodbye(run=RUN, worker="w1", incarnation="i"),
    lambda: Event(run=RUN, source="w1", kind=EventKind.HEARTBEAT, time=1.0, data={"incarnation": "i"}),
    lambda: Event(run=RUN, source="w1", kind=EventKind.EVALUATION, time=1.0, data={"version": 0, "loss": 1.0}),
]


@pytest.mark.parametrize("make", MESSAGES)
def test_hellos_goodbyes_and_events_are_held_to_the_same(make: Callable[[], Hello | Goodbye | Event]) -> None:
    delivery = Delivery(source=Source.CONTROL, body=encode(make()), user="w1")
    assert from_aside(delivery, RUN, 3, senders=SENDERS) is not None
    for user in ("w2", ""):
        with pytest.raises(WireError, match=r"account 'w2' speaks|no user id"):
            from_aside(replace(delivery, user=user), RUN, 3, senders=SENDERS)


@pytest.mark.parametrize("user", ["operator", "aggregator", "olga"])
def test_operators_give_commands(user: str) -> None:
    SENDERS.require_operator(user)


@pytest.mark.parametrize("user", ["", "w1", "Operator", "operator "])
def test_nobody_else_does(user: str) -> None:
    with pytest.raises(ConfigError, match=r"may give no commands: .* aggregator\.trusted_users"):
        SENDERS.require_operator(user)
