"""TLS, the same for all that fedmq speaks: contexts that check whom they speak to, and what is wrong if they cannot.

Nothing here can be told not to verify: whoever has a certificate of their own making names its CA.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

from broker.errors import ConfigError
from broker.secretfiles import read_secret, read_secret_bytes

__all__ = ["client_context", "common_name", "complaint", "days_left", "of_reason", "server_context"]

#: What OpenSSL calls a certificate that is out of its time; whoever runs the server may renew it.
EXPIRED, NOT_YET_VALID = 10, 9
#: The host's name, or its address, is not in the certificate.
OTHER_HOST = (62, 64)
#: Nobody whom we trust has signed it.
UNKNOWN_CA = (2, 18, 19, 20, 21)

#: What comes back from a port where something else is spoken.
NO_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG"}
#: What stands in the alert of a server that does not like our certificate, or has got none.
REFUSALS = ("unknown ca", "certificate", "decrypt error", "access denied")

_DAY = 86400.0


def client_context(
    *,
    ca_file: Path | None = None,
    certificate_file: Path | None = None,
    key_file: Path | None = None,
    key_password_file: Path | None = None,
    table: str = "broker",
) -> ssl.SSLContext:
    """TLS of at least 1.2 to a server whose certificate and name are verified.

    Args:
        ca_file: PEM, whom we trust to sign it; the system's CAs if None.
        certificate_file: PEM, what we show if the server asks, with intermediate ones behind it.
        key_file: PEM, its key.
        key_password_file: holds the passphrase of the key.
        table: where these are set, for the errors.

    Raises :class:`ConfigError` for files that cannot be read, do not go together, or that others may read.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        _trust(context, ca_file, f"{table}.ca_file")
    _show(context, certificate_file, key_file, key_password_file, table)
    return context


def server_context(
    *, certificate_file: Path | None, key_file: Path | None, client_ca_file: Path | None = None, table: str
) -> ssl.SSLContext | None:
    """TLS of at least 1.2 for a server of ours; None if no certificate is given.

    Args:
        certificate_file: PEM, with intermediate ones behind it.
        key_file: PEM, its key.
        client_ca_file: PEM; whoever connects must show a certificate that one of these has signed.
        table: where these are set, for the errors.

    Raises :class:`ConfigError` as :func:`client_context`.
    """
    if certificate_file is None and key_file is None:
        if client_ca_file is not None:
            raise ConfigError(f"{table}.client_ca_file needs {table}.certificate_file and {table}.key_file, too")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _show(context, certificate_file, key_file, None, table)
    if client_ca_file is not None:
        _trust(context, client_ca_file, f"{table}.client_ca_file")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _trust(context: ssl.SSLContext, path: Path, what: str) -> None:
    try:
        context.load_verify_locations(cafile=str(path))
    except ssl.SSLError:
        raise ConfigError(f"{what} = {str(path)!r}: holds no certificate in PEM form (BEGIN CERTIFICATE)") from None
    except OSError as error:
        raise ConfigError(f"{what} = {str(path)!r}: {error.strerror}") from None


