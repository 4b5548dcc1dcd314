"""What each codec makes of the same values, as it must stay: a change here is a new format version.

The decoded bytes, too: the same on every machine, since a version must be rebuilt bit for bit elsewhere.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from broker.codecs import CODECS, codec_of, decoded
from broker.messages import DTYPES, Array

BYTES = Path(__file__).parent / "codecs"
SEED = 2**53 - 111
#: SHA-256 of the decoded values, its first half; of 1500 values, and of 70,001.
DECODED = {
    "bf16": ("faf9d3840c7e376187cfb618402a9df4", "1ced74488e891481c8cfcc432367790f"),
    "eden:1": ("4d64730810fecb7bb4ad2644f022d2ee", "68f194cc176de986bb8ad86626cb7843"),
    "eden:2": ("efd8f5766ac446c47bbcd3bad96089de", "a472881b46ca40c53613cb49b7fa68d1"),
    "eden:3": ("2911228295919d501d56c71f58fe8b3b", "d434248e17575da1baec1e506bfb7e23"),
    "eden:4": ("f0fcd6a7c59f49b18565f4044768bcf7", "0afef6289ed5fa53bfe67e1b1f7a17fc"),
    "fp16": ("96a0e8638f8d6e9cc55221d6f9c54c4d", "da025e44b774e0cfa13fcac1a2ff5e1d"),
    "int8": ("6943ce898aa285d416c3a72a08560801", "dacab188739b3e34502747323d7ba837"),
    "topk:0.05": ("69ff614e8c90a1998e902cc7fd351292", "f60bb1e34f10ea1103713245a2813698"),
}


def values(size: int) -> Array:
    """Whole numbers of either sign times powers of two, from a rule that needs no library."""
    state = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2**32)
    whole = (state >> np.uint64(12)).astype(np.int64) - 2**19
    return np.ldexp(whole.astype(np.float32), -10 - (state % np.uint64(13)).astype(np.int32))


def digest(array: Array) -> str:
    return sha256(array.astype("<f4").tobytes()).hexdigest()[:32]


def golden(name: str) -> bytes:
    return (BYTES / f"{name.replace(':', '-')}.bin").read_bytes()


@pytest.mark.parametrize("name", DECODED)
def test_planes_are_as_ever(name: str) -> None:
    planes = codec_of(name).encode(values(1500), SEED)

    assert b"".join(plane.tobytes() for plane in planes) == golden(name)


@pytest.mark.parametrize("name", DECODED)
def test_golden_planes_are_decoded_to_the_same_bits(name: str) -> None:
    body = golden(name)
    planes = []
    for dtype, count in codec_of(name).layout(1500):
        length = count * DTYPES[dtype].itemsize
        planes.append(np.frombuffer(body[:length], np.uint8).view(DTYPES[dtype]))
        body = body[length:]

    assert not body
    assert digest(decoded(codec_of(name), planes, 1500, SEED)) == DECODED[name][0]


@pytest.mark.parametrize("name", DECODED)
def test_several_blocks_are_decoded_to_the_same_bits(name: str) -> None:
    codec = codec_of(name)

    assert digest(decoded(codec, codec.encode(values(70_001), SEED), 70_001, SEED)) == DECODED[name][1]


def test_every_codec_has_golden_planes() -> None:
    assert {name.partition(":")[0] for name in DECODED} == set(CODECS.own)
    assert sorted(path.stem for path in BYTES.iterdir()) == sorted(name.replace(":", "-") for name in DECODED)
