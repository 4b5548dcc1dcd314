"""Text without passwords and without what a terminal would obey.

Whatever a program says goes through here last: its log, its errors, its tracebacks. Two nets for passwords, since
neither is enough. An address with a password in it is known by its form, wherever it comes from. And a password that
this process has read is known itself, however a library or a user's task quotes it.
"""

from __future__ import annotations

import base64
import re
from urllib.parse import quote, unquote

__all__ = ["HIDDEN", "conceal", "harmless", "redacted"]

#: What stands in a password's place.
HIDDEN = "***"

#: In running text an address ends where a space is. Rather too much than too little: a password may hold any of :/@.
_WORD = re.compile(r"\S+")
#: What follows a host's colon and is a port.
_PORT = re.compile(r"\d{1,5}(?![\w.%-])")
_HOST = re.compile(r"\[[^\]]*\]|[^:/?#]*")

#: Control characters but for tab and line break, other line breaks, and the marks that turn the direction of writing.
_OBEYED = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069]")

#: Shorter ones are words of ordinary text as well, and hiding them there would tell what they are.
_SHORTEST = 8

_known: set[str] = set()


def redacted(text: str) -> str:
    """An address without its password, also if it is malformed; or a text with one address in it."""
    start = text.find("://") + 3 if "://" in text else 0
    inside, at, after = text[start:].rpartition("@")
    if at:
        user, colon, _ = inside.partition(":")
        return f"{text[:start]}{user}{':' + HIDDEN if colon else ''}@{after}"
    host = _HOST.match(text, start) if start else None
    if host and text.startswith(":", host.end()) and not _PORT.match(text, host.end() + 1):
        # The host was forgotten: this is a user and a password.
        return f"{text[: host.end()]}:{HIDDEN}"
    return text


def conceal(password: str, user: str = "") -> None:
    """From now on :func:`harmless` hides this password, in the form in which it stands in addresses and decoded.

    Not one of fewer than eight characters, or of letters alone.
    """
    plain = unquote(password)
    if len(plain) < _SHORTEST or plain.isalpha():
        return
    basic = base64.b64encode(f"{user}:{plain}".encode()).decode()
    _known.update((password, plain, quote(plain, safe=""), basic))


def harmless(text: str) -> str:
    """A text for people or for a log, without passwords and without what a terminal would obey."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    if "://" in text and "@" in text:
        text = _WORD.sub(_without_password, text)
    return _OBEYED.sub("\N{REPLACEMENT CHARACTER}", text)


def _without_password(word: re.Match[str]) -> str:
    """A word without what stands from the first colon behind ``://`` to the last ``@``.

    Not as one pattern: that would take hours for a long text full of ``://``, which others may send.
    """
    text = word[0]
    start, at = text.find("://"), text.rfind("@")
    colon = text.find(":", start + 3) if start >= 0 else -1
    return f"{text[:colon]}:{HIDDEN}{text[at:]}" if 0 <= colon < at else text
