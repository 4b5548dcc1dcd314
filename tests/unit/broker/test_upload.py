"""Sending in chunks, without a broker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from broker.amqp.upload import Route, Uploader
from broker.errors import BrokerError
from broker.transport import Outgoing
from broker.wire.chunks import Bodies


class Torn(Bodies):
    """Chunks that cannot be made, for a reason that nobody has thought of."""

    def __len__(self) -> int:
        return 3

    def body(self, index: int) -> bytes:
        raise MemoryError(f"chunk {index}")


@pytest.fixture
def uploader() -> Iterator[Uploader]:
    publisher: Any = None  # nothing gets so far
    made = Uploader(publisher, Route(("updates", "r.w.chunk"), ("updates", "r.w"), "update"))
    yield made
    made.close()


def test_an_error_that_was_not_foreseen_is_told_to_whoever_waits(
    uploader: Uploader, caplog: pytest.LogCaptureFixture
) -> None:
    future = uploader.send(Outgoing(body=b"manifest", chunks=Torn(), message_id="w/i/0"))
    with pytest.raises(BrokerError, match="could not be sent in chunks: MemoryError: chunk 0") as failure:
        future.result(60)
    assert not failure.value.retryable
    assert "chunk 0" in caplog.text
