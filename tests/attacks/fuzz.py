"""Fuzzing of everything that reads what others sent: ``python -m tests.attacks.fuzz --inputs 1000000``.

Inputs are made from good messages of every kind and in every code, by changes to their bytes and to their structure;
afterwards the checks are made right again (mostly), so that the changes get behind them. What is new to a receiver, by
the words with which it refuses, or by the lines that it runs (with ``--atheris``), is kept and changed further.

For each input: nothing but the errors of :mod:`broker.errors`, no value that is not finite out of a code, not more than
100 ms, and over all of them no more than 64 MB. Exit code 1, and the input as Python writes it, where that is not so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import resource
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pika
import pika.data

from aggregator.core import events as on
from aggregator.reading import from_aside, read_update
from aggregator.senders import Senders
from broker.amqp import patched  # noqa: F401 - mends pika
from broker.amqp.publisher import plain
from broker.errors import BrokerError, FedmqError, WireError
from broker.jsontext import from_json
from broker.letters import RawLetter, contents, facts, kept_headers, kept_id, letter_of
from broker.messages import (
    Action,
    Array,
    Command,
    Event,
    EventKind,
    Goodbye,
    Hello,
    Manifest,
    Mode,
    ModelSpec,
    Parameters,
    Plan,
    TensorSpec,
    Update,
    UpdateId,
    parameters_digest,
    pieces,
)
from broker.topology import Topology
from broker.transport import Delivery, Source, Token
from broker.wire import decode, delta_range, encode, encode_in_chunks, follow, join, told_by_delta
from broker.wire.encoded import compressed
from broker.wire.envelope import PREFIX, aligned, header_check, pack, unpack
from broker.wire.tensors import checksum
from fedmq.monitoring.broker import alarms_of, by_management
from fedmq.monitoring.monitor import Monitor
from fedmq.runs import runs_in
from worker_client.reading import read

__all__ = ["Mutator", "Receivers", "seeds"]

RUN = "run"
MODEL = ModelSpec((TensorSpec("w", (1200,), "float32"), TensorSpec("v", (2,), "float32")))
CODES = ("", "bf16", "fp16", "int8", "eden:1", "eden:4", "topk:0.01", "topk:0.5")
LONGEST = 0.1
GROWTH = 64 * 2**20
SENDERS = Senders("aggregator")
TOKEN = Token(1, 1)

#: Where whole numbers, texts and lists begin to hurt.
INTERESTING: tuple[Any, ...] = (
    *(
        sign * 2**power + more
        for power in (0, 7, 8, 15, 16, 31, 32, 52, 53, 62)
        for more in (-1, 0, 1)
        for sign in (1, -1)
    ),
    *(2**63 - 1, 2**64 - 1, 0.0, -0.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), True, False, None),
    *("", "\0", "a" * 64, "a" * 65, "a" * 1000, "../..", "#", "*", "\x1b[2J", "\u202e", "ｗ1", "w\n", b"", b"\xff"),  # noqa: RUF001
    *([], {}, [[]], [0] * 17, {"": ""}, ["w", [2], "float32", "parameter"], "float32", "object", "eden:4", "topk:1e-9"),
)


def seeds() -> Iterator[bytes]:
    """Good messages."""
    tensors = {"w": np.linspace(-1, 1, 1200, dtype=np.float32), "v": np.ones(2, np.float32)}
    for codec in CODES:
        coded = compressed(MODEL, tensors, codec, 7) if codec else tensors
        update = Update(
            run=RUN,
            id=UpdateId("w1", "i", 3),
            base_version=2,
            base_epoch=1,
            mode=Mode.DELTA,
            examples=5,
            metrics={"loss": 0.5},
            model=MODEL,
            tensors=coded,
            codec=codec,
            seed=7 if codec else 0,
        )
        yield encode(update)
        yield encode_in_chunks(update, str(update.id), 2048)[0]
    version = _version(tensors)
    yield encode(version)
    first, _, shared = told_by_delta(version, "v2", None, "int8", chunk_bytes=2048)
    second, _, _ = told_by_delta(version, "v3", shared, "int8", chunk_bytes=2048)
    yield from (encode(first), encode(second))
    yield encode(Hello(run=RUN, worker="w1", incarnation="i"))
    yield encode(Goodbye(run=RUN, worker="w1", incarnation="i", reason="done"))
    yield encode(Command(run=RUN, id="c", action=Action.SET, changes={"buffer_size": 4}))
    for kind in EventKind:
        data: dict[str, Any] = {
            "version": 2,
            "loss": 0.5,
            "role": "trainer",
            "incarnation": "i",
            "state": "training",
            "examples": 3,
            "aggregator": "a/1",
            "active": True,
            "epoch": 1,
            "page": 0,
            "pages": 1,
            "metrics": '{"loss": 0.5}',
            "rejected": '{"malformed": 2}',
            "row0": '{"name": "w1", "seen": 1.0, "rejected": {"malformed": 2}, "until": 1e9}',
            "what": "folded",
        }
        yield encode(Event(run=RUN, kind=kind, source="w1", time=1.0, data=data))
    yield from table_entries()
    yield from rows()
    yield encode(second.__class__(**{**_fields(second), "chunks": second.chunks[:1]}))
    for lossless in (False, True):
        flat = Update(**{**_fields(update), "tensors": {**tensors, "w": np.zeros(1200, np.float32)}, "codec": ""})
        yield from encode_in_chunks(flat, "w1/i/3", 2048, lossless=lossless)[1]


def _version(tensors: Mapping[str, Array]) -> Parameters:
    return Parameters(
        run=RUN, epoch=1, version=2, plan=Plan(codec="int8"), digest=parameters_digest(tensors), model=MODEL,
        tensors=tensors,
    )  # fmt: skip


def table_entries() -> Iterator[bytes]:
    """Good headers of AMQP, as bytes behind something in a prefix's place."""
    headers: dict[str, Any] = {
        "worker": "w1", "seq": 3,
        "x-death": [{"count": 1, "reason": "expired", "time": datetime(2026, 1, 1, tzinfo=UTC)}],
        "deep": {"a": [1, True, None, {"b": "c"}]}, "amount": Decimal("1.5"), "raw": b"\xff",
    }  # fmt: skip
    pieces: list[bytes] = []
    pika.data.encode_table(pieces, headers)
    yield bytes(PREFIX.size) + b"".join(pieces)[4:]


