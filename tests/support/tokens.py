"""OAuth2 tokens as an authorization server makes them, and a RabbitMQ that believes them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import Any

from broker.amqp.node import PrivateNode

__all__ = ["jwt", "put", "token_node"]

#: Shared by the server that makes tokens and the broker; of the tests alone.
KEY = b"a key of thirty-two bytes or more"
_ADVANCED = f"""[{{rabbitmq_auth_backend_oauth2, [
  {{resource_server_id, <<"rabbitmq">>}},
  {{key_config, [{{default_key, <<"k">>}}, {{signing_keys, #{{<<"k">> => {{map,
    #{{<<"kty">> => <<"MAC">>, <<"alg">> => <<"HS256">>, <<"value">> => <<"{KEY.decode()}">>}}}}}}}}]}}
]}}]."""


def token_node() -> PrivateNode:
    """A node that takes tokens besides its own account, not yet started."""
    return PrivateNode(
        plugins=("rabbitmq_management", "rabbitmq_auth_backend_oauth2"),
        settings={"auth_backends.1": "internal", "auth_backends.2": "rabbit_auth_backend_oauth2"},
        files={"advanced.config": _ADVANCED.encode()},
    )


def jwt(seconds: float = 600, *, key: bytes = KEY, **claims: Any) -> str:
    """A token that is good for ``seconds``, and for everything."""
    rights = ["configure:*/*", "write:*/*/*", "read:*/*/*"]
    payload = {"exp": int(time.time() + seconds), "aud": ["rabbitmq"], "scope": [f"rabbitmq.{one}" for one in rights]}
    parts = ({"alg": "HS256", "typ": "JWT", "kid": "k"}, {**payload, **claims})
    signed = ".".join(_encoded(json.dumps(part).encode()) for part in parts)
    return f"{signed}.{_encoded(hmac.new(key, signed.encode(), hashlib.sha256).digest())}"


def put(file: Path, token: str) -> Path:
    """Write ``token`` as those who renew them do: whole, or not at all."""
    draft = file.with_suffix(".new")
    draft.touch(mode=0o600)
    draft.write_text(token + "\n")
    return draft.replace(file)


def _encoded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
