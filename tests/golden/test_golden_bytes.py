"""The bytes of format version 1, as they must stay: a change here is a new format version."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from broker.messages import (
    Action,
    Command,
    Event,
    EventKind,
    Goodbye,
    Hello,
    Manifest,
    Mode,
    ModelSpec,
    Parameters,
    Plan,
    Role,
    Rounds,
    TensorRole,
    TensorSpec,
    Update,
    UpdateHead,
    UpdateId,
    parameters_digest,
    whole,
)
from broker.wire import Message, decode, encode

BYTES = Path(__file__).parent / "bytes"

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
HEAD = UpdateHead(
    run="digits",
    id=UpdateId("w1", "a1b2", 41),
    base_version=3,
    base_epoch=2,
    mode=Mode.DELTA,
    examples=128,
    metrics={"loss": 0.25},
    seconds=1.5,
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
        model=MODEL,
        tensors=TENSORS,
    ),
    "parameters": Parameters(
        run="digits",
        epoch=2,
        version=3,
        plan=Plan(mode=Mode.GRADIENT, rounds=Rounds.SYNCHRONOUS, fraction=0.5, seed=9, attempt=1),
        digest=parameters_digest(TENSORS),
        model=MODEL,
        tensors=TENSORS,
    ),
    "manifest": Manifest(head=HEAD, model=MODEL, nbytes=200, chunks=((128, "0" * 32), (72, "f" * 32))),
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


@pytest.mark.parametrize("name", MESSAGES)
def test_bytes_are_as_ever(name: str) -> None:
    golden = (BYTES / f"{name}.bin").read_bytes()

    assert encode(MESSAGES[name]) == golden


@pytest.mark.parametrize("name", MESSAGES)
def test_golden_bytes_are_read(name: str) -> None:
    message = decode((BYTES / f"{name}.bin").read_bytes())

    assert type(message) is type(MESSAGES[name])
    for field in message.__dataclass_fields__:
        if field != "tensors":
            assert getattr(message, field) == getattr(MESSAGES[name], field), field
    if isinstance(message, Update | Parameters):
        assert list(message.tensors) == list(TENSORS)
        for tensor, values in message.tensors.items():
            assert whole(values).tobytes() == TENSORS[tensor].tobytes()
            assert values.shape == TENSORS[tensor].shape


def test_there_is_a_golden_file_for_each_message_and_no_other() -> None:
    assert sorted(path.stem for path in BYTES.iterdir()) == sorted(MESSAGES)