def rows() -> Iterator[bytes]:
    """Good answers of the management API, behind something in a prefix's place."""
    queues = [
        {"name": f"fedmq.{RUN}.{name}", "vhost": "/", "messages": 3, "messages_ready": 3, "message_bytes": 10,
         "messages_unacknowledged": 0, "consumers": 1}
        for name in ("updates", "dead", "parameters", "outbox.w1", "turn")
    ]  # fmt: skip
    consumers = [{"queue": {"name": f"fedmq.{RUN}.turn"}, "consumer_tag": "aggregator/a-turn", "active": True}]
    nodes = [{"name": "rabbit@a", "running": True, "mem_alarm": True, "disk_free_alarm": True, "disk_free": 7}]
    yield bytes(PREFIX.size) + json.dumps([*queues, *consumers, *nodes]).encode()


def _fields(message: Any) -> dict[str, Any]:
    return {name: getattr(message, name) for name in message.__dataclass_fields__}


class Receivers:
    """All that reads what others sent; given one message, each."""

    def __init__(self) -> None:
        self._monitor = Monitor(RUN)
        tensors = {"w": np.linspace(-1, 1, 1200, dtype=np.float32), "v": np.ones(2, np.float32)}
        flat = Update(
            run=RUN, id=UpdateId("w1", "i", 3), base_version=2, base_epoch=1, mode=Mode.DELTA, examples=5, model=MODEL,
            tensors=tensors,
        )  # fmt: skip
        body, chunks = encode_in_chunks(flat, "w1/i/3", 2048)
        manifest = decode(body)
        assert isinstance(manifest, Manifest)
        self._manifest, self._chunks = manifest, list(chunks)
        version = _version(tensors)
        _, _, self._shared = told_by_delta(version, "v2", None, "int8", chunk_bytes=2048)
        told, parts, _ = told_by_delta(version, "v3", self._shared, "int8", chunk_bytes=2048)
        self._told, self._parts = told, [parts[index] for index in delta_range(told)]
        self._count = 0

    def __call__(self, body: bytes) -> list[str]:
        """How each took it, in words without numbers; raises what no receiver may raise."""
        return [_outcome(lambda r=receiver: r(body)) for receiver in self._all()]  # type: ignore[misc]

    def _all(self) -> list[Callable[[bytes], object]]:
        return [
            *(self._update, self._aside, self._version, self._chunk, self._event, self._letter),
            *(self._delta, self._headers, self._answer),
        ]

    def _update(self, body: bytes) -> object:
        announced = {"chunks": len(self._manifest.chunks), "bytes": self._manifest.nbytes}
        headers: dict[str, str | int] = {"worker": "w1", "message_id": "w1/i/3", **announced}
        event = read_update(TOKEN, Delivery(source=Source.UPDATE, body=body, headers=headers, user="w1"), SENDERS)
        if isinstance(event, on.Arrived):
            _require_finite(event.update)
        return event.detail if isinstance(event, on.Unreadable) else type(event).__name__

    def _aside(self, body: bytes) -> object:
        delivery = Delivery(source=Source.CONTROL, body=body, user="w1", token=TOKEN)
        return type(from_aside(delivery, RUN, 3, senders=SENDERS)).__name__

    def _version(self, body: bytes) -> object:
        return type(read(Delivery(source=Source.PARAMETERS, body=body), RUN)).__name__

    def _chunk(self, body: bytes) -> object:
        return type(join(self._manifest, "w1/i/3", [body, *self._chunks[1:]])).__name__

    def _event(self, body: bytes) -> object:
        self._monitor.take(Delivery(source=Source.EVENT, body=body))
        self._count += 1
        if self._count % 100 == 0:
            # As the page and ``fedmq status --json`` write it: whatever came in, it must be JSON.
            json.dumps(self._monitor.snapshot(), allow_nan=False)
            json.dumps(self._monitor.series(), allow_nan=False)
        return "taken"

    def _letter(self, body: bytes) -> object:
        raw = RawLetter(key="run.w1", body=body)
        letter = letter_of(raw, 1, RUN)
        if self._count % 10 == 0:
            text = json.dumps([facts(letter), contents(raw)], allow_nan=False, ensure_ascii=False)
            assert text.isprintable(), "a dead letter that a terminal would obey"
        return letter.reason

    def _delta(self, body: bytes) -> object:
        """As a part of a delta, and as what announces one."""
        try:
            manifest = decode(body)
        except WireError:
            return type(follow(self._told, "v3", [body, *self._parts[1:]], self._shared)).__name__
        if isinstance(manifest, Manifest):
            return type(follow(manifest, "v3", self._parts, self._shared)).__name__
        return "no manifest"

    def _headers(self, body: bytes) -> object:
        """As AMQP's own headers, and what a dead letter keeps of them."""
        start = min(PREFIX.size, len(body))
        entries = body[start : start + 4096]
        table = pika.data.decode_table(struct.pack(">I", len(entries)) + entries, 0)[0]
        kept = kept_headers(plain(table))
        pika.BasicProperties(headers=kept, message_id=kept_id(str(table)[:300])).encode()
        json.dumps(contents(RawLetter(headers=table)), allow_nan=False)
        return len(kept) > 0

    def _answer(self, body: bytes) -> object:
        """As an answer of the management API."""
        try:
            rows = from_json(body[PREFIX.size :])
        except ValueError:
            # Of the same structure as the message then.
            try:
                rows = [unpack(body)[0]]
            except WireError:
                return "nothing"
        rows = rows if isinstance(rows, list) else [rows]
        by_management(Topology(RUN), rows, rows, alarms_of(rows))
        with contextlib.suppress(BrokerError):
            return len(runs_in(rows))
        return "no rows"


