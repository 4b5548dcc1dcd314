"""Keys for tests, as files that the settings name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from broker.signing import Keyring, PublicKey, Signer, lines_of, make_key

__all__ = ["Keys", "keyring", "signer"]


def signer(file: Path, run: str) -> Signer:
    loaded = Signer.load(file, run, "a key")
    assert loaded is not None
    return loaded


def keyring(file: Path, run: str) -> Keyring:
    loaded = Keyring.load(file, run, "keys")
    assert loaded is not None
    return loaded


@dataclass(frozen=True)
class Keys:
    """A folder with private keys, and the lists of those that are believed."""

    folder: Path

    def private(self, name: str) -> Path:
        """The private key of ``name``, made if there is none."""
        file = self.folder / f"{name}.key"
        if not file.exists():
            self._publish(file.with_suffix(".pub"), [make_key(file, name)])
        return file

    def enrolled(self, *names: str, as_: str = "") -> Path:
        """A file of the public keys of ``names``; with ``as_`` all under that name."""
        file = self.folder / f"{'-'.join(names)}-{as_}.keys"
        lines = []
        for name in names:
            line = self.private(name).with_suffix(".pub").read_text()
            lines.append(line.replace(f"{name} ", f"{as_ or name} ", 1))
        file.write_text("".join(lines))
        return file

    @staticmethod
    def _publish(file: Path, keys: list[PublicKey]) -> None:
        file.write_text(lines_of(keys))
