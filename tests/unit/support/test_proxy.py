"""The proxy does what it is told, and nothing else."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.support.frames import BODY, HEADER, METHOD
from tests.support.proxy import Direction, Proxy
from tests.support.waiting import wait_for

#: On a busy machine.
PATIENCE = 60.0
GREETING = b"AMQP\x00\x00\x09\x01"


class Far:
    """A server that keeps what each connection says, and answers when it is told to."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.socket.getsockname()[1])
        self.said: list[bytes] = []
        self.ends: list[str] = []
        self.peers: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self.socket.accept()
            except OSError:
                return
            self.peers.append(peer)
            self.said.append(b"")
            self.ends.append("")
            self._threads.append(threading.Thread(target=self._listen, args=(peer, len(self.peers) - 1), daemon=True))
            self._threads[-1].start()

    def _listen(self, peer: socket.socket, index: int) -> None:
        try:
            while data := peer.recv(65536):
                self.said[index] += data
            self.ends[index] = "closed"
        except OSError:
            self.ends[index] = "reset"

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        for peer in self.peers:
            peer.close()
        for thread in self._threads:
            thread.join(PATIENCE)


@pytest.fixture
def far() -> Iterator[Far]:
    made = Far()
    yield made
    made.close()


@pytest.fixture
def proxy(far: Far) -> Iterator[Proxy]:
    with Proxy("127.0.0.1", far.port, seed=7) as made:
        yield made


@pytest.fixture
def near(proxy: Proxy) -> Iterator[socket.socket]:
    with dial(proxy) as made:
        yield made


def dial(proxy: Proxy) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def frame(kind: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, 1, len(payload)) + payload + b"\xce"


def wait_said(far: Far, data: bytes, index: int = 0) -> None:
    wait_for(lambda: len(far.said) > index and far.said[index] == data, PATIENCE, what=f"{data!r}")


def is_reset(near: socket.socket) -> bool:
    """Whether the connection ends with a RST; False for a FIN."""
    try:
        while near.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return False


def is_turned_away(proxy: Proxy) -> bool:
    """Whether a new connection is reset; that may be before the caller knows that it stands."""
    try:
        with dial(proxy) as near:
            return is_reset(near)
    except ConnectionResetError:
        return True


def test_it_forwards_both_ways_and_passes_on_the_end(far: Far, proxy: Proxy, near: socket.socket) -> None:
    near.sendall(b"question")
    wait_said(far, b"question")
    far.peers[0].sendall(b"answer")
    assert near.recv(100) == b"answer"

    near.shutdown(socket.SHUT_WR)
    wait_for(lambda: far.ends[0] == "closed", PATIENCE)
    far.peers[0].shutdown(socket.SHUT_WR)
    assert near.recv(100) == b""
    wait_for(lambda: proxy.connections == 0, PATIENCE)


def test_a_large_amount_comes_through_unharmed(far: Far, near: socket.socket) -> None:
    data = bytes(range(256)) * 20_000
    near.sendall(data)
    wait_said(far, data)


@pytest.mark.parametrize("reset", [True, False])
def test_a_cut_ends_all_connections_on_both_sides(far: Far, proxy: Proxy, near: socket.socket, reset: bool) -> None:
    with dial(proxy) as other:
        near.sendall(b"a")
        other.sendall(b"b")
        wait_for(lambda: sorted(far.said) == [b"a", b"b"], PATIENCE)

        assert proxy.cut(reset=reset) == 2

        assert is_reset(near) is is_reset(other) is reset
        wait_for(lambda: far.ends == [("reset" if reset else "closed")] * 2, PATIENCE)

    # Then whoever comes again is served
    with dial(proxy) as again:
        again.sendall(b"c")
        wait_said(far, b"c", 2)


def test_a_hole_keeps_what_it_swallows_until_it_is_healed(far: Far, proxy: Proxy, near: socket.socket) -> None:
    near.sendall(b"before")
    wait_said(far, b"before")

    proxy.hole(Direction.UP)
    near.sendall(b" and after")
    # Then the other way is free
    far.peers[0].sendall(b"answer")
    assert near.recv(100) == b"answer"
    # And the end of the connection does not get through either
    near.shutdown(socket.SHUT_WR)
    assert (far.said[0], far.ends[0]) == (b"before", "")

    proxy.heal()
    wait_said(far, b"before and after")
    wait_for(lambda: far.ends[0] == "closed", PATIENCE)


