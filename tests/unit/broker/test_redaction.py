"""No password comes out: of addresses, well formed or not, and of whatever quotes one."""

from __future__ import annotations

import base64
import sys
import threading
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import redaction
from broker.console import set_up_logging
from broker.redaction import conceal, harmless, redacted

SECRET = "pl4nted-s3cret"  # noqa: S105 (of nothing)
#: What a password may hold that means something in an address.
SPECIAL = "p@ss:w/o?r#d,%&=[]"


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    before = set(redaction._known)
    yield
    redaction._known.clear()
    redaction._known.update(before)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (f"amqp://me:{SECRET}@host:5672/v", "amqp://me:***@host:5672/v"),
        (f"amqp://me:{SPECIAL}@host:5672/v", "amqp://me:***@host:5672/v"),
        (f"amqp://me:{SECRET}\nand more@host", "amqp://me:***@host"),
        (f"amqp://m/e@x:{SECRET}@host", "amqp://m/e@x:***@host"),
        (f"me:{SECRET}@host", "me:***@host"),
        (f"amqp:/me:{SECRET}@host", "amqp:***@host"),
        (f"amqp://me:{SECRET}", "amqp://me:***"),
        (f"amqp://me:123{SECRET}", "amqp://me:***"),
        ("amqp://me:1234567", "amqp://me:***"),
        ("amqp://host:5672/v", "amqp://host:5672/v"),
        ("amqp://host:5672", "amqp://host:5672"),
        ("amqp://[::1]:5672/", "amqp://[::1]:5672/"),
        ("amqp://host/v?heartbeat=5", "amqp://host/v?heartbeat=5"),
        ("amqp://me@host/", "amqp://me@host/"),
        ("aggregator.buffer_size", "aggregator.buffer_size"),
        ("", ""),
    ],
)
def test_an_address_is_shown_without_its_password(address: str, shown: str) -> None:
    assert redacted(address) == shown
    assert redacted(shown) == shown


@given(st.text(min_size=1), st.text(alphabet=st.characters(exclude_characters=":"), max_size=5))
def test_whatever_the_password_nothing_of_it_is_left(password: str, user: str) -> None:
    shown = redacted(f"amqp://{user}:{password}@host/")
    # A scheme within the user's name is no scheme.
    assert shown == f"amqp://{user}:***@host/"


@pytest.mark.parametrize("password", [SECRET, SPECIAL])
def test_a_text_with_addresses_is_shown_without_their_passwords(password: str) -> None:
    text = f"neither amqp://a:{password}@one:5672/ nor 'amqps://b:{password}@two' answers; ask me@example.org"
    assert harmless(text) == "neither amqp://a:***@one:5672/ nor 'amqps://b:***@two' answers; ask me@example.org"
    assert harmless("http://127.0.0.1:15672/api does not answer") == "http://127.0.0.1:15672/api does not answer"


@pytest.mark.parametrize("password", [SECRET, SPECIAL, "with spaces in it 1"])
def test_a_password_that_was_read_is_known_in_every_form(password: str) -> None:
    basic = base64.b64encode(f"me:{password}".encode()).decode()
    forms = (password, quote(password, safe=""), basic)
    text = " and ".join(f"<{form}>" for form in forms)
    assert harmless(text) == text
    conceal(quote(password, safe=""), "me")
    assert harmless(text) == "<***> and <***> and <***>"


@pytest.mark.parametrize("password", ["", "guest", "s3cret!", "password", "Correcthorse"])
def test_what_is_a_word_of_ordinary_text_is_no_known_secret(password: str) -> None:
    conceal(password)
    text = f"check user and {password} in broker.url"
    assert harmless(text) == text


def test_the_longest_of_two_passwords_is_hidden_whole() -> None:
    conceal("abcdefg1")
    conceal("abcdefg1-and-more")
    assert harmless("abcdefg1-and-more") == "***"


def test_a_crash_is_told_without_passwords(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    conceal(SECRET)
    set_up_logging()

    def crash() -> None:
        raise KeyError(f"{SECRET} or amqp://u:{SPECIAL}@h/")

    thread = threading.Thread(target=crash, name="pump")
    thread.start()
    thread.join()
    told = capsys.readouterr().err
    assert "Exception in thread pump:" in told
    assert "in crash" in told
    assert "KeyError: '*** or amqp://u:***@h/'" in told

    try:
        crash()
    except KeyError as error:
        sys.excepthook(KeyError, error, error.__traceback__)
    told = capsys.readouterr().err
    assert told.startswith("Traceback")
    assert "KeyError: '*** or amqp://u:***@h/'" in told


def test_what_a_terminal_would_obey_is_replaced_and_lines_stay_lines() -> None:
    assert harmless("a\x1b[2Jb\x9bc\u202ed\r\te\nf") == "a\ufffd[2Jb\ufffdc\ufffdd\ufffd\te\nf"
