"""What an aggregator takes that asks for signatures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aggregator.archive import KeptUpdates, UpdateArchive
from aggregator.config import AggregatorConfig
from aggregator.core import events as on
from aggregator.core.standing import BLAMED
from aggregator.reading import from_aside, read_update
from aggregator.signatures import Signatures
from broker.errors import ConfigError
from broker.messages import (
    Action,
    Command,
    Hello,
    Manifest,
    ModelSpec,
    ParametersHead,
    Plan,
    Reason,
    TensorSpec,
    Update,
    UpdateId,
)
from broker.signing import COMMAND, CONTROL, EVENT, UPDATE, VERSION
from broker.transport import Delivery, Source, Token
from broker.wire import encode, encode_in_chunks
from tests.support.signing import Keys, signer

RUN = "digits"
TOKEN = Token(1, 1)
MODEL = ModelSpec((TensorSpec("a", (3000,), "float32"),))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def asking(keys: Keys) -> Signatures:
    config = AggregatorConfig(worker_keys_file=keys.enrolled("w1", "w2"), operator_keys_file=keys.enrolled("boss"))
    return Signatures.load(config, RUN)


def update(worker: str = "w1") -> Update:
    return Update(
        run=RUN,
        id=UpdateId(worker, "i", 1),
        base_version=0,
        base_epoch=0,
        mode=AggregatorConfig().mode,
        examples=1,
        model=MODEL,
        tensors={"a": np.arange(3000, dtype="<f4")},
    )


def sent(body: bytes) -> Delivery:
    return Delivery(source=Source.UPDATE, body=body, headers={"worker": "w1"}, token=TOKEN, user="w1")


def refusal(body: bytes, asking: Signatures) -> Reason:
    event = read_update(TOKEN, sent(body), signatures=asking)
    assert isinstance(event, on.Unreadable)
    # Nobody knows whose it is, so none of a worker's updates may be taken for it.
    assert event.update is None
    assert event.reason not in BLAMED
    return event.reason


def test_updates_of_enrolled_workers_are_taken(keys: Keys, asking: Signatures) -> None:
    for name in ("w1", "w2"):
        body = encode(update(name), signer(keys.private(name), RUN).sealing(UPDATE))
        event = read_update(TOKEN, sent(body), signatures=asking)
        assert isinstance(event, on.Arrived)
        assert event.update.id.worker == name


def test_all_others_are_refused_and_held_against_nobody(keys: Keys, asking: Signatures) -> None:
    body = encode(update(), signer(keys.private("w1"), RUN).sealing(UPDATE))
    assert refusal(encode(update()), asking) is Reason.NOT_SIGNED
    for forged in (
        encode(update(), signer(keys.private("w2"), RUN).sealing(UPDATE)),
        encode(update(), signer(keys.private("w3"), RUN).sealing(UPDATE)),
        encode(update(), signer(keys.private("w1"), "another").sealing(UPDATE)),
        encode(update(), signer(keys.private("w1"), RUN).sealing(EVENT)),
        body[:-1] + bytes([body[-1] ^ 1]),
        body[:300] + bytes([body[300] ^ 1]) + body[301:],
    ):
        assert refusal(forged, asking) is Reason.BAD_SIGNATURE


def test_what_does_not_ask_takes_signed_and_unsigned(keys: Keys) -> None:
    open_ = Signatures.load(AggregatorConfig(), RUN)
    for body in (encode(update()), encode(update(), signer(keys.private("w3"), RUN).sealing(UPDATE))):
        assert isinstance(read_update(TOKEN, sent(body), signatures=open_), on.Arrived)


def test_chunks_are_those_that_the_worker_has_signed(keys: Keys, asking: Signatures) -> None:
    sealing = signer(keys.private("w1"), RUN).sealing(UPDATE)
    body, chunks = encode_in_chunks(update(), "w1/i/1", 4096, sealing=sealing)
    headers: dict[str, str | int] = {"worker": "w1", "message_id": "w1/i/1", "chunks": len(chunks), "bytes": 12000}
    manifest = replace(sent(body), headers=headers)
    assert isinstance(read_update(TOKEN, manifest, signatures=asking), on.Announced)
    whole = replace(manifest, chunks=tuple(chunks))
    assert isinstance(read_update(TOKEN, whole, signatures=asking), on.Arrived)

    forged = chunks[1][:-1] + bytes([chunks[1][-1] ^ 1])
    event = read_update(TOKEN, replace(whole, chunks=(chunks[0], forged, *chunks[2:])), signatures=asking)
    assert isinstance(event, on.Unreadable)
    assert event.reason is Reason.BAD_SIGNATURE


def test_hellos_are_heard_from_who_has_signed_them(keys: Keys, asking: Signatures) -> None:
    hello = Hello(run=RUN, worker="w1", incarnation="i")

    def heard(body: bytes) -> bool:
        return from_aside(Delivery(source=Source.CONTROL, body=body), RUN, 0, signatures=asking) is not None

    own = signer(keys.private("w1"), RUN)
    assert heard(encode(hello, own.sealing(CONTROL)))
    assert not heard(encode(hello))
    assert not heard(encode(hello, own.sealing(EVENT)))
    assert not heard(encode(hello, signer(keys.private("w2"), RUN).sealing(CONTROL)))


def test_commands_are_executed_for_operators(keys: Keys, asking: Signatures) -> None:
    command = Command(run=RUN, id="c1", action=Action.STOP, time=1e6)
    good = encode(command, signer(keys.private("boss"), RUN).sealing(COMMAND))
    asking.require_command(command, good, 1e6 + 3600)
    for now in (1e6 + 90_000, 1e6 - 90_000):  # somebody has kept it
        with pytest.raises(ConfigError, match="once more"):
            asking.require_command(command, good, now)
    for body in (
        encode(command),
        encode(command, signer(keys.private("w1"), RUN).sealing(COMMAND)),
        encode(command, signer(keys.private("boss"), RUN).sealing(CONTROL)),
    ):
        with pytest.raises(ConfigError, match="--key"):
            asking.require_command(command, body, 1e6)
    Signatures().require_command(command, encode(command), 9e9)


def test_of_the_versions_on_the_broker_its_own_count(keys: Keys) -> None:
    signing = Signatures.load(AggregatorConfig(signing_key_file=keys.private("aggregator")), RUN)
    head = ParametersHead(run=RUN, epoch=2, version=7, plan=Plan(), digest="0" * 64)
    version = Manifest(head=head, model=MODEL, nbytes=12_000, chunks=((12_000, "0" * 64),))
    headers: dict[str, str | int] = {"epoch": 2, "version": 7, "attempt": 0}

    def on_broker(body: bytes, **more: str | int) -> Delivery:
        return Delivery(source=Source.PARAMETERS, body=body, headers={**headers, **more})

    own = encode(version, signer(keys.private("aggregator"), RUN).sealing(VERSION))
    assert signing.is_own(on_broker(own))
    assert not signing.is_own(on_broker(own, epoch=10**6))
    assert not signing.is_own(on_broker(encode(version)))
    assert not signing.is_own(on_broker(encode(version, signer(keys.private("w1"), RUN).sealing(VERSION))))
    assert Signatures().is_own(on_broker(encode(version)))


def test_a_kept_update_is_kept_as_it_was_signed(keys: Keys, tmp_path: Path) -> None:
    bodies = [encode(update(name), signer(keys.private(name), RUN).sealing(UPDATE)) for name in ("w1", "w2")]
    archive = UpdateArchive(tmp_path, 1)
    for body in bodies:
        archive.add(body)
    archive.sync()
    archive.close()

    kept = KeptUpdates(tmp_path)
    kept.refresh()
    assert [kept.read(update(name).id, 1) for name in ("w1", "w2")] == bodies
    kept.close()


def test_files_that_cannot_be_used_are_refused_at_the_start(tmp_path: Path, keys: Keys) -> None:
    for name in ("signing_key_file", "worker_keys_file", "operator_keys_file"):
        with pytest.raises(ConfigError, match=f"aggregator.{name}"):
            Signatures.load(AggregatorConfig.model_validate({name: tmp_path / "absent"}), RUN)
    public = keys.enrolled("w1")
    public.chmod(0o600)
    with pytest.raises(ConfigError, match="private key"):
        Signatures.load(AggregatorConfig(signing_key_file=public), RUN)
