"""What a worker believes of what comes in the aggregator's name, by the broker's word, and by signatures if it asks.

Notices are believed of the account that publishes the versions, to which nobody else has a right.

A version is looked at before anything else is done with it: whether one of the aggregator's keys has signed it for this
run, and whether it is older than one that was believed before, in this life of the worker or an earlier one. So
whoever holds the broker can neither make a version nor bring an old one back.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from broker.errors import CheckpointCorrupt, CheckpointError, CheckpointNotWritten, WireError
from broker.jsontext import from_json
from broker.messages import ParametersHead
from broker.seldom import Seldom
from broker.signing import VERSION, Keyring, Signer, notice_to
from broker.transport import Delivery, Source, order_of
from broker.wire import order_in
from worker_client.config import WorkerConfig
from worker_client.keeping import put

__all__ = ["Guard", "Identity"]

log = logging.getLogger("fedmq.worker")

FILE = "believed.json"
FORMAT = 1

#: Epoch, version and attempt.
Order = tuple[int, int, int]


class Guard:
    """Believes every version if it has no keys.

    Args:
        keys: the aggregator's.
        worker: this worker's name.
        run: its run.
        folder: where the newest version that was believed is noted; None for not beyond this process.

    Raises :class:`CheckpointError` if what is noted there cannot be read.
    """

    def __init__(self, keys: Keyring | None, worker: str, run: str, folder: Path | None) -> None:
        self.refused = 0
        """Messages that were not believed."""
        self._keys = keys
        self._worker, self._run = worker, run
        self._file = folder / FILE if keys is not None and folder is not None else None
        self._speaker = ""
        self._seldom = Seldom()
        self._newest = (-1, -1, -1) if self._file is None else _noted(self._file, run)

    @property
    def asks(self) -> bool:
        """Whether signatures are asked for."""
        return self._keys is not None

    def believes(self, delivery: Delivery) -> bool:
        """Whether ``delivery`` is the aggregator's word, and no older one of it. On any thread.

        Of what came with its tensors these are looked at too, for else a forged copy would take the place of the
        version itself. Of chunks it is done when they have come.
        """
        try:
            if delivery.source is not Source.PARAMETERS:
                self._require_speaker(delivery.user)
                if self._keys is not None:
                    self._keys.speakers(delivery.body, notice_to(self._worker))
                return True
            if self._keys is not None:
                self._keys.speakers(delivery.body, VERSION)
                self._require_order(order_in(delivery.body), order_of(delivery.headers))
            self._speaker = delivery.user
        except WireError as error:
            self.refused += 1
            if self._seldom.may(f"{delivery.source} {type(error).__name__}"):
                what = "a version" if delivery.source is Source.PARAMETERS else "a notice"
                log.error("%s that is not believed is left aside, waiting for a good one: %s", what, error)
            return False
        return True

    def note(self, head: ParametersHead) -> None:
        """``head`` was believed: from now on, nothing older is. Durable when this returns.

        Raises :class:`CheckpointNotWritten`.
        """
        order = _order(head)
        if self._keys is None or order <= self._newest:
            return
        self._newest = order
        if self._file is not None:
            content = {"format": FORMAT, "run": self._run, "newest": order}
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                put(self._file, [json.dumps(content).encode()])
            except OSError as error:
                raise CheckpointNotWritten(f"{self._file}: {error.strerror}") from None

    def _require_speaker(self, user: str) -> None:
        if self._speaker and user != self._speaker:
            raise WireError(f"account {user!r} sent it, and the versions are of {self._speaker!r}")

    def _require_order(self, order: Order, said: Order) -> None:
        if order != said:
            # By the headers the newest of several is told, before its body is read.
            raise WireError(f"its headers say that it is {_shown(said)}; it is {_shown(order)}")
        if order < self._newest:
            raise WireError(
                f"it is {_shown(order)}, and {_shown(self._newest)} was there: an old one was brought back"
                + (f" (if the run was begun anew under its old name, remove {self._file})" if self._file else "")
            )


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a worker shows itself as, and whom it believes."""

    signer: Signer | None
    guard: Guard

    @classmethod
    def load(cls, config: WorkerConfig, run: str) -> Self:
        """As the settings say. Raises :class:`ConfigError` and :class:`CheckpointError` for files of no use."""
        signer = Signer.load(config.signing_key_file, run, "worker.signing_key_file")
        keys = Keyring.load(config.aggregator_keys_file, run, "worker.aggregator_keys_file")
        return cls(signer, Guard(keys, config.name, run, config.folder))


def _order(head: ParametersHead) -> Order:
    return head.epoch, head.version, head.plan.attempt


def _shown(order: Order) -> str:
    epoch, version, attempt = order
    return f"version {version} of epoch {epoch}" + (f", told for the {attempt + 1}th time" if attempt else "")


def _noted(file: Path, run: str) -> Order:
    try:
        values: Any = from_json(file.read_bytes())
    except FileNotFoundError:
        return (-1, -1, -1)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError:
        values = None
    newest = values.get("newest") if isinstance(values, dict) and values.get("format") == FORMAT else None
    if not (isinstance(newest, list) and len(newest) == 3 and all(type(n) is int for n in newest)):
        raise CheckpointCorrupt(
            f"{file} is damaged, or of a newer release: it says below which version nothing is believed. Remove it if "
            "the broker can be trusted now"
        )
    return (-1, -1, -1) if values.get("run") != run else (newest[0], newest[1], newest[2])
