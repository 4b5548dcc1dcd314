"""What the doctor finds: each thing with its verdict, and with what to change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Finding", "Level", "note", "ok", "problem", "worst"]


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"
    """A run works; it may be slow, or something could not be looked at."""
    PROBLEM = "problem"
    """A run fails, waits for ever, or loses updates."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    area: str
    level: Level
    text: str
    advice: str = ""
    """What to change, as a command or a setting where there is one."""

    def plain(self) -> dict[str, str]:
        """For ``--json``."""
        return {"area": self.area, "level": self.level.value, "text": self.text, "advice": self.advice}


def ok(area: str, text: str) -> Finding:
    """All is well."""
    return Finding(area, Level.OK, text)


def note(area: str, text: str, advice: str = "") -> Finding:
    """Worth knowing."""
    return Finding(area, Level.NOTE, text, advice)


def problem(area: str, text: str, advice: str = "") -> Finding:
    """To be changed; without ``advice`` where the text says how."""
    return Finding(area, Level.PROBLEM, text, advice)


def worst(findings: Iterable[Finding]) -> Level:
    """The worst verdict; ok if there is none."""
    order = list(Level)
    return max((finding.level for finding in findings), key=order.index, default=Level.OK)
