"""The bytes of format version 1, as they must stay: a change here is a new format version."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from broker.messages import (
    Action,
    Command,
    Delta,
    Event,
    EventKind,
    Goodbye,
    Hello,
    Manifest,
    Mode,
    ModelSpec,
    Parameters,
    ParametersHead,
    Plan,
    Role,
    Rounds,
    TensorRole,
    TensorSpec,
    Update,
    UpdateHead,
    UpdateId,
    Work,
    parameters_digest,
    whole,
)
from broker.signing import Signer
from broker.wire import Message, compressed, decode, encode, encode_in_chunks, join

BYTES = Path(__file__).parent / "bytes"
#: As they were before headers had the fields ``steps``, ``effort`` and ``plan.work``.
FORMER = Path(__file__).parent / "former"

MODEL = ModelSpec(
    (
        TensorSpec("layer.weight", (2, 3), "float32"),
        TensorSpec("layer.half", (3,), "bfloat16"),
        TensorSpec("norm.running_mean", (3,), "float32", TensorRole.STATISTIC),
        TensorSpec("norm.num_batches_tracked", (), "int64", TensorRole.COUNTER),
    )
)
TENSORS = {
    "layer.weight": np.arange(6, dtype="<f4").reshape(2, 3),
    "layer.half": np.array([0x3F80, 0xBF80, 0x4000], "<u2").view(np.dtype(ml_dtypes.bfloat16)),
    "norm.running_mean": np.array([0.5, -0.25, 1e-3], "<f4"),
    "norm.num_batches_tracked": np.array(7, "<i8"),
}
#: Large enough for a codec.
LARGE = ModelSpec((TensorSpec("layer.weight", (32, 32), "float32"),))
#: Each block of 256 reaches 127, so that int8 has a scale of 1 and loses nothing.
EXACT = (np.arange(1024, dtype="<f4") % 255 - 127).reshape(32, 32)

HEAD = UpdateHead(
    run="digits",
    id=UpdateId("w1", "a1b2", 41),
    base_version=3,
    base_epoch=2,
    mode=Mode.DELTA,
    examples=128,
    metrics={"loss": 0.25},
    seconds=1.5,
    steps=12,
    effort=19.5,
)
MESSAGES: dict[str, Message] = {
    "update": Update(
        run=HEAD.run,
        id=HEAD.id,
        base_version=3,
        base_epoch=2,
        mode=Mode.DELTA,
        examples=128,
        metrics={"loss": 0.25},
        seconds=1.5,
        steps=12,
        effort=19.5,
        model=MODEL,
        tensors=TENSORS,
    ),
    "parameters": Parameters(
        run="digits",
        epoch=2,
        version=3,
        plan=Plan(
            mode=Mode.GRADIENT,
            rounds=Rounds.SYNCHRONOUS,
            fraction=0.5,
            seed=9,
            attempt=1,
            work=Work(proximal=0.125, momentum=0.75),
        ),
        digest=parameters_digest(TENSORS),
        model=MODEL,
        tensors=TENSORS,
    ),
    "manifest": Manifest(head=HEAD, model=MODEL, nbytes=200, chunks=((128, "0" * 32), (72, "f" * 32))),
    "manifest-of-a-code": Manifest(
        head=HEAD, model=LARGE, nbytes=1088, chunks=((1024, "0" * 32), (64, "f" * 32)), codec="int8", seed=11
    ),
    "manifest-with-delta": Manifest(
        head=ParametersHead(run="digits", epoch=2, version=3, plan=Plan(codec="eden:4"), digest="d" * 64),
        model=LARGE,
        nbytes=4096,
        chunks=((4096, "0" * 32),),
        state="b" * 64,
        delta=Delta(base="a" * 64, codec="int8", seed=11, nbytes=1088, chunks=((1024, "0" * 32), (64, "f" * 32))),
    ),
    "hello": Hello(run="digits", worker="w1", incarnation="a1b2", role=Role.EVALUATOR, version=-1),
    "goodbye": Goodbye(run="digits", worker="w1", incarnation="a1b2", confirmed=12, reason="done"),
    "command": Command(
        run="digits", id="c0ffee", action=Action.SET, changes={"buffer_size": 16, "deadline": None}, time=1.5
    ),
    "event": Event(
        run="digits",
        kind=EventKind.HEARTBEAT,
        source="w1",
        time=1.5,
        data={"state": "training", "version": 3, "loss": 0.5, "late": False, "none": None},
    ),
}


#: These are put together from others, and read back in tests of their own.
PARTS = ("update-in-a-code", "chunk", "chunk-packed", "signed-update", "signed-manifest")


def update_in_a_code() -> Update:
    encoded = compressed(LARGE, {"layer.weight": EXACT}, "int8", 11)
    return Update(
        run=HEAD.run,
        id=HEAD.id,
        base_version=3,
        base_epoch=2,
        mode=Mode.DELTA,
        examples=128,
        model=LARGE,
        tensors=encoded,
        codec="int8",
        seed=11,
    )


def signer(folder: Path) -> Signer:
    """With the key that has made the golden signatures."""
    file = folder / "w1.key"
    file.touch(0o600)
    file.write_bytes(
        Ed25519PrivateKey.from_private_bytes(bytes(range(32))).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
    )
    loaded = Signer.load(file, "digits", "a key")
    assert loaded is not None
    return loaded


def golden(name: str) -> bytes:
    return (BYTES / f"{name}.bin").read_bytes()


@pytest.mark.parametrize("name", MESSAGES)
def test_bytes_are_as_ever(name: str) -> None:
    assert encode(MESSAGES[name]) == golden(name)


@pytest.mark.parametrize("name", MESSAGES)
def test_golden_bytes_are_read(name: str) -> None:
    message = decode(golden(name))

    assert type(message) is type(MESSAGES[name])
    for field in message.__dataclass_fields__:
        if field != "tensors":
            assert getattr(message, field) == getattr(MESSAGES[name], field), field
    if isinstance(message, Update | Parameters):
        assert list(message.tensors) == list(TENSORS)
        for tensor, values in message.tensors.items():
            assert whole(values).tobytes() == TENSORS[tensor].tobytes()
            assert values.shape == TENSORS[tensor].shape


def test_an_update_in_a_code_is_as_ever() -> None:
    assert encode(update_in_a_code()) == golden("update-in-a-code")

    message = decode(golden("update-in-a-code"))
    assert isinstance(message, Update)
    assert (message.codec, message.seed) == ("int8", 11)
    assert whole(message.tensors["layer.weight"]).tobytes() == EXACT.tobytes()


def test_chunks_are_as_ever() -> None:
    update = replace(update_in_a_code(), tensors={"layer.weight": EXACT}, codec="", seed=0)
    body, chunks = encode_in_chunks(update, str(update.id), 4096)
    manifest = decode(body)
    assert isinstance(manifest, Manifest)
    assert len(chunks) == 2
    assert chunks[0] == golden("chunk")

    # What zstandard makes of the same bytes may change with its release; what it once made must be read.
    for first in ("chunk", "chunk-packed"):
        joined = join(manifest, str(update.id), [golden(first), chunks[1]])
        assert whole(joined.tensors["layer.weight"]).tobytes() == EXACT.tobytes()
    assert len(golden("chunk-packed")) < len(golden("chunk"))


def test_signed_messages_are_as_ever(tmp_path: Path) -> None:
    """Ed25519 signatures are the same each time."""
    sealing = signer(tmp_path).sealing("update")
    update = MESSAGES["update"]
    assert encode(update, sealing) == golden("signed-update")
    large = replace(update_in_a_code(), tensors={"layer.weight": EXACT}, codec="", seed=0)
    body, chunks = encode_in_chunks(large, str(large.id), 4096, sealing=sealing)
    assert body == golden("signed-manifest")
    assert chunks[0] == golden("chunk")

    for message in (decode(golden("signed-update"), strong=True), decode(golden("signed-update"))):
        assert isinstance(message, Update)
        assert message.id == HEAD.id
        assert whole(message.tensors["layer.weight"]).tobytes() == TENSORS["layer.weight"].tobytes()
    manifest = decode(golden("signed-manifest"), strong=True)
    assert isinstance(manifest, Manifest)
    assert [size for size, _ in manifest.chunks] == [3072, 1024]
    # The message itself is that of the unsigned form, but for the checksums.
    assert golden("signed-update")[:5] == b"FdMQ\x02"
    assert golden("signed-update")[128:133] == golden("update")[:5]


def test_there_is_a_golden_file_for_each_message_and_no_other() -> None:
    assert sorted(path.stem for path in BYTES.iterdir()) == sorted([*MESSAGES, *PARTS])


def test_bytes_of_before_headers_told_of_local_work_are_read() -> None:
    update, manifest, parameters = (
        decode((FORMER / f"{name}.bin").read_bytes()) for name in ("update", "manifest", "parameters")
    )

    assert isinstance(update, Update)
    assert isinstance(manifest, Manifest)
    assert isinstance(parameters, Parameters)
    assert manifest.head == replace(HEAD, steps=0, effort=0.0)
    assert (update.id, update.seconds, update.steps, update.effort) == (HEAD.id, 1.5, 0, 0.0)
    assert (parameters.plan.attempt, parameters.plan.work) == (1, Work())
