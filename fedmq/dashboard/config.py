"""``[dashboard]``: where the live page is served."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from broker.addresses import is_loopback
from broker.settings import Table
from broker.tls import server_context

__all__ = ["DashboardConfig", "names_of"]


def _named(text: str) -> str:
    for name in names_of(text):
        if not name.replace(".", "").replace("-", "").isalnum():
            raise ValueError(f"{name!r} is no name of a host")
    return text


def names_of(text: str) -> list[str]:
    """The names in a list with commas."""
    return [name for part in text.split(",") if (name := part.strip())]


class DashboardConfig(Table):
    """``[dashboard]``: the live page of ``fedmq dashboard`` and ``fedmq demo``."""

    port: Annotated[int, Field(ge=0, le=65535)] = 7373
    """Where the page is served; 0 for any port that is free. ``fedmq demo`` takes another one if this is taken."""
    address: Annotated[str, Field(min_length=1, max_length=255)] = "127.0.0.1"
    """Who can reach it: with this address only those on the same machine. There is no password: an address that
    others can reach shows the run to whoever asks, so put a web server that asks who they are before it."""
    host_names: Annotated[str, AfterValidator(_named)] = ""
    """Names under which browsers may ask for the page, separated by commas, besides addresses and ``localhost``; any
    other name is refused, as a foreign page may have pointed it here."""

    certificate_file: Path | None = None
    """A server certificate, as a PEM file: the page is served as ``https``, then."""
    key_file: Path | None = None
    """Its key, as a PEM file that others cannot read."""
    client_ca_file: Path | None = None
    """Only browsers that show a certificate that a CA in this PEM file has signed get the page."""

    def context(self) -> ssl.SSLContext | None:
        """TLS, if a certificate is given. Raises :class:`ConfigError` if it cannot be used."""
        return server_context(
            certificate_file=self.certificate_file,
            key_file=self.key_file,
            client_ca_file=self.client_ca_file,
            table="dashboard",
        )

    def exposure(self) -> str:
        """What to warn of, if others than this machine can reach the page; else empty."""
        if is_loopback(self.address) or self.client_ca_file is not None:
            return ""
        text = f"whoever can reach {self.address} can see this run: the page asks for no password"
        return text if self.certificate_file is not None else f"{text}, and is not encrypted (docs/tls.md)"
