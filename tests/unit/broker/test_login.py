"""Logging in anew: what stands in the file counts, and what was good has some time to be replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from broker.amqp.login import Login
from broker.errors import AccessRefused, BrokerUnreachable, ConfigError
from broker.settings import BrokerConfig

REFUSED = AccessRefused("h refused the login of user 'w1'")


def config_of(file: Path | None, grace: float = 60.0) -> BrokerConfig:
    url = SecretStr("amqp://w1:unfiled@127.0.0.1/")
    return BrokerConfig(url=url, url_file=file, login_grace=grace)


def filed(tmp_path: Path, password: str) -> Path:
    file = tmp_path / "broker.url"
    file.write_text(f"amqp://w1:{password}@127.0.0.1/v\n")
    file.chmod(0o600)
    return file


def passwords(login: Login) -> list[str]:
    return [one.credentials.password for one in login.parameters()]


def test_each_attempt_takes_what_stands_in_the_file_then(tmp_path: Path) -> None:
    file = filed(tmp_path, "before-it")
    login = Login(config_of(file), "me")
    assert passwords(login) == ["before-it"]

    file.write_text("")  # in the middle of being written
    assert passwords(login) == ["before-it"]

    filed(tmp_path, "after-it")
    assert passwords(login) == ["after-it"]


def test_a_login_that_was_good_is_tried_again_for_a_while_and_one_that_never_was_is_not(tmp_path: Path) -> None:
    now = [100.0]
    login = Login(config_of(filed(tmp_path, "some-word"), grace=30.0), "me", clock=lambda: now[0])
    assert login.refused(REFUSED) is REFUSED

    login.accepted()
    now[0] += 1000
    again = login.refused(REFUSED)
    assert isinstance(again, BrokerUnreachable)
    assert "broker.url_file is read again for another 30 s" in str(again)
    now[0] += 29
    assert isinstance(login.refused(REFUSED), BrokerUnreachable)
    now[0] += 1
    assert login.refused(REFUSED) is REFUSED

    login.accepted()
    assert isinstance(login.refused(REFUSED), BrokerUnreachable)


def test_without_a_file_nothing_could_replace_the_password() -> None:
    login = Login(config_of(None), "me")
    login.accepted()

    assert login.refused(REFUSED) is REFUSED


def test_who_names_no_user_is_guest_and_refused_over_a_network() -> None:
    with pytest.raises(ConfigError, match="who names no user is 'guest'"):
        Login(BrokerConfig(url=SecretStr("amqp://10.0.0.1/")), "me")
    Login(BrokerConfig(url=SecretStr("amqp://[::1]/")), "me")
