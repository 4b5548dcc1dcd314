"""All commands are of one mould: their help, JSON, exit codes, and that none waits for another's imports."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from rich.text import Text

from broker import errors
from fedmq import control
from fedmq.cli import COMMANDS as TABLE
from fedmq.cli import EXIT_CODES, app
from tests.support.commands import ROOT, environment_of


def commands(of: Any, name: str = "fedmq") -> Iterator[tuple[str, Any]]:
    """``of`` and all below it, by name."""
    yield name, of
    for word, inner in getattr(of, "commands", {}).items():
        yield from commands(inner, f"{name} {word}")


COMMANDS = dict(commands(typer.main.get_command(app)))
#: Those that do something themselves.
LEAVES = {name: command for name, command in COMMANDS.items() if not hasattr(command, "commands")}

#: Commands whose result is no list or table of facts.
NOTHING_LISTED = {
    "dashboard",
    *("demo", "init", "aggregator", "worker", "evaluate", "set", "release", "pause", "resume", "stop"),
    *(
        "checkpoint export",
        "dead replay",
        "dead drop",
        "broker certificates",
        "broker check",
        "broker node",
        "report",
        "track",
    ),
    *("keys make", "keys show", "keys enrol", "keys remove"),
    *("broker setup", "broker add-worker", "broker rotate", "broker remove-worker"),
}
#: What makes a command slow to start, and only those that work with it may import.
HEAVY = ("torch", "matplotlib", "sklearn", "transformers", "fedmq.simulation")


def options_of(command: Any) -> set[str]:
    return {word for parameter in command.params for word in parameter.opts}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_word_in_brackets_is_taken_for_markup(name: str) -> None:
    command = COMMANDS[name]
    texts = [command.help or "", *(getattr(parameter, "help", None) or "" for parameter in command.params)]

    for text in texts:
        # A table's name like [aggregator] would vanish, and leave "Settings of .".
        assert Text.from_markup(text).plain == text.replace("\\[", "[")


@pytest.mark.parametrize("name", LEAVES)
def test_the_help_has_an_example_of_the_command_itself(name: str) -> None:
    (example,) = re.findall(r"Example: (.+)", LEAVES[name].help or "")

    assert re.match(rf"{name}( |$)", example)
    # What the example says, the command understands.
    given = set(re.findall(r"(?<= )--?[a-z][a-z-]*", example))
    assert given <= options_of(LEAVES[name])


@pytest.mark.parametrize("name", LEAVES)
def test_what_lists_something_does_so_as_json_too(name: str) -> None:
    has_json = "--json" in options_of(LEAVES[name])

    assert has_json is (name.removeprefix("fedmq ") not in NOTHING_LISTED)


@pytest.mark.parametrize("name", LEAVES)
def test_every_option_is_explained(name: str) -> None:
    for parameter in LEAVES[name].params:
        assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_the_list_of_commands_says_what_the_commands_say_of_themselves() -> None:
    for name, known in TABLE.items():
        first = inspect.cleandoc(COMMANDS[f"fedmq {name}"].help or "").split("\n\n")[0]

        assert known.summary == first.replace("\n", " "), name
        assert COMMANDS[f"fedmq {name}"].name == name


def codes_of(kind: type[errors.FedmqError]) -> Iterator[int]:
    yield kind.exit_code
    for inner in kind.__subclasses__():
        yield from codes_of(inner)


def test_every_exit_code_is_told_in_the_help_and_to_operators() -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    rows = {int(code) for code in re.findall(r"^\| (\d) \|", page, re.MULTILINE)}
    epilog = str(COMMANDS["fedmq"].epilog)

    assert rows == set(EXIT_CODES) == {0, *codes_of(errors.FedmqError), control.UNANSWERED}
    for code, meaning in EXIT_CODES.items():
        assert f"{code} {meaning}" in epilog


def test_no_help_and_no_completion_waits_for_what_only_work_needs() -> None:
    """A process of its own, in which nothing was imported before: the help of all commands, one after the other."""
    code = f"""
import contextlib, io, json, sys
from fedmq.cli import COMMANDS, app
found = {{}}
def run(*words):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            app(list(words), prog_name="fedmq")
        except SystemExit as end:
            assert not end.code, (words, end.code)
    found[" ".join(words)] = [name for name in {HEAVY!r} if name in sys.modules]
    return out.getvalue()
run("--version")
assert "simulate" in run("--help")
found["pydantic"] = ["pydantic"] if "pydantic" in sys.modules else []
for name in COMMANDS:
    if name != "simulate":
        assert "Example" in run(name, "--help") or name in ("checkpoint", "dead", "broker", "keys"), name
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment_of(None), capture_output=True, text=True, check=False, timeout=60
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == len(TABLE) + 2
    assert not [name for names in found.values() for name in names], found
