"""A worker without training, as a process: each new version is answered with an update of the same size at once.

    python -m benchmarks.echo URL RUN NAME NBYTES [--raw] [--codec NAME]

With ``--raw`` it neither decodes nor encodes: the bytes come, and prepared bytes of the same size go.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from queue import SimpleQueue

import numpy as np
from pydantic import SecretStr

from broker.amqp.transport import AmqpWorkerTransport
from broker.messages import Hello, Manifest, ModelSpec, Parameters, TensorSpec, Update, UpdateId
from broker.settings import CHUNK_BYTES, BrokerConfig
from broker.topology import Topology
from broker.transport import Delivery, Incoming, Outgoing, Sink, Source
from broker.wire import decode, encode, encode_in_chunks, join


def model_of(nbytes: int) -> ModelSpec:
    """A model of so many bytes, in tensors as large as those of a network: at most 4 M elements each."""
    sizes = [2**22] * (nbytes // 4 // 2**22) + [nbytes // 4 % 2**22]
    return ModelSpec(tuple(TensorSpec(f"w{n}", (size,), "float32") for n, size in enumerate(sizes) if size))


def raw_message(nbytes: int, message_id: str, **headers: int) -> Outgoing:
    """So many bytes, in chunks as a message of that size would be."""
    sizes = [CHUNK_BYTES] * (nbytes // CHUNK_BYTES) + [nbytes % CHUNK_BYTES]
    if len(sizes) == 1:
        return Outgoing(body=BODY[:nbytes], message_id=message_id, headers=headers)
    chunks = tuple(BODY[:size] for size in sizes if size)
    facts: dict[str, str | int] = {**headers, "chunks": len(chunks), "bytes": nbytes + 2**20}
    return Outgoing(body=b"manifest", chunks=chunks, message_id=message_id, headers=facts)


BODY = np.random.default_rng(0).bytes(CHUNK_BYTES)


def update_of(version: Parameters, run: str, name: str, seq: int, tensors: dict[str, np.ndarray]) -> Outgoing:
    """The answer to ``version``."""
    update = Update(
        run=run,
        id=UpdateId(name, "bench", seq),
        base_version=version.version,
        base_epoch=version.epoch,
        mode=version.plan.mode,
        examples=1,
        model=version.model,
        tensors=tensors,
    )
    body, chunks = encode_in_chunks(update, str(update.id), CHUNK_BYTES)
    headers: dict[str, str | int] = {"chunks": len(chunks), "bytes": version.model.nbytes} if chunks else {}
    return Outgoing(body=body, chunks=chunks, message_id=str(update.id), headers=headers)


def joined(url: str, run: str, name: str, sink: Sink) -> AmqpWorkerTransport:
    """The transport of a worker that has said hello, as soon as the run is there."""
    transport = AmqpWorkerTransport(BrokerConfig(url=SecretStr(url)), Topology(run), worker=name)
    transport.open(sink, wait=60)
    hello = Hello(run=run, worker=name, incarnation="bench")
    while transport.control(Outgoing(body=encode(hello))).exception() is not None:
        time.sleep(0.2)  # the run is not there yet
    return transport


def main() -> None:
    """Echo until the last version."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("run")
    parser.add_argument("name")
    parser.add_argument("nbytes", type=int)
    parser.add_argument("--raw", action="store_true")
    arguments = parser.parse_args()
    inbox: SimpleQueue[Incoming] = SimpleQueue()
    transport = joined(arguments.url, arguments.run, arguments.name, inbox.put)
    answer = Raw(arguments) if arguments.raw else Echo(arguments)
    while True:
        item = inbox.get()
        if not isinstance(item, Delivery) or item.source is not Source.PARAMETERS:
            continue
        if "chunks" in item.headers and item.chunks is None and not item.headers.get("done"):
            transport.fetch(item)
            continue
        if item.headers.get("done"):
            break
        message = answer(item)
        while (error := transport.publish(message).exception()) is not None:
            print(error, file=sys.stderr)
            time.sleep(0.2)
    transport.close()


class Raw:
    """Prepared bytes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._seq = 0
        self._message = raw_message(arguments.nbytes, "")
        self._name = arguments.name

    def __call__(self, delivery: Delivery) -> Outgoing:
        """The next of them."""
        del delivery
        self._seq += 1
        return dataclasses.replace(self._message, message_id=f"{self._name}/bench/{self._seq}")


class Echo:
    """Updates."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._seq = 0
        self._run, self._name = arguments.run, arguments.name
        self._tensors = {t.name: np.full(t.shape, 1e-3, np.float32) for t in model_of(arguments.nbytes).tensors}

    def __call__(self, delivery: Delivery) -> Outgoing:
        """The answer to the version in ``delivery``."""
        version = decode(delivery.body)
        if isinstance(version, Manifest):
            version = join(version, str(delivery.headers["message_id"]), delivery.chunks or ())
        if not isinstance(version, Parameters):
            raise TypeError(type(version).__name__)
        self._seq += 1
        return update_of(version, self._run, self._name, self._seq, self._tensors)


if __name__ == "__main__":
    main()
