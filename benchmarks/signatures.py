"""Signatures: what an update takes to write and to read, signed and unsigned, on one core.

    python benchmarks/signatures.py --repeats 7

*write* is from tensors to bodies on their way out, *read* from bodies to tensors that are believed: what the worker and
the aggregator do between them but for the network. Messages that are larger than a chunk go in chunks of 4 MiB, as they
would. CPU seconds, the median of the repeats.

Figures, machine and versions: docs/signatures.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from broker.messages import Manifest, Mode, ModelSpec, TensorSpec, Update, UpdateId
from broker.settings import CHUNK_BYTES
from broker.signing import UPDATE, Keyring, Signer, lines_of, make_key
from broker.wire import decode, encode_in_chunks, join

MEGABYTES = (0.001, 0.1, 1.0, 10.0, 100.0)
RUN, ID = "bench", UpdateId("w1", "i", 1)

Bodies = tuple[bytes, list[bytes]]


def update(megabytes: float) -> Update:
    """Of one layer."""
    model = ModelSpec((TensorSpec("layer", (int(megabytes * 250_000),), "float32"),))
    values = np.random.default_rng(1).standard_normal(model.tensors[0].shape).astype("<f4")
    return Update(
        run=RUN,
        id=ID,
        base_version=0,
        base_epoch=0,
        mode=Mode.DELTA,
        examples=1,
        model=model,
        tensors={"layer": values},
    )


def write(message: Update, signer: Signer | None) -> Bodies:
    """All bodies of ``message``."""
    sealing = None if signer is None else signer.sealing(UPDATE)
    body, chunks = encode_in_chunks(message, str(ID), CHUNK_BYTES, sealing=sealing)
    return body, list(chunks)


def read(bodies: Bodies, keys: Keyring | None) -> None:
    """As the aggregator does."""
    body, chunks = bodies
    if keys is not None:
        keys.speakers(body, UPDATE)
    message = decode(body, strong=keys is not None)
    if isinstance(message, Manifest):
        join(message, str(ID), chunks)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median of one call; short ones are called several times."""
    started = time.process_time()
    work()
    calls = max(1, int(0.02 / max(time.process_time() - started, 1e-6)))
    times = []
    for _ in range(repeats):
        started = time.process_time()
        for _ in range(calls):
            work()
        times.append((time.process_time() - started) / calls)
    return statistics.median(times)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        private, public = Path(folder) / "w1.key", Path(folder) / "workers.keys"
        public.write_text(lines_of([make_key(private, "w1")]))
        signer, keys = Signer.load(private, RUN, "a key"), Keyring.load(public, RUN, "keys")
        print("| MB | write | signed | read | signed | both, ms more | ratio |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for megabytes in MEGABYTES:
            message = update(megabytes)
            row = []
            for who, ring in ((None, None), (signer, keys)):
                bodies = write(message, who)
                row.append(seconds(lambda: write(message, who), repeats))  # noqa: B023
                row.append(seconds(lambda: read(bodies, ring), repeats))  # noqa: B023
            plain_write, plain_read, signed_write, signed_read = (1000 * figure for figure in row)
            plain, signed = plain_write + plain_read, signed_write + signed_read
            figures = (plain_write, signed_write, plain_read, signed_read, signed - plain)
            print(f"| {megabytes:g} | {' | '.join(f'{figure:.2f}' for figure in figures)} | {signed / plain:.2f} |")


if __name__ == "__main__":
    main()
