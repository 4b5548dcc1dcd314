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


BLAME = "blame follows the validated `user_id`"

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


#: What other tests try.
ELSEWHERE: tuple[Attack, ...] = (
    Attack(
        "hostile-messages",
        "worker",
        "sends 140 hostile messages: pickles, bombs, overlaps, lies about sizes, not finite values, …",
        "aggregator",
        "each its reason",
        "the decoder's limits (broker/wire/FORMAT.md)",
        "tests/attacks/test_corpus.py::test_a_run_takes_all_of_them_and_ends_with_the_same_parameters",
    ),
    Attack(
        "hostile-headers",
        "worker",
        "sends AMQP headers that a client library stumbles over",
        "aggregator",
        "rejected as other messages",
        "headers that cannot be read are dropped",
        "tests/attacks/test_corpus.py::test_headers_that_pika_stumbles_over_stop_nobody",
    ),
    Attack(
        "code-on-the-wire",
        "anybody",
        "sends something that runs when it is decoded",
        "fedmq",
        "no such code",
        "nothing that receives can execute: no pickle, eval, torch.load in what is shipped",
        "tests/architecture/test_no_execution.py::test_no_shipped_file_can_run_code_from_data",
    ),
    Attack(
        "rubbish-without-end",
        "worker",
        "floods the run with rubbish",
        "aggregator",
        "`too-many`, unread",
        "an allowance for each account",
        "tests/integration/test_bad_worker.py::test_a_flood_of_rubbish_is_refused_unread_and_not_kept",
    ),
    Attack(
        "framing",
        "worker",
        "misbehaves in another's name, so that the other is quarantined",
        "aggregator",
        "the account answers for it",
        BLAME,
        "tests/integration/test_bad_worker.py::test_whoever_speaks_in_another_s_name_answers_for_it_and_the_other_does_not",
    ),
    Attack(
        "the-same-for-ever",
        "worker",
        "sends its own old update again and again",
        "aggregator",
        "counts once",
        "the ledger of ids",
        "tests/integration/test_bad_worker.py::test_the_same_update_for_ever_counts_once_and_costs_ever_less",
    ),
    Attack(
        "giants",
        "worker",
        "sends giant messages, floods of events",
        "aggregator",
        "`too-large`, `too-many`",
        "limits of size and rate",
        "tests/integration/test_bad_worker.py::test_giant_messages_and_floods_of_events_are_passed_over",
    ),
    Attack(
        "man-in-the-middle",
        "network",
        "answers in the broker's place, with a certificate of another authority or none",
        "fedmq",
        "`Untrusted`",
        "TLS, verified always",
        "tests/integration/test_tls.py::test_a_broker_that_must_not_be_trusted_is_left_alone",
    ),
    Attack(
        "listening",
        "network",
        "listens, where somebody has configured plain AMQP to another machine",
        "fedmq",
        "refused before anything is sent",
        "`broker.allow_plain` must say so",
        "tests/integration/test_tls.py::test_a_plain_address_elsewhere_is_refused_before_anything_is_sent",
    ),
    Attack(
        "wrong-certificate",
        "outsider",
        "shows a certificate of another authority, an expired one, or one whose name has no account",
        "broker",
        "connection closed",
        "mutual TLS",
        "tests/integration/test_tls.py::test_who_must_not_be_let_in_is_not",
    ),
    Attack(
        "forging-administrator",
        "whoever runs the broker",
        "forges, changes and replays updates, versions, notices, commands",
        "aggregator",
        "`not-signed`, `bad-signature`; workers wait for a good one",
        "signatures (Ed25519)",
        "tests/integration/test_signatures.py::test_what_the_brokers_administrator_forges_changes_and_replays_is_refused",
    ),
    Attack(
        "copied-secrets",
        "another user of a machine",
        "reads a file with a password or a key",
        "fedmq",
        "`ConfigError`: chmod 600",
        "files that others may read are refused",
        "tests/unit/broker/test_secretfiles.py::test_a_file_of_everybody_is_refused_with_what_to_do",
    ),
    Attack(
        "searching-logs",
        "whoever sees logs, reports, the page",
        "looks for a password there",
        "fedmq",
        "found nowhere",
        "redaction at one place",
        "tests/integration/test_planted_secret.py::test_it_is_found_nowhere",
    ),
)
