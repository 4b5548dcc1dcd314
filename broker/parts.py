"""Parts by their names: those that come with fedmq, those of installed packages, and those of the user's own modules.

A part is a strategy, an optimiser, a codec and the like. Its name is looked up

1. in fedmq's own table,
2. among the entry points of installed packages, in the group of its kind (``fedmq.strategies`` and so on),
3. as ``package.module:attribute``.

The third is for names that stand in the configuration of this very process: whoever writes that decides what runs
here anyway. A name that came over the wire, or stands in a file that somebody may have sent, picks among what is
installed and what the configuration has named before (:func:`part_of` without ``may_import``), and imports nothing
else. fedmq's own names cannot be taken by a package.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, cast

from pydantic import ValidationInfo

from broker.errors import ConfigError, FedmqError

__all__ = ["FROM_WIRE", "Name", "Parts", "made", "names_of", "part_of", "register"]

#: Validation context for settings that somebody else has sent.
FROM_WIRE = {"from_wire": True}

T = TypeVar("T")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Parts(Generic[T]):
    """Where the parts of one kind come from. ``T`` is what makes one, a callable."""

    kind: str
    """As errors call it: ``strategy``."""
    group: str
    """Of the entry points."""
    own: Mapping[str, T]
    """fedmq's own, by name."""
    imported: dict[str, T] = field(default_factory=dict, compare=False, repr=False)
    """Those that the configuration of this process has named by their paths, by path, or by the name it gave them."""


def part_of(parts: Parts[T], name: str, *, may_import: bool = False) -> T:
    """What makes the part that ``name`` means.

    Args:
        parts: the kind.
        name: what was written.
        may_import: whether ``name`` is from the configuration of this process, so that it may be
            ``package.module:attribute``.

    Raises:
        ConfigError: there is none (with the nearest names), it cannot be loaded, or it cannot be called.
    """
    if name in parts.own:
        return parts.own[name]
    if points := _installed(parts.group).get(name):
        return cast("T", _loaded(parts.kind, points))
    if name in parts.imported:
        return parts.imported[name]
    if may_import and ":" in name:
        part = parts.imported[name] = cast("T", _imported(parts.kind, name))
        return part
    raise ConfigError(_unknown(parts, name, may_import=may_import))


def register(parts: Parts[Any], name: str, path: str) -> None:
    """Call what is at ``path``, which the configuration of this process has named, ``name`` from now on.

    Raises:
        ConfigError: the name is fedmq's own or a package's, or there is nothing at ``path`` that makes a part.
    """
    if name in parts.own or name in _installed(parts.group):
        raise ConfigError(f"{parts.kind} {name!r} is there already; give yours another name")
    parts.imported[name] = _imported(parts.kind, path)


def made(parts: Parts[Callable[[Any], Made]], name: str, argument: object) -> Made:
    """What the part that ``name`` means makes of ``argument``.

    Raises:
        ConfigError: there is none, or it does not take the argument.
    """
    make = part_of(parts, name)
    try:
        return make(argument)
    except FedmqError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{parts.kind} {name!r} cannot be made of these settings: {type(error).__name__}: {error}"
        ) from error


@dataclass(frozen=True, slots=True)
class Name:
    """Validator for a setting that names a part; the value is the name."""

    parts: Parts[Any]

    def __call__(self, name: str, info: ValidationInfo) -> str:
        """``name``, if there is such a part. Raises ValueError."""
        try:
            part_of(self.parts, name, may_import=info.context != FROM_WIRE)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return name


def names_of(parts: Parts[T]) -> tuple[str, ...]:
    """All that are known: fedmq's own, those of installed packages, then those that the configuration has named."""
    return tuple(dict.fromkeys([*parts.own, *sorted(_installed(parts.group)), *parts.imported]))


@cache
def _installed(group: str) -> Mapping[str, tuple[EntryPoint, ...]]:
    """By name. Read once: it looks into every installed distribution, and names come from peers, too."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in entry_points(group=group):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def _loaded(kind: str, points: tuple[EntryPoint, ...]) -> Any:
    first = points[0]
    if len({point.value for point in points}) > 1:
        owners = " and ".join(map(_described, points))
        raise ConfigError(f"{kind} {first.name!r} is in two packages: {owners}; remove one, or name it by its path")
    try:
        part = first.load()
    except Exception as error:
        raise ConfigError(
            f"{kind} {first.name!r}, entry point {_described(first)}, cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    return _callable(kind, first.name, part)


def _described(point: EntryPoint) -> str:
    owner = f" of {point.dist.name} {point.dist.version}" if point.dist is not None else ""
    return f"{point.value}{owner}"


def _imported(kind: str, name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        part: Any = importlib.import_module(module)
        for word in attribute.split("."):
            part = getattr(part, word)
    except Exception as error:
        raise ConfigError(f"{kind} {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    return _callable(kind, name, part)


def _callable(kind: str, name: str, part: Any) -> Any:
    if not callable(part):
        raise ConfigError(f"{kind} {name!r} is a {type(part).__name__}; it must be something that makes one")
    return part


def _unknown(parts: Parts[Any], name: str, *, may_import: bool) -> str:
    known = names_of(parts)
    near = difflib.get_close_matches(name, known, 3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    also = ", or package.module:attribute" if may_import else ""
    return f"no {parts.kind} is called {name[:80]!r}{hint}; there are {', '.join(known) or 'none'}{also}"
