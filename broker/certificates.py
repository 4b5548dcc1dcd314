"""A small certificate authority: for tests, and for federations that have none.

One folder holds it: ``ca.pem`` and ``ca.key``, and for each name a certificate ``NAME.pem`` with its key ``NAME.key``.
Nothing that is there is overwritten; more names can be added as long as the CA's key is there.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from broker.errors import ConfigError
from broker.messages import NAME_PATTERN
from broker.secretfiles import read_secret_bytes, write_secret

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

__all__ = ["CA_DAYS", "CLIENT_DAYS", "RESERVED", "SERVER_DAYS", "Authority", "check_account", "host_of", "require_free"]

#: How long they are valid. What is renewed by hand is forgotten if it must be done each month.
CA_DAYS, SERVER_DAYS, CLIENT_DAYS = 3650, 825, 825
#: Names of files that are no client's.
RESERVED = ("ca", "broker")
#: Clocks differ.
_EARLIER = dt.timedelta(minutes=10)
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*")


def host_of(text: str) -> str:
    """``text``, if it is a name or an address of a host. Raises :class:`ConfigError` if not."""
    try:
        return str(ipaddress.ip_address(text.strip("[]")))
    except ValueError:
        if len(text) <= 253 and _HOST.fullmatch(text):
            return text
    raise ConfigError(f"{text!r} is no name and no address of a host") from None


def check_account(name: str) -> None:
    """Raise :class:`ConfigError` unless ``name`` can be that of an account, and of its files."""
    if re.fullmatch(NAME_PATTERN, name) is None or name in RESERVED:
        raise ConfigError(
            f"{name!r} cannot be the name of an account here (pattern {NAME_PATTERN}, and not {' or '.join(RESERVED)})"
        )


def require_free(folder: Path, name: str) -> None:
    """Raise :class:`ConfigError` if there is a certificate or a key of that name."""
    for made in (folder / f"{name}.key", folder / f"{name}.pem"):
        if made.exists():
            raise ConfigError(f"{made} is there already: move it away to have a new one (or use another --folder)")


@dataclass(frozen=True, slots=True)
class Authority:
    """Who signs. Use :meth:`new` or :meth:`load`."""

    folder: Path
    certificate: x509.Certificate
    key: EllipticCurvePrivateKey

    @classmethod
    def new(cls, folder: Path, *, name: str = "fedmq", days: float = CA_DAYS) -> Authority:
        """A new one, in a folder that has none. Raises :class:`ConfigError` if it cannot be written."""
        from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415 (only who makes certificates waits)

        for made in (folder / "ca.key", folder / "ca.pem"):
            if made.exists():
                raise ConfigError(f"{made} is there already: the certificates that it has signed need it")
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _signed(f"{name} CA", key, None, days=days)
        _make(folder)
        write_secret(folder / "ca.key", _pem_of(key))
        write_secret(folder / "ca.pem", _text_of(certificate))
        (folder / "ca.pem").chmod(0o644)
        return cls(folder, certificate, key)

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """The one in ``folder``. Raises :class:`ConfigError` if it cannot be read, or others may read its key."""
        from cryptography import x509  # noqa: PLC0415
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey  # noqa: PLC0415
        from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

        path = folder / "ca.key"
        try:
            key = load_pem_private_key(read_secret_bytes(path, "the CA's key"), None)
            certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        except OSError as error:
            raise ConfigError(f"{folder / 'ca.pem'}: {error.strerror}") from None
        except (ValueError, TypeError):
            raise ConfigError(f"{folder}: ca.pem and ca.key are not what 'fedmq broker certificates' makes") from None
        if not isinstance(key, EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise ConfigError(f"{path} is not the key of {folder / 'ca.pem'}")
        return cls(folder, certificate, key)

    def server(self, hosts: Sequence[str], *, name: str = "broker", days: float = SERVER_DAYS) -> tuple[Path, Path]:
        """A certificate for a server that is reached as ``hosts``, names or addresses; the files, its key last."""
        return self._issue(name, hosts[0], hosts=hosts, days=days)

    def client(self, name: str, *, days: float = CLIENT_DAYS) -> tuple[Path, Path]:
        """A certificate for the account ``name``; the files, its key last."""
        check_account(name)
        return self._issue(name, name, hosts=(), days=days)

    def _issue(self, file: str, name: str, *, hosts: Sequence[str], days: float) -> tuple[Path, Path]:
        from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

        certificate_path, key_path = self.folder / f"{file}.pem", self.folder / f"{file}.key"
        require_free(self.folder, file)
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _signed(name, key, self, hosts=hosts, days=days)
        write_secret(key_path, _pem_of(key))
        write_secret(certificate_path, _text_of(certificate))
        certificate_path.chmod(0o644)
        return certificate_path, key_path


def _signed(
    name: str, key: EllipticCurvePrivateKey, by: Authority | None, *, hosts: Sequence[str] = (), days: float
) -> x509.Certificate:
    """A certificate of ``key``: a CA's without ``by``, a server's with ``hosts``, else a client's."""
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID  # noqa: PLC0415

    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    issuer, signer = (subject, key) if by is None else (by.certificate.subject, by.key)
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    until = now + dt.timedelta(days=days)
    if by is not None:
        # What outlives its CA is worth nothing from then on.
        until = min(until, by.certificate.not_valid_after_utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, until) - _EARLIER)
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=0 if by is None else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=by is not None,
                key_cert_sign=by is None,
                crl_sign=by is None,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    if by is not None:
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    if hosts:
        names = [_named(host) for host in map(host_of, hosts)]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(signer, hashes.SHA256())


def _named(host: str) -> x509.GeneralName:
    from cryptography import x509  # noqa: PLC0415

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem_of(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _text_of(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415

    return certificate.public_bytes(Encoding.PEM)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made: {error.strerror}") from None
