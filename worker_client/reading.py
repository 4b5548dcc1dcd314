"""From what arrives to what a worker's loop knows."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from broker.errors import WireError
from broker.messages import Event, EventKind, Manifest, ModelSpec, Parameters, ParametersHead
from broker.transport import Delivery, Source
from broker.wire import decode, join

__all__ = ["Broken", "Offer", "head_of", "read", "under"]


@dataclass(frozen=True, slots=True)
class Offer:
    """A version that can be downloaded."""

    head: ParametersHead
    model: ModelSpec
    delivery: Delivery
    part: range
    """Which of its chunks hold the whole version."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A download of which something is missing or damaged."""

    head: ParametersHead
    problem: str


def read(delivery: Delivery, run: str) -> Parameters | Offer | Broken | Event | None:
    """The version or notice in ``delivery``; None for what is not for a worker of ``run``. Raises :class:`WireError`.

    Of a version in chunks, each is checked against its checksum, and its tensors are views of them. The digest is not
    computed again: it comes from the same aggregator as the checksums, so it proves nothing more, and for 100 MB it
    takes 60 ms and more where the checksums take 10.
    """
    message = decode(delivery.body)
    if isinstance(message, Event):
        return message if message.kind is EventKind.NOTICE and message.run == run else None
    if delivery.source is not Source.PARAMETERS:
        return None
    if isinstance(message, Parameters):
        return message if message.run == run else None
    if isinstance(message, Manifest) and isinstance(message.head, ParametersHead) and message.head.run == run:
        return _in_chunks(delivery, message, message.head)
    return None


def _in_chunks(delivery: Delivery, manifest: Manifest, head: ParametersHead) -> Parameters | Offer | Broken:
    if delivery.lost:
        return Broken(head, delivery.lost)
    if delivery.chunks is None:
        return Offer(head, manifest.model, delivery, range(len(manifest.chunks)))
    try:
        version = join(manifest, str(delivery.headers.get("message_id", "")), delivery.chunks)
    except WireError as error:
        return Broken(head, str(error))
    assert isinstance(version, Parameters)  # noqa: S101  (its head is a version's)
    return version


def head_of(parameters: Parameters) -> ParametersHead:
    """Only the small facts: the machine must not keep a version's tensors in memory, nor compare them."""
    return ParametersHead(**{f.name: getattr(parameters, f.name) for f in fields(ParametersHead)})


def under(head: ParametersHead, parameters: Parameters) -> Parameters:
    """The tensors of ``parameters`` under another head that has their digest: the plan was told anew."""
    return replace(parameters, **{f.name: getattr(head, f.name) for f in fields(ParametersHead)})
