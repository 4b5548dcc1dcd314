"""OAuth2 tokens as passwords: a file that something else renews, and what a token says of itself.

Nothing of a token is verified here. It is our own; who verifies it is the broker.
"""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker.errors import ConfigError
from broker.redaction import conceal
from broker.secretfiles import read_secret

__all__ = ["Token", "read_token", "token_of"]

#: From this version on RabbitMQ takes ``sub`` before ``client_id``.
SUBJECT_FIRST = (3, 11)


@dataclass(frozen=True, slots=True)
class Token:
    """A token as it was read."""

    text: str = field(repr=False)
    expires: float | None = None
    """Seconds since 1970; None if it does not say, or is no JWT."""
    subject: str = ""
    client: str = ""

    def account(self, version: tuple[int, ...] = ()) -> str:
        """What RabbitMQ calls whoever shows it; empty if the token does not tell. Without a version: the newest."""
        names = (self.subject, self.client)
        return next(filter(None, reversed(names) if version and version[:2] < SUBJECT_FIRST else names), "")


def read_token(path: Path | str, what: str = "broker.token_file") -> Token:
    """The token in a file.

    Raises :class:`ConfigError` if it cannot be read, holds nothing, or others may read it.
    """
    token = token_of(read_secret(path, what))
    if any(character.isspace() for character in token.text):
        raise ConfigError(f"{what}: holds more than a token: one line, and nothing else, is wanted")
    conceal(token.text)
    return token


def token_of(text: str) -> Token:
    """What ``text`` says of itself, if it is a JWT."""
    parts = text.split(".")
    claims: Any = None
    if len(parts) == 3:
        try:
            claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        except (ValueError, RecursionError):
            claims = None
    if not isinstance(claims, dict):
        return Token(text)
    return Token(
        text,
        expires=_moment(claims.get("exp")),
        subject=_text(claims.get("sub")),
        client=_text(claims.get("client_id")),
    )


def _moment(value: object) -> float | None:
    """Seconds since 1970, if ``value`` says any that can be waited for."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        moment = float(value)
    except OverflowError:
        return None
    return moment if math.isfinite(moment) else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
