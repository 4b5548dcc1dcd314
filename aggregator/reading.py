"""From what arrives to what the round machine knows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from aggregator.core import events as on
from aggregator.senders import NO_USER, Senders
from aggregator.signatures import Signatures
from broker.errors import BadSignature, NotSigned, UnknownFormat, WireError
from broker.messages import (
    NAME_PATTERN,
    Command,
    Event,
    EventKind,
    Goodbye,
    Hello,
    Manifest,
    Reason,
    Role,
    Scalar,
    Update,
    UpdateHead,
    evaluation_metrics,
)
from broker.transport import Delivery, Source, Token
from broker.wire import Message, decode, join

__all__ = ["from_aside", "read_update"]


def read_update(
    token: Token, delivery: Delivery, senders: Senders | None = None, signatures: Signatures | None = None
) -> on.Announced | on.Arrived | on.Unreadable:
    """The update in ``delivery``, or its announcement, or why it is none that can be used.

    ``senders`` knows who may speak in whose name, by the broker's word, and ``signatures`` by their own; if None,
    anybody may.
    """
    worker = str(delivery.headers.get("worker", ""))
    if re.fullmatch(NAME_PATTERN, worker) is None:
        worker = ""  # nobody's; it would be remembered, and told of
    if senders is not None:
        if not delivery.user:
            return on.Unreadable(token, Reason.NO_USER, NO_USER)
        # For what cannot be read, whoever sent it is to blame, and not whom its headers name.
        worker = senders.blamed(delivery.user, worker)
    try:
        signers = signatures.of_update(delivery.body) if signatures is not None else None
        message = decode(delivery.body, strong=signers is not None)
    except WireError as error:
        return on.Unreadable(token, _reason(error), str(error), worker)
    head = message.head if isinstance(message, Manifest) else message
    if not isinstance(head, Update | UpdateHead):
        kind = type(message).__name__.lower()
        return on.Unreadable(token, Reason.MALFORMED, f"a {kind} in the queue of updates", worker)
    refused = senders.refusal(delivery.user, head.id.worker) if senders is not None else None
    if refused is None and signers is not None and head.id.worker not in signers:
        refused = Reason.BAD_SIGNATURE, f"{', '.join(sorted(signers))} has signed it, in the name of {head.id.worker}"
    if refused is not None:
        # Without its id: the worker that it names has perhaps sent an update under that one.
        return on.Unreadable(token, *refused, worker)
    if isinstance(head, Update):
        return on.Arrived(token, head, len(delivery.body))
    assert isinstance(message, Manifest)  # noqa: S101  (whose head this is)
    return _in_chunks(token, delivery, message, head)


def _reason(error: WireError) -> Reason:
    match error:
        case UnknownFormat():
            return Reason.UNKNOWN_FORMAT
        case NotSigned():
            return Reason.NOT_SIGNED
        case BadSignature():
            return Reason.BAD_SIGNATURE
    return Reason.MALFORMED


def _in_chunks(
    token: Token, delivery: Delivery, manifest: Manifest, head: UpdateHead
) -> on.Announced | on.Arrived | on.Unreadable:
    worker = head.id.worker
    facts = delivery.headers
    said = facts.get("message_id"), facts.get("chunks"), facts.get("bytes")
    if said != (str(head.id), len(manifest.chunks), manifest.nbytes):
        # By these its chunks are found, and no more is fetched than they say.
        return on.Unreadable(token, Reason.MALFORMED, "its headers say something else than its body", worker, head.id)
    if delivery.lost:
        return on.Unreadable(token, Reason.INCOMPLETE, delivery.lost, worker, head.id)
    if delivery.chunks is None:
        return on.Announced(token, head, manifest.model)
    try:
        message = join(manifest, str(head.id), delivery.chunks)
    except WireError as error:
        return on.Unreadable(token, _reason(error), str(error), worker, head.id)
    assert isinstance(message, Update)  # noqa: S101  (its head is an update's)
    return on.Arrived(token, message, manifest.nbytes)


def from_aside(
    delivery: Delivery,
    run: str,
    newest: int,
    heard: Callable[[Event], None] = lambda _event: None,
    senders: Senders | None = None,
    *,
    signatures: Signatures | None = None,
) -> on.Happening | Command | None:
    """What a message that is no update says; None for what makes no sense or is of another run.

    Args:
        delivery: of the control queue or an event.
        run: this run.
        newest: its newest version; nobody can have evaluated a later one.
        heard: is given each heartbeat, of which the round machine needs less than people who watch.
        senders: knows who may speak in whose name, by the broker's word; if None, anybody may.
        signatures: the same by their own; of commands :meth:`Signatures.require_command` knows.

    Raises :class:`WireError`, also for what nobody may say in that name.
    """
    message = decode(delivery.body)
    if isinstance(message, Manifest | Update) or message.run != run:
        return None
    if isinstance(message, Command):
        # Only the queue that operators may write to; anybody's event may look like one.
        return message if delivery.source is Source.CONTROL and delivery.token is not None else None
    if isinstance(message, Hello | Goodbye | Event):
        name = message.source if isinstance(message, Event) else message.worker
        if senders is not None and (refused := senders.refusal(delivery.user, name)):
            raise WireError(refused[1])
        if signatures is not None and not signatures.believes(delivery, name):
            return None
    if isinstance(message, Event) and message.kind is EventKind.HEARTBEAT:
        heard(message)
    return _happening(message, newest)


def _happening(message: Message, newest: int) -> on.Happening | None:
    match message:
        case Hello():
            return on.Joined(message)
        case Goodbye():
            return on.Left(message)
        case Event(kind=EventKind.HEARTBEAT, source=source, data=data):
            role = Role.EVALUATOR if data.get("role") == Role.EVALUATOR else Role.TRAINER
            confirmed = data.get("confirmed")
            count = confirmed if isinstance(confirmed, int) and not isinstance(confirmed, bool) else 0
            incarnation = str(data.get("incarnation", ""))
            is_name = re.fullmatch(NAME_PATTERN, incarnation) is not None
            version = data.get("version")
            waiting = version if data.get("state") == "waiting" and isinstance(version, int) else None
            return on.Seen(source, incarnation, role, min(max(count, 0), 2**53), waiting) if is_name else None
        case Event(kind=EventKind.EVALUATION, source=source, data=data):
            version = data.get("version")
            if isinstance(version, int) and not isinstance(version, bool) and 0 <= version <= newest:
                return on.Evaluated(source, version, evaluation_metrics(message))
        case Event(kind=EventKind.CHECK, source=source, data=data):
            return _checked(source, data.get("version"), data.get("examples"), newest, evaluation_metrics(message))
    return None


def _checked(
    source: str, version: Scalar, examples: Scalar, newest: int, metrics: Mapping[str, float]
) -> on.Checked | None:
    are_whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (version, examples))
    if not (are_whole and isinstance(version, int) and isinstance(examples, int)):
        return None
    is_sensible = 0 <= version <= newest and examples >= 1
    return on.Checked(source, version, min(examples, 2**53), metrics) if is_sensible else None
