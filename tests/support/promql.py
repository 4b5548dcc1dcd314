"""What a PromQL expression refers to: as much of the language as dashboards and alerts here are written in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Query", "read"]

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^()]*)\)")
_SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\s*\{([^{}]*)\}")
_RANGE = re.compile(r"\[[^\[\]]*\]")
_NAME = re.compile(r"(?<![\w.])([a-zA-Z_:][a-zA-Z0-9_:]*)(\s*\()?")
_WORDS = {"and", "or", "unless", "bool", "offset"}
#: Of the functions and operators that exist, those that are in use: a misspelt one is none of them.
FUNCTIONS = {
    *("avg", "changes", "clamp_min", "count", "deriv", "histogram_quantile", "increase", "max", "max_over_time", "min"),
    *("quantile", "rate", "sum", "time", "vector"),
}


@dataclass(frozen=True)
class Query:
    """An expression's metrics, each with the labels asked of it; and the labels that results are grouped by."""

    metrics: Mapping[str, frozenset[str]]
    grouped: frozenset[str]


def read(expression: str) -> Query:
    """Take ``expression`` apart. Raises ValueError for what is no expression."""
    rest = _STRING.sub('""', expression)
    for opening, closing in ("()", "[]", "{}"):
        if rest.count(opening) != rest.count(closing):
            raise ValueError(f"{opening} and {closing} do not match in {expression}")
    grouped = {label.strip() for labels in _GROUPING.findall(rest) for label in labels.split(",") if label.strip()}
    rest = _RANGE.sub(" ", _GROUPING.sub(" ", rest))
    metrics: dict[str, frozenset[str]] = {}

    def selector(match: re.Match[str]) -> str:
        labels = [part for part in match[2].split(",") if part.strip()]
        names = [re.fullmatch(r'\s*([a-zA-Z_]\w*)\s*(?:=~|!~|!=|=)\s*""\s*', part) for part in labels]
        if not all(names):
            raise ValueError(f"{{{match[2]}}} is no selector, in {expression}")
        asked = frozenset(name[1] for name in names if name)
        metrics[match[1]] = metrics.get(match[1], frozenset()) | asked
        return " "

    rest = _SELECTOR.sub(selector, rest)
    for name, call in _NAME.findall(rest):
        if call and name not in FUNCTIONS and name not in _WORDS:
            raise ValueError(f"{name} is no function, in {expression}")
        if not call and name not in _WORDS:
            metrics.setdefault(name, frozenset())
    if not metrics:
        raise ValueError(f"nothing is asked for in {expression}")
    return Query(metrics, frozenset(grouped))
