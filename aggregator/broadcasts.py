"""Durable versions as messages on their way out: whole, in chunks, or by what they change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace

from aggregator.core import effects as do
from aggregator.core.snapshot import Snapshot
from broker.errors import BrokerError, FedmqError
from broker.messages import Manifest, Parameters, ParametersHead, Plan
from broker.signing import VERSION, Signer, sealing_of
from broker.transport import AggregatorTransport, Outgoing
from broker.wire import CHUNK_OVERHEAD, Chunks, Shared, Sums, encode, encode_in_chunks, told_by_delta

__all__ = ["Announcer", "Broadcasts"]


class Broadcasts:
    """Makes the messages of one run's versions.

    Args:
        run: the run's name.
        chunk_bytes: versions that are larger travel in chunks.
        codec: in which code workers that have followed get what a version changes; empty for none.
        lossless: pack chunks.
        signer: signs them.
    """

    def __init__(
        self, run: str, *, chunk_bytes: int, codec: str = "", lossless: bool = False, signer: Signer | None = None
    ) -> None:
        self._run = run
        self._chunk_bytes = chunk_bytes
        self._codec, self._lossless = codec, lossless
        self._sealing = sealing_of(signer, VERSION)
        self._shared: Shared | None = None
        self._told: tuple[str, Manifest, Sequence[bytes]] | None = None
        # Of the version that was cut last: it is cut once to be sent ahead and again with each plan. Not the chunks,
        # which would keep its tensors.
        self._sums: tuple[tuple[str, int], Sums] | None = None

    def is_in_chunks(self, model_bytes: int, largest: int) -> bool:
        """Whether a version of this size travels in chunks; ``largest`` is what the broker takes."""
        return bool(self._codec) or model_bytes + CHUNK_OVERHEAD > min(self._chunk_bytes, largest)

    def message(self, version: Parameters, largest: int) -> Outgoing:
        """``version`` on its way out; ``largest`` is what the broker takes. Its tensors are borrowed."""
        message_id = f"{self._run}/{version.epoch}/{version.version}"
        limit = min(self._chunk_bytes, largest)
        if self._codec:
            manifest, chunks = self._by_delta(version, message_id, limit)
            body = encode(manifest, self._sealing)
        else:
            known = self._sums[1] if self._sums is not None and self._sums[0] == (message_id, limit) else None
            body, chunks = encode_in_chunks(
                version, message_id, limit, lossless=self._lossless, sums=known, sealing=self._sealing
            )
            if isinstance(chunks, Chunks):
                self._sums = (message_id, limit), chunks.sums()
        headers: dict[str, str | int] = {
            "run": self._run,
            "epoch": version.epoch,
            "version": version.version,
            "attempt": version.plan.attempt,
            "done": int(version.plan.done),
        }
        if chunks:
            headers |= {"chunks": len(chunks), "bytes": version.model.nbytes}
        return Outgoing(body=body, chunks=chunks, headers=headers, message_id=message_id)

    def _by_delta(self, version: Parameters, message_id: str, limit: int) -> tuple[Manifest, Sequence[bytes]]:
        """The same chunks for the same version, whose plan may be another now."""
        if self._told is None or self._told[0] != message_id:
            manifest, chunks, self._shared = told_by_delta(
                version,
                message_id,
                self._shared,
                self._codec,
                chunk_bytes=limit,
                lossless=self._lossless,
                strong=self._sealing is not None,
            )
            self._told = message_id, manifest, chunks
        _, manifest, chunks = self._told
        head = ParametersHead(
            run=version.run, epoch=version.epoch, version=version.version, plan=version.plan, digest=version.digest
        )
        return replace(manifest, head=head), chunks


class Announcer:
    """Hands a run's durable versions to the transport.

    Args:
        run: the run's name.
        transport: where to.
        messages: makes the messages.
        fail: takes an error that no waiting cures; called on the transport's threads.
    """

    def __init__(
        self, run: str, transport: AggregatorTransport, messages: Broadcasts, fail: Callable[[FedmqError], None]
    ) -> None:
        self._run = run
        self._transport = transport
        self._messages = messages
        self._fail = fail
        self._under_way: dict[Future[None], int] = {}
        self._prepared = -1

    def is_in_chunks(self, model_bytes: int) -> bool:
        """Whether a version of this size travels in chunks."""
        return self._messages.is_in_chunks(model_bytes, self._transport.max_message_bytes)

    def broadcast(self, effect: do.Broadcast) -> Future[None]:
        """Give a durable version to all workers; done once the broker has it."""
        message = Parameters(
            run=self._run,
            epoch=effect.epoch,
            version=effect.version,
            plan=effect.plan,
            digest=effect.digest,
            model=effect.model,
            tensors=effect.parameters,
        )
        future = self._transport.broadcast(self._messages.message(message, self._transport.max_message_bytes))
        self._under_way[future] = effect.version
        future.add_done_callback(self._done)
        return future

    def prepare(self, snapshot: Snapshot) -> None:
        """While a version becomes durable its chunks are sent ahead; nobody looks at them before it is broadcast."""
        if snapshot.version == self._prepared or not self.is_in_chunks(snapshot.model.nbytes):
            return
        self._prepared = snapshot.version
        message = Parameters(
            run=self._run,
            epoch=snapshot.epoch,
            version=snapshot.version,
            plan=Plan(),
            digest=snapshot.digest,
            model=snapshot.model,
            tensors=snapshot.parameters,
        )
        self._transport.prepare(self._messages.message(message, self._transport.max_message_bytes))

    def wait(self, timeout: float, *, before: int | None = None) -> bool:
        """Until everything was sent, for ``timeout`` seconds at most; ``before``: only versions before this one.

        Whether it was.
        """
        # A copy: callbacks take from it on other threads.
        futures = [one for one, version in self._under_way.copy().items() if before is None or version < before]
        return not wait(futures, timeout=timeout).not_done

    def _done(self, future: Future[None]) -> None:
        self._under_way.pop(future, None)
        error = future.exception()
        # What waiting cures, the transport has tried again, or the next connection brings the current version.
        cured = isinstance(error, BrokerError) and error.retryable
        if isinstance(error, FedmqError) and not cured:
            self._fail(error)