def test_a_hole_in_both_directions_takes_new_connections_and_says_nothing(far: Far, proxy: Proxy) -> None:
    proxy.hole()
    with dial(proxy) as near:
        near.sendall(b"hello")
        near.settimeout(0.2)
        with pytest.raises(TimeoutError):
            near.recv(10)
        assert far.said in ([], [b""])
        proxy.heal()
        wait_said(far, b"hello")


def test_slices_are_small_and_lose_nothing(
    far: Far, proxy: Proxy, near: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the far end reads at once depends on its speed, so what the proxy sends is looked at.
    sent: list[int] = []
    write = asyncio.StreamWriter.write

    def recorded(writer: asyncio.StreamWriter, data: bytes) -> None:
        sent.append(len(data))
        write(writer, data)

    monkeypatch.setattr(asyncio.StreamWriter, "write", recorded)
    data = bytes(range(256)) * 4
    proxy.slices(5)
    near.sendall(data)

    wait_said(far, data)
    assert sum(sent) == len(data)
    assert set(sent) == {1, 2, 3, 4, 5}


def test_a_delay_holds_back_and_loses_nothing(far: Far, proxy: Proxy, near: socket.socket) -> None:
    proxy.delay(0.05)
    for _ in range(5):
        near.sendall(b"x")
    wait_said(far, b"xxxxx")


def test_a_refusing_proxy_serves_nobody_until_it_is_healed(far: Far, proxy: Proxy) -> None:
    proxy.refuse()
    assert is_turned_away(proxy)
    assert far.peers == []
    proxy.heal()
    with dial(proxy) as near:
        near.sendall(b"x")
        wait_said(far, b"x")


@pytest.mark.parametrize("together", [True, False])
def test_a_cut_in_a_frame_lets_the_beginning_through(
    far: Far, proxy: Proxy, near: socket.socket, together: bool
) -> None:
    first = GREETING + frame(METHOD, b"publish") + frame(HEADER, b"properties") + frame(BODY, b"small")
    last = frame(METHOD, b"publish") + frame(BODY, b"a large body")
    cut = proxy.cut_in_frame(12, kind=BODY, least=10)

    parts = [first + last] if together else [bytes([byte]) for byte in first + last]
    try:
        for part in parts:
            near.sendall(part)
    except OSError:
        assert not together

    assert is_reset(near)
    assert cut.happened.is_set()
    wait_for(lambda: far.ends[0] == "reset", PATIENCE)
    assert far.said[0] == (first + last)[: len(first) + 15 + 12]

    # Then it has happened once
    with dial(proxy) as again:
        again.sendall(first + last)
        wait_said(far, first + last, 1)


def test_a_cut_after_a_number_of_bytes_counts_from_when_it_was_ordered(
    far: Far, proxy: Proxy, near: socket.socket
) -> None:
    near.sendall(b"12345")
    wait_said(far, b"12345")

    cut = proxy.cut_after(3)
    near.sendall(b"6789")

    assert is_reset(near)
    assert cut.happened.is_set()
    wait_for(lambda: far.ends[0] == "reset", PATIENCE)
    assert far.said[0] == b"12345678"


def test_healing_calls_off_a_cut_that_has_not_happened(far: Far, proxy: Proxy, near: socket.socket) -> None:
    cut = proxy.cut_in_frame(10, kind=BODY)
    proxy.heal()
    sent = GREETING + frame(BODY, b"a large body")
    near.sendall(sent)
    wait_said(far, sent)
    assert not cut.happened.is_set()


def test_an_address_leads_through_the_proxy(proxy: Proxy) -> None:
    there = "amqp://user:pass%40word@broker.example:5672/vhost?x=1"
    assert proxy.url(there) == f"amqp://user:pass%40word@127.0.0.1:{proxy.port}/vhost?x=1"


def test_a_server_that_is_away_is_seen_as_away(far: Far) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
    with Proxy.to(f"amqp://user:password@127.0.0.1:{port}/") as proxy:
        assert is_turned_away(proxy)
