"""All benchmarks, one after the other, with what they ran on; ``make bench`` is the same.

    python -m benchmarks --into results
    python -m benchmarks --quick --only ingest workers

Each one's output goes to a file of its own, ``results/<name>.md``, under a head that says command, machine, versions
and how busy the machine was. ``peers`` installs other systems and is only run if it is named. What the figures should
be is in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from broker.amqp.node import installed_version

#: By name: the arguments for figures that are worth something, and for a first look.
COMMANDS: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "rounds": (["--rounds", "20"], ["--sizes", "0.1", "1", "--rounds", "5"]),
    "ingest": ([], ["--sizes", "0.1", "1", "--megabytes", "50", "--repeat", "1"]),
    "workers": ([], ["--workers", "4", "20", "--updates", "400", "--repeat", "1"]),
    "monitoring": ([], ["--updates", "200", "--repeat", "1"]),
    "memory": ([], ["--megabytes", "20", "--buffers", "2", "4"]),
    "codecs": ([], ["--elements", "65536", "--repeats", "1"]),
    "signatures": ([], ["--repeats", "1"]),
    "accuracy": ([], ["--tasks", "digits", "--codecs", "eden:4", "--seeds", "1", "--versions", "5"]),
    "robust": ([], ["single", "--seeds", "1"]),
    "peers": (["--sizes", "0.1", "1", "10", "100", "--rounds", "5"], ["--sizes", "0.1", "--rounds", "2"]),
}
PACKAGES = ("fedmq", "pika", "numpy", "torch")


def machine() -> str:
    """What the figures are of."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    size = f", {memory[0] / 1e6:.0f} GB" if memory else ""
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}{size}, {platform.platform()}"


def versions() -> str:
    """Of Python, the broker and what the figures depend on."""
    shown = [f"Python {platform.python_version()}", f"RabbitMQ {installed_version() or 'not installed here'}"]
    for name in PACKAGES:
        try:
            shown.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(shown)


def load() -> str:
    """How many processes want to run, over the last minute."""
    return f"{os.getloadavg()[0]:.1f}"


def run(name: str, *, quick: bool, into: Path, about: str) -> bool:
    """Run one, and keep what it says; whether it came to its end."""
    arguments = COMMANDS[name][quick]
    before = load()
    sys.stdout.write(f"## {name}\n\n")
    lines: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout or ():
            sys.stdout.write(line)
            sys.stdout.flush()
            lines.append(line)
    command = " ".join(["python -m", f"benchmarks.{name}", *arguments])
    date = time.strftime("%d %B %Y")
    head = f"`{command}`, {date}. {about}. Load before: {before}, after: {load()}.\n\n"
    (into / f"{name}.md").write_text(head + "".join(lines))
    sys.stdout.write("\n")
    return process.returncode == 0


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text().splitlines()
    except OSError:
        return []


def main() -> int:
    """Run those that are wanted; 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), help="those, instead of all but peers")
    parser.add_argument("--quick", action="store_true", help="sizes that say little, to see whether they run")
    parser.add_argument("--into", type=Path, default=Path("results"), help="folder of the results")
    arguments = parser.parse_args()
    arguments.into.mkdir(parents=True, exist_ok=True)
    about = f"{machine()}; {versions()}"
    sys.stdout.write(about + "\n\n")
    names = arguments.only or [name for name in COMMANDS if name != "peers"]
    failed = [name for name in names if not run(name, quick=arguments.quick, into=arguments.into, about=about)]
    if failed:
        sys.stderr.write(f"failed: {', '.join(failed)}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
