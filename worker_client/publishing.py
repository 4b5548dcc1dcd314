"""The update that is being published: given an id, cut to size, sent, and sent again."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from broker.errors import ConnectionLost, FedmqError
from broker.messages import ModelSpec, ParametersHead, Update, UpdateId
from broker.transport import Outgoing, WorkerTransport
from worker_client.mailbox import Published
from worker_client.outbox import Outbox
from worker_client.sending import Sender
from worker_client.training import Trained
from worker_client.variates import Variates

__all__ = ["Publishing", "error_of"]


class Publishing:
    """One update at a time. Its tensors are borrowed, and nobody may write into them, until it is confirmed.

    Args:
        transport: takes the update.
        outbox: gives out ids.
        sender: writes the update.
        model: of the run.
        chunk_bytes: updates that are larger travel in chunks.
        variates: are told of updates that are published, confirmed and rejected.
        report: is given each outcome, on any thread.
    """

    def __init__(
        self,
        transport: WorkerTransport,
        outbox: Outbox,
        sender: Sender,
        model: ModelSpec,
        *,
        chunk_bytes: int,
        variates: Variates,
        report: Callable[[Published], None],
    ) -> None:
        self._transport = transport
        self._outbox = outbox
        self._sender = sender
        self._model = model
        self._chunk_bytes = chunk_bytes
        self._variates = variates
        self._report = report
        self._message: Outgoing | None = None
        self._update: Update | None = None
        self._size = 0
        self.id: UpdateId | None = None
        """Of the update that is being published; None if there is none."""

    @property
    def is_in_chunks(self) -> bool:
        """Whether the update travels in chunks."""
        return self._message is not None and bool(self._message.chunks)

    def start(self, base: ParametersHead, trained: Trained) -> None:
        """Publish what was ``trained`` from ``base``, under a new id.

        Raises :class:`CheckpointNotWritten` if that cannot be made durable, :class:`ModelMismatch` if the tensors do
        not fit the model.
        """
        update = self._sender.update(self._outbox.next_id(), base, trained, trained.model or self._model)
        self._variates.record(update)
        self.resume(update)
        self.send()

    def resume(self, update: Update) -> None:
        """``update``, which has an id, is the one to send."""
        self.id = update.id
        self._cut(update)

    def send(self) -> None:
        """Send it, once more under the same id if it was sent before."""
        if self._message is None:
            raise RuntimeError("there is no update to publish")
        try:
            future = self._transport.publish(self._message)
        except FedmqError as error:
            self._report(Published(error))
        else:
            future.add_done_callback(lambda done: self._report(Published(error_of(done))))

    def cut_again(self) -> bool:
        """Cut it to what the broker takes, if that is less than it was when it was cut; whether it is."""
        if self._update is None or self._largest >= self._size:
            return False
        self._cut(self._update)
        return True

    def confirm(self) -> None:
        """The broker has it."""
        if self.id is not None:
            self._outbox.confirm(self.id)
            self._variates.confirm(self.id)
        self._message = self._update = self.id = None

    @property
    def _largest(self) -> int:
        return min(self._chunk_bytes, self._transport.max_message_bytes)

    def _cut(self, update: Update) -> None:
        self._size = self._largest
        self._update, self._message = update, self._sender.cut(update, self._size)


def error_of(done: Future[None]) -> BaseException | None:
    """Why the broker did not confirm a message."""
    return ConnectionLost("the transport gave up waiting for the confirm") if done.cancelled() else done.exception()
