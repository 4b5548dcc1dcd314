"""``python -m tests.chaos --duration 1800 --seed 7 --workers 4 --kills 300``; ``make chaos`` is the same."""

from __future__ import annotations

import argparse
import secrets
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from broker.amqp.node import PrivateNode
from tests.chaos.campaign import campaign
from tests.chaos.loads import LOADS
from tests.chaos.nemesis import KILLS, KINDS

#: Part of the faults that find nobody, or that wait while another one is at the broker.
MISSED = 0.12


def main() -> int:
    """Run a campaign; 0 if nothing was lost or doubled, 1 otherwise, 2 if it cannot be run here."""
    arguments = _arguments()
    available, reason = PrivateNode.available()
    if not available:
        sys.stderr.write(f"error: {reason}\n")
        return 2
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="fedmq-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    # So that everything that was started is ended.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    report = campaign(
        folder,
        seed=arguments.seed,
        duration=arguments.duration,
        kills=arguments.kills,
        gap=arguments.gap or _gap(arguments.duration, arguments.kills),
        aggregators=arguments.aggregators,
        workers=arguments.workers,
        load=arguments.load,
        console=Console(width=120),
    )
    if report.is_good and not (arguments.keep or arguments.folder):
        shutil.rmtree(folder)
    else:
        sys.stdout.write(f"logs, schedule, checkpoints and report.json: {folder}\n")
    return 0 if report.is_good else 1


def _gap(duration: float, kills: int) -> float:
    """Seconds between two faults, so that about so many kills are among them."""
    share = sum(KINDS[kind][0] for kind in KILLS) / sum(weight for weight, _, _ in KINDS.values())
    return duration * share * (1 - MISSED) / kills if kills else 3.0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--duration", type=float, default=120.0, help="seconds of faults (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="what the faults are drawn from (default: a new one)")
    parser.add_argument("--kills", type=int, default=0, help="go on until so many SIGKILLs were sent")
    parser.add_argument("--gap", type=float, default=None, help="seconds between two faults, on the average")
    parser.add_argument("--workers", type=int, default=4, choices=range(1, 9), metavar="1…8")
    parser.add_argument("--aggregators", type=int, default=2, choices=range(1, 5), metavar="1…4")
    parser.add_argument("--load", choices=tuple(LOADS), default="whole", help="what updates and versions are made of")
    parser.add_argument("--folder", help="where to work (default: a new one, removed if all is well)")
    parser.add_argument("--keep", action="store_true", help="keep the folder in any case")
    arguments = parser.parse_args()
    if arguments.seed is None:
        arguments.seed = secrets.randbelow(10**6)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
