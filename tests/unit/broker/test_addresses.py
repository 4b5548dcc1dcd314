"""Addresses of a broker: what is one, and that a wrong one is refused without a word of what stands in it."""

from __future__ import annotations

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.addresses import addresses_of, holds_password
from broker.amqp.refusals import Place
from broker.errors import ConfigError


@pytest.mark.parametrize(
    "text",
    [
        "amqp://guest:guest@127.0.0.1:5672/",
        "amqps://me:p%40ss%3Aw%2Ford@rabbit.example:5671/vhost",
        "amqp://me:p@ss:word@host/",
        "amqp://host",
        "amqp://[::1]:5672/%2F",
        "amqp:///vhost",
        "amqp://me@host/v%40x?heartbeat=5",
    ],
)
def test_an_address_is_one(text: str) -> None:
    assert addresses_of(text) == (text,)
    assert addresses_of(f" {text} ,\n{text},") == (text, text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        (" , ", "is empty"),
        ("hu:sh@host", "begins with amqp://"),
        ("http://u:hush@host/", "begins with amqp://"),
        ("amqp://u:p,hush@host/", "a comma within a password or a virtual host is written as %2C"),
        ("amqp://u:p/hush@host/", "/ is written as %2F"),
        ("amqp://u:12/hush@host/", "/ is written as %2F"),
        ("amqp://u:p?hush@host/", "? as %3F"),
        ("amqp://u:p#hush@host/", "# as %23"),
        ("amqp://u:hush@host/v@w", "in a virtual host @ as %40"),
        ("amqp://u:hush@host:port/", "the port is a number"),
        ("amqp://u:hush@host:99999/", "the port is a number"),
        ("amqp://u:hush@host:0/", "the port is a number"),
        ("amqp://guest:guest@rabbit.example/", "the user 'guest' is for RabbitMQ's own machine"),
        ("amqp://me:hush@127.0.0.1/,amqp://guest:hush@10.0.0.1/", "fedmq broker setup makes accounts"),
        ("amqp://u:hush", "the port is a number"),
        ("amqp://u:hu[sh@host/", "what is special is written like %2F"),
        ("amqp://u:hush\u2100@host/", "what is special is written like %2F"),
        ("amqp://u:hu\nsh@host/", "what is special is written like %2F"),
    ],
)
def test_one_that_cannot_be_meant_is_refused_without_showing_it(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        addresses_of(text)
    told = str(caught.value)
    assert told.startswith("broker.url")
    assert words in told
    assert "hu" not in told
    assert "sh@" not in told


@given(st.text(max_size=9), st.text(max_size=9), st.sampled_from("/?#@:[],%\\"))
def test_no_part_of_a_password_is_taken_for_something_that_is_shown(before: str, after: str, special: str) -> None:
    # Given a password that was not encoded, and perhaps is refused for that
    url = f"amqp://user:{before}{special}hush{special}{after}@host:5672/"
    try:
        (address,) = addresses_of(url)
    except ConfigError:
        return
    # What messages show of an address
    place = Place.of(pika.URLParameters(address))
    assert place == Place(address="host:5672", vhost="/", user="user")


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("amqp://u:p@h/", True),
        ("amqp://:p@h/", True),
        ("amqp://guest:other@h/", True),
        ("amqp://guest:guest@h1/,amqp://u:p@h2/", True),
        ("amqp://u:p", True),
        ("u:p@h", True),
        ("amqp://guest:guest@127.0.0.1:5672/", False),
        ("amqp://guest:guest@h1/,amqp://guest:guest@h2/", False),
        ("amqp://h:5672/", False),
        ("amqps://worker-1@h/", False),
    ],
)
def test_a_password_is_noticed(text: str, holds: bool) -> None:
    assert holds_password(text) is holds
