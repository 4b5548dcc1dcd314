"""JSON out of a file or from a broker, which may hold anything."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["from_json"]


def from_json(text: str | bytes) -> Any:
    """What ``text`` says as JSON. Raises :class:`ValueError`, and nothing else, if it says nothing."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None
