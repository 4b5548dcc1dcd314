"""What lies in a run's dead-letter queue, and which of it an operator means. No I/O, no clock.

A letter got there in one of two ways. The aggregator rejected an update: its copy has the reason, a detail and
the time in its headers. Or RabbitMQ gave up on it by itself (delivery limit, expiry, length limit, a rejection
by hand): then RabbitMQ's own header ``x-death`` says why. Whatever is neither is shown all the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from itertools import islice
from math import isfinite, sqrt
from typing import Any

import numpy as np

from broker.errors import ConfigError, WireError
from broker.messages import NAME_PATTERN, Reason, Update, UpdateId, Values, pieces
from broker.wire import decode
from broker.wire.sealed import unsealed

__all__ = [
    "UNKNOWN",
    "DeadLetter",
    "Origin",
    "RawLetter",
    "Selection",
    "contents",
    "facts",
    "kept_headers",
    "kept_id",
    "letter_of",
    "original_headers",
    "parse_age",
    "parse_id",
    "parse_reason",
    "parse_time",
    "printable",
    "replayed_headers",
]

#: Stands for a worker whom nothing names, in the key of a dead letter as well as here.
UNKNOWN = "unknown"

#: Headers that a rejection adds to those of the update.
REASON_HEADERS = frozenset({"reason", "detail", "time", "body", "user"})
#: What the header ``body`` says if a rejection had to leave the body out.
LEFT_OUT = re.compile(r"(\d{1,12}) bytes, left out", re.ASCII)
REASON_LENGTH = 100
#: The header that keeps, over replays, why an update was rejected before: the oldest first, separated by commas.
FORMER = "former_reasons"
FORMER_LENGTH = 300

#: Of a copy in the dead letters: headers, letters of a header's name and of its text, and bytes of an id or a type.
MOST_HEADERS = 32
KEY_LENGTH = 64
TEXT_LENGTH = 500
SHORT_BYTES = 255

#: Elements that are looked at together: tensors are widened to float64 for it, piece by piece.
PIECE = 2**20

_AGE_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


class Origin(StrEnum):
    """Who put a letter into the dead-letter queue."""

    AGGREGATOR = "aggregator"
    BROKER = "broker"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class RawLetter:
    """A message as the broker hands it out, with whatever headers it has."""

    key: str = ""
    """The routing key with which it came into the dead-letter queue."""
    message_id: str = ""
    type: str = ""
    headers: Mapping[str, Any] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """The facts of one rejected update; never its tensors.

    Text from outside is made harmless for a terminal (:func:`printable`).
    """

    number: int
    """Its place in the queue, from 1."""
    id: UpdateId | None
    """None if neither its body nor its message id is an update's."""
    worker: str
    """By the key with which it was published, which a broker can restrict; ``unknown`` if there is none."""
    reason: str
    """The rejection's; ``broker: …`` if RabbitMQ gave up on it; ``unknown`` if nobody says why."""
    detail: str
    former: str
    """Why it was rejected before it was replayed: the oldest first, separated by commas; empty if it never was."""
    time: datetime | None
    """When it was rejected, in UTC."""
    origin: Origin
    base_version: int | None
    examples: int | None
    bytes: int
    """Size of the update as it was published."""
    left_out: bool
    """The body was too large to be kept, so there is nothing to publish again."""


def letter_of(raw: RawLetter, number: int, run: str) -> DeadLetter:
    """Read ``raw``, the letter at place ``number`` in the queue of ``run``. Whatever the bytes, nothing is raised."""
    headers = raw.headers
    update = _update_of(raw.body)
    death = _death_of(headers)
    if death is not None:
        origin, key = Origin.BROKER, _first(death.get("routing-keys"))
        reason = f"broker: {str(death.get('reason', '?')).replace('_', '-')}"
        detail, time = f"queue {death.get('queue', '?')}", death.get("time")
    else:
        origin = Origin.AGGREGATOR if "reason" in headers else Origin.OTHER
        key = raw.key
        reason, detail, time = str(headers.get("reason", UNKNOWN)), str(headers.get("detail", "")), headers.get("time")
    left_out = LEFT_OUT.fullmatch(str(headers.get("body", ""))) if not raw.body else None
    identity = update.id if update is not None else _id_of(raw.message_id)
    return DeadLetter(
        number=number,
        id=identity,
        worker=_worker_of(key, run) or (identity.worker if identity is not None else UNKNOWN),
        reason=printable(reason, REASON_LENGTH),
        detail=printable(detail),
        former=printable(str(headers.get(FORMER, "")), FORMER_LENGTH),
        time=_time_of(time),
        origin=origin,
        base_version=update.base_version if update is not None else _count_of(headers.get("base_version")),
        examples=update.examples if update is not None else _count_of(headers.get("examples")),
        bytes=int(left_out[1]) if left_out else len(raw.body),
        left_out=left_out is not None,
    )


