"""The help of every command, as rich shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer
from rich.text import Text

from fedmq.cli import app


def commands(of: Any, name: str = "fedmq") -> Iterator[tuple[str, Any]]:
    """``of`` and all below it, by name."""
    yield name, of
    for word, inner in getattr(of, "commands", {}).items():
        yield from commands(inner, f"{name} {word}")


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_no_word_in_brackets_is_taken_for_markup(name: str) -> None:
    command = COMMANDS[name]
    texts = [command.help or "", *(getattr(parameter, "help", None) or "" for parameter in command.params)]

    for text in texts:
        # A table's name like [aggregator] would vanish, and leave "Settings of .".
        assert Text.from_markup(text).plain == text.replace("\\[", "[")


@pytest.mark.parametrize("name", ["aggregator", "worker", "evaluate", "config", "init", "broker check"])
def test_the_help_has_an_example_of_the_command_itself(name: str) -> None:
    assert f"Example: fedmq {name} " in (COMMANDS[f"fedmq {name}"].help or "")
