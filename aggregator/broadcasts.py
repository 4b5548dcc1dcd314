"""Durable versions as messages on their way out: whole, in chunks, or by what they change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from broker.messages import Manifest, Parameters, ParametersHead
from broker.transport import Outgoing
from broker.wire import CHUNK_OVERHEAD, Shared, encode, encode_in_chunks, told_by_delta

__all__ = ["Broadcasts"]


class Broadcasts:
    """Makes the messages of one run's versions.

    Args:
        run: the run's name.
        chunk_bytes: versions that are larger travel in chunks.
        codec: in which code workers that have followed get what a version changes; empty for none.
        lossless: pack chunks.
    """

    def __init__(self, run: str, *, chunk_bytes: int, codec: str = "", lossless: bool = False) -> None:
        self._run = run
        self._chunk_bytes = chunk_bytes
        self._codec, self._lossless = codec, lossless
        self._shared: Shared | None = None
        self._told: tuple[str, Manifest, Sequence[bytes]] | None = None

    def is_in_chunks(self, model_bytes: int, largest: int) -> bool:
        """Whether a version of this size travels in chunks; ``largest`` is what the broker takes."""
        return bool(self._codec) or model_bytes + CHUNK_OVERHEAD > min(self._chunk_bytes, largest)

    def message(self, version: Parameters, largest: int) -> Outgoing:
        """``version`` on its way out; ``largest`` is what the broker takes. Its tensors are borrowed."""
        message_id = f"{self._run}/{version.epoch}/{version.version}"
        limit = min(self._chunk_bytes, largest)
        if self._codec:
            manifest, chunks = self._by_delta(version, message_id, limit)
            body = encode(manifest)
        else:
            body, chunks = encode_in_chunks(version, message_id, limit, lossless=self._lossless)
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
                version, message_id, self._shared, self._codec, chunk_bytes=limit, lossless=self._lossless
            )
            self._told = message_id, manifest, chunks
        _, manifest, chunks = self._told
        head = ParametersHead(
            run=version.run, epoch=version.epoch, version=version.version, plan=version.plan, digest=version.digest
        )
        return replace(manifest, head=head), chunks