def kept_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    """What of an update's ``headers`` a copy in the dead letters has, so that it can be written whatever they are.

    As much as a frame holds, and a reason, would be too much for a frame; the broker ends a connection for that. And
    a name that is no UTF-8 is longer when it has been read than it may be when it is written.
    """
    # None that the rejection writes itself, nor what would stand in the place of the type.
    others = ((key, value) for key, value in headers.items() if key not in {*REASON_HEADERS, "type"})
    short = ((key, value) for key, value in others if len(key) <= KEY_LENGTH)
    return {key: value[:TEXT_LENGTH] if isinstance(value, str) else value for key, value in islice(short, MOST_HEADERS)}


def kept_id(text: str) -> str:
    """``text``, or as much of it as fits where AMQP has an id or a type."""
    return text.encode(errors="replace")[:SHORT_BYTES].decode(errors="ignore")


def original_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    """``headers`` as they were before the rejection."""
    return {key: value for key, value in headers.items() if key not in REASON_HEADERS and not key.startswith("x-")}


def replayed_headers(headers: Mapping[str, Any], letter: DeadLetter) -> dict[str, Any]:
    """The headers with which ``letter`` is published again: the original ones, and why it was rejected until now."""
    former = letter.former.split(", ") if letter.former else []
    if letter.reason != UNKNOWN and letter.reason not in former[-1:]:
        former.append(letter.reason)
    while len(", ".join(former)) > FORMER_LENGTH:
        former.pop(0)
    return kept_headers(original_headers(headers)) | ({FORMER: ", ".join(former)} if former else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which letters are meant: those to which everything that is given applies. Without anything, all."""

    workers: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    """As they are shown; ``broker`` alone means whatever RabbitMQ gave up on."""
    ids: tuple[UpdateId, ...] = ()
    before: datetime | None = None
    """Rejected earlier than this. Letters without a time are not meant then."""

    def __bool__(self) -> bool:
        return bool(self.workers or self.reasons or self.ids or self.before)

    def matches(self, letter: DeadLetter) -> bool:
        """Whether ``letter`` is meant."""
        return (
            (not self.workers or letter.worker in self.workers)
            and (not self.reasons or bool({letter.reason, letter.reason.partition(":")[0]} & set(self.reasons)))
            and (not self.ids or letter.id in self.ids)
            and (self.before is None or (letter.time is not None and letter.time < self.before))
        )


def parse_id(text: str) -> UpdateId:
    """``WORKER/INCARNATION/SEQ`` as an update id. Raises :class:`ConfigError`."""
    identity = _id_of(text)
    if identity is None:
        raise ConfigError(f"--id {text!r}: an update's id is WORKER/INCARNATION/SEQ, as 'fedmq dead list' shows it")
    return identity


def parse_reason(text: str) -> str:
    """A reason that a dead letter may have, of fedmq's or of RabbitMQ's. Raises :class:`ConfigError`."""
    if text in {*Reason, UNKNOWN} or text.partition(":")[0] == "broker":
        return text
    raise ConfigError(
        f"--reason {text!r}: the reasons are {', '.join(Reason)}, {UNKNOWN}; and for what RabbitMQ gave up on "
        "'broker', or one of them, like 'broker: delivery-limit'"
    )


def parse_age(text: str) -> timedelta:
    """``90s``, ``30m``, ``2h``, ``7d`` or ``1w`` as a span of time. Raises :class:`ConfigError`."""
    match = re.fullmatch(r"(\d{1,6})([smhdw])", text.strip())
    if match is None:
        raise ConfigError(f"--older-than {text!r}: give a number and a unit: 90s, 30m, 2h, 7d or 1w")
    return timedelta(seconds=int(match[1]) * _AGE_UNITS[match[2]])


def parse_time(text: str) -> datetime:
    """An ISO 8601 time; without a zone it is UTC. Raises :class:`ConfigError`."""
    try:
        time = datetime.fromisoformat(text.strip())
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ConfigError(f"--before {text!r}: give a time like 2026-08-01T12:30 (UTC) or 2026-08-01") from None


def printable(text: str, limit: int = 1000) -> str:
    """``text`` on one line, without what a terminal would obey, cut after ``limit`` characters."""
    shown = "".join(character if character.isprintable() else "\ufffd" for character in text[:limit])
    return f"{shown}…" if len(text) > limit else shown


def facts(letter: DeadLetter) -> dict[str, Any]:
    """``letter`` as JSON knows it."""
    return {
        "number": letter.number,
        "id": None if letter.id is None else str(letter.id),
        "worker": letter.worker,
        "reason": letter.reason,
        "detail": letter.detail,
        "former_reasons": letter.former,
        "time": None if letter.time is None else letter.time.isoformat(),
        "origin": letter.origin.value,
        "base_version": letter.base_version,
        "examples": letter.examples,
        "bytes": letter.bytes,
        "left_out": letter.left_out,
    }


def contents(raw: RawLetter) -> dict[str, Any]:
    """What is in ``raw``, as JSON knows it: all headers, and what its body says and holds.

    Of an update that is its head, and for each tensor shape, dtype, Euclidean norm (of its finite elements) and
    the number of elements that are not finite; of anything else why it is none.
    """
    result: dict[str, Any] = {"message_id": printable(raw.message_id), "headers": _as_json(raw.headers)}
    try:
        seal, _ = unsealed(raw.body)
        if seal is not None:
            # Whose key that is, and whether it has signed this, is for the aggregator to say.
            result["signed_with"] = seal.key.hex()
        message = decode(raw.body)
    except WireError as error:
        return result | {"unreadable": printable(str(error)), "begins": raw.body[:32].hex(" ")}
    if not isinstance(message, Update):
        return result | {"unreadable": f"a message of type {type(message).__name__}, not an update"}
    return result | {
        "update": {
            "run": message.run,
            "base_version": message.base_version,
            "base_epoch": message.base_epoch,
            "mode": message.mode.value,
            "examples": message.examples,
            "seconds": _as_json(message.seconds),
            "steps": message.steps,
            "metrics": _as_json(message.metrics),
        },
        "tensors": [_tensor(name, array) for name, array in message.tensors.items()],
    }


def _tensor(name: str, array: Values) -> dict[str, Any]:
    squares, broken = 0.0, 0
    for flat in pieces(array):
        for start in range(0, flat.size, PIECE):
            with np.errstate(invalid="ignore"):  # of signalling NaN numpy warns
                piece = flat[start : start + PIECE].astype(np.float64)
            finite = piece[np.isfinite(piece)]
            squares += float(np.dot(finite, finite))
            broken += piece.size - finite.size
    return {
        "name": printable(name, 256),
        "shape": list(array.shape),
        "dtype": array.dtype.name,
        "norm": _as_json(sqrt(squares)),
        "not_finite": broken,
    }


def _as_json(value: Any) -> Any:
    """``value`` in JSON's types; text is made printable, and what JSON has no word for becomes text."""
    if isinstance(value, Mapping):
        return {printable(str(key)): _as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(inner) for inner in value]
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and isfinite(value)):
        return value
    return printable(value.isoformat() if isinstance(value, datetime) else str(value))


