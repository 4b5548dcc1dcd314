"""What goes on each machine: the broker's address with the account's name and password, in a file or shown once."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from broker.addresses import is_loopback
from broker.errors import ConfigError
from broker.secretfiles import read_secret, write_secret

__all__ = ["Addresses", "address_of", "leads_here"]


def address_of(places: str, vhost: str, name: str, password: str | None) -> str:
    """The value of ``broker.url`` for one account.

    Args:
        places: where the broker is: addresses, separated by commas; who logs in there is not taken from them.
        vhost: the virtual host.
        name: the account.
        password: None for one that logs in by certificate, whose name stands in that.

    Raises :class:`ConfigError` for what is no address.
    """
    login = "" if password is None else f"{quote(name, safe='')}:{quote(password, safe='')}@"
    return ",".join(_address(place.strip(), login, vhost) for place in places.split(",") if place.strip())


def _address(place: str, login: str, vhost: str) -> str:
    try:
        parts = urlsplit(place)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if parts.scheme not in {"amqp", "amqps"} or not host:
        raise ConfigError("--address: where clients find the broker, such as amqps://rabbit.example.org:5671")
    shown = f"[{host}]" if ":" in host else host
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{login}{shown}{f':{port}' if port else ''}/{quote(vhost, safe='')}{query}"


def leads_here(places: str) -> bool:
    """Whether one of these addresses leads to this machine alone."""
    return any(is_loopback(urlsplit(place.strip()).hostname or "") for place in places.split(","))


class Addresses:
    """The addresses of accounts: in files of a folder that is for its owner alone, or only shown.

    Args:
        places: see :func:`address_of`.
        vhost: the virtual host.
        folder: where each account has its file; None for none.
        by_certificate: accounts have no password.
    """

    def __init__(self, places: str, vhost: str, *, folder: Path | None, by_certificate: bool = False) -> None:
        self._places = places
        self._vhost = vhost
        self._folder = folder
        self._by_certificate = by_certificate

    def file(self, name: str) -> Path | None:
        """Where the address of this account is."""
        return None if self._folder is None else self._folder / f"{name}.url"

    def known(self, name: str) -> str | None:
        """The password in the account's file; None if there is none.

        Raises :class:`ConfigError` if the file is another account's, or others may read it.
        """
        file = self.file(name)
        if file is None or not file.exists():
            return None
        parts = urlsplit(read_secret(file, f"the address of {name!r}").partition(",")[0])
        if parts.username is None and self._by_certificate:
            return None
        if unquote(parts.username or "") != name or parts.password is None:
            raise ConfigError(f"{file} is no address with user {name!r} and a password: move it away")
        return unquote(parts.password)

    def keep(self, name: str, password: str | None) -> str:
        """Write the file if there is to be one and is none; the address.

        Raises :class:`ConfigError` if it cannot be written.
        """
        address = address_of(self._places, self._vhost, name, password)
        file = self.file(name)
        if file is not None and not file.exists():
            self._make_folder(file.parent)
            write_secret(file, f"{address}\n".encode())
        return address

    def renew(self, name: str, password: str) -> str:
        """As :meth:`keep`, in place of the file that is there, at one blow."""
        address = address_of(self._places, self._vhost, name, password)
        file = self.file(name)
        if file is not None:
            self._make_folder(file.parent)
            draft = file.with_name(f"{file.name}.new")
            draft.unlink(missing_ok=True)
            write_secret(draft, f"{address}\n".encode())
            draft.replace(file)
        return address

    @staticmethod
    def _make_folder(folder: Path) -> None:
        try:
            folder.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
            mode = folder.stat().st_mode
        except OSError as error:
            raise ConfigError(f"--folder {str(folder)!r}: cannot be made: {error.strerror}") from None
        if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"--folder {str(folder)!r}: others may look into it: chmod 700, or name another")
