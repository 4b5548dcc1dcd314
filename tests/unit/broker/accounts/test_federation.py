"""A federation's accounts, as data and as a definitions file."""

from __future__ import annotations

import base64
import hashlib
import json

import pytest

from broker.accounts.federation import Account, Federation, definitions, new_password, password_hash
from broker.errors import ConfigError
from broker.permissions import RESERVED

AGGREGATOR, W1, W2 = Account("aggregator", "aggregator"), Account("w1", "worker"), Account("w2", "worker")


def test_a_hash_is_as_rabbitmqs_page_on_passwords_calculates_it() -> None:
    # The example of https://www.rabbitmq.com/docs/passwords: "test12" with the salt 908D C60A.
    assert password_hash("test12", bytes.fromhex("908DC60A")) == "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR"


@pytest.mark.parametrize(
    ("accounts", "words"),
    [
        ((Account("aggregator", "worker"),), "this name has another meaning"),
        ((W1, Account("w1", "operator")), "'w1' would be the name of 2 accounts"),
        ((Account("w 1", "worker"),), "letters, digits"),
        ((Account("a.b", "monitor"),), "--monitor = 'a.b'"),
    ],
)
def test_names_that_mean_something_else_are_refused(accounts: tuple[Account, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Federation("fed", accounts)


def test_no_worker_is_called_as_what_stands_in_keys_for_somebody_else() -> None:
    for name in RESERVED:
        with pytest.raises(ConfigError):
            Federation("fed", (Account(name, "worker"),))


def test_a_definitions_file_holds_hashes_and_no_password() -> None:
    words = {account.name: new_password() for account in (AGGREGATOR, W1)}
    made = definitions(Federation("fed", (AGGREGATOR, W1, W2)), words, administrator="administrator")

    text = json.dumps(made)
    assert not [word for word in words.values() if word in text]
    users = {user["name"]: user for user in made["users"]}
    salted = base64.b64decode(users["w1"]["password_hash"])
    assert salted[4:] == hashlib.sha256(salted[:4] + words["w1"].encode()).digest()
    assert users["w2"]["password_hash"] == ""  # nobody gets in by a password then
    assert {name: user["tags"] for name, user in users.items()} == {
        "aggregator": [],
        "w1": [],
        "w2": [],
        "administrator": ["administrator"],
    }
    assert users["w1"]["limits"]["max-connections"] == 8
    assert {row["vhost"] for kind in ("permissions", "topic_permissions", "policies") for row in made[kind]} == {"fed"}
    assert made["parameters"][0]["value"] == {"max-connections": 2000, "max-queues": 5000}
