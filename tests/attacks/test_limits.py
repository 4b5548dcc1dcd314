"""What no message, header, file or answer can cost, whoever made it."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pika
import pika.data
import pytest
from safetensors.numpy import save_file

from aggregator import lineage, rollback
from aggregator.checkpoint import CheckpointStore
from aggregator.history import _lines
from aggregator.reading import read_update
from aggregator.senders import Senders
from broker.admin import Admin
from broker.amqp import patched  # noqa: F401 - mends pika
from broker.amqp.download import Download
from broker.amqp.publisher import plain
from broker.errors import BrokerError, BrokerUnreachable, CheckpointError, ConnectionLost, WireError
from broker.jsontext import from_json
from broker.letters import RawLetter, contents, kept_headers, kept_id, letter_of, replayed_headers
from broker.redaction import harmless
from broker.transport import Delivery, Source, Token
from broker.wire import decode
from broker.wire.envelope import MAX_HEADER
from tests.attacks.corpus import Author, raw

#: Each takes milliseconds; what this guards against takes minutes.
SECONDS = 1.0
FRAME = 131_072


def cost(work: Callable[[], object]) -> tuple[float, int]:
    """Processor seconds and bytes that ``work`` takes."""
    tracemalloc.start()
    before = time.process_time()
    work()
    seconds = time.process_time() - before
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return seconds, peak


@pytest.mark.parametrize("one", [b"\x80", b"\x81\xa0\xc0", b"\x90", b"\xa0", b"\xc0", b"\xc4\x00"])
def test_a_header_full_of_small_things_costs_little(one: bytes) -> None:
    inner = b"\xdc\x10\x00" + one * 4096
    count = (MAX_HEADER - 16) // len(inner)
    body = raw(b"\x81\xa1a\xdc" + count.to_bytes(2, "big") + inner * count)

    def read() -> None:
        with pytest.raises(WireError):
            decode(body)

    seconds, peak = cost(read)

    assert seconds < SECONDS
    assert peak < 8 * 2**20


# --------------------------------------------------------------------------------------------- AMQP's own headers


def decoded(entries: bytes) -> dict[str, Any]:
    """As pika reads a table of these entries."""
    table: dict[str, Any] = pika.data.decode_table(struct.pack(">I", len(entries)) + entries, 0)[0]
    return table


TABLES = {
    "as much as a frame holds": b"\x01tS" + struct.pack(">I", FRAME - 200) + b"w" * (FRAME - 200),
    "65,000 empty ones": b"\0V" * (FRAME // 2),
    "1,000 texts": b"".join(b"\4" + f"{n:04d}".encode() + b"S\0\0\0\x64" + b"t" * 100 for n in range(1000)),
    "texts of three bytes a letter": b"\1tS\0\0\xff\xff" + "€".encode() * 21_845,
    "a long name that is no UTF-8": b"\xff" + b"\xfe" * 255 + b"V" + b"\x40" + b"\xfe" * 64 + b"I\0\0\0\1",
    "what a rejection writes": b"\4userS\0\0\0\5admin\6reasonS\0\0\0\4fine\4typeS\0\0\0\1t\4bodyS\0\0\0\1b",
    "a float of 1e300": b"\1dd" + struct.pack(">d", 1e300),
    "numbers": b"\1ll\x80" + b"\0" * 7 + b"\1LL" + b"\xff" * 8 + b"\1tt\1",
}


@pytest.mark.parametrize("entries", TABLES.values(), ids=TABLES)
def test_what_a_dead_letter_keeps_of_any_headers_can_be_written(entries: bytes) -> None:
    kept = kept_headers(plain(decoded(entries)))
    properties = pika.BasicProperties(
        headers={**kept, "detail": "d" * 500}, message_id=kept_id("\\xff" * 255), type=kept_id("é" * 200)
    )

    written = b"".join(properties.encode())

    assert len(written) < FRAME - 4096
    assert kept.keys().isdisjoint({"user", "reason", "body", "type"})


def test_a_replay_can_be_written_whatever_the_letter_s_headers() -> None:
    headers = {f"h{number}": "t" * 100_000 for number in range(100)}

    letter = letter_of(RawLetter(key="run.w1", headers={"reason": "malformed"}), 1, "run")
    replayed = replayed_headers(headers, letter)

    assert replayed["former_reasons"] == "malformed"
    assert len(b"".join(pika.BasicProperties(headers=replayed).encode())) < FRAME - 4096


def test_short_ids_stay_as_they_are() -> None:
    assert kept_id("w1/i/3") == "w1/i/3"
    assert kept_id("é" * 200) == "é" * 127
    assert kept_headers({"worker": "w1", "seq": 3}) == {"worker": "w1", "seq": 3}


@pytest.mark.parametrize("said", ["w" * 65, "a.b", "#", "\x1b[2J", "w1\n", ""])
def test_nobody_is_blamed_by_a_name_that_is_none(said: str) -> None:
    delivery = Delivery(source=Source.UPDATE, body=b"", headers={"worker": said}, user="aggregator")

    event = read_update(Token(1, 1), delivery, Senders("aggregator"))

    assert getattr(event, "worker", None) == ""


class _Cut:
    """A channel whose session is gone as soon as anything is read."""

    @property
    def session(self) -> _Cut:
        return self

    async def channel(self) -> None:
        raise ConnectionLost("cut")


@pytest.mark.parametrize("offsets", ["0+10000000000000000000000", "99999999999999999999+4", "0+2 2+99999999999999999"])
def test_headers_that_tell_of_more_chunks_than_there_can_be_cost_nothing(offsets: str) -> None:
    headers: dict[str, str | int] = {"chunks": 2**62, "message_id": "run/1/1", "offsets": offsets}
    download = Download(Delivery(source=Source.PARAMETERS, body=b"", headers=headers), range(4), lambda _: None)

    def read() -> None:
        with pytest.raises(ConnectionLost):
            asyncio.run(download.run(_Cut(), "stream"))  # type: ignore[arg-type]

    seconds, peak = cost(read)

    assert seconds < SECONDS
    assert peak < 2**20


# ------------------------------------------------------------------------------------------------ texts and files


@pytest.mark.parametrize("text", ["://" * 100_000 + " @", "://:" * 100_000, "a://b:" * 50_000 + "@", "://a@" * 60_000])
def test_a_long_text_is_made_harmless_soon(text: str) -> None:
    assert cost(lambda: harmless(text))[0] < SECONDS


def test_other_line_breaks_and_marks_of_direction_do_not_get_through() -> None:
    assert harmless("a\u2028b\u2029c\u061cd") == "a\ufffdb\ufffdc\ufffdd"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "", "NaNN", b"\xff", "\ud800["])
def test_json_that_says_nothing_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of whatever kind
        from_json(text)


def test_a_line_of_the_history_that_is_nested_without_end_is_passed_over() -> None:
    assert list(_lines(b"[" * 100_000 + b'\n{"version": 1}\n')) == [{"version": 1}]


STATES = ["[" * 100_000, '{"a":' * 100_000, "null", "[]", '{"version": Infinity}', '{"version": []}', '{"entries": 1}']


@pytest.mark.parametrize("state", STATES)
def test_a_checkpoint_whose_state_makes_no_sense_is_passed_over(tmp_path: Path, state: str) -> None:
    store = CheckpointStore(tmp_path, "run")
    file = tmp_path / "00000001.safetensors"
    save_file({"w": np.zeros(2, np.float32)}, file, metadata={"format": "5", "state": state})

    assert store.files() == [file]
    assert rollback._checkpoints(store) == []
    assert lineage._partial(file) == frozenset()
    with pytest.raises(CheckpointError):
        store.load()


def test_a_dead_letter_with_a_signalling_nan_is_shown_without_a_word() -> None:
    values = np.zeros(30_000, np.float32)
    values.view(np.uint32)[0] = 0x7F800001

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = contents(RawLetter(body=Author("run", "w1").with_values(values)))

    assert shown["tensors"][0]["not_finite"] == 1


# ------------------------------------------------------------------------------------------- the management API

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
ANSWERS = {
    "without end": (HEAD + b"\r\n[", b" " * 2**20),
    "a drop at a time, without end": (HEAD + b"\r\n[", b" "),
    "nested without end": (HEAD + b"Content-Length: 100000\r\n\r\n" + b"[" * 100_000, b""),
    "cut": (HEAD + b"Content-Length: 100\r\n\r\n[", b""),
    "a length that is none": (HEAD + b"Content-Length: many\r\n\r\n{", b""),
    "chunks of no length": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b""),
    "a chunk of 2^62": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n4000000000000000\r\n[", b""),
    "headers without end": (b"HTTP/1.1 200 OK\r\n", b"A: b\r\n" * 1000),
    "a line without end": (b"HTTP/1.1 200 OK\r\nA: ", b"a" * 2**16),
    "no HTTP": (b"AMQP\x00\x00\x09\x01", b""),
    "nothing": (b"", b""),
    "bytes": (HEAD + b"Content-Length: 2\r\n\r\n\xff\xfe", b""),
}


@pytest.fixture
def answering() -> Iterator[Callable[[bytes, bytes], int]]:
    """Answers the next request with the first bytes, and then with the second again and again; gives the port."""
    server = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []
    over = threading.Event()

    def answer(first: bytes, more: bytes) -> None:
        try:
            connection, _ = server.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(first)
                while more and not over.is_set():
                    connection.sendall(more)
                    if len(more) == 1:
                        over.wait(0.01)
        except OSError:
            pass  # hung up on, as it should be

    def start(first: bytes, more: bytes) -> int:
        threads.append(threading.Thread(target=answer, args=(first, more)))
        threads[-1].start()
        return int(server.getsockname()[1])

    yield start
    over.set()
    server.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_the_password_is_not_sent_on_to_where_an_answer_points(answering: Callable[[bytes, bytes], int]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        where = f"Location: http://127.0.0.1:{elsewhere.getsockname()[1]}/\r\nContent-Length: 0\r\n\r\n".encode()
        port = answering(b"HTTP/1.1 302 Found\r\n" + where, b"")

        with pytest.raises(BrokerError, match="302"):
            Admin(f"http://127.0.0.1:{port}", "me", "secret").nodes()

        elsewhere.setblocking(False)
        with pytest.raises(BlockingIOError):
            elsewhere.accept()


@pytest.mark.parametrize(("first", "more"), ANSWERS.values(), ids=ANSWERS)
def test_an_answer_of_the_management_api_may_be_anything(
    answering: Callable[[bytes, bytes], int], first: bytes, more: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.admin.LARGEST_ANSWER", 2**22)
    monkeypatch.setattr("broker.admin.TIMES_AS_LONG", 1)
    admin = Admin(f"http://127.0.0.1:{answering(first, more)}", "me", "secret", timeout=0.5)

    with pytest.raises(BrokerUnreachable) as error:
        admin.nodes()

    assert len(str(error.value)) < 1000