def _update_of(body: bytes) -> Update | None:
    try:
        message = decode(body)
    except WireError:
        return None
    return message if isinstance(message, Update) else None


def _death_of(headers: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """RabbitMQ's account of the last time that it gave up on the message; the newest stands first."""
    deaths = headers.get("x-death")
    newest = deaths[0] if isinstance(deaths, list) and deaths else None
    return newest if isinstance(newest, dict) else None


def _first(value: Any) -> str:
    return str(value[0]) if isinstance(value, list) and value else ""


def _worker_of(key: str, run: str) -> str:
    owner, _, worker = key.partition(".")
    return worker if owner == run and worker != UNKNOWN and re.fullmatch(NAME_PATTERN, worker) else ""


def _id_of(text: str) -> UpdateId | None:
    match = re.fullmatch(r"([A-Za-z0-9_-]{1,64})/([A-Za-z0-9_-]{1,64})/(\d{1,16})", text, re.ASCII)
    return UpdateId(match[1], match[2], int(match[3])) if match and int(match[3]) <= 2**53 else None


def _count_of(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**53 else None


def _time_of(value: Any) -> datetime | None:
    if isinstance(value, datetime):
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    try:
        return datetime.fromtimestamp(int(value), UTC) if isinstance(value, int) else None
    except (OverflowError, OSError, ValueError):
        return None