def _show(
    context: ssl.SSLContext, certificate: Path | None, key: Path | None, password_file: Path | None, table: str
) -> None:
    if certificate is None and key is None:
        return
    if certificate is None:
        raise ConfigError(f"{table}.key_file is set and {table}.certificate_file is not: a key needs its certificate")
    if key is None:
        raise ConfigError(f"{table}.certificate_file is set and {table}.key_file is not: name the key's file, too")
    common_name(certificate, f"{table}.certificate_file")
    read_secret_bytes(key, f"{table}.key_file")
    what = f"{table}.key_file = {str(key)!r}"
    password = _Password(password_file, table)
    try:
        context.load_cert_chain(str(certificate), str(key), password=password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            text = f"is not the key of {table}.certificate_file = {str(certificate)!r}"
        elif password.was_asked:
            setting = f"{table}.key_password_file"
            text = f"is encrypted, and what {setting} holds does not open it"
            if password_file is None:
                text = "is encrypted: " + (
                    f"name a file with its passphrase as {setting}"
                    if table == "broker"
                    else f"decrypt it (openssl pkey -in {key} -out …)"
                )
        else:
            text = "holds no private key in PEM form (BEGIN PRIVATE KEY)"
        raise ConfigError(f"{what}: {text}") from None
    except OSError as error:
        raise ConfigError(f"{what}: {error.strerror}") from None


class _Password:
    """What OpenSSL calls for a passphrase. Without it, it would ask on the terminal."""

    def __init__(self, path: Path | None, table: str) -> None:
        self.was_asked = False
        self._read: Callable[[], str] = (
            (lambda: "") if path is None else lambda: read_secret(path, f"{table}.key_password_file")
        )

    def __call__(self) -> str:
        self.was_asked = True
        return self._read()


def common_name(path: Path, what: str) -> str:
    """The common name of the certificate in a PEM file, the first if there are several: RabbitMQ's account.

    Raises :class:`ConfigError` if there is no certificate, or no such name in it.
    """
    # Here, because whoever uses no certificate need not wait for it.
    from cryptography import x509  # noqa: PLC0415
    from cryptography.x509.oid import NameOID  # noqa: PLC0415

    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{what} = {str(path)!r}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{what} = {str(path)!r}: holds no certificate in PEM form (BEGIN CERTIFICATE)") from None
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def days_left(not_after: str, now: float) -> float:
    """Days until ``not_after``, as Python's ssl says it, from ``now`` (seconds since 1970)."""
    return (ssl.cert_time_to_seconds(not_after) - now) / _DAY


def complaint(error: ssl.SSLError, host: str, *, ca_file: str, table: str = "broker") -> tuple[str, bool]:
    """What is wrong, in words and with what to do; and whether waiting may cure it.

    Args:
        error: what Python's ssl raised.
        host: the name or address that was connected to.
        ca_file: the file of CAs that was trusted; empty for the system's.
        table: where ``ca_file`` is set.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        words = _of_certificate(error, host, ca_file, table)
        return words, error.verify_code in {EXPIRED, NOT_YET_VALID}
    return of_reason(str(error.reason or error), table)


def of_reason(reason: str, table: str = "broker") -> tuple[str, bool]:
    """As :func:`complaint`, of what OpenSSL calls it: ``WRONG_VERSION_NUMBER``."""
    if reason in NO_TLS:
        return "it does not speak TLS at this port: RabbitMQ's TLS listener has a port of its own, 5671 mostly", False
    _, is_alert, what = reason.replace("_", " ").lower().partition("alert ")
    if not is_alert:
        return f"TLS failed: {reason.replace('_', ' ').lower()}", False
    if not any(word in what for word in REFUSALS):
        words = (
            f"it ended the TLS handshake ({what}): TLS 1.2 or newer is needed on both sides, and, where the server "
            f"asks for a certificate, {table}.certificate_file and {table}.key_file"
        )
        return words, False
    if "required" in what:
        # With TLS 1.3. With 1.2 it is but a handshake that failed.
        words = f"it asks for a certificate ({what}): set {table}.certificate_file and {table}.key_file"
        return words, False
    words = (
        f"it does not accept our certificate ({what}): {table}.certificate_file and {table}.key_file must be signed by "
        "a CA that the server trusts, and be valid now"
    )
    return words, "expired" in what


def _of_certificate(error: ssl.SSLCertVerificationError, host: str, ca_file: str, table: str) -> str:
    code = error.verify_code
    words = f"its certificate is not accepted: {error.verify_message}"
    if code == EXPIRED:
        words = "its certificate has expired: renew it on the server"
    elif code == NOT_YET_VALID:
        words = "its certificate is not valid yet: look at the clocks of this machine and of the server"
    elif code in OTHER_HOST:
        words = (
            f"its certificate is for another host, not for {host!r}: connect to a name that stands in it, or give it "
            "one with this name (fedmq broker certificates --broker-host)"
        )
    elif code in UNKNOWN_CA and ca_file:
        words = f"its certificate is signed by nobody whom {table}.ca_file = {ca_file!r} names; is that the right file?"
    elif code in UNKNOWN_CA:
        words = (
            "its certificate is signed by nobody whom this system trusts; if the CA is your own, name its file as "
            f"{table}.ca_file"
        )
    return words
