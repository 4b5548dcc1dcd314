"""A command on a terminal, as a person has it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

from tests.support.commands import PATIENCE, environment_of

__all__ = ["on_terminal"]


def on_terminal(folder: Path, *arguments: str, url: str | None = None, program: str = "fedmq") -> tuple[int, str]:
    """Run ``python -m program`` with stdout and stderr on a pseudo-terminal; its exit code and all that was shown."""
    environment = {**environment_of(url), "TERM": "xterm-256color", "COLUMNS": "120"}
    del environment["FEDMQ_LOG_FORMAT"], environment["NO_COLOR"]
    ours, theirs = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        # Linux says EIO when the last one who had the terminal is gone.
        try:
            while piece := os.read(ours, 65536):
                shown.append(piece)
        except OSError:
            return

    command = [sys.executable, "-m", program, *arguments]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, close_fds=True
    )
    os.close(theirs)
    reader = threading.Thread(target=read)
    reader.start()
    try:
        code = process.wait(PATIENCE)
    finally:
        process.kill()
        reader.join()
        os.close(ours)
    return code, b"".join(shown).decode(errors="replace")
