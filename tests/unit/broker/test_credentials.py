"""With what fedmq logs in, and over what kind of line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pika.exceptions import AuthenticationError

from broker.admin import Admin
from broker.amqp.credentials import Certified, account_of, parameters
from broker.amqp.refusals import Place, connection_error
from broker.certificates import Authority
from broker.errors import AccessRefused, ConfigError
from broker.settings import BrokerConfig
from tests.support.tls import files_of


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.new(tmp_path_factory.mktemp("ca"))


def config(url: str, **more: Any) -> BrokerConfig:
    return BrokerConfig.model_validate({"url": url, **more})


def test_a_certificate_is_the_login_unless_the_address_names_a_password(authority: Authority) -> None:
    mine = files_of(authority, "w1")
    for url in ("amqps://h/v", "amqps://w1@h/v"):
        (one,) = parameters(config(url, **mine), "n")
        assert isinstance(one.credentials, Certified)
        assert (one.credentials.username, one.host, one.port, one.virtual_host) == ("w1", "h", 5671, "v")
        assert one.ssl_options is not None
        assert one.ssl_options.server_hostname == "h"
        assert (Place.of(one).login, Place.of(one).user, account_of(config(url, **mine))) == ("certificate", "w1", "w1")
    (one,) = parameters(config("amqps://u:p@h/", **mine), "n")
    assert (Place.of(one).login, Place.of(one).user) == ("password", "u")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("amqps://w2@h/", r"names account 'w2', and broker\.certificate_file = .* is that of 'w1'"),
        ("amqp://127.0.0.1/", r"broker\.certificate_file needs TLS"),
    ],
)
def test_an_address_that_does_not_go_with_the_certificate(authority: Authority, url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parameters(config(url, **files_of(authority, "w1")), "n")


@pytest.mark.parametrize("scheme", ["amqp", "amqps"])
def test_an_address_does_not_say_what_is_verified(scheme: str) -> None:
    with pytest.raises(ConfigError, match="no ssl_options there"):
        parameters(config(f"{scheme}://u:p@127.0.0.1/?ssl_options={{'protocol':2}}"), "n")


@pytest.mark.parametrize("host", ["rabbit.example", "10.0.0.7", "[fe80::1]", "localhost.example"])
def test_plain_lines_to_other_machines_are_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=r"without TLS.*broker\.allow_plain = true"):
        parameters(config(f"amqp://u:p@{host}/"), "n")
    assert parameters(config(f"amqp://u:p@{host}/", allow_plain=True), "n")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "[::1]", ""])
def test_this_machine_needs_no_tls(host: str) -> None:
    assert parameters(config(f"amqp://u:p@{host}:5672/"), "n")[0].ssl_options is None


def test_a_key_s_passphrase_needs_a_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"key_password_file is set and broker\.key_file is not"):
        parameters(config("amqps://u:p@h/", key_password_file=tmp_path / "x"), "n")


def test_a_broker_without_the_mechanism_is_told_how_to_have_it(authority: Authority) -> None:
    (one,) = parameters(config("amqps://h/", **files_of(authority, "w1")), "n")
    text = str(connection_error(AuthenticationError("PLAIN"), Place.of(one), opened=False))
    assert "rabbitmq-plugins enable rabbitmq_auth_mechanism_ssl" in text


@pytest.mark.parametrize(
    ("url", "there"),
    [
        ("amqp://u:p@127.0.0.1/", "http://127.0.0.1:15672"),
        ("amqps://u:p@mq.example.org/", "https://mq.example.org:15671"),
        ("amqps://u:p@[fe80::1]:5671/", "https://[fe80::1]:15671"),
    ],
)
def test_where_the_management_api_is(url: str, there: str) -> None:
    assert Admin.of(config(url)).url == there


def test_no_password_goes_to_a_management_api_without_tls() -> None:
    plain = "http://mq.example.org:15672"
    with pytest.raises(AccessRefused, match="the password would go there without TLS"):
        Admin.of(config("amqps://u:p@mq.example.org/", management_url=plain)).overview()
