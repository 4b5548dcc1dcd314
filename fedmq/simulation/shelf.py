"""The versions that simulated workers have: each is kept as long as somebody trains from it."""

from __future__ import annotations

from broker.messages import Parameters

__all__ = ["Shelf"]


class Shelf:
    """By number, and the newest."""

    def __init__(self) -> None:
        self.newest: Parameters | None = None
        self._versions: dict[int, Parameters] = {}
        self._users: dict[int, int] = {}

    def put(self, base: Parameters) -> None:
        """``base`` is the newest from now on."""
        before, self.newest = self.newest, base
        self._versions[base.version] = base
        if before is not None and before.version != base.version and before.version not in self._users:
            del self._versions[before.version]

    def take(self) -> int:
        """Somebody trains from the newest; its number."""
        if self.newest is None:
            raise LookupError("no version has come yet")
        version = self.newest.version
        self._users[version] = self._users.get(version, 0) + 1
        return version

    def __getitem__(self, version: int) -> Parameters:
        return self._versions[version]

    def give_back(self, version: int) -> None:
        """Whoever trained from it does so no more."""
        self._users[version] -= 1
        if not self._users[version]:
            del self._users[version]
            if self.newest is None or version != self.newest.version:
                del self._versions[version]
