"""What a worker believes that asks for the aggregator's signature."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from broker.errors import CheckpointCorrupt, CheckpointNotWritten
from broker.messages import (
    Event,
    EventKind,
    Manifest,
    ModelSpec,
    Parameters,
    ParametersHead,
    Plan,
    TensorSpec,
    parameters_digest,
)
from broker.signing import EVENT, VERSION, notice_to
from broker.transport import Delivery, Source
from broker.wire import encode, encode_in_chunks
from tests.support.signing import Keys, keyring, signer
from worker_client.guard import Guard
from worker_client.reading import Broken, Complete, Offer, head_of, read

RUN = "digits"
MODEL = ModelSpec((TensorSpec("a", (3000,), "float32"),))
TENSORS = {"a": np.arange(3000, dtype="<f4")}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


def version(number: int, epoch: int = 1, attempt: int = 0) -> Parameters:
    return Parameters(
        run=RUN,
        epoch=epoch,
        version=number,
        plan=Plan(attempt=attempt),
        digest=parameters_digest(TENSORS),
        model=MODEL,
        tensors=TENSORS,
    )


class Post:
    """Delivers versions as whoever has the key of ``name``."""

    def __init__(self, keys: Keys, name: str = "aggregator", run: str = RUN) -> None:
        self._signer = signer(keys.private(name), run)

    def version(self, what: Parameters) -> Delivery:
        return delivered(encode(what, self._signer.sealing(VERSION)), what)

    def in_chunks(self, what: Parameters) -> tuple[Delivery, tuple[bytes, ...]]:
        body, chunks = encode_in_chunks(what, "id", 4096, sealing=self._signer.sealing(VERSION))
        delivery = delivered(body, what)
        return replace(delivery, headers={**delivery.headers, "message_id": "id"}), tuple(chunks)

    def notice(self, worker: str, purpose: str = "") -> Delivery:
        event = Event(run=RUN, kind=EventKind.NOTICE, source="aggregator", time=1.0, data={"reason": "too-stale"})
        sealing = self._signer.sealing(purpose or notice_to(worker))
        return Delivery(source=Source.EVENT, body=encode(event, sealing))


def delivered(body: bytes, what: Parameters) -> Delivery:
    headers: dict[str, str | int] = {
        "epoch": what.epoch,
        "version": what.version,
        "attempt": what.plan.attempt,
    }
    return Delivery(source=Source.PARAMETERS, body=body, headers=headers)


def guard(keys: Keys, folder: Path | None = None) -> Guard:
    return Guard(keyring(keys.enrolled("aggregator"), RUN), "w1", RUN, folder)


def test_whoever_asks_for_no_signature_believes_everything(tmp_path: Path) -> None:
    open_ = Guard(None, "w1", RUN, tmp_path)
    assert open_.believes(delivered(encode(version(3)), version(3)))
    open_.note(head_of(version(3)))
    assert open_.believes(delivered(encode(version(2)), version(2)))
    assert not list(tmp_path.iterdir())


def test_only_the_aggregators_versions_are_believed(keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    own = guard(keys)
    good = Post(keys).version(version(3))
    forged = [
        delivered(encode(version(3)), version(3)),  # not signed
        Post(keys, "stranger").version(version(3)),
        Post(keys, run="another").version(version(3)),
        replace(good, body=good.body[:-1] + bytes([good.body[-1] ^ 1])),  # a tensor's last bit
        replace(good, headers={**good.headers, "epoch": 10**6}),  # so that nothing newer would be heard
        delivered(encode(version(3), signer(keys.private("aggregator"), RUN).sealing(EVENT)), version(3)),
        replace(good, body=b"nonsense"),
    ]

    with caplog.at_level(logging.ERROR, "fedmq.worker"):
        assert [own.believes(one) for one in forged] == [False] * len(forged)
    assert own.refused == len(forged)
    assert "not believed" in caplog.text
    # And the good one is, whatever came before it
    assert own.believes(good)
    assert isinstance(read(good, RUN, signed=True), Complete)


def test_what_is_older_than_what_was_believed_is_not_also_by_the_next_life(keys: Keys, tmp_path: Path) -> None:
    post, folder = Post(keys), tmp_path / "new" / "folder"
    own = guard(keys, folder)
    for number, epoch, attempt in ((4, 2, 0), (5, 2, 0), (5, 2, 1)):
        assert own.believes(post.version(version(number, epoch, attempt)))
        own.note(head_of(version(number, epoch, attempt)))
    own.note(head_of(version(1, 1)))  # which changes nothing

    for life in (own, guard(keys, folder)):
        for number, epoch, attempt in ((4, 2, 0), (5, 2, 0), (9, 1, 7)):
            assert not life.believes(post.version(version(number, epoch, attempt)))
        assert life.believes(post.version(version(5, 2, 1)))  # the same again
        assert life.believes(post.version(version(2, 3)))  # an operator's rollback begins an epoch


def test_a_folder_of_another_run_says_nothing_of_this_one(keys: Keys, tmp_path: Path) -> None:
    guard(keys, tmp_path).note(head_of(version(5, 2)))
    content = json.loads((tmp_path / "believed.json").read_text())
    (tmp_path / "believed.json").write_text(json.dumps({**content, "run": "another"}))

    assert guard(keys, tmp_path).believes(Post(keys).version(version(0)))


@pytest.mark.parametrize("content", ["", "{}", '{"format": 2, "newest": [1, 2, 0]}', '{"format": 1, "newest": [1, 2]}'])
def test_a_damaged_note_is_not_taken_for_none(content: str, keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "believed.json").write_text(content)
    with pytest.raises(CheckpointCorrupt, match="Remove it"):
        guard(keys, tmp_path)


def test_a_note_that_cannot_be_written_is_an_error(keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    own = guard(keys)
    own._file = tmp_path / "file" / "believed.json"
    with pytest.raises(CheckpointNotWritten):
        own.note(head_of(version(1)))


def test_a_notice_is_for_one_worker(keys: Keys) -> None:
    own, post = guard(keys), Post(keys)
    assert own.believes(post.notice("w1"))
    assert not own.believes(post.notice("w2"))
    assert not own.believes(post.notice("w1", EVENT))
    assert not own.believes(Post(keys, "stranger").notice("w1"))


def test_a_manifest_is_believed_and_then_its_chunks_if_they_are_those(keys: Keys) -> None:
    own = guard(keys)
    delivery, chunks = Post(keys).in_chunks(version(3))
    assert own.believes(delivery)
    offer = read(delivery, RUN, signed=True)
    assert isinstance(offer, Offer)
    assert isinstance(offer.manifest, Manifest)
    assert isinstance(read(replace(delivery, chunks=chunks), RUN, signed=True), Complete)

    forged = chunks[0][:-1] + bytes([chunks[0][-1] ^ 1])
    broken = read(replace(delivery, chunks=(forged, *chunks[1:])), RUN, signed=True)
    assert isinstance(broken, Broken)
    assert isinstance(broken.head, ParametersHead)


def test_without_keys_notices_are_believed_of_the_account_that_publishes_the_versions() -> None:
    guard = Guard(None, "w1", RUN, None)
    notice = Delivery(source=Source.EVENT, body=b"a notice", user="aggregator")
    assert guard.believes(notice), "no version has come yet"
    assert guard.believes(Delivery(source=Source.PARAMETERS, body=b"a version", user="aggregator"))

    assert guard.believes(notice)
    assert not guard.believes(replace(notice, user="mallory"))
    assert not guard.believes(replace(notice, user=""))
    assert guard.refused == 2