def _outcome(receive: Callable[[], object]) -> str:
    try:
        text = str(receive())
    except FedmqError as error:
        if not isinstance(error, WireError):
            raise TypeError(f"not a WireError: {error!r}") from error
        text = str(error)
    return re.sub(r"\d[\d.e+-]*|'[^']*'", "#", text)[:80]


def _require_finite(update: Update) -> None:
    for values in update.tensors.values():
        if not getattr(values, "is_finite", False):
            continue
        for piece in pieces(values):
            assert np.isfinite(piece).all(), "a code that gives what is not finite"


class Mutator:
    """Changes messages; everything that it draws comes from one seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._good = list(seeds())
        self.pool = list(self._good)

    def next(self) -> bytes:
        """Another input."""
        # Half of them from the good ones: most of what is kept is refused early.
        body = self._random.choice(self._good if self._random.random() < 0.5 else self.pool)
        for _ in range(self._random.choice((1, 1, 1, 2, 4, 8))):
            body = self._random.choice((self._structure, self._bytes, self._data))(body)
        return body if self._random.random() < 0.1 else sealed(body)

    def keep(self, body: bytes) -> None:
        """Change this one further."""
        if len(self.pool) < 5000:
            self.pool.append(body)

    def _structure(self, body: bytes) -> bytes:
        try:
            header, data = unpack(body)
        except WireError:
            return self._bytes(body)
        changed = self._changed(header)
        try:
            return pack(changed if isinstance(changed, dict) else header, [data] if data.nbytes else [])
        except (ValueError, OverflowError, TypeError, FedmqError):
            return body

    def _changed(self, value: Any) -> Any:
        """``value`` with something in it replaced, added, left out or doubled."""
        choice = self._random.random()
        if isinstance(value, dict) and value and choice < 0.9:
            result = dict(value)
            key = self._random.choice(list(result))
            if choice < 0.05:
                del result[key]
            elif choice < 0.1:
                result[self._random.choice(["extra", "type", "run", "codec", "chunks", ""])] = result[key]
            else:
                result[key] = self._changed(result[key])
            return result
        if isinstance(value, list | tuple) and value and choice < 0.9:
            items = list(value)
            place = self._random.randrange(len(items))
            if choice < 0.1:
                del items[place]
            elif choice < 0.2:
                items *= self._random.choice((2, 3, 50))
            else:
                items[place] = self._changed(items[place])
            return items
        if isinstance(value, int) and choice < 0.3:
            return value + self._random.choice((-1, 1, 64, -64))
        return self._random.choice(INTERESTING)

    def _data(self, body: bytes) -> bytes:
        """Other values where the tensors, or what a code makes of them, stand."""
        try:
            _, data = unpack(body)
        except WireError:
            return body
        if not data.nbytes:
            return body
        changed, start = bytearray(body), len(body) - data.nbytes
        for _ in range(self._random.choice((1, 1, 3, 10))):
            place = start + self._random.randrange(data.nbytes) // 4 * 4
            changed[place : place + 4] = self._random.choice(FLOATS)
        return bytes(changed[: len(body)])

    def _bytes(self, body: bytes) -> bytes:
        data = bytearray(body)
        place = self._random.randrange(len(data) + 1)
        match self._random.randrange(7):
            case 0 if place < len(data):
                data[place] ^= 1 << self._random.randrange(8)
            case 1 if place < len(data):
                data[place] = self._random.choice((0, 1, 0x7F, 0x80, 0xC1, 0xDC, 0xDD, 0xDF, 0xFF))
            case 2:
                del data[place : place + self._random.choice((1, 2, 4, 64, 1000))]
            case 3:
                data[place:place] = self._random.randbytes(self._random.choice((1, 2, 4, 64)))
            case 4:
                other = self._random.choice(self.pool)
                data[place:] = other[self._random.randrange(len(other) + 1) :]
            case 5:
                data[place : place + 4] = self._random.choice(FLOATS)
            case _:
                data = data[:place]
        return bytes(data)


FLOATS = [
    np.array([value], np.float32).tobytes() for value in (np.nan, np.inf, -np.inf, 3.4e38, 1e-45, -0.0, 1e-38, 65_504)
] + [np.array([value], np.int32).tobytes() for value in (-1, 2**31 - 1, -(2**31), 2**30)]


def sealed(body: bytes) -> bytes:
    """``body`` with the header's check and the data's checksum made right, as far as it is a message at all."""
    if len(body) < PREFIX.size:
        return body
    magic, version, _, length = PREFIX.unpack_from(body)
    end = PREFIX.size + length
    if end > len(body):
        length, end = len(body) - PREFIX.size, len(body)
    header = body[PREFIX.size : end]
    body = PREFIX.pack(magic, version, header_check(header), length) + header + body[end:]
    place, data = header.find(b"checksum\xd9\x20"), memoryview(body)[min(aligned(end), len(body)) :]
    if place >= 0 and place + 42 <= len(header):
        header = header[: place + 10] + checksum([data]).encode() + header[place + 42 :]
        body = PREFIX.pack(magic, version, header_check(header), length) + header + body[end:]
    return body


def rss() -> int:
    """The most memory that this process has taken, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(inputs: int, seed: int) -> int:
    """Fuzz; the exit code."""
    mutator, receivers = Mutator(seed), Receivers()
    for body in mutator.pool:
        receivers(body)
    seen: set[tuple[int, str]] = set()
    slowest, counts, before, began = 0.0, Counter[str](), rss(), time.monotonic()
    for number in range(inputs):
        body = mutator.next()
        started = time.process_time()
        try:
            outcomes = receivers(body)
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            print(f"input {number} of seed {seed}: {error!r}\n{body!r}")
            return 1
        seconds = time.process_time() - started
        if seconds > LONGEST:
            print(f"input {number} of seed {seed} took {seconds:.3f} s\n{body[:2000]!r}")
            return 1
        slowest = max(slowest, seconds)
        counts["read" if outcomes[0] in {"Arrived", "Announced"} else "refused"] += 1
        new = {(index, outcome) for index, outcome in enumerate(outcomes)} - seen
        if new:
            seen |= new
            mutator.keep(body)
    grown, took = rss() - before, time.monotonic() - began
    print(
        f"{inputs:,} inputs of seed {seed} in {took:.0f} s: {counts['read']:,} read as updates, {counts['refused']:,} "
        f"refused, {len(seen)} different outcomes; slowest {1000 * slowest:.1f} ms, grown by {grown / 2**20:.1f} MB"
    )
    return int(grown > GROWTH)


