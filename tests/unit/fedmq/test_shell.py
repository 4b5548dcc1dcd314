"""fedmq in a shell: completion as bash asks for it, and a terminal with and without NO_COLOR."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from fedmq.cli import COMMANDS
from tests.support.commands import environment_of

#: Colours of the foreground and the background; bold and dim are none.
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7])(?:;\d+)*m")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A command ``fedmq``, and beside it what ``fedmq --install-completion`` gives to bash."""
    folder = tmp_path_factory.mktemp("bin")
    command = folder / "fedmq"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m fedmq "$@"\n')
    command.chmod(0o755)
    environment = environment_of(None, {"_FEDMQ_COMPLETE": "source_bash"})
    made = subprocess.run([str(command)], env=environment, capture_output=True, text=True, check=True)
    (folder / "completion").write_text(made.stdout)
    return folder / "completion"


def completed(script: Path, *words: str, folder: Path | None = None) -> list[str]:
    """What bash offers for the last of ``words``."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    code = f"""
source {script}
COMP_WORDS=({" ".join(f"'{word}'" for word in words)})
COMP_CWORD={len(words) - 1}
function=$(complete -p fedmq | sed -n 's/.*-F \\([^ ]*\\).*/\\1/p')
"$function" fedmq
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    environment = environment_of(None) | {"PATH": f"{script.parent}:{os.environ['PATH']}"}
    done = subprocess.run([bash, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_commands_and_their_options(script: Path) -> None:
    """Three starts of fedmq, of a tenth of a second and more each."""
    assert completed(script, "fedmq", "re") == [name for name in COMMANDS if name.startswith("re")]
    assert completed(script, "fedmq", "dead", "re") == ["replay"]
    assert completed(script, "fedmq", "config", "--j") == ["--json"]


def test_bash_completes_the_names_of_runs_that_are_here(script: Path, tmp_path: Path) -> None:
    for name in ("digits", "digits-2", "wine"):
        (tmp_path / "runs" / name).mkdir(parents=True)

    assert completed(script, "fedmq", "history", "--run", "di", folder=tmp_path) == ["digits", "digits-2"]


def terminal(folder: Path, *arguments: str, environment: Mapping[str, str]) -> str:
    """What ``fedmq ARGUMENTS`` writes to a terminal."""
    ours, theirs = pty.openpty()
    kept = {key: value for key, value in environment_of("amqp://u:p@127.0.0.1:1/").items() if key != "NO_COLOR"}
    with subprocess.Popen(
        [sys.executable, "-m", "fedmq", *arguments],
        cwd=folder,
        env=kept | {"TERM": "xterm-256color", **environment},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        written = b""
        try:
            while piece := os.read(ours, 65536):
                written += piece
        except OSError:  # how Linux says that nobody writes to a terminal any more
            pass
        process.wait()
    os.close(ours)
    return written.decode()


@pytest.mark.parametrize("arguments", [("--help",), ("config",), ("config", "--json"), ("workers", "--run", "none")])
def test_there_are_no_colours_where_the_user_wants_none(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Help, a table, JSON, an error."""
    assert not COLOUR.search(terminal(tmp_path, *arguments, environment={"NO_COLOR": "1"}))


def test_there_are_colours_in_a_terminal_otherwise(tmp_path: Path) -> None:
    assert COLOUR.search(terminal(tmp_path, "workers", "--run", "none", environment={}))
