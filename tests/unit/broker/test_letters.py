"""What a dead letter says, and which of them an operator means."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import ConfigError
from broker.letters import (
    DeadLetter,
    Origin,
    RawLetter,
    Selection,
    contents,
    facts,
    letter_of,
    original_headers,
    parse_age,
    parse_id,
    parse_time,
    printable,
    replayed_headers,
)
from broker.messages import Hello, UpdateId
from broker.wire import encode
from tests.support.builders import update_of, vector

RUN = "test"
NOON = datetime(2026, 8, 1, 12, 0, tzinfo=UTC)
UPDATE = update_of({"w": vector(3.0, 4.0)}, worker="w1", seq=7, base_version=5, examples=32, metrics={"loss": 0.5})
BODY = encode(UPDATE)
HEADERS = {"run": RUN, "worker": "w1", "base_version": 5, "examples": 32}
REJECTED = {**HEADERS, "reason": "not-finite", "detail": "w holds NaN", "time": int(NOON.timestamp())}


def buried(**changes: Any) -> RawLetter:
    """As the aggregator puts it there."""
    raw = RawLetter(key="test.w1", message_id="w1/i/7", type="update", headers=REJECTED, body=BODY)
    return replace(raw, **changes)


def given_up(reason: str = "delivery_limit", **changes: Any) -> RawLetter:
    """As RabbitMQ puts it there."""
    death = {
        "reason": reason,
        "queue": "fedmq.test.updates",
        "exchange": "fedmq.updates",
        "routing-keys": ["test.w1"],
        "count": 1,
        "time": NOON,
    }
    older = {"reason": "expired", "queue": "elsewhere", "routing-keys": ["test.w9"], "time": NOON - timedelta(days=1)}
    return buried(key="test.broker", headers={**HEADERS, "x-death": [death, older]}, **changes)


def test_a_rejected_update_says_who_what_why_and_when() -> None:
    letter = letter_of(buried(), 3, RUN)
    assert letter == DeadLetter(
        number=3,
        id=UpdateId("w1", "i", 7),
        worker="w1",
        reason="not-finite",
        detail="w holds NaN",
        former="",
        time=NOON,
        origin=Origin.AGGREGATOR,
        base_version=5,
        examples=32,
        bytes=len(BODY),
        left_out=False,
    )


def test_what_rabbitmq_gave_up_on_is_told_by_its_newest_account_of_it() -> None:
    letter = letter_of(given_up(), 1, RUN)
    assert (letter.origin, letter.reason) == (Origin.BROKER, "broker: delivery-limit")
    assert (letter.worker, letter.time) == ("w1", NOON)
    assert "fedmq.test.updates" in letter.detail
    assert letter.id == UpdateId("w1", "i", 7)


def test_a_worker_cannot_pass_off_a_reason_where_rabbitmq_gave_up() -> None:
    raw = given_up()
    letter = letter_of(replace(raw, headers={**raw.headers, "reason": "run-done", "time": 0}), 1, RUN)
    assert letter.reason == "broker: delivery-limit"
    assert letter.time == NOON


def test_a_damaged_update_is_known_by_its_message_id_and_headers() -> None:
    letter = letter_of(buried(body=BODY[:-1] + b"\xff"), 1, RUN)
    assert letter.id == UpdateId("w1", "i", 7)
    assert (letter.base_version, letter.examples) == (5, 32)


def test_the_worker_is_the_one_whose_key_it_came_with() -> None:
    assert letter_of(buried(key="test.w2"), 1, RUN).worker == "w2"
    assert letter_of(buried(key="test.unknown"), 1, RUN).worker == "w1"
    assert letter_of(buried(key="other.w2"), 1, RUN).worker == "w1"
    assert letter_of(buried(key="test.unknown", body=b"?", message_id=""), 1, RUN).worker == "unknown"


def test_foreign_bytes_without_any_header_are_a_letter_too() -> None:
    letter = letter_of(RawLetter(key="test.w1", body=b"\x1b[2J"), 1, RUN)
    assert (letter.origin, letter.reason, letter.worker) == (Origin.OTHER, "unknown", "w1")
    assert (letter.id, letter.time, letter.base_version, letter.bytes) == (None, None, None, 4)


def test_a_body_that_was_left_out_is_told_from_one_that_is_there() -> None:
    headers = {**REJECTED, "body": "20000000 bytes, left out"}
    letter = letter_of(buried(headers=headers, body=b""), 1, RUN)
    assert letter.left_out
    assert letter.bytes == 20_000_000
    assert letter.id == UpdateId("w1", "i", 7)
    assert not letter_of(buried(headers=headers), 1, RUN).left_out


def test_the_headers_of_the_rejection_go_and_those_of_the_update_stay() -> None:
    assert original_headers(REJECTED) == HEADERS
    assert original_headers(given_up().headers) == HEADERS
    assert original_headers({**HEADERS, "body": "1 bytes, left out"}) == HEADERS


def test_a_replayed_update_keeps_the_reasons_of_its_rejections() -> None:
    raw, rejections = buried(), []
    for reason in ("not-finite", "rolled-back", "rolled-back", "broker: expired", "x" * 300):
        letter = letter_of(replace(raw, headers={**raw.headers, "reason": reason, "time": 0}), 1, RUN)
        rejections.append(letter.former)
        raw = replace(raw, headers=replayed_headers(raw.headers, letter))
        assert original_headers(HEADERS) == {k: v for k, v in raw.headers.items() if k != "former_reasons"}

    assert rejections == [
        "",
        "not-finite",
        "not-finite, rolled-back",
        "not-finite, rolled-back",
        "not-finite, rolled-back, broker: expired",
    ]
    assert len(raw.headers["former_reasons"]) <= 300
    assert "former_reasons" not in replayed_headers(HEADERS, letter_of(buried(headers=HEADERS), 1, RUN))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary() | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(["reason", "detail", "time", "body", "base_version", "examples", "x-death", "other"])


@given(
    st.builds(
        RawLetter,
        key=st.text(max_size=30),
        message_id=st.text(max_size=30),
        headers=st.dictionaries(names, values, max_size=8)
        | st.fixed_dictionaries(
            {"x-death": st.lists(st.dictionaries(st.sampled_from(["reason", "queue", "routing-keys", "time"]), values))}
        ),
        body=st.binary(max_size=40) | st.just(BODY),
    )
)
def test_whatever_the_message_it_can_be_shown(raw: RawLetter) -> None:
    letter = letter_of(raw, 1, RUN)
    json.dumps(facts(letter) | contents(raw), allow_nan=False)
    assert letter.worker.isprintable()
    assert letter.reason.isprintable()
    assert letter.detail.isprintable()


def test_the_contents_of_an_update_show_norm_and_damage_of_each_tensor() -> None:
    damaged = update_of(
        {"w": vector(3.0, float("nan"), 4.0, float("inf")), "n": np.array([6, 8], np.int64)},
        base_version=5,
        metrics={"loss": float("nan")},
    )
    shown = contents(buried(body=encode(damaged)))
    assert shown["update"]["base_version"] == 5
    assert shown["update"]["metrics"] == {"loss": "nan"}
    assert shown["tensors"] == [
        {"name": "w", "shape": [4], "dtype": "float32", "norm": 5.0, "not_finite": 2},
        {"name": "n", "shape": [2], "dtype": "int64", "norm": 10.0, "not_finite": 0},
    ]
    assert shown["headers"]["reason"] == "not-finite"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"\x1b]0;gotcha\x07 and more bytes", "not a fedmq message"),
        (encode(Hello(run=RUN, worker="w1", incarnation="i")), "Hello, not an update"),
        (b"", "too few"),
    ],
)
def test_the_contents_of_anything_else_say_why_it_is_no_update(body: bytes, words: str) -> None:
    shown = contents(buried(body=body))
    assert words in shown["unreadable"]
    assert str(shown["unreadable"]).isprintable()


def test_what_a_terminal_would_obey_does_not_get_through() -> None:
    assert printable("a\x1b[31mb\nc\u202ed") == "a\ufffd[31mb\ufffdc\ufffdd"
    assert printable("x" * 20, 10) == "x" * 10 + "…"


# ------------------------------------------------------------------------------------------------- selection

LETTER = letter_of(buried(), 1, RUN)
OTHER = letter_of(buried(key="test.w2", message_id="w2/i/1", body=b"?", headers={"reason": "malformed"}), 2, RUN)
BROKER = letter_of(given_up("expired"), 3, RUN)


@pytest.mark.parametrize(
    ("selection", "meant"),
    [
        (Selection(), [1, 2, 3]),
        (Selection(workers=("w2",)), [2]),
        (Selection(workers=("w1", "w2")), [1, 2, 3]),
        (Selection(reasons=("malformed", "not-finite")), [1, 2]),
        (Selection(reasons=("broker",)), [3]),
        (Selection(reasons=("broker: expired",)), [3]),
        (Selection(ids=(UpdateId("w2", "i", 1),)), [2]),
        (Selection(workers=("w1",), reasons=("malformed",)), []),
        (Selection(before=NOON), []),
        (Selection(before=NOON + timedelta(seconds=1)), [1, 3]),
    ],
)
def test_a_selection_means_those_to_which_everything_applies(selection: Selection, meant: list[int]) -> None:
    assert [letter.number for letter in (LETTER, OTHER, BROKER) if selection.matches(letter)] == meant


def test_a_selection_of_nothing_in_particular_is_false() -> None:
    assert not Selection()
    assert Selection(before=NOON)
    assert Selection(workers=("w1",))


def test_ages_times_and_ids_are_read() -> None:
    assert parse_age("90s") == timedelta(seconds=90)
    assert parse_age("2h") == timedelta(hours=2)
    assert parse_age("1w") == timedelta(days=7)
    assert parse_time("2026-08-01T12:00") == NOON
    assert parse_time("2026-08-01") == NOON - timedelta(hours=12)
    assert parse_time("2026-08-01T14:00+02:00") == NOON
    assert parse_time("2026-08-01T14:00+02:00").utcoffset() == timedelta(0)
    assert parse_id("w-1/ab_c/12") == UpdateId("w-1", "ab_c", 12)


@pytest.mark.parametrize("text", ["", "7", "h", "-1h", "1.5h", "1y", "99999999d"])
def test_an_age_that_is_none_is_explained(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--older-than .*7d"):
        parse_age(text)


@pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01", "0001-01-01T00:00+23:00"])
def test_a_time_that_is_none_is_explained(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--before .*2026-08-01"):
        parse_time(text)


@pytest.mark.parametrize("text", ["", "w1", "w1/i", "w1/i/x", "w1/i/-1", "w1/i/99999999999999999", "w 1/i/1"])
def test_an_id_that_is_none_is_explained(text: str) -> None:
    with pytest.raises(ConfigError, match="WORKER/INCARNATION/SEQ"):
        parse_id(text)
