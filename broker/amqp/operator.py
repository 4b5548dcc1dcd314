"""An operator's side: give the run's aggregator a command, and hear what became of it."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from broker.amqp.publisher import Publisher
from broker.amqp.session import Channel
from broker.amqp.watch import AmqpWatch
from broker.errors import BadSignature, BrokerError, BrokerUnreachable, NotSigned, Unroutable, WireError
from broker.messages import Command, Event, EventKind
from broker.settings import BrokerConfig
from broker.signing import EVENT, Keyring
from broker.topology import CONTROL, EVENTS, Topology
from broker.transport import Delivery, Failed, Incoming, Outgoing
from broker.wire import Sealing, decode, encode

__all__ = ["Answer", "Operator"]


log = logging.getLogger("fedmq.broker")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the aggregator said to a command."""

    accepted: bool
    text: str


class Operator:
    """A connection for commands; a context manager."""

    def __init__(self, config: BrokerConfig, topology: Topology, keys: Keyring | None = None) -> None:
        """Nothing happens before the block is entered. With ``keys``, an answer must be signed with one of them."""
        self._keys = keys
        self._topology = topology
        self._patience = config.connect_timeout + 5
        self._publisher = Publisher(
            config, f"fedmq operator · run {topology.run}", prepare=self._prepare, failed=lambda _error: None
        )
        self._watch = AmqpWatch(config, topology)
        self._answers: dict[str, Answer] = {}
        self._heard = threading.Condition()

    def __enter__(self) -> Self:
        self._watch.open(self._take)
        self._publisher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._publisher.stop()
        self._watch.close()

    def give(self, command: Command, *, wait: float, sealing: Sealing | None = None) -> Answer | None:
        """Put ``command`` into the run's queue, durably; the answer, or None if there is none in ``wait`` seconds.

        ``sealing`` signs it.

        Raises:
            Unroutable: no aggregator has ever declared the run on this broker.
            BrokerError: the broker cannot be reached or refuses.
        """
        message = Outgoing(body=encode(command, sealing), message_id=command.id, headers={"run": command.run})
        try:
            # First, or a quick answer would be gone before anybody listens.
            self._watch.watching.result(self._patience)
            self._publisher.publish(CONTROL, self._topology.command_key, message, kind="command").result(self._patience)
        except TimeoutError:
            problem = self._publisher.link.problem or "it takes no messages (memory or disk alarm?)"
            raise BrokerUnreachable(f"RabbitMQ did not take the command: {problem}") from None
        except Unroutable:
            raise Unroutable(self._absent) from None
        with self._heard:
            self._heard.wait_for(lambda: command.id in self._answers, wait)
            return self._answers.get(command.id)

    @property
    def _absent(self) -> str:
        return f"no aggregator has ever declared run {self._topology.run!r} on this broker; check --run and --broker"

    async def _prepare(self, channel: Channel) -> None:
        if not await channel.session.exists(exchanges=(CONTROL, EVENTS)):
            # Publishing to a missing exchange would cost the channel, again and again.
            absent = Unroutable(self._absent)
            if not self._watch.watching.done():
                self._watch.watching.set_exception(absent)
            self._publisher.refuse(absent)
            await channel.ended()

    def _take(self, item: Incoming) -> None:
        if isinstance(item, Failed):
            self._fail(item.error)
        if not isinstance(item, Delivery):
            return
        try:
            event = decode(item.body)
            if self._keys is not None and isinstance(event, Event) and event.kind is EventKind.PROGRESS:
                self._keys.speakers(item.body, EVENT)
        except WireError as error:
            if isinstance(error, NotSigned | BadSignature):
                log.warning("an answer that is not believed is left aside: %s", error)
            return
        if not isinstance(event, Event) or event.kind is not EventKind.PROGRESS or event.data.get("what") != "command":
            return
        with self._heard:
            answer = Answer(bool(event.data.get("accepted")), str(event.data.get("text", "")))
            self._answers[str(event.data.get("id"))] = answer
            self._heard.notify_all()

    def _fail(self, error: Exception) -> None:
        if not self._watch.watching.done() and isinstance(error, BrokerError):
            self._watch.watching.set_exception(error)
