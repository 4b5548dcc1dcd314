"""The management API, asked for what it will tell: whatever it does not is named, and stops nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from broker.admin import Admin
from broker.errors import AccessRefused, BrokerError, BrokerUnreachable
from fedmq.doctor.findings import Finding, note

__all__ = ["Asking"]

Facts = Mapping[str, Any]


class Asking:
    """One look at the API of one node, by the user that fedmq has."""

    def __init__(self, admin: Admin) -> None:
        self._admin = admin
        self._gone: BrokerError | None = None
        self._untold: dict[str, list[str]] = {}

    def some(self, path: str, what: str) -> list[Facts] | None:
        """The objects at ``path``; None if they are not told, which ``what`` will be missed for."""
        if self._gone is None:
            try:
                answer = self._admin.get(path)
            except BrokerUnreachable as error:
                self._gone = error  # each further question would take as long
            except BrokerError as error:
                self._untold.setdefault(_cause(error), []).append(what)
                return None
            else:
                rows: list[Any] = answer if isinstance(answer, list) else [answer]
                if all(isinstance(row, dict) for row in rows):
                    return rows
                reason = f"{self._admin.url} answers in a form that fedmq does not know: another version?"
                self._untold.setdefault(reason, []).append(what)
                return None
        self._untold.setdefault(str(self._gone), []).append(what)
        return None

    def of_vhost(self, kind: str, what: str) -> list[Facts] | None:
        """The objects of one kind in our virtual host."""
        return self.some(f"/{kind}/{quote(self._admin.vhost, safe='')}", what)

    def queues(self) -> dict[str, Facts] | None:
        """The queues of our virtual host, by name."""
        rows = self.of_vhost("queues", "queues and their policies")
        return None if rows is None else {str(row.get("name")): row for row in rows}

    @property
    def vhost(self) -> str:
        """Our virtual host."""
        return self._admin.vhost

    @property
    def clock(self) -> float | None:
        """See :class:`Admin`."""
        return self._admin.clock

    def untold(self) -> list[Finding]:
        """What could not be looked at, and why."""
        advice = (
            "rabbitmq-plugins enable rabbitmq_management on the broker; broker.management_url if its port is not 15672"
            if self._gone is not None
            else ""
        )
        return [
            note("management", f"not looked at: {', '.join(dict.fromkeys(what))} ({reason})", advice)
            for reason, what in self._untold.items()
        ]


def _cause(error: BrokerError) -> str:
    """Of a user who may not ask, the same for all questions."""
    text = str(error)
    if isinstance(error, AccessRefused):
        before, _, after = text.partition(" for /")
        return before + ":" + after.partition("):")[2] if after else text
    return text
