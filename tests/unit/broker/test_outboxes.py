"""Which chunks nobody will ask for any more: told too early, an update is lost; never told, an outbox is full."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from broker.amqp.outboxes import Outboxes
from broker.topology import Topology
from broker.transport import Delivery, Source, Token

PATIENCE = 100.0
WORKER = "w"


class Desk:
    """Outboxes with a clock of the test's, whose manifests come from one worker."""

    def __init__(self, *, alone: bool = False) -> None:
        self.now = 0.0
        loop = asyncio.get_running_loop()
        cast("Any", loop).time = lambda: self.now
        self._outboxes = Outboxes(Topology("run"), PATIENCE, lambda _delivery: None)
        self._alone = alone
        self._tag = 0
        self.begin()

    def begin(self) -> None:
        self._outboxes.stop()
        self._outboxes.start(cast("Any", None), alone=self._alone)

    def end(self) -> None:
        self._outboxes.stop()

    def announce(self, of: str, *, redelivered: bool = False, worker: str = WORKER) -> Token:
        self._tag += 1
        token = Token(1, self._tag)
        headers: dict[str, str | int] = {"message_id": of, "chunks": 2}
        delivery = Delivery(source=Source.UPDATE, body=b"", headers=headers, token=token, redelivered=redelivered)
        self._outboxes.announce(token, delivery, worker)
        return token

    def settle(self, token: Token) -> None:
        self._outboxes.ack(token)

    def discard(self, of: str, *, worker: str = WORKER) -> None:
        token = self.announce(of, worker=worker)
        headers: dict[str, str | int] = {"message_id": of, "chunks": 2}
        self._outboxes.discard(token, Delivery(source=Source.UPDATE, body=b"", headers=headers, token=token))

    def waste(self) -> list[str]:
        return [wanted.announced.id for wanted in self._outboxes._wanted]

    def rested(self, worker: str) -> None:
        self._outboxes._rested(worker)

    def is_spent(self, of: str, sought: Token, *, before: bool = True) -> bool:
        return self._outboxes._is_spent(of, self._outboxes._announced[sought], before)


def on_a_loop(test: Callable[[], None]) -> Callable[[], None]:
    """The test within a running loop."""

    def run() -> None:
        async def inside() -> None:
            test()

        asyncio.run(inside())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@on_a_loop
def test_an_update_that_was_settled_is_spent_at_once_and_wherever_it_stands() -> None:
    desk = Desk()
    desk.settle(desk.announce("w/i/7"))
    sought = desk.announce("w/i/3")
    assert desk.is_spent("w/i/7", sought, before=False)
    # Of another worker it may be another's
    assert not desk.is_spent("w/i/7", desk.announce("v/i/8", worker="v"))


@on_a_loop
def test_earlier_ones_are_spent_as_soon_as_nobody_else_can_hold_their_manifests() -> None:
    desk = Desk()
    early = desk.announce("w/i/5")
    assert not desk.is_spent("w/i/4", early)
    desk.now = PATIENCE + 1
    # Still: its manifest may have come back behind this one
    assert not desk.is_spent("w/i/4", early)
    late = desk.announce("w/i/6")
    assert desk.is_spent("w/i/4", late)
    assert not desk.is_spent("w/i/7", late)


@on_a_loop
def test_in_a_run_that_begins_there_is_nobody_else() -> None:
    desk = Desk(alone=True)
    assert desk.is_spent("w/i/4", desk.announce("w/i/5"))


@on_a_loop
def test_what_is_announced_is_never_spent() -> None:
    desk = Desk(alone=True)
    other = desk.announce("w/i/4")
    sought = desk.announce("w/i/5")
    assert not desk.is_spent("w/i/4", sought)
    desk.settle(other)
    assert desk.is_spent("w/i/4", sought)


@on_a_loop
def test_after_a_broken_connection_others_may_hold_manifests_again() -> None:
    desk = Desk()
    desk.now = 2 * PATIENCE
    assert desk.is_spent("w/i/4", desk.announce("w/i/5"))
    desk.begin()
    assert not desk.is_spent("w/i/4", desk.announce("w/i/5"))


@on_a_loop
def test_of_another_incarnation_is_spent_what_stands_before_a_new_update_and_has_stood_for_long() -> None:
    desk = Desk(alone=True)
    assert not desk.is_spent("w/h/9", desk.announce("w/i/0"))
    desk.now = PATIENCE - 1
    assert not desk.is_spent("w/h/9", desk.announce("w/i/1"))
    desk.now = PATIENCE + 1
    assert not desk.is_spent("w/h/9", desk.announce("w/i/2"), before=False)
    assert not desk.is_spent("w/h/9", desk.announce("w/i/3", redelivered=True))
    assert desk.is_spent("w/h/9", desk.announce("w/i/4"))


def test_who_is_refused_again_and_again_has_its_outbox_searched_once_in_a_while() -> None:
    async def inside() -> list[str]:
        desk = Desk(alone=True)
        for number in range(50):
            desk.discard(f"w/i/{number}")
        desk.discard("v/i/0", worker="v")
        at_once = desk.waste()
        desk.rested(WORKER)
        desk.rested(WORKER)
        desk.rested("v")
        later = desk.waste()
        desk.discard("w/i/50")
        assert at_once == ["w/i/0", "v/i/0"]
        last = desk.waste()
        desk.end()
        return later[2:] + last[3:]

    # The newest of those that came meanwhile, in whose search the others go; and after a rest, at once.
    assert asyncio.run(inside()) == ["w/i/49", "w/i/50"]
