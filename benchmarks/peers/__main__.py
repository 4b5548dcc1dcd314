"""``python -m benchmarks.peers``: see the package."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from benchmarks.peers import __doc__ as explanation
from benchmarks.peers import environments, fedmq
from benchmarks.peers.flower import FLOWER, FLOWER_GRPC
from benchmarks.peers.nvflare import NVFLARE, NVFLARE_TUNED
from benchmarks.peers.report import Machine, Report
from benchmarks.peers.trial import Failure, Outcome, Plan, System, measure

__all__ = ["SYSTEMS", "compare", "main"]

SYSTEMS: tuple[System, ...] = (FLOWER, FLOWER_GRPC, NVFLARE, NVFLARE_TUNED)

Installer = Callable[[str, Path], Path]


def compare(
    names: Sequence[str],
    sizes: Sequence[float],
    plan: Plan,
    cache: Path,
    *,
    command: str,
    keep: Path | None = None,
    install: Installer = environments.prepare,
) -> Report:
    """Measure the systems of these names, one after the other.

    Args:
        names: of :data:`SYSTEMS`, or ``fedmq``.
        sizes: of the model, in megabytes.
        plan: how long.
        cache: for the virtual environments.
        command: what was typed, for the report.
        keep: leave the folders of all trials there.
        install: gives the folder of programs for a requirements file.
    """
    machine = Machine.here()
    chosen = [system for system in SYSTEMS if system.name in names]
    outcomes: list[Outcome] = []
    reasons: dict[str, str] = {}
    versions: dict[str, dict[str, str]] = {}
    # All environments first: an installation would load the machine between two trials.
    programs: dict[str, Path] = {}
    for system in chosen:
        try:
            programs[system.name] = install(system.requirements, cache)
            versions[system.name] = environments.versions(programs[system.name])
        except Failure as failure:
            reasons[system.name] = str(failure)
            _tell(f"{system.name}: {failure}")
    for mb in sizes:
        for system in chosen:
            if system.name not in reasons:
                outcome = measure(system, programs[system.name], mb, plan, keep=keep)
                _tell(_one_line(outcome))
                if outcome.failure:  # somebody may have been quicker at a port
                    outcome = measure(system, programs[system.name], mb, plan, keep=keep)
                    _tell(f"once more: {_one_line(outcome)}")
                outcomes.append(outcome)
        if fedmq.NAME in names:
            outcomes.append(fedmq.measure_fedmq(mb, plan))
            _tell(_one_line(outcomes[-1]))
    return Report(command, machine, plan, chosen, versions, outcomes, reasons)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print a table; 1 if a system could not be measured at a size, 0 otherwise."""
    names = [*(system.name for system in SYSTEMS), fedmq.NAME]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=explanation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.1, 1, 10, 100], metavar="MB")
    parser.add_argument("--rounds", type=int, default=5, help="that count, after --warm-up (default: 5)")
    parser.add_argument("--warm-up", type=int, default=1, metavar="ROUNDS", help="that do not count (default: 1)")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--peers", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedmq-benchmarks"
    parser.add_argument("--venvs", type=Path, default=cache, metavar="FOLDER", help=f"(default: {cache})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there as well")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave logs and files of all trials there")
    parser.add_argument("--start-limit", type=float, default=180, metavar="SECONDS", help="until the first round")
    parser.add_argument("--round-limit", type=float, default=180, metavar="SECONDS", help="for a round")
    chosen = parser.parse_args(arguments)
    plan = Plan(chosen.rounds, chosen.warm_up, chosen.workers, chosen.start_limit, chosen.round_limit)
    if min(plan.rounds, plan.workers) < 1 or plan.warm_up < 0 or min(chosen.sizes) <= 0:
        parser.error("sizes, rounds and workers must be positive")
    if not Path("/proc/self/environ").exists():
        parser.error("this finds the processes of other systems in /proc, and so needs Linux")
    if chosen.keep is not None:
        chosen.keep.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _stop)
    typed = shlex.join(["python", "-m", "benchmarks.peers", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        report = compare(
            chosen.peers, chosen.sizes, plan, chosen.venvs.expanduser().absolute(), command=typed, keep=chosen.keep
        )
    except KeyboardInterrupt:
        _tell("interrupted; everything that was started is gone")
        return 130
    print(report.markdown())
    if chosen.json is not None:
        chosen.json.write_text(report.json())
    return int(bool(report.reasons) or any(outcome.failure for outcome in report.outcomes))


def _stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise SystemExit(128 + number)


def _one_line(outcome: Outcome) -> str:
    if outcome.failure:
        return f"{outcome.system}, {outcome.mb:g} MB: {outcome.failure}"
    return (
        f"{outcome.system}, {outcome.mb:g} MB: {outcome.median:.4f} s/round, "
        f"server {outcome.largest / 1e6:.0f} / {outcome.together / 1e6:.0f} MB"
    )


def _tell(text: str) -> None:
    print(f"# {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
