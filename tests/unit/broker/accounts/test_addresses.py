"""Addresses for other machines: what stands in them, and how their files are kept."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from broker.accounts.addresses import Addresses, address_of, leads_here
from broker.addresses import addresses_of
from broker.errors import ConfigError

PLACES = "amqps://admin:its-own-word@one.example:5671/other?heartbeat=5, amqp://[::1]:5672"


def test_an_address_has_the_accounts_name_and_nobody_elses_password() -> None:
    text = address_of(PLACES, "my/host", "w1", "p@ss:wörd")

    assert text == (
        "amqps://w1:p%40ss%3Aw%C3%B6rd@one.example:5671/my%2Fhost?heartbeat=5,"
        "amqp://w1:p%40ss%3Aw%C3%B6rd@[::1]:5672/my%2Fhost"
    )
    assert len(addresses_of(text)) == 2
    assert address_of("amqps://h", "v", "w1", None) == "amqps://h/v"  # by certificate


@pytest.mark.parametrize("place", ["rabbit.example", "http://h", "amqps://", "amqp://h:port"])
def test_what_is_no_address_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match="--address"):
        address_of(place, "v", "w1", "word")


def test_a_loopback_address_is_of_use_here_only() -> None:
    assert leads_here("amqp://127.0.0.1:5672/")
    assert leads_here("amqp://rabbit.example,amqp://localhost")
    assert not leads_here("amqp://rabbit.example/,amqp://10.0.0.1")


def test_a_file_is_its_owners_and_stays_as_it_is_until_it_is_renewed(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "accounts"
    addresses = Addresses("amqp://h", "v", folder=folder)
    assert addresses.known("w1") is None

    addresses.keep("w1", "first-word")
    addresses.keep("w1", "second-word")
    assert addresses.known("w1") == "first-word"
    file = folder / "w1.url"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    assert addresses.renew("w1", "second-word") == "amqp://w1:second-word@h/v"
    assert addresses.known("w1") == "second-word"
    assert sorted(path.name for path in folder.iterdir()) == ["w1.url"]


def test_a_folder_that_others_see_and_anothers_file_are_refused(tmp_path: Path) -> None:
    (open_ := tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        Addresses("amqp://h", "v", folder=open_).keep("w1", "some-word")

    (mine := tmp_path / "mine").mkdir(mode=0o700)
    Addresses("amqp://h", "v", folder=mine).keep("w1", "some-word")
    (mine / "w1.url").rename(mine / "w2.url")
    with pytest.raises(ConfigError, match="no address with user 'w2'"):
        Addresses("amqp://h", "v", folder=mine).known("w2")
