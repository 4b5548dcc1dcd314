"""Codecs: bytes a value, error, and GB of float32 a second each way on one core.

    python benchmarks/codecs.py --elements 16777216 --repeats 5

Seconds are CPU seconds of the one thread that works, so that neighbours on the machine count little; the median of the
repeats. Beside it, in the same run, a copy of the same array. The error is vNMSE on normal, log-normal and t(3) inputs,
and for the mean of ten encodings with different seeds.

Figures, machine and versions: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

# Before numpy is imported: one core is what is measured.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import numpy as np

from broker.codecs import Codec, codec_of, decoded
from broker.messages import Array

NAMES = ("bf16", "fp16", "int8", "eden:4", "eden:3", "eden:2", "eden:1", "topk:0.1", "topk:0.01")
MEANS = 10


def inputs(elements: int) -> dict[str, Array]:
    """By name; in the table's order."""
    random = np.random.default_rng(7)
    drawn = random.standard_normal(elements), random.lognormal(size=elements), random.standard_t(3, elements)
    return {
        name: values.astype(np.float32) for name, values in zip(("normal", "log-normal", "t(3)"), drawn, strict=True)
    }


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median, after one round to warm up."""
    work()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return statistics.median(times)


def vnmse(values: Array, result: Array) -> float:
    """A block at a time, since float64 copies of all would not fit everywhere."""
    error = square = 0.0
    for start in range(0, values.size, 2**20):
        exact = values[start : start + 2**20].astype(np.float64)
        square += float(exact @ exact)
        exact -= result[start : start + 2**20]
        error += float(exact @ exact)
    return error / square


def mean(codec: Codec, values: Array) -> Array:
    """Of decodings with different seeds."""
    total = np.zeros(values.size, np.float64)
    for seed in range(MEANS):
        total += decoded(codec, codec.encode(values, seed), values.size, seed)
    return total / MEANS


def row(codec: Codec, given: dict[str, Array], repeats: int, means: int) -> str:
    """One codec."""
    values = given["normal"]
    planes = codec.encode(values, 1)

    def decode() -> None:
        for _piece in codec.pieces(planes, values.size, 1):
            pass

    speeds = [
        values.nbytes / 1e9 / max(seconds(work, repeats), 1e-9) for work in (lambda: codec.encode(values, 1), decode)
    ]
    errors = [vnmse(x, decoded(codec, codec.encode(x, 1), x.size, 1)) for x in given.values()]
    few = values[:means]
    cells = [
        codec.name,
        *(f"{speed:.2f}" for speed in speeds),
        f"{sum(plane.nbytes for plane in planes) / values.size:.3f}",
        *(f"{error:.3g}" for error in errors),
        f"{vnmse(few, mean(codec, few)):.3g}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=2**24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--codecs", nargs="+", default=NAMES)
    arguments = parser.parse_args()
    given = inputs(arguments.elements)
    copied = given["normal"]
    head = ("codec", "encode GB/s", "decode GB/s", "bytes a value", *(f"vNMSE {name}" for name in given), "mean of 10")
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    copying = copied.nbytes / 1e9 / max(seconds(copied.copy, arguments.repeats), 1e-9)
    print(f"| (copy) | {copying:.2f} | {copying:.2f} | 4.000 | 0 | 0 | 0 | 0 |", flush=True)
    for name in arguments.codecs:
        print(row(codec_of(name), given, arguments.repeats, min(arguments.elements, 2**20)), flush=True)


if __name__ == "__main__":
    main()
