"""Signatures and the keys that they are made and checked with (Ed25519, RFC 8032).

A private key is a file in PEM (PKCS 8), of whoever signs; the public keys that somebody believes are lines of a text
file. What a signature is made of, and where it stands, is in ``broker.wire.sealed``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from broker.errors import BadSignature, ConfigError, NotSigned
from broker.messages import NAME_PATTERN
from broker.secretfiles import read_secret_bytes, write_secret
from broker.wire.envelope import before_data
from broker.wire.sealed import KEY_ID, Seal, Sealing, digest_of, signed_text, unsealed

if TYPE_CHECKING:  # imported when a key is used: no command that needs none waits for it
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = [
    "COMMAND",
    "CONTROL",
    "EVENT",
    "UPDATE",
    "VERSION",
    "Keyring",
    "PublicKey",
    "Signer",
    "lines_of",
    "make_key",
    "notice_to",
    "parse_keys",
    "public_of",
    "sealing_of",
]

log = logging.getLogger("fedmq.keys")

#: What a message is good for. It is part of what is signed, so that none can be passed off as another.
UPDATE, VERSION, CONTROL, EVENT, COMMAND = "update", "version", "control", "event", "command"

WORD = "ed25519:"
#: Bytes of a public key, and of a file of them: a thousand workers' take 100 KB.
KEY_BYTES = 32
MOST_BYTES = 2**24


def notice_to(worker: str) -> str:
    """What a notice to ``worker`` is good for: nobody else."""
    return f"notice {worker}"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """Whose signatures are believed, and until when."""

    name: str
    raw: bytes
    expires: date | None = None
    """The last day on which it is believed, in UTC; None for always."""

    @property
    def id(self) -> bytes:
        """By which a seal names it."""
        return hashlib.sha256(self.raw).digest()[:KEY_ID]

    @property
    def is_expired(self) -> bool:
        """Whether its last day is over."""
        if self.expires is None:
            return False
        end = datetime(self.expires.year, self.expires.month, self.expires.day, tzinfo=UTC) + timedelta(days=1)
        return time.time() >= end.timestamp()

    def __str__(self) -> str:
        """As it stands in a file of keys."""
        until = f" expires={self.expires.isoformat()}" if self.expires else ""
        return f"{self.name} {WORD}{base64.b64encode(self.raw).decode()}{until}"

    def has_signed(self, text: bytes, signature: bytes) -> bool:
        """Whether ``signature`` is this key's under ``text``."""
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415

        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, text)
        except InvalidSignature:
            return False
        return True


# ------------------------------------------------------------------------------------------------- signing


class Signer:
    """Signs what is said in one run with one key."""

    def __init__(self, key: Ed25519PrivateKey, run: str) -> None:
        """See :meth:`load`."""
        self._key = key
        self._run = run
        self._public = PublicKey("own", _raw(key))

    @classmethod
    def load(cls, path: Path | None, run: str, what: str) -> Signer | None:
        """With the key in the file ``path``, which the setting ``what`` names; None without a path.

        Raises :class:`ConfigError` if the file cannot be read, may be read by others, or holds something else.
        """
        return None if path is None else cls(_private(path, what), run)

    def sealing(self, purpose: str) -> Sealing:
        """Signs one message, which is good for ``purpose``."""

        def seal(digest: bytes) -> bytes:
            return bytes(Seal(self._public.id, self._key.sign(signed_text(purpose, self._run, digest))))

        return seal

    def require_own(self, body: bytes, purpose: str) -> None:
        """Raise :class:`WireError` unless this key has signed ``body`` for ``purpose``, before its data."""
        _speakers([self._public], self._run, body, purpose, "this aggregator's own key")


def sealing_of(signer: Signer | None, purpose: str) -> Sealing | None:
    """As :meth:`Signer.sealing`; None for whoever signs nothing."""
    return None if signer is None else signer.sealing(purpose)


def make_key(path: Path, name: str) -> PublicKey:
    """Write a new private key into the new file ``path``. Raises as :func:`write_secret`."""
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

    key = Ed25519PrivateKey.generate()
    content = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_secret(path, content)
    return PublicKey(name, _raw(key))


def public_of(path: Path, name: str, what: str) -> PublicKey:
    """The public key that goes with the private one in ``path``. Raises as :meth:`Signer.load`."""
    return PublicKey(name, _raw(_private(path, what)))


def _private(path: Path, what: str) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

    content = read_secret_bytes(path, what)
    advice = "make one with 'fedmq keys make'"
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # Not the library's words: nobody knows what it quotes.
        raise ConfigError(f"{what} = {str(path)!r}: holds no private key in PEM without a password; {advice}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{what} = {str(path)!r}: holds a key of another kind than Ed25519; {advice}")
    return key


