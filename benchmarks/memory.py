"""Peak memory of the aggregator's process, whatever the number of updates that make a round.

    python -m benchmarks.memory --megabytes 100 --buffers 4 16 64 --publishers 4 --strategy mean

Publishers send updates as fast as they can; two rounds of each buffer size. Bound: 3.5 models and 250 MB. What the
process takes with a model of nothing is given as well.

Figures, machine and versions: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import resource
import secrets
import subprocess
import sys

from aggregator.process import tune
from benchmarks.ingest import MB, publishers, serve_fedmq
from broker.amqp.node import PrivateNode


def peak(url: str, megabytes: float, buffer_size: int, senders: int, strategy: str) -> float:
    """MB."""
    run, count, nbytes = f"memory-{secrets.token_hex(3)}", 2 * buffer_size, int(megabytes * MB) // 4 * 4
    counts = [count // senders + (index < count % senders) for index in range(senders)]
    command = [sys.executable, "-m", "benchmarks.memory", "--serve", run, "--url", url]
    command += ["--megabytes", str(megabytes), "--buffers", str(buffer_size), "--strategy", strategy]
    with publishers(url, run, nbytes, counts):
        return float(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=900).stdout))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--buffers", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--publishers", type=int, default=4)
    parser.add_argument("--strategy", default="mean")
    parser.add_argument("--url", help="a RabbitMQ; a private node if not given")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.serve:
        tune()
        nbytes, buffer_size = int(arguments.megabytes * MB) // 4 * 4, arguments.buffers[0]
        serve_fedmq(arguments.url, arguments.serve, nbytes, 2 * buffer_size, buffer_size, strategy=arguments.strategy)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB)
        return
    with contextlib.ExitStack() as stack:
        url = arguments.url or stack.enter_context(PrivateNode()).url
        print("| model MB | updates a round | peak MB | models above the process alone |")
        print("| --- | --- | --- | --- |")
        alone = peak(url, 0.01, arguments.buffers[0], arguments.publishers, arguments.strategy)
        print(f"| 0.01 | {arguments.buffers[0]} | {alone:.0f} | |", flush=True)
        for size in arguments.buffers:
            found = peak(url, arguments.megabytes, size, arguments.publishers, arguments.strategy)
            models = (found - alone) / arguments.megabytes
            print(f"| {arguments.megabytes:g} | {size} | {found:.0f} | {models:.2f} |", flush=True)


if __name__ == "__main__":
    main()
