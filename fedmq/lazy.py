"""A group of commands of which each is imported when it is used, so that none waits for what another needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["Command", "LazyGroup"]


@dataclass(frozen=True, slots=True)
class Command:
    """Where a command is, and what the list of commands says of it."""

    where: str
    """``package.module:attribute`` of a function, or of a :class:`typer.Typer` with commands of its own."""
    summary: str
    """The first paragraph of its help, on one line."""

    def load(self, name: str) -> Any:
        """The command itself, called ``name``."""
        module, _, attribute = self.where.partition(":")
        found = getattr(import_module(module), attribute)
        if not isinstance(found, typer.Typer):
            app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            app.command(name)(found)
            return typer.main.get_command(app)
        group = typer.main.get_group(found)
        group.name = name
        return group


class LazyGroup(TyperGroup):
    """A group with the commands of :attr:`table`, which a subclass sets, before those that typer knows."""

    table: ClassVar[Mapping[str, Command]] = {}

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.commands = _Commands(self.table, self.commands)

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, those of the table first."""
        del ctx
        return list(self.commands)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """What a list of commands shows of one, for which nothing is imported."""
        known = self.table.get(cmd_name)
        return super().get_command(ctx, cmd_name) if known is None else TyperCommand(cmd_name, help=known.summary)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command itself, to be executed or completed."""
        if args and args[0] in self.table:
            return args[0], self.commands[args[0]], args[1:]
        return super().resolve_command(ctx, args)


class _Commands(MutableMapping[str, Any]):
    """By name; those of a table are imported when they are looked up."""

    def __init__(self, table: Mapping[str, Command], others: Mapping[str, Any]) -> None:
        self._known: dict[str, Any] = dict(table) | dict(others)

    def __getitem__(self, name: str) -> Any:
        if isinstance(known := self._known[name], Command):
            self._known[name] = known = known.load(name)
        return known

    def __setitem__(self, name: str, command: Any) -> None:
        self._known[name] = command

    def __delitem__(self, name: str) -> None:
        del self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)
