"""A virtual environment for each peer, made when it is missing or its requirements have changed."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.peers.trial import Failure

__all__ = ["prepare", "versions"]

REQUIREMENTS = Path(__file__).parent / "requirements"


def prepare(name: str, cache: Path, *, limit: float = 900.0) -> Path:
    """The folder of programs of the environment for ``requirements/<name>.txt``.

    Args:
        name: of the requirements.
        cache: the folder that holds all environments.
        limit: seconds that an installation may take.

    Raises:
        Failure: the environment could not be made; the last lines of the installer say why.
    """
    requirements = REQUIREMENTS / f"{name}.txt"
    stamp = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    folder = cache / name
    ready = folder / ".ready"
    if not ready.exists() or ready.read_text() != stamp:
        print(f"# {name}: making an environment in {folder}", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-m", "venv", folder], limit)
        _run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", "-r", requirements], limit)
        # Written last, so an interrupted installation is done again.
        ready.write_text(stamp)
    return folder / "bin"


def versions(programs: Path) -> dict[str, str]:
    """What is installed in an environment, by name."""
    listed = _run([programs / "python", "-m", "pip", "list", "--format", "json"], 60)
    return {item["name"]: item["version"] for item in json.loads(listed)}


def _run(command: list[str | Path], limit: float) -> str:
    line = [str(part) for part in command]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as error:
        raise Failure(f"cannot be installed here: nothing after {limit:.0f} s") from error
    if done.returncode != 0:
        # `venv` complains on standard output, `pip` on the other; warnings come last there.
        said = [text for text in (done.stderr or done.stdout).splitlines() if text and not text.startswith("WARNING")]
        raise Failure(f"cannot be installed here: {said[-1][:200] if said else 'no reason given'}")
    return done.stdout
