"""Signatures: each changed bit is found, and each key speaks only for whom and what it is enrolled."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.errors import BadSignature, ConfigError, NotSigned, UnknownFormat, WireError
from broker.letters import RawLetter, contents
from broker.messages import Manifest, Mode, ModelSpec, TensorSpec, Update, UpdateId
from broker.signing import UPDATE, VERSION, Keyring, PublicKey, Signer, make_key, parse_keys
from broker.wire import Chunks, decode, encode, encode_in_chunks, join
from broker.wire.sealed import SEAL_BYTES
from tests.support.signing import Keys, keyring, signer

RUN = "digits"
MODEL = ModelSpec((TensorSpec("a", (3,), "float32"), TensorSpec("b", (40, 40), "float32")))
UPDATE_ID = UpdateId("w1", "a1", 7)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def w1(keys: Keys) -> Signer:
    return signer(keys.private("w1"), RUN)


@pytest.fixture(scope="module")
def ring(keys: Keys) -> Keyring:
    return keyring(keys.enrolled("w1"), RUN)


def update(model: ModelSpec = MODEL) -> Update:
    tensors = {spec.name: np.arange(spec.nbytes // 4, dtype="<f4").reshape(spec.shape) for spec in model.tensors}
    return Update(
        run=RUN,
        id=UPDATE_ID,
        base_version=3,
        base_epoch=1,
        mode=Mode.DELTA,
        examples=8,
        model=model,
        tensors=tensors,
    )


def believed(ring: Keyring, body: bytes) -> object:
    """As a receiver reads: the signature, then the message."""
    ring.speakers(body, UPDATE)
    return decode(body, strong=True)


def test_what_was_signed_is_believed(w1: Signer, ring: Keyring) -> None:
    body = encode(update(), w1.sealing(UPDATE))

    assert ring.speakers(body, UPDATE) == {"w1"}
    read = decode(body, strong=True)
    assert isinstance(read, Update)
    assert read.id == UPDATE_ID


def test_every_flipped_bit_is_found(w1: Signer, ring: Keyring) -> None:
    small = ModelSpec((TensorSpec("a", (3,), "float32"), TensorSpec("b", (2, 2), "float32")))
    body = encode(update(small), w1.sealing(UPDATE))
    believed(ring, body)

    for place in range(len(body)):
        for bit in range(8):
            changed = bytearray(body)
            changed[place] ^= 1 << bit
            with pytest.raises(WireError):
                believed(ring, bytes(changed))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_piece_can_be_left_out_put_in_or_moved(data: st.DataObject, w1: Signer, ring: Keyring) -> None:
    body = encode(update(), w1.sealing(UPDATE))
    start = data.draw(st.integers(0, len(body)))
    stop = data.draw(st.integers(start, len(body)))
    more = data.draw(st.binary(max_size=70))
    changed = body[:start] + more + body[stop:]
    if changed != body:
        with pytest.raises(WireError):
            believed(ring, changed)


def test_of_chunks_every_bit_counts_too(w1: Signer, ring: Keyring) -> None:
    body, chunks = encode_in_chunks(update(), str(UPDATE_ID), 4096, sealing=w1.sealing(UPDATE))
    assert isinstance(chunks, Chunks)
    manifest = believed(ring, body)
    assert isinstance(manifest, Manifest)
    sent = list(chunks)
    assert len(sent) > 1
    join(manifest, str(UPDATE_ID), sent)

    for place in (5, 9, 40, 100, 1000, len(sent[0]) - 1):
        changed = bytearray(sent[0])
        changed[place] ^= 1
        with pytest.raises(BadSignature):
            join(manifest, str(UPDATE_ID), [bytes(changed), *sent[1:]])
    # Nor can another update's chunks be put in their place
    other = replace(update(), tensors={"a": np.ones(3, "<f4"), "b": np.ones((40, 40), "<f4")})
    _, others = encode_in_chunks(other, str(UPDATE_ID), 4096, sealing=w1.sealing(UPDATE))
    with pytest.raises(BadSignature):
        join(manifest, str(UPDATE_ID), [others[0], *sent[1:]])


def test_checksums_that_can_be_forged_are_none_under_a_signature(w1: Signer, ring: Keyring) -> None:
    manifest = decode(encode_in_chunks(update(), str(UPDATE_ID), 4096)[0])
    body = encode(manifest, w1.sealing(UPDATE))
    ring.speakers(body, UPDATE)
    with pytest.raises(WireError, match="checksums"):
        decode(body, strong=True)


def test_another_run_purpose_or_key_is_not_believed(keys: Keys, w1: Signer, ring: Keyring) -> None:
    with pytest.raises(BadSignature, match="another run"):
        ring.speakers(encode(update(), signer(keys.private("w1"), "other").sealing(UPDATE)), UPDATE)
    with pytest.raises(BadSignature, match="kind"):
        ring.speakers(encode(update(), w1.sealing(VERSION)), UPDATE)
    with pytest.raises(BadSignature, match="which is none of keys"):
        ring.speakers(encode(update(), signer(keys.private("stranger"), RUN).sealing(UPDATE)), UPDATE)
    with pytest.raises(NotSigned, match="asks for one"):
        ring.speakers(encode(update()), UPDATE)


def test_a_key_that_has_two_names_speaks_for_both(keys: Keys, w1: Signer) -> None:
    line = keys.private("w1").with_suffix(".pub").read_text()
    file = keys.folder / "two.keys"
    file.write_text(line + line.replace("w1 ", "w1b ", 1) + keys.private("w2").with_suffix(".pub").read_text())

    assert keyring(file, RUN).speakers(encode(update(), w1.sealing(UPDATE)), UPDATE) == {"w1", "w1b"}


def test_a_seal_before_a_seal_is_no_message(w1: Signer) -> None:
    body = encode(update(), w1.sealing(UPDATE))
    with pytest.raises(WireError, match="a seal before a seal"):
        decode(body[:SEAL_BYTES] + body)
    with pytest.raises(WireError, match="too few"):
        decode(body[: SEAL_BYTES - 1])


def test_whoever_asks_for_no_signature_reads_signed_messages(w1: Signer) -> None:
    read = decode(encode(update(), w1.sealing(UPDATE)))
    assert isinstance(read, Update)


def test_a_dead_letter_shows_with_which_key_it_was_signed(w1: Signer, ring: Keyring) -> None:
    shown = contents(RawLetter(body=encode(update(), w1.sealing(UPDATE))))
    assert shown["signed_with"] == ring.keys[0].id.hex()
    assert shown["update"]["examples"] == 8
    assert "signed_with" not in contents(RawLetter(body=encode(update())))


def test_a_format_to_come_is_told_from_a_seal() -> None:
    body = encode(update())
    with pytest.raises(UnknownFormat, match="upgrade"):
        decode(body[:4] + b"\x03" + body[5:])


# ------------------------------------------------------------------------------------------------- files


def test_a_private_key_is_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "w1.key"
    public = make_key(file, "w1")
    assert file.stat().st_mode & 0o777 == 0o600
    assert parse_keys(str(public), "here") == (public,)
    with pytest.raises(ConfigError, match="exists already"):
        make_key(file, "w1")

    file.chmod(0o604)
    with pytest.raises(ConfigError, match="chmod 600"):
        Signer.load(file, RUN, "worker.signing_key_file")


def test_a_file_that_is_no_private_key_is_named_and_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.touch(0o600)
    file.write_text("secret words")
    with pytest.raises(ConfigError, match=r"worker\.signing_key_file.*no private key") as caught:
        Signer.load(file, RUN, "worker.signing_key_file")
    assert "secret words" not in str(caught.value)
    with pytest.raises(ConfigError, match="No such file"):
        Signer.load(tmp_path / "none", RUN, "worker.signing_key_file")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("w1", "a line is like"),
        ("w1 ed25519:AAAA", "no Ed25519 public key"),
        ("w1 ssh-rsa:AAAA", "a line is like"),
        ("w/1 ed25519:AAAA", "cannot be a name"),
        (f"w1 ed25519:{'A' * 43}= expires=soon", "expires"),
        (f"w1 ed25519:{'A' * 43}= 2030-01-31", "expires"),
    ],
)
def test_a_line_that_is_none_is_refused_by_its_number(line: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"line 2: .*{problem}"):
        parse_keys(f"# the workers\n{line}\n", "workers.keys")


def test_others_may_read_enrolled_keys_and_not_write_them(keys: Keys) -> None:
    file = keys.enrolled("w1", as_="open")
    file.chmod(0o644)
    keyring(file, RUN)
    file.chmod(0o646)
    with pytest.raises(ConfigError, match="chmod o-w"):
        keyring(file, RUN)


def test_keys_come_and_go_while_the_run_goes_on(tmp_path: Path) -> None:
    keys = Keys(tmp_path)
    file = keys.enrolled("w1", as_="both")
    ring = keyring(file, RUN)
    old, new = (encode(update(), signer(keys.private(name), RUN).sealing(UPDATE)) for name in ("w1", "w1-new"))
    with pytest.raises(BadSignature):
        ring.speakers(new, UPDATE)

    # Both keys of one name, and then the new one alone
    first, second = (keys.private(name).with_suffix(".pub").read_text() for name in ("w1", "w1-new"))
    second = second.replace("w1-new ", "w1 ")
    _replaced(file, first + second)
    assert ring.speakers(old, UPDATE) == ring.speakers(new, UPDATE) == {"w1"}
    _replaced(file, second)
    assert ring.speakers(new, UPDATE) == {"w1"}
    with pytest.raises(BadSignature):
        ring.speakers(old, UPDATE)

    # What cannot be read changes nothing
    _replaced(file, "nonsense")
    assert ring.speakers(new, UPDATE) == {"w1"}
    file.unlink()
    assert ring.speakers(new, UPDATE) == {"w1"}
    _replaced(file, first)
    assert ring.speakers(old, UPDATE) == {"w1"}


def test_a_key_whose_time_is_over_is_not_believed(keys: Keys, w1: Signer) -> None:
    line = keys.private("w1").with_suffix(".pub").read_text().strip()
    body = encode(update(), w1.sealing(UPDATE))
    file = keys.folder / "expiring.keys"
    _replaced(file, f"{line} expires=2999-01-01  # not yet\n")
    ring = keyring(file, RUN)
    assert ring.speakers(body, UPDATE) == {"w1"}
    assert str(ring.keys[0]) == f"{line} expires=2999-01-01"

    _replaced(file, f"{line} expires=2020-01-01\n")
    with pytest.raises(BadSignature, match="time is over"):
        ring.speakers(body, UPDATE)


def test_no_command_waits_for_the_library_unless_it_uses_a_key() -> None:
    code = "import sys, broker.signing, fedmq.cli; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_key_is_named_by_its_digest() -> None:
    assert PublicKey("w1", bytes(32)).id.hex() == "66687aadf862bd77"


def _replaced(file: Path, text: str) -> None:
    temporary = file.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(file)
