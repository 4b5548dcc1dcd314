"""``[dashboard]``: where the live page is served."""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import AfterValidator, Field

from broker.settings import Table

__all__ = ["DashboardConfig", "is_loopback", "names_of"]


def _named(text: str) -> str:
    for name in names_of(text):
        if not name.replace(".", "").replace("-", "").isalnum():
            raise ValueError(f"{name!r} is no name of a host")
    return text


def names_of(text: str) -> list[str]:
    """The names in a list with commas."""
    return [name for part in text.split(",") if (name := part.strip())]


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches what listens at ``address``."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


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

    def exposure(self) -> str:
        """What to warn of, if others than this machine can reach the page; else empty."""
        if is_loopback(self.address):
            return ""
        return f"whoever can reach {self.address} can see this run: the page asks for no password"
