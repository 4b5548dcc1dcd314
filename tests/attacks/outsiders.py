"""Attacks of those who have no account, or one that has nothing to do with this federation."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import pika
import pika.exceptions

from broker.errors import AccessRefused
from tests.attacks.harness import Account, Run, answer_of
from tests.attacks.table import attack

LOGIN = "login"


def _login(run: Run, account: Account, **how: str) -> str:
    return answer_of(lambda: run.federation.connect(account, **how).close())


@attack(
    who="outsider", what="logs in as `guest`", by="broker", answer="403 ACCESS_REFUSED", mechanism="no such account"
)
def guest(run: Run) -> str:
    return _login(run, Account("guest", "guest"))


@attack(
    who="outsider",
    what="logs in as a worker with a wrong password",
    by="broker",
    answer="403 ACCESS_REFUSED",
    mechanism=LOGIN,
)
def wrong_password(run: Run) -> str:
    return _login(run, run.federation.crew[0], password=secrets.token_hex(8))


@attack(
    who="former worker",
    what="logs in with an account that was removed",
    by="broker",
    answer="403 ACCESS_REFUSED",
    mechanism=LOGIN,
)
def removed_account(run: Run) -> str:
    account = run.federation.account("worker", "former")
    assert _login(run, account) == "done"
    run.federation.remove(account)
    return _login(run, account)


@attack(
    who="outsider",
    what="logs in without a name (ANONYMOUS)",
    by="broker",
    answer="no such mechanism",
    mechanism="`auth_mechanisms` (RabbitMQ 4 must be told to leave ANONYMOUS out)",
)
def anonymous(run: Run) -> str:
    class Anonymous:
        TYPE = "ANONYMOUS"
        erase_on_connect = False

        def response_for(self, start: pika.spec.Connection.Start) -> tuple[str | None, bytes | None]:
            offered = start.mechanisms if isinstance(start.mechanisms, bytes) else str(start.mechanisms).encode()
            return ("ANONYMOUS", b"") if b"ANONYMOUS" in offered.split() else (None, None)

        def erase_credentials(self) -> None:
            pass

    parameters = pika.URLParameters(run.federation.node.url)
    pika.credentials.VALID_TYPES.append(Anonymous)
    try:
        parameters.credentials = Anonymous()
        connection = pika.BlockingConnection(parameters)
        connection.close()
    except pika.exceptions.AuthenticationError:
        return "no such mechanism"
    finally:
        pika.credentials.VALID_TYPES.remove(Anonymous)
    return "done"


@attack(
    who="another federation's worker",
    what="connects to this federation's virtual host",
    by="broker",
    answer="530 NOT_ALLOWED",
    mechanism="a virtual host for each federation",
)
def other_federation(run: Run) -> str:
    return _login(run, run.federation.stranger)


@attack(
    who="worker",
    what="logs in to the management API: reads messages, makes accounts, sets policies and limits",
    by="broker",
    answer="401",
    mechanism="no tag",
)
def worker_in_the_api(run: Run) -> str:
    return in_the_api(run, run.federation.mallory)


def in_the_api(run: Run, account: Account) -> str:
    """What the API answers to an account that would change something there."""
    federation = run.federation
    api, queue = federation.api(account), f"/queues/{federation.vhost}/{run.topology.updates}"
    asked = {"count": 1, "ackmode": "ack_requeue_true", "encoding": "auto"}
    refusals = 0
    deeds: list[Callable[[], object]] = [
        lambda: api._request("POST", f"{queue}/get", body=asked),
        lambda: api._request("DELETE", f"{queue}/contents"),
        lambda: api._request("DELETE", queue),
        lambda: api.put(f"/users/{account.name}", {"password": "x", "tags": "administrator"}),
        lambda: api.put(
            f"/permissions/{federation.vhost}/{account.name}", {"configure": ".*", "write": ".*", "read": ".*"}
        ),
        lambda: api.put(f"/user-limits/{account.name}/max-connections", {"value": -1}),
        lambda: api.put(f"/policies/{federation.vhost}/mine", {"pattern": ".*", "definition": {"message-ttl": 0}}),
    ]
    for deed in deeds:
        try:
            deed()
        except AccessRefused:
            refusals += 1
    return "401" if refusals == len(deeds) else f"{refusals} of {len(deeds)} refused"