def _raw(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


# ------------------------------------------------------------------------------------------------ checking


def parse_keys(text: str, where: str) -> tuple[PublicKey, ...]:
    """The keys in ``text``, the content of ``where``. Raises :class:`ConfigError` that names the line."""
    lines = (line.partition("#")[0].split() for line in text.splitlines())
    return tuple(_parse(words, f"{where}, line {number}") for number, words in enumerate(lines, start=1) if words)


def lines_of(keys: Iterable[PublicKey]) -> str:
    """The content of a file of ``keys``."""
    return "".join(f"{key}\n" for key in keys)


def _parse(words: Sequence[str], where: str) -> PublicKey:
    like = f"a line is like 'w1 {WORD}AAAA…=', and may end with expires=2030-01-31"
    if not 2 <= len(words) <= 3 or not words[1].startswith(WORD):
        raise ConfigError(f"{where}: {like}")
    if not re.fullmatch(NAME_PATTERN, words[0]):
        raise ConfigError(f"{where}: {words[0]!r:.80} cannot be a name: letters, digits, dash, underscore, up to 64")
    try:
        raw = base64.b64decode(words[1].removeprefix(WORD), validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != KEY_BYTES:
        raise ConfigError(f"{where}: this is no Ed25519 public key, which is {KEY_BYTES} bytes in base64; {like}")
    expires = None
    if len(words) == 3:
        try:
            expires = date.fromisoformat(words[2].removeprefix("expires="))
        except ValueError:
            expires = None
        if expires is None or not words[2].startswith("expires="):
            raise ConfigError(f"{where}: {words[2]!r:.40} is no expires=YYYY-MM-DD; {like}")
    return PublicKey(words[0], raw, expires)


class Keyring:
    """The public keys that somebody believes, as a file has them now. May be used from any thread."""

    def __init__(self, path: Path, run: str, what: str) -> None:
        """Use :meth:`load`."""
        self._path, self._run, self._what = path, run, what
        self._lock = threading.Lock()
        self._keys, self._state = _read(path, what)

    @classmethod
    def load(cls, path: Path | None, run: str, what: str) -> Keyring | None:
        """The keys in the file ``path``, which the setting ``what`` names; None without a path.

        Raises :class:`ConfigError` if it cannot be read, if others may write it, or for a line that is none.
        """
        return None if path is None else cls(path, run, what)

    @property
    def keys(self) -> tuple[PublicKey, ...]:
        """All of them. The file is read again when it has changed; what cannot be read changes nothing."""
        with self._lock:
            try:
                state = _state_of(self._path)
            except OSError as error:
                state, problem = (0, 0, 0), f"{self._what} = {str(self._path)!r}: {error.strerror}"
            else:
                problem = ""
            if state == self._state:
                return self._keys
            self._state = state
            if not problem:
                try:
                    self._keys, self._state = _read(self._path, self._what)
                except ConfigError as error:
                    problem = str(error)
            if problem:
                log.error("%s; the %d keys that were there before are believed on", problem, len(self._keys))
            else:
                log.info("%s has changed: %d keys", self._path, len(self._keys))
            return self._keys

    def speakers(self, body: bytes | memoryview, purpose: str) -> frozenset[str]:
        """Who has signed the message ``body`` for ``purpose``: all names that the key has.

        What then stands before its data is as it was signed; of its data, only the digest that stands there.

        Raises :class:`NotSigned`, :class:`BadSignature`, and :class:`WireError` for what is no message.
        """
        return _speakers(self.keys, self._run, body, purpose, self._what)


def _speakers(
    keys: Iterable[PublicKey], run: str, body: bytes | memoryview, purpose: str, where: str
) -> frozenset[str]:
    seal, message = unsealed(body)
    if seal is None:
        raise NotSigned(f"it bears no signature, and {where} asks for one")
    known = [key for key in keys if key.id == seal.key]
    if not known:
        raise BadSignature(f"it is signed with key {seal.key.hex()}, which is none of {where}")
    valid = [key for key in known if not key.is_expired]
    if not valid:
        raise BadSignature(f"it is signed with key {seal.key.hex()}, whose time is over ({known[0].expires})")
    text = signed_text(purpose, run, digest_of([before_data(message)]))
    # The short name says which to try; what has signed is the key itself.
    signing = {raw for raw in {key.raw for key in valid} if PublicKey("", raw).has_signed(text, seal.signature)}
    if not signing:
        who = ", ".join(sorted({key.name for key in valid}))
        raise BadSignature(
            f"its signature does not fit: it was changed on its way, or is of another run or kind (key of {who})"
        )
    return frozenset(key.name for key in valid if key.raw in signing)


def _state_of(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path, what: str) -> tuple[tuple[PublicKey, ...], tuple[int, int, int]]:
    where = f"{what} = {str(path)!r}"
    try:
        state = _state_of(path)
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}") from None
    if os.name == "posix" and mode & stat.S_IWOTH:
        raise ConfigError(f"{where}: others may write this file, and so choose who is believed: chmod o-w {path}")
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{where}: holds more than {MOST_BYTES} bytes")
    try:
        return parse_keys(content.decode(), where), state
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: holds no text") from None
