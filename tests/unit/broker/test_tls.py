"""TLS: what may be trusted, which files go together, and what is said if not."""

from __future__ import annotations

import contextlib
import ssl
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.hazmat.primitives.serialization import load_pem_private_key as load_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from broker.certificates import Authority, host_of
from broker.errors import ConfigError
from broker.secretfiles import write_secret
from broker.tls import client_context, common_name, complaint, days_left, of_reason, server_context

HOSTS = ["localhost", "127.0.0.1", "::1"]


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority with one server and one client."""
    made = Authority.new(tmp_path_factory.mktemp("ca"))
    made.server(HOSTS)
    made.client("w1")
    return made


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that nobody trusts."""
    made = Authority.new(tmp_path_factory.mktemp("stranger"))
    made.client("w1")
    return made


def of(authority: Authority, name: str) -> dict[str, Any]:
    return {"certificate_file": authority.folder / f"{name}.pem", "key_file": authority.folder / f"{name}.key"}


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> ssl.SSLObject:
    """Both ends in memory; what either raises."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(6):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return ends[0]


@pytest.mark.parametrize("host", HOSTS)
def test_who_is_named_in_the_certificate_is_trusted(ca: Authority, host: str) -> None:
    server = server_context(**of(ca, "broker"), client_ca_file=ca.folder / "ca.pem", table="metrics")
    assert server is not None
    client = client_context(ca_file=ca.folder / "ca.pem", **of(ca, "w1"))

    line = handshake(server, client, host)

    assert line.version() == "TLSv1.3"
    assert client.minimum_version == server.minimum_version == ssl.TLSVersion.TLSv1_2
    assert (client.verify_mode, client.check_hostname) == (ssl.CERT_REQUIRED, True)
    certificate = line.getpeercert()
    assert certificate is not None
    assert 820 < days_left(str(certificate["notAfter"]), time.time()) < 826


def test_the_system_s_cas_are_verified_by_too(ca: Authority) -> None:
    context = client_context()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    server = server_context(**of(ca, "broker"), table="metrics")
    assert server is not None
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        handshake(server, context, "localhost")
    words, is_passing = complaint(caught.value, "localhost", ca_file="")
    assert "name its file as broker.ca_file" in words
    assert not is_passing


@pytest.mark.parametrize(
    ("host", "words", "is_passing"),
    [
        ("mq.example.org", "for another host, not for 'mq.example.org'", False),
        ("127.0.0.2", "for another host, not for '127.0.0.2'", False),
    ],
)
def test_another_host_is_not_trusted(ca: Authority, host: str, words: str, is_passing: bool) -> None:
    server = server_context(**of(ca, "broker"), table="metrics")
    assert server is not None
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        handshake(server, client_context(ca_file=ca.folder / "ca.pem"), host)
    said, passing = complaint(caught.value, host, ca_file="x")
    assert words in said
    assert passing is is_passing


def test_another_ca_is_not_trusted(ca: Authority, stranger: Authority) -> None:
    server = server_context(**of(ca, "broker"), table="metrics")
    assert server is not None
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        handshake(server, client_context(ca_file=stranger.folder / "ca.pem"), "localhost")
    assert complaint(caught.value, "localhost", ca_file="other.pem") == (
        "its certificate is signed by nobody whom broker.ca_file = 'other.pem' names; is that the right file?",
        False,
    )


def test_a_client_of_another_ca_or_without_a_certificate_is_not_taken(ca: Authority, stranger: Authority) -> None:
    server = server_context(**of(ca, "broker"), client_ca_file=ca.folder / "ca.pem", table="dashboard")
    assert server is not None
    for own in (of(stranger, "w1"), {}):
        with pytest.raises(ssl.SSLError):
            handshake(server, client_context(ca_file=ca.folder / "ca.pem", **own), "localhost")


def test_a_client_s_certificate_is_no_server_s(ca: Authority) -> None:
    server = server_context(**of(ca, "w1"), table="metrics")
    assert server is not None
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, client_context(ca_file=ca.folder / "ca.pem"), "w1")


@pytest.mark.parametrize(("days", "words"), [(-1.0, "has expired")])
def test_a_certificate_out_of_its_time_may_be_renewed(tmp_path: Path, days: float, words: str) -> None:
    authority = Authority.new(tmp_path)
    authority.server(HOSTS, days=days)
    server = server_context(**of(authority, "broker"), table="metrics")
    assert server is not None
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        handshake(server, client_context(ca_file=tmp_path / "ca.pem"), "localhost")
    said, is_passing = complaint(caught.value, "localhost", ca_file="")
    assert words in said
    assert is_passing


@pytest.mark.parametrize(
    ("code", "words", "is_passing"),
    [(9, "look at the clocks", True), (23, "is not accepted: certificate revoked", False)],
)
def test_what_else_may_be_wrong_with_a_certificate(code: int, words: str, is_passing: bool) -> None:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code, error.verify_message = code, "certificate revoked"
    said, passing = complaint(error, "localhost", ca_file="")
    assert words in said
    assert passing is is_passing


@pytest.mark.parametrize(
    ("reason", "words", "is_passing"),
    [
        ("WRONG_VERSION_NUMBER", "does not speak TLS at this port", False),
        ("TLSV1_ALERT_UNKNOWN_CA", "does not accept our certificate (unknown ca)", False),
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "asks for a certificate (certificate required): set broker.", False),
        ("SSLV3_ALERT_CERTIFICATE_EXPIRED", "does not accept our certificate (certificate expired)", True),
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", "where the server asks for a certificate, broker.certificate_file", False),
        ("TLSV1_ALERT_PROTOCOL_VERSION", "TLS 1.2 or newer is needed on both sides", False),
        ("SOMETHING_NEW", "TLS failed: something new", False),
    ],
)
def test_reasons(reason: str, words: str, is_passing: bool) -> None:
    said, passing = of_reason(reason)
    assert words in said
    assert passing is is_passing


# ---------------------------------------------------------------------------------------------------- files


def test_files_that_do_not_go_together(ca: Authority, stranger: Authority, tmp_path: Path) -> None:
    pem, key = ca.folder / "w1.pem", ca.folder / "w1.key"
    empty = tmp_path / "empty"
    write_secret(empty, b"nothing")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"certificate_file": pem}, "broker.key_file is not: name the key's file"),
        ({"key_file": key}, "a key needs its certificate"),
        (
            {"certificate_file": pem, "key_file": stranger.folder / "w1.key"},
            "is not the key of",
        ),
        ({"certificate_file": pem, "key_file": empty}, "holds no private key"),
        ({"certificate_file": empty, "key_file": key}, "holds no certificate"),
        ({"certificate_file": tmp_path / "no", "key_file": key}, "No such file"),
        ({"certificate_file": pem, "key_file": tmp_path / "no"}, "No such file"),
        ({"ca_file": empty}, "broker.ca_file .* holds no certificate"),
        ({"ca_file": tmp_path / "no"}, "broker.ca_file .* No such file"),
    ]
    for files, words in cases:
        with pytest.raises(ConfigError, match=words):
            client_context(**files)


def test_a_key_that_others_may_read_is_refused(ca: Authority, tmp_path: Path) -> None:
    key = tmp_path / "w1.key"
    key.write_bytes((ca.folder / "w1.key").read_bytes())
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        client_context(certificate_file=ca.folder / "w1.pem", key_file=key)
    with pytest.raises(ConfigError, match=r"metrics.key_file.*chmod 600"):
        server_context(certificate_file=ca.folder / "w1.pem", key_file=key, table="metrics")


def test_an_encrypted_key_needs_its_passphrase(ca: Authority, tmp_path: Path) -> None:
    plain = load_key((ca.folder / "w1.key").read_bytes(), None)
    locked = plain.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"open sesame"))
    write_secret(tmp_path / "key", locked)
    write_secret(tmp_path / "right", b"open sesame\n")
    write_secret(tmp_path / "wrong", b"open barley")
    files: dict[str, Any] = {"certificate_file": ca.folder / "w1.pem", "key_file": tmp_path / "key"}

    client_context(**files, key_password_file=tmp_path / "right")
    with pytest.raises(ConfigError, match=r"name a file with its passphrase as broker.key_password_file"):
        client_context(**files)
    with pytest.raises(ConfigError, match="does not open it"):
        client_context(**files, key_password_file=tmp_path / "wrong")
    with pytest.raises(ConfigError, match="is encrypted: decrypt it"):
        server_context(**files, table="dashboard")


def test_a_client_ca_alone_is_no_server(ca: Authority) -> None:
    assert server_context(certificate_file=None, key_file=None, table="metrics") is None
    with pytest.raises(ConfigError, match=r"metrics.client_ca_file needs"):
        server_context(certificate_file=None, key_file=None, client_ca_file=ca.folder / "ca.pem", table="metrics")


# ------------------------------------------------------------------------------------------------ authority


def test_what_an_authority_makes(ca: Authority) -> None:
    assert (ca.folder / "ca.key").stat().st_mode & 0o777 == 0o600
    assert (ca.folder / "w1.key").stat().st_mode & 0o777 == 0o600
    assert common_name(ca.folder / "w1.pem", "x") == "w1"
    client = x509.load_pem_x509_certificate((ca.folder / "w1.pem").read_bytes())
    server = x509.load_pem_x509_certificate((ca.folder / "broker.pem").read_bytes())
    for certificate, purpose in ((client, ExtendedKeyUsageOID.CLIENT_AUTH), (server, ExtendedKeyUsageOID.SERVER_AUTH)):
        assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [purpose]
        assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]


def test_nothing_is_overwritten_and_more_can_be_added(tmp_path: Path) -> None:
    first = Authority.new(tmp_path / "tls")
    first.client("w1")
    before = {path.name: path.read_bytes() for path in (tmp_path / "tls").iterdir()}

    again = Authority.load(tmp_path / "tls")
    for wrong in (lambda: again.client("w1"), lambda: Authority.new(tmp_path / "tls")):
        with pytest.raises(ConfigError, match="is there already"):
            wrong()
    assert {path.name: path.read_bytes() for path in (tmp_path / "tls").iterdir()} == before

    certificate, _ = again.client("w2")
    x509.load_pem_x509_certificate(certificate.read_bytes()).verify_directly_issued_by(first.certificate)


def test_nothing_outlives_its_authority(tmp_path: Path) -> None:
    authority = Authority.new(tmp_path, days=10)
    made = x509.load_pem_x509_certificate(authority.client("w1", days=100)[0].read_bytes())
    assert made.not_valid_after_utc == authority.certificate.not_valid_after_utc


def test_an_authority_whose_key_is_another_s_or_open_is_refused(tmp_path: Path, stranger: Authority) -> None:
    Authority.new(tmp_path)
    (tmp_path / "ca.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Authority.load(tmp_path)
    (tmp_path / "ca.key").unlink()
    with pytest.raises(ConfigError, match="No such file"):
        Authority.load(tmp_path)
    write_secret(tmp_path / "ca.key", (stranger.folder / "ca.key").read_bytes())
    with pytest.raises(ConfigError, match="is not the key of"):
        Authority.load(tmp_path)


@pytest.mark.parametrize("name", ["ca", "broker", "../w1", "", "a.b", "x" * 65])
def test_names_that_are_no_account_s(ca: Authority, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of an account"):
        ca.client(name)


@pytest.mark.parametrize("host", ["mq.example.org", "*.example.org", "rabbitmq", "10.0.0.1", "::1", "a_b"])
def test_hosts(host: str) -> None:
    assert host_of(host) == host


@pytest.mark.parametrize("host", ["", "a b", "amqps://h", "h:5671", "-h", "x" * 300, "h/"])
def test_what_is_no_host(host: str) -> None:
    with pytest.raises(ConfigError, match="no name and no address"):
        host_of(host)
