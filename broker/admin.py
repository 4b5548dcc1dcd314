"""A client of RabbitMQ's management HTTP API: what commands and tests ask of it, no more."""

from __future__ import annotations

import base64
import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from broker.addresses import is_loopback
from broker.errors import AccessRefused, BrokerError, BrokerUnreachable
from broker.jsontext import from_json
from broker.settings import BrokerConfig
from broker.tls import client_context, complaint
from broker.tokens import read_token

__all__ = ["Admin", "Facts"]

Facts = dict[str, Any]

#: What only an administrator may ask.
OF_ADMINISTRATORS = ("/users", "/permissions", "/topic-permissions", "/vhosts", "/user-limits", "/vhost-limits")

#: What RabbitMQ says to a wrong password or an unknown user; to one without rights it says *Not management user*.
LOGIN_FAILED = "Login failed"


#: Bytes of an answer. A thousand connections, of which most is told, are three megabytes.
LARGEST_ANSWER = 64 * 2**20
PIECE = 64 * 1024
#: So many times as long as it may take to begin, an answer may take in all.
TIMES_AS_LONG = 6


class _NoDetours(urllib.request.HTTPRedirectHandler):
    """The password goes where it was meant for, and nowhere else: RabbitMQ's API sends nobody on."""

    def redirect_request(self, *_args: Any) -> None:
        """Take the answer for a refusal."""


class _NotThere(BrokerError):
    """What was asked for does not exist."""


class Admin:
    """The API of one node, as one user.

    Every method raises :class:`BrokerUnreachable` if nothing answers, :class:`AccessRefused` if the user may
    not ask, and :class:`BrokerError` for any other refusal.
    """

    def __init__(
        self,
        url: str,
        user: str,
        password: str,
        *,
        timeout: float = 10.0,
        context: ssl.SSLContext | None = None,
        ca_file: str = "",
        refusal: str = "",
    ) -> None:
        """Nothing is asked yet.

        Args:
            url: the admin UI's address, such as ``http://127.0.0.1:15672``.
            user: the account.
            password: its password.
            timeout: seconds for each answer.
            context: for ``https``; by default the system's CAs are trusted.
            ca_file: the file of CAs that ``context`` goes by, for the errors.
            refusal: why nothing must be asked, if so.
        """
        if urlsplit(url).scheme not in {"http", "https"}:
            raise BrokerError(f"the admin UI's address begins with http:// or https://, not {url!r}")
        self.url = url.rstrip("/")
        self.vhost = "/"
        """The virtual host of the address that this was made of."""
        #: Seconds by which the broker's clock was ahead of ours at the last answer, to about a second; None if unknown.
        self.clock: float | None = None
        self.user = user
        """Whom it asks as."""
        self._authorization = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        self._timeout = timeout
        self._context = context
        self._ca_file = ca_file
        self._refused = refusal

    @classmethod
    def of(cls, config: BrokerConfig, *, timeout: float = 10.0) -> Admin:
        """The API that belongs to ``config``, with the user and the virtual host of its first address."""
        first = config.urls()[0]
        parts = urlsplit(first)
        host = parts.hostname or "127.0.0.1"
        host = f"[{host}]" if ":" in host else host
        url = config.management_url or (f"https://{host}:15671" if parts.scheme == "amqps" else f"http://{host}:15672")
        is_encrypted = url.startswith("https://")
        user, password, refusal = _login_of(config, first)
        if not is_encrypted and not config.allow_plain and not is_loopback(urlsplit(url).hostname or "localhost"):
            refusal = (
                f"the admin UI at {url} is not asked: the password would go there without TLS. Name an https:// "
                "address as broker.management_url, or set broker.allow_plain = true where the network is trusted"
            )
        admin = cls(
            url,
            user,
            password,
            timeout=timeout,
            context=client_context(ca_file=config.ca_file) if is_encrypted else None,
            ca_file=str(config.ca_file or ""),
            refusal=refusal,
        )
        admin.vhost = unquote(parts.path[1:]) or "/"
        return admin

    def get(self, path: str) -> object:
        """``GET`` anything, such as ``/whoami`` or ``/nodes``."""
        return self._request("GET", path)

    def listed(self, path: str) -> list[Facts]:
        """``GET`` a list of anything."""
        return self._list(path)

    def found(self, path: str) -> list[Facts]:
        """As :meth:`listed`; empty if there is nothing at ``path``."""
        try:
            return self._list(path)
        except _NotThere:
            return []

    def one(self, path: str) -> Facts:
        """``GET`` an object of any kind."""
        return self._object(path)

    def overview(self) -> Facts:
        """Versions, totals, listeners."""
        return self._object("/overview")

    def queues(self, vhost: str = "/", *, columns: Sequence[str] = ()) -> list[Facts]:
        """The queues and streams of a virtual host; of each only ``columns``, if some are named."""
        return self._list(f"/queues/{_quoted(vhost)}{_asking(columns)}")

    def consumers(self, vhost: str = "/", *, columns: Sequence[str] = ()) -> list[Facts]:
        """The consumers of a virtual host, with tag, queue and whether they are active; ``columns`` as above."""
        return self._list(f"/consumers/{_quoted(vhost)}{_asking(columns)}")

    def nodes(self) -> list[Facts]:
        """The nodes of the cluster, with their alarms."""
        return self._list("/nodes")

    def connections(self) -> list[Facts]:
        """All connections, with ``name``, ``user`` and ``client_properties``."""
        return self._list("/connections")

    def close_connection(self, name: str, reason: str = "closed by fedmq") -> None:
        """Close a connection by its ``name`` (address and ports, not the name that its client gave it)."""
        self._request("DELETE", f"/connections/{_quoted(name)}", headers={"X-Reason": reason})

    def delete_queue(self, name: str, vhost: str = "/") -> None:
        """Delete a queue and what is in it."""
        self._request("DELETE", f"/queues/{_quoted(vhost)}/{_quoted(name)}")

    def put(self, path: str, body: Facts) -> None:
        """``PUT`` anything else, such as ``/users/…`` or ``/permissions/…``."""
        self._request("PUT", path, body=body)

    def post(self, path: str, body: Facts) -> None:
        """``POST`` anything, such as ``/definitions``."""
        self._request("POST", path, body=body)

    def delete(self, path: str) -> None:
        """``DELETE`` anything else; nothing happens if it is not there."""
        try:
            self._request("DELETE", path)
        except _NotThere:
            return

    def _object(self, path: str) -> Facts:
        answer = self._request("GET", path)
        if not isinstance(answer, dict):
            raise BrokerError(f"{self.url}{path} answered with something else than an object")
        return answer

    def _list(self, path: str) -> list[Facts]:
        answer = self._request("GET", path)
        if not isinstance(answer, list):
            raise BrokerError(f"{self.url}{path} answered with something else than a list")
        return answer

    def _request(
        self, method: str, path: str, *, body: Facts | None = None, headers: dict[str, str] | None = None
    ) -> object:
        if self._refused:
            raise AccessRefused(self._refused)
        request = urllib.request.Request(  # noqa: S310 - the scheme was checked
            f"{self.url}/api{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": self._authorization, "Content-Type": "application/json", **(headers or {})},
        )
        try:
            asked = time.time()
            opener = urllib.request.build_opener(_NoDetours, urllib.request.HTTPSHandler(context=self._context))
            with opener.open(request, timeout=self._timeout) as answer:
                self._compare_clocks(answer.headers.get("Date"), asked)
                text = _all_of(answer, time.monotonic() + TIMES_AS_LONG * self._timeout)
            return from_json(text) if text else None
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error, method, path) from None
        except (OSError, ValueError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLError):
                reason, _ = complaint(reason, urlsplit(self.url).hostname or "", ca_file=self._ca_file)
            raise BrokerUnreachable(f"the admin UI at {self.url} does not answer: {reason}") from None

    def _compare_clocks(self, date: str | None, asked: float) -> None:
        try:
            theirs = parsedate_to_datetime(date or "").timestamp()
        except (ValueError, TypeError):
            return
        # Theirs is cut to the second, and was written between the two of ours.
        now = time.time()
        early, late = theirs - now, theirs + 1 - asked
        self.clock = 0.0 if early <= 0 <= late else early if early > 0 else late

    def _refusal(self, error: urllib.error.HTTPError, method: str, path: str) -> BrokerError:
        try:
            detail = error.read(500).decode(errors="replace")
        except (OSError, HTTPException):
            detail = ""
        if error.code == 401 and _reason_of(detail) == LOGIN_FAILED:
            return AccessRefused(
                f"the admin UI at {self.url} refused the login of user {self.user!r}: check user and password in "
                "broker.url"
            )
        if error.code in {401, 403}:
            is_ruling = method != "GET" or path.startswith(("/users", "/vhosts"))
            tag = "administrator" if is_ruling and path.startswith(OF_ADMINISTRATORS) else "monitoring"
            return AccessRefused(
                f"user {self.user!r} may not use the admin UI at {self.url} for {path} ({_reason_of(detail)}): give "
                f"it the tag {tag!r} (rabbitmqctl set_user_tags {self.user} {tag}), and permissions in the "
                "virtual host"
            )
        if error.code == 404:
            return _NotThere(f"{self.url}: {method} {path}: 404, there is no such thing")
        return BrokerError(f"{self.url}: {method} {path}: {error.code} {detail}")