def guided(inputs: int, seed: int) -> None:
    """Let atheris (libFuzzer) choose, by the lines of fedmq that an input reaches."""
    import tempfile  # noqa: PLC0415

    import atheris  # noqa: PLC0415

    atheris.instrument_all()
    receivers = Receivers()

    def one(data: bytes) -> None:
        receivers(data)

    def mutated(data: bytes, largest: int, draw: int) -> bytes:
        mutator = Mutator.__new__(Mutator)
        mutator._random = random.Random(draw)
        mutator.pool = pool
        changed = atheris.Mutate(data, largest) if draw % 3 == 0 else mutator._structure(data)
        return sealed(changed)[:largest]

    pool = list(seeds())
    with tempfile.TemporaryDirectory() as folder:
        for number, body in enumerate(pool):
            (Path(folder) / str(number)).write_bytes(body)
        arguments = [sys.argv[0], f"-runs={inputs}", f"-seed={seed}", "-max_len=16384", "-timeout=1", folder]
        atheris.Setup(arguments, one, custom_mutator=mutated)
        atheris.Fuzz()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--atheris", action="store_true", help="guided by coverage; pip install atheris")
    arguments = parser.parse_args()
    if arguments.atheris:
        guided(arguments.inputs, arguments.seed)
        return 0
    return run(arguments.inputs, arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
