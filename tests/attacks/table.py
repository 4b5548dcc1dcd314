"""The table of attacks, as data: what docs/security.md shows, and what each of them is tried by.

Those of the account of somebody who belongs to a federation, or does not, are deeds in ``outsiders``, ``workers`` and
``others``, which ``test_attacks`` does one after the other to a run that goes on. For the rest the row names the test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tests.attacks.harness import Run

__all__ = ["ATTACKS", "ELSEWHERE", "Attack", "By", "Deed", "attack"]

By = Literal["broker", "aggregator", "worker", "fedmq"]
Deed = Callable[["Run"], str]


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack, and how it ends."""

    name: str
    who: str
    """Who attacks."""
    what: str
    by: By
    """Who stops it."""
    answer: str
    """The broker's code and name for the refusal, or the aggregator's reason, or what becomes of it."""
    mechanism: str
    test: str
    """Where it is tried."""
    deed: Deed | None = None
    """Does it, and tells the answer."""


#: By name, in the order in which they are told of and done.
ATTACKS: dict[str, Attack] = {}


def attack(*, who: str, what: str, by: By, answer: str, mechanism: str) -> Callable[[Deed], Deed]:
    """Put the deed that follows into the table, under its own name."""

    def put(deed: Deed) -> Deed:
        name = deed.__name__.replace("_", "-")
        assert name not in ATTACKS, name
        test = f"tests/attacks/test_attacks.py::test_an_attack_is_stopped_and_changes_nothing[{name}]"
        ATTACKS[name] = Attack(name, who, what, by, answer, mechanism, test, deed)
        return deed

    return put


CORPUS = "tests/attacks/test_corpus.py::test_a_run_takes_all_of_them_and_ends_with_the_same_parameters"

#: What other tests try.
ELSEWHERE: tuple[Attack, ...] = (
    Attack(
        "hostile-messages",
        "worker",
        "sends 140 hostile messages: pickles, bombs, overlaps, lies about sizes, not finite values, …",
        "aggregator",
        "each its reason",
        "the decoder's limits (broker/wire/FORMAT.md)",
        CORPUS,
    ),
    Attack(
        "hostile-headers",
        "worker",
        "sends AMQP headers that a client library stumbles over",
        "aggregator",
        "rejected as another message",
        "headers that cannot be read are dropped",
        "tests/attacks/test_corpus.py::test_headers_that_pika_stumbles_over_stop_nobody",
    ),
)