def _login_of(config: BrokerConfig, url: str) -> tuple[str, str, str]:
    """User and password for the API, and why there are none."""
    parts = urlsplit(url)
    if config.token_file is not None:
        token = read_token(config.token_file)
        # Whoever shows a token may call themselves what they like.
        return unquote(parts.username or "") or token.account() or "token", token.text, ""
    if config.certificate_file is not None and parts.password is None:
        refusal = "the admin UI takes no certificate for a login: to ask it, broker.url must name user and password"
        return "", "", refusal
    return unquote(parts.username or "guest"), unquote(parts.password or "guest"), ""


def _all_of(answer: HTTPResponse, until: float) -> bytes:
    """An answer, unless it is without end: in bytes, or in time. Raises :class:`ValueError` then."""
    pieces, size = [], 0
    while piece := answer.read1(PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > LARGEST_ANSWER:
            raise ValueError(f"its answer is longer than {LARGEST_ANSWER} bytes")
        if time.monotonic() > until:
            raise ValueError("its answer does not come to an end")
    return b"".join(pieces)


def _reason_of(detail: str) -> str:
    """What RabbitMQ says, or the beginning of what something else does."""
    try:
        return str(from_json(detail)["reason"])
    except (ValueError, KeyError, TypeError):
        return " ".join(detail.split())[:80] or "no reason given"


def _asking(columns: Sequence[str]) -> str:
    return f"?columns={','.join(columns)}" if columns else ""


def _quoted(part: str) -> str:
    return quote(part, safe="")
