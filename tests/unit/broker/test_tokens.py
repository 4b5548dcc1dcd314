"""What a token says of itself, and when its file is looked at again."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from broker.amqp.credentials import TokenBearer, account_of, parameters
from broker.amqp.refusals import Place
from broker.amqp.renewal import LONGEST_LOOK, SHORTEST_LOOK, look_after
from broker.errors import ConfigError
from broker.redaction import harmless
from broker.secretfiles import write_secret
from broker.settings import BrokerConfig
from broker.tokens import Token, read_token, token_of
from tests.support.tokens import jwt


def unsigned(claims: Any) -> str:
    return f"x.{base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip('=')}.y"


def test_what_a_token_says() -> None:
    token = token_of(unsigned({"exp": 12.5, "sub": "s", "client_id": "c"}))
    assert (token.expires, token.subject, token.client) == (12.5, "s", "c")
    assert [token.account(version) for version in ((), (3, 10, 8), (3, 11, 0), (4, 1, 0))] == ["s", "c", "s", "s"]
    assert token_of(unsigned({"sub": "s"})).account((3, 10, 8)) == "s"
    assert token_of(unsigned({"client_id": "c"})).account((4, 0, 5)) == "c"


@pytest.mark.parametrize(
    "text", ["opaque", "a.b.c", "a..c", unsigned([1]), unsigned("x"), f"x.{'W' * 99_999}.y", "é.é.é"]
)
def test_what_is_no_jwt_says_nothing(text: str) -> None:
    assert token_of(text) == Token(text)


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": "soon", "sub": 7},
        {"exp": None, "sub": None},
        {},
        *({"exp": moment} for moment in (10**400, float("nan"), float("inf"), True)),
    ],
)
def test_claims_of_other_kinds_are_none(claims: dict[str, Any]) -> None:
    token = token_of(unsigned(claims))
    assert (token.expires, token.account()) == (None, "")


def test_a_token_is_a_secret(tmp_path: Path) -> None:
    text = jwt(sub="w1")
    write_secret(tmp_path / "token", f"{text}\n".encode())
    token = read_token(tmp_path / "token")
    assert token.text == text
    assert text not in repr(token)
    assert text not in harmless(f"refused {text}")
    (tmp_path / "token").chmod(0o644)
    with pytest.raises(ConfigError, match=r"broker\.token_file .*chmod 600"):
        read_token(tmp_path / "token")
    write_secret(tmp_path / "two", b"one two")
    with pytest.raises(ConfigError, match=r"holds more than a token"):
        read_token(tmp_path / "two")


@pytest.mark.parametrize(
    ("expires", "seconds"),
    [(None, LONGEST_LOOK), (1000.0, LONGEST_LOOK), (50.0, 8.0), (10.5, SHORTEST_LOOK), (3.0, SHORTEST_LOOK)],
)
def test_the_file_is_looked_at_more_often_towards_the_end(expires: float | None, seconds: float) -> None:
    assert look_after(Token("t", expires=expires), now=10.0) == pytest.approx(seconds)


def config(tmp_path: Path, url: str, token: str) -> BrokerConfig:
    file = tmp_path / "token"
    file.unlink(missing_ok=True)
    write_secret(file, token.encode())
    return BrokerConfig.model_validate({"url": url, "token_file": file})


def test_the_token_is_the_password_and_names_the_account(tmp_path: Path) -> None:
    text = jwt(60, sub="s", client_id="c")
    (one,) = parameters(config(tmp_path, "amqps://h/v", text), "n")
    assert isinstance(one.credentials, TokenBearer)
    assert (one.credentials.username, one.credentials.password, one.virtual_host) == ("s", text, "v")
    assert one.credentials.account((3, 10, 8)) == "c"
    place = Place.of(one)
    assert (place.login, place.is_encrypted, place.has_expired) == ("token", True, False)
    assert text not in repr(place)

    (named,) = parameters(config(tmp_path, "amqps://w1@h/", text), "n")
    assert named.credentials.account((3, 10, 8)) == named.credentials.account((4, 0, 5)) == "w1"
    assert Place.of(parameters(config(tmp_path, "amqps://h/", jwt(-60, sub="s")), "n")[0]).has_expired


def test_a_token_with_a_password_or_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"names a password, and broker\.token_file is one, too"):
        parameters(config(tmp_path, "amqps://u:p@h/", jwt(sub="s")), "n")
    with pytest.raises(ConfigError, match=r"name the account in broker\.url"):
        parameters(config(tmp_path, "amqps://h/", "opaque"), "n")
    assert account_of(config(tmp_path, "amqps://w1@h/", "opaque")) == "w1"
