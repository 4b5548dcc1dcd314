"""What TLS costs: the same updates over the same transports and the same node, plain and encrypted in turn.

    python -m benchmarks.tls --megabytes 200 --rounds 5

One worker publishes updates of 0.1, 1 and 4 MB, each durable and confirmed, sixteen on their way at a time; one
aggregator acknowledges them. Seconds from the first publish to the last acknowledgement, of the best round for each,
since whatever else the machine does only makes it slower. Plain and TLS take turns within each round. Worker, broker
and aggregator share the machine, so that each byte is encrypted and decrypted twice on it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import Future
from pathlib import Path

from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpAggregatorTransport, AmqpWorkerTransport
from broker.certificates import Authority
from broker.settings import BrokerConfig
from broker.topology import Topology
from broker.transport import Delivery, Incoming, Outgoing, Source

SIZES = (100_000, 1_000_000, 4_000_000)
ON_THEIR_WAY = 16
NAMES = ("ca.pem", "broker.pem", "broker.key")
SETTINGS = {
    "listeners.ssl.1": "127.0.0.1:{tls}",
    "ssl_options.cacertfile": "{folder}/ca.pem",
    "ssl_options.certfile": "{folder}/broker.pem",
    "ssl_options.keyfile": "{folder}/broker.key",
}


def seconds(config: BrokerConfig, nbytes: int, count: int) -> float:
    """How long ``count`` updates of ``nbytes`` take."""
    topology = Topology(f"tls-{os.urandom(4).hex()}")
    aggregator = AmqpAggregatorTransport(config, topology, model_bytes=nbytes, prefetch=4 * ON_THEIR_WAY)
    worker = AmqpWorkerTransport(config, topology, worker="w1")
    done, left = threading.Event(), [count]

    def take(item: Incoming) -> None:
        if isinstance(item, Delivery) and item.source is Source.UPDATE and item.token is not None:
            aggregator.ack(item.token)
            left[0] -= 1
            if not left[0]:
                done.set()

    aggregator.open(take, wait=30)
    worker.open(lambda _item: None, wait=30)
    body = os.urandom(nbytes)
    pending: deque[Future[None]] = deque()
    began = time.perf_counter()
    for number in range(count):
        if len(pending) == ON_THEIR_WAY:
            pending.popleft().result(60)
        pending.append(worker.publish(Outgoing(body=body, message_id=str(number), headers={"worker": "w1"})))
    if not done.wait(300):
        raise TimeoutError(f"{left[0]} of {count} updates have not come")
    took = time.perf_counter() - began
    worker.close()
    aggregator.close()
    return took


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=200, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority.new(Path(folder))
        authority.server(["127.0.0.1"])
        files = {name: (Path(folder) / name).read_bytes() for name in NAMES}
        with PrivateNode(plugins=(), settings=SETTINGS, ports=("tls",), files=files) as node:
            login = f"{node.user}:{node.password}@127.0.0.1"
            ways = {
                "plain": BrokerConfig.model_validate({"url": node.url}),
                "TLS": BrokerConfig.model_validate(
                    {"url": f"amqps://{login}:{node.port('tls')}/", "ca_file": Path(folder) / "ca.pem"}
                ),
            }
            for nbytes in SIZES:
                count = max(ON_THEIR_WAY, chosen.megabytes * 1_000_000 // nbytes)
                best = {
                    way: min(times)
                    for way, times in zip(
                        ways,
                        zip(
                            *(
                                [seconds(config, nbytes, count) for config in ways.values()]
                                for _ in range(chosen.rounds)
                            ),
                            strict=True,
                        ),
                        strict=True,
                    )
                }
                rates = {way: nbytes * count / took / 1e6 for way, took in best.items()}
                shown = ", ".join(f"{way} {rate:.0f} MB/s" for way, rate in rates.items())
                print(f"{nbytes / 1e6:g} MB: {shown}, ratio {rates['TLS'] / rates['plain']:.2f}", flush=True)


if __name__ == "__main__":
    main()
