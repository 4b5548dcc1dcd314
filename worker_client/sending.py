"""What a worker says, as encoded messages on their way out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from broker.messages import (
    Event,
    EventKind,
    Goodbye,
    Hello,
    Manifest,
    ModelSpec,
    ParametersHead,
    Role,
    Update,
    UpdateId,
)
from broker.signing import CONTROL, EVENT, UPDATE, Signer, sealing_of
from broker.transport import Outgoing
from broker.wire import Message, decode, encode, encode_in_chunks
from worker_client.training import Trained

__all__ = ["Sender"]


class Sender:
    """One worker's stationery: its run, its name, its incarnation and its role stand on every sheet."""

    def __init__(
        self,
        run: str,
        worker: str,
        incarnation: str,
        role: Role,
        *,
        pack_chunks: bool = False,
        more: Callable[[UpdateId], Mapping[str, str | int]] = lambda _: {},
        signer: Signer | None = None,
    ) -> None:
        """``more`` gives headers that go with an update; ``signer`` signs everything."""
        self._run = run
        self._worker = worker
        self._incarnation = incarnation
        self._role = role
        self._pack_chunks = pack_chunks
        self._more = more
        self._signer = signer

    def hello(self, version: int) -> Outgoing:
        """The worker is here, and ``version`` is the newest it has (-1: none)."""
        return self._sheet(
            Hello(run=self._run, worker=self._worker, incarnation=self._incarnation, role=self._role, version=version),
            CONTROL,
        )

    def goodbye(self, confirmed: int, reason: str, *, incarnation: str = "") -> Outgoing:
        """The worker leaves after ``confirmed`` updates of this incarnation, or a former ``incarnation`` left."""
        return self._sheet(
            Goodbye(
                run=self._run,
                worker=self._worker,
                incarnation=incarnation or self._incarnation,
                role=self._role,
                confirmed=confirmed,
                reason=reason[:1000],
            ),
            CONTROL,
        )

    def event(self, kind: EventKind, data: Mapping[str, Any]) -> Outgoing:
        """Something worth showing; role and incarnation are added to ``data``."""
        facts = {**data, "role": str(self._role), "incarnation": self._incarnation}
        return self._sheet(Event(run=self._run, kind=kind, source=self._worker, time=time.time(), data=facts), EVENT)

    def update(self, update: UpdateId, base: ParametersHead, trained: Trained, model: ModelSpec) -> Update:
        """What was trained from ``base``."""
        return Update(
            run=self._run,
            id=update,
            base_version=base.version,
            base_epoch=base.epoch,
            mode=base.plan.mode,
            examples=trained.examples,
            metrics=dict(trained.metrics),
            seconds=trained.seconds,
            steps=trained.steps,
            effort=trained.effort,
            model=model,
            tensors=trained.tensors if trained.encoded is None else trained.encoded,
            codec=trained.codec,
            seed=trained.seed,
        )

    def cut(self, update: Update, largest: int) -> Outgoing:
        """``update`` on its way out, in chunks if it takes more than ``largest`` bytes.

        Raises :class:`ModelMismatch` if its tensors do not fit its model.
        """
        headers: dict[str, str | int] = {
            "run": self._run,
            "worker": update.id.worker,
            "incarnation": update.id.incarnation,
            "seq": update.id.seq,
            "base_version": update.base_version,
            "examples": update.examples,
            "steps": update.steps,
        }
        sealing = sealing_of(self._signer, UPDATE)
        body, chunks = encode_in_chunks(update, str(update.id), largest, lossless=self._pack_chunks, sealing=sealing)
        if chunks:
            manifest = decode(body)
            assert isinstance(manifest, Manifest)  # noqa: S101  (it was encoded here)
            headers |= {"chunks": len(chunks), "bytes": manifest.nbytes}
        headers |= self._more(update.id)
        return Outgoing(body=body, chunks=chunks, message_id=str(update.id), headers=headers)

    def _sheet(self, message: Message, purpose: str) -> Outgoing:
        body = encode(message, sealing_of(self._signer, purpose))
        return Outgoing(body=body, headers={"run": self._run, "worker": self._worker})
