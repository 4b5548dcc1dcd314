"""What comes from others, made harmless: texts that anybody may show, and numbers that any JSON reader takes."""

from __future__ import annotations

import math

__all__ = ["clean", "count", "number", "real", "whole"]

#: Letters of a name, a state or a reason.
LONGEST = 80


def clean(value: object, longest: int = LONGEST) -> str:
    """``value`` as one line that a terminal or a page shows as it is.

    Control characters, line breaks and marks that turn the direction of writing become ``\N{REPLACEMENT CHARACTER}``.
    """
    text = str(value)
    if len(text) > longest:
        text = text[: longest - 1] + "…"
    return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def whole(value: object, default: int) -> int:
    """``value`` if it is a whole number (no bool) that every JSON reader takes, else ``default``."""
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**53 else default


def count(value: object) -> int | None:
    """``value`` if it is a whole number from 0 on, else None."""
    found = whole(value, -1)
    return found if found >= 0 else None


def number(value: object) -> float | None:
    """``value`` if it is a number, which may be NaN or infinite; else None."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:
        return None


def real(value: object) -> float | None:
    """``value`` if it is a finite number, else None: JSON has no other."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None
