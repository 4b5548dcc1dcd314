"""From what arrives to what a worker's loop knows."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from broker.errors import AccessRefused, ConfigError, FedmqError, WireError
from broker.messages import Event, EventKind, Manifest, ModelSpec, Parameters, ParametersHead
from broker.transport import Delivery, Source
from broker.wire import Shared, decode, delta_range, follow, join
from broker.wire.messages import read_chunk

__all__ = ["Broken", "Complete", "Offer", "explained", "head_of", "read", "require_account", "under"]


@dataclass(frozen=True, slots=True)
class Offer:
    """A version that can be downloaded."""

    head: ParametersHead
    manifest: Manifest
    delivery: Delivery

    @property
    def model(self) -> ModelSpec:
        """The run's model."""
        return self.manifest.model

    def part(self, shared: Shared | None) -> range:
        """Which chunks to get: those of the delta for whoever has the state before, else of the whole version."""
        delta = self.manifest.delta
        if delta is not None and shared is not None and delta.base == shared.state:
            return delta_range(self.manifest)
        return range(len(self.manifest.chunks))


@dataclass(frozen=True, slots=True)
class Complete:
    """A version with its tensors."""

    parameters: Parameters
    state: str = ""
    """The name of its tensors, where versions are told by deltas."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A download of which something is missing or damaged."""

    head: ParametersHead
    problem: str


def explained(error: FedmqError, account: str, name: str) -> FedmqError:
    """``error``, with what to do where the broker refuses the worker ``name`` because its account is another's."""
    if not isinstance(error, AccessRefused) or account in {"", name}:
        return error
    return AccessRefused(
        f"{error}. This worker is called {name!r} and its account {account!r}, which may do what worker {account!r} "
        f"does: set worker.name = {account!r}, or make an account for this one (fedmq broker add-worker {name})"
    )


def require_account(account: str, name: str, theirs: str) -> None:
    """Raise :class:`ConfigError` if the aggregator will take nothing from the worker ``name``.

    Args:
        account: the broker's account of this worker.
        name: what this worker is called.
        theirs: the account that publishes the run's versions; empty if the broker does not say.
    """
    if theirs and account not in {"", name, theirs}:
        raise ConfigError(
            f"this worker is called {name!r} and its account at the broker {account!r}: the aggregator takes updates "
            f"of a worker from the account of the same name only. Set worker.name = {account!r}, or give it its own "
            "account in broker.url"
        )


def read(
    delivery: Delivery, run: str, shared: Shared | None = None, *, signed: bool = False
) -> Complete | Offer | Broken | Event | None:
    """The version or notice in ``delivery``; None for what is not for a worker of ``run``. Raises :class:`WireError`.

    ``shared`` is what is here, which a delta may start from. ``signed``: that it is was looked at, so its tensors must
    be those that the signature stands for.

    Of a version in chunks, each is checked against its checksum, and its tensors are views of them. The digest is not
    computed again: it comes from the same aggregator as the checksums, so it proves nothing more, and for 100 MB it
    takes 60 ms and more where the checksums take 10.
    """
    message = decode(delivery.body, strong=signed)
    if isinstance(message, Event):
        return message if message.kind is EventKind.NOTICE and message.run == run else None
    if delivery.source is not Source.PARAMETERS:
        return None
    if isinstance(message, Parameters):
        return Complete(message) if message.run == run else None
    if isinstance(message, Manifest) and isinstance(message.head, ParametersHead) and message.head.run == run:
        return _in_chunks(delivery, message, message.head, shared)
    return None


def _in_chunks(
    delivery: Delivery, manifest: Manifest, head: ParametersHead, shared: Shared | None
) -> Complete | Offer | Broken:
    if delivery.lost:
        return Broken(head, delivery.lost)
    if delivery.chunks is None:
        return Offer(head, manifest, delivery)
    of = str(delivery.headers.get("message_id", ""))
    try:
        first = read_chunk(delivery.chunks[0])[0].index if delivery.chunks else 0
        if first < len(manifest.chunks):
            version = join(manifest, of, delivery.chunks)
        elif shared is not None:
            version = follow(manifest, of, delivery.chunks, shared)
        else:
            return Broken(head, "a delta, and nothing here that it could start from")
    except WireError as error:
        return Broken(head, str(error))
    assert isinstance(version, Parameters)  # noqa: S101  (its head is a version's)
    return Complete(version, manifest.state)


def head_of(parameters: Parameters) -> ParametersHead:
    """Only the small facts: the machine must not keep a version's tensors in memory, nor compare them."""
    return ParametersHead(**{f.name: getattr(parameters, f.name) for f in fields(ParametersHead)})


def under(head: ParametersHead, parameters: Parameters) -> Parameters:
    """The tensors of ``parameters`` under another head that has their digest: the plan was told anew."""
    return replace(parameters, **{f.name: getattr(head, f.name) for f in fields(ParametersHead)})
