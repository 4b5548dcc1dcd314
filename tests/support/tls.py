"""A RabbitMQ that speaks TLS, with certificates of the test's own."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from broker.admin import Admin
from broker.amqp.node import PrivateNode
from broker.certificates import Authority
from broker.settings import BrokerConfig

__all__ = ["SETTINGS", "add_account", "files_of", "tls_config", "tls_node"]

#: As docs/tls.md has it, but for passwords, which are taken as well, and for further listeners with other certificates.
SETTINGS = {
    "listeners.ssl.1": "127.0.0.1:{tls}",
    "ssl_options.cacertfile": "{folder}/ca.pem",
    "ssl_options.certfile": "{folder}/broker.pem",
    "ssl_options.keyfile": "{folder}/broker.key",
    "ssl_options.verify": "verify_peer",
    "ssl_options.fail_if_no_peer_cert": "true",
    "ssl_cert_login_from": "common_name",
    "auth_mechanisms.1": "EXTERNAL",
    "auth_mechanisms.2": "PLAIN",
    "management.ssl.ip": "127.0.0.1",
    "management.ssl.port": "{https}",
    "management.ssl.cacertfile": "{folder}/ca.pem",
    "management.ssl.certfile": "{folder}/broker.pem",
    "management.ssl.keyfile": "{folder}/broker.key",
}


def tls_node(authority: Authority) -> PrivateNode:
    """A node with the certificate ``broker`` of ``authority``, not yet started."""
    names = ("ca.pem", "broker.pem", "broker.key")
    return PrivateNode(
        plugins=("rabbitmq_management", "rabbitmq_auth_mechanism_ssl"),
        settings=SETTINGS,
        ports=("tls", "https"),
        files={name: (authority.folder / name).read_bytes() for name in names},
    )


def add_account(node: PrivateNode, name: str) -> None:
    """An account that may do everything and has no password."""
    admin = Admin(node.management_url, node.user, node.password)
    admin.put(f"/users/{name}", {"password_hash": "", "tags": ""})
    admin.put(f"/permissions/%2F/{name}", {"configure": ".*", "write": ".*", "read": ".*"})


def files_of(authority: Authority, name: str) -> Mapping[str, Path]:
    """What ``name`` sets to be itself."""
    folder = authority.folder
    if not (folder / f"{name}.pem").exists():
        authority.client(name)
    return {"certificate_file": folder / f"{name}.pem", "key_file": folder / f"{name}.key"}


def tls_config(node: PrivateNode, authority: Authority, name: str = "", **more: Any) -> BrokerConfig:
    """``[broker]`` for ``name``, who logs in with a certificate; or with the node's password, if there is no name."""
    login = "" if name else f"{node.user}:{node.password}@"
    own = {
        "url": f"amqps://{login}localhost:{node.port('tls')}/",
        "management_url": f"https://localhost:{node.port('https')}",
        "ca_file": authority.folder / "ca.pem",
        "heartbeat": 10,
        **files_of(authority, name or f"any-{secrets.token_hex(2)}"),
    }
    return BrokerConfig.model_validate({**own, **more})
