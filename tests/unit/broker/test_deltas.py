"""Versions told by what they change: both sides have the same bits, and whoever missed one notices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from aggregator.broadcasts import Broadcasts
from broker.errors import WireError
from broker.messages import Array, Manifest, Parameters, ParametersHead, Plan, parameters_digest, whole
from broker.transport import Outgoing
from broker.wire import Shared, decode, delta_range, follow, join
from tests.support.builders import RUN, spec_of

SIZE = 5000


def version_of(number: int, tensors: dict[str, Array]) -> Parameters:
    return Parameters(
        run=RUN,
        epoch=1,
        version=number,
        plan=Plan(),
        digest=parameters_digest(tensors),
        model=spec_of(tensors, buffers=("mean",)),
        tensors=tensors,
    )


def walk(versions: int, dtype: type[np.floating] = np.float32) -> list[Parameters]:
    """Parameters that move a little with each version."""
    random = np.random.default_rng(3)
    w, result = random.normal(size=SIZE), []
    for number in range(versions):
        result.append(version_of(number, {"w": w.astype(dtype), "mean": np.full(3, number, np.float32)}))
        w = w + random.normal(size=SIZE) * 0.01
    return result


def manifest_in(message: Outgoing) -> Manifest:
    manifest = decode(message.body)
    assert isinstance(manifest, Manifest)
    return manifest


class Follower:
    """A worker that has what it has been told."""

    def __init__(self) -> None:
        self.shared: Shared | None = None

    def take_whole(self, message: Outgoing) -> Parameters:
        manifest = manifest_in(message)
        return self._has(manifest, join(manifest, message.message_id, message.chunks[: len(manifest.chunks)]))

    def take_delta(self, message: Outgoing) -> Parameters:
        manifest = manifest_in(message)
        assert self.shared is not None
        chunks = [message.chunks[index] for index in delta_range(manifest)]
        return self._has(manifest, follow(manifest, message.message_id, chunks, self.shared))

    def _has(self, manifest: Manifest, version: object) -> Parameters:
        assert isinstance(version, Parameters)
        self.shared = Shared(version.tensors, manifest.state)
        return version


@pytest.mark.parametrize("codec", ["int8", "eden:2", "topk:0.1", "bf16"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_who_follows_has_the_same_bits_as_who_takes_the_whole(codec: str, dtype: type[np.floating]) -> None:
    broadcasts, follower = Broadcasts(RUN, chunk_bytes=65_536, codec=codec), Follower()
    for version in walk(8, dtype):
        message = broadcasts.message(version, 2**20)
        followed = follower.take_delta(message) if version.version else follower.take_whole(message)
        late = Follower().take_whole(message)
        assert parameters_digest(followed.tensors) == parameters_digest(late.tensors)
        assert followed.version == version.version
        assert whole(followed.tensors["mean"])[0] == version.version
        assert followed.tensors["w"].dtype == dtype


@pytest.mark.parametrize("codec", ["int8", "eden:2", "topk:0.2"])
def test_the_state_follows_the_parameters_and_errors_do_not_add_up(codec: str) -> None:
    broadcasts, follower, errors = Broadcasts(RUN, chunk_bytes=65_536, codec=codec), Follower(), []
    for version in walk(60):
        message = broadcasts.message(version, 2**20)
        followed = follower.take_delta(message) if version.version else follower.take_whole(message)
        errors.append(float(np.linalg.norm(whole(followed.tensors["w"]) - whole(version.tensors["w"]))))
    assert max(errors[40:]) < 1.5 * max(errors[10:40])


def test_a_delta_is_small() -> None:
    broadcasts = Broadcasts(RUN, chunk_bytes=65_536, codec="eden:2")
    first, second = (broadcasts.message(version, 2**20) for version in walk(2))
    manifest = manifest_in(second)
    delta = sum(len(second.chunks[index]) for index in delta_range(manifest))
    assert len(delta_range(manifest_in(first))) == 0
    assert delta < sum(map(len, first.chunks)) / 8


def test_whoever_missed_one_notices() -> None:
    broadcasts, follower = Broadcasts(RUN, chunk_bytes=65_536, codec="int8"), Follower()
    messages = [broadcasts.message(version, 2**20) for version in walk(3)]
    follower.take_whole(messages[0])
    with pytest.raises(WireError, match="not the one at hand"):
        follower.take_delta(messages[2])
    follower.take_whole(messages[2])


def test_a_delta_of_other_bytes_leads_to_another_state() -> None:
    broadcasts, follower = Broadcasts(RUN, chunk_bytes=65_536, codec="int8"), Follower()
    first, second = (broadcasts.message(version, 2**20) for version in walk(2))
    follower.take_whole(first)
    manifest = manifest_in(second)
    assert manifest.delta is not None
    forged = replace(manifest, delta=replace(manifest.delta, chunks=((manifest.delta.nbytes, "0" * 32),)))
    assert follower.shared is not None
    with pytest.raises(WireError, match="does not lead"):
        follow(forged, second.message_id, [second.chunks[1]], follower.shared)


@pytest.mark.parametrize(
    "other",
    [{"v": np.zeros(SIZE, np.float32)}, {"w": np.zeros(SIZE + 1, np.float32)}, {"w": np.zeros(SIZE, np.float16)}],
    ids=["another name", "another shape", "another dtype"],
)
def test_a_delta_of_another_model_is_refused(other: dict[str, Array]) -> None:
    # Found by ``make fuzz``: a name that is not there was a KeyError.
    one, two = walk(2)
    broadcasts, follower = Broadcasts(RUN, chunk_bytes=65_536, codec="int8"), Follower()
    follower.take_whole(broadcasts.message(one, 2**20))
    message = broadcasts.message(two, 2**20)
    assert follower.shared is not None
    follower.shared = Shared({**other, "mean": follower.shared.tensors["mean"]}, follower.shared.state)

    with pytest.raises(WireError, match="another model"):
        follower.take_delta(message)


def test_another_plan_for_the_same_version_has_the_same_chunks() -> None:
    broadcasts = Broadcasts(RUN, chunk_bytes=65_536, codec="int8")
    first, second = walk(2)
    broadcasts.message(first, 2**20)
    message = broadcasts.message(second, 2**20)
    again = broadcasts.message(replace(second, plan=Plan(attempt=1, paused=True)), 2**20)
    head = manifest_in(again).head
    assert isinstance(head, ParametersHead)
    assert head.plan == Plan(attempt=1, paused=True)
    assert replace(manifest_in(again), head=manifest_in(message).head) == manifest_in(message)
    assert list(again.chunks) == list(message.chunks)
