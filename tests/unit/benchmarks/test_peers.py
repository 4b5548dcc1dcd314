"""The comparison with other systems, without any of them: a script stands in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import __main__ as peers
from benchmarks.peers import environments
from benchmarks.peers.fedmq import read_row
from benchmarks.peers.processes import Memory, descendants, marked
from benchmarks.peers.report import Machine, Report
from benchmarks.peers.trial import Failure, Outcome, Plan, System, Trial, measure, seconds_of_rounds
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[3]
MACHINE = Machine(cores=2, processor="Some CPU", memory=8_000_000_000, system="Linux 6", python="3.11.7", load=0.25)

# Its rounds start at 0, 1, 4, 9 ... It leaves a child in a session of its own, as other people's launchers do.
SERVER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
with open(sys.argv[1], "a") as file:
    file.writelines(f"{number * number}.0\\n" for number in range(int(sys.argv[2])))
time.sleep(600)
"""

# Starts a process, says how to find it, and is then killed.
OWNER = """
import sys, time
from pathlib import Path
from benchmarks.peers.processes import Group
with Group(Path(sys.argv[1])) as group:
    group.start("child", [sys.executable, "-c", sys.argv[2], sys.argv[1] + "/starts", "1"], side="server")
    print(group.token, flush=True)
    time.sleep(600)
"""


def system(start: Callable[[Trial], None], name: str = "stand-in") -> System:
    return System(name=name, title="Stand-in {version}", how="as it is", package="it", requirements="it", start=start)


def python(trial: Trial, code: str, *arguments: str) -> None:
    trial.group.start("server", [sys.executable, "-c", code, *arguments], side="server")


def test_rounds_to_warm_up_do_not_count() -> None:
    assert seconds_of_rounds([0.0, 10.0, 11.0, 13.0], Plan(rounds=2, warm_up=1)) == (1.0, 2.0)


def test_a_trial_is_timed_by_the_servers_side_and_leaves_nothing() -> None:
    # Given a server that leaves its session's ties behind
    trials: list[Trial] = []

    def start(trial: Trial) -> None:
        trials.append(trial)
        python(trial, SERVER, str(trial.stamps), str(trial.plan.starts))

    # When
    outcome = measure(system(start), Path(sys.executable).parent, 1.0, Plan(rounds=2, warm_up=1))

    # Then
    assert outcome.seconds == (3.0, 5.0)
    assert outcome.median == 4.0
    assert outcome.together >= outcome.largest > 1_000_000
    assert marked(trials[0].group.token) == []
    assert not trials[0].folder.exists()


@pytest.mark.parametrize(
    ("code", "starts", "plan", "reason"),
    [
        ("raise SystemExit(3)", "0", Plan(), "server ended with exit code 3 before the start of round 1"),
        (SERVER, "0", Plan(start_limit=0.3), "the start of round 1 did not come within 0.3 s"),
        (SERVER, "2", Plan(round_limit=0.3), "the start of round 3 did not come within 0.3 s"),
    ],
)
def test_what_goes_wrong_is_said_and_leaves_nothing(code: str, starts: str, plan: Plan, reason: str) -> None:
    trials: list[Trial] = []

    def start(trial: Trial) -> None:
        trials.append(trial)
        python(trial, code, str(trial.stamps), starts)

    outcome = measure(system(start), Path(sys.executable).parent, 1.0, plan)

    assert reason in outcome.failure
    assert outcome.seconds == ()
    assert marked(trials[0].group.token) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_everything_ends_with_its_owner_however_that_ends(number: signal.Signals, tmp_path: Path) -> None:
    # Given an owner whose process has left a child of its own
    folder = tmp_path / "trial"
    command = [sys.executable, "-c", OWNER, str(folder), SERVER]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as owner:
        assert owner.stdout is not None
        token = owner.stdout.readline().decode().strip()
        wait_for(lambda: len(marked(f"{token}-server")) == 2, what="the child and its child")

        # When
        owner.send_signal(number)
        owner.wait()

    # Then
    wait_for(lambda: not marked(token), what="the end of all")
    wait_for(lambda: not folder.exists(), what="the end of the folder")


def test_memory_of_several_is_added_and_descendants_are_found_by_name() -> None:
    command = [sys.executable, "-c", "print(flush=True); input()"]
    # Two that have just begun: one whose peak is long past may have held more than both hold now.
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as second,
    ):
        for child in (first, second):
            assert child.stdout is not None
            child.stdout.readline()
        name = Path(f"/proc/{first.pid}/comm").read_text().strip()
        memory = Memory(list)
        memory.look([first.pid])
        alone = memory.together
        memory.look([first.pid, second.pid])

        assert {first.pid, second.pid} <= set(descendants(os.getpid(), name))
        assert descendants(first.pid, "no such name") == []
        assert memory.together > alone > 0
        assert memory.largest <= memory.together
        for child in (first, second):
            child.communicate(b"\n")


def test_a_system_that_cannot_be_installed_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Given two systems, one of which cannot be installed
    def start(trial: Trial) -> None:
        python(trial, SERVER, str(trial.stamps), str(trial.plan.starts))

    def install(requirements: str, cache: Path) -> Path:
        installed.append(requirements)
        if len(installed) == 1:
            raise Failure("cannot be installed here: no such release")
        return Path(sys.executable).parent

    installed: list[str] = []
    monkeypatch.setattr(peers, "SYSTEMS", (system(start, "first"), system(start, "second")))
    monkeypatch.setattr(environments, "versions", lambda programs: {"it": "1.2"})

    # When
    report = peers.compare(
        ["first", "second"], [1.0], Plan(rounds=1, warm_up=0), tmp_path, command="command", install=install
    )

    # Then
    assert report.reasons == {"first": "cannot be installed here: no such release"}
    assert [(outcome.system, outcome.seconds) for outcome in report.outcomes] == [("second", (1.0,))]
    assert "| Stand-in 1.2 | 1 (1-1) |" in report.markdown()
    assert "| Stand-in ? | cannot be installed here: no such release |" in report.markdown()


def test_the_table_says_what_failed_where() -> None:
    report = Report(
        command="python -m benchmarks.peers",
        machine=MACHINE,
        plan=Plan(),
        systems=[system(lambda trial: None)],
        versions={"stand-in": {"it": "1.2", "numpy": "2.0"}},
        outcomes=[
            Outcome("stand-in", 10.0, failure="the server ended | badly"),
            Outcome("stand-in", 0.1, (0.25, 0.5, 1.0), largest=3_000_000, together=4_000_000),
        ],
        reasons={},
    )

    lines = report.markdown().splitlines()

    assert "2 cores of Some CPU, 8 GB, Linux 6, Python 3.11.7; load 0.2 before the first system was started." in lines
    assert "| system | 0.1 MB: s/round | 10 MB: s/round | 0.1 MB: memory | 10 MB: memory |" in lines
    assert "| Stand-in 1.2 | 0.5 (0.25-1) | failed: the server ended / badly | 3 / 4 | - |" in lines
    assert "- Stand-in 1.2: as it is. numpy 2.0." in lines


ROW = {"megabytes": 1.0, "fedmq": 0.04, "fedmq_least": 0.03, "fedmq_most": 0.05, "aggregator_peak_mb": 80.0}


def test_fedmqs_own_figures_are_read() -> None:
    outcome = read_row([ROW | {"megabytes": 0.1}, ROW], 1.0, broker=100_000_000)

    assert (outcome.median, min(outcome.seconds), max(outcome.seconds)) == (0.04, 0.03, 0.05)
    assert (outcome.largest, outcome.together) == (80_000_000, 180_000_000)


@pytest.mark.parametrize("rows", [[], [ROW | {"megabytes": 2.0}], [{"megabytes": 1.0}], [None]])
def test_figures_that_are_not_there_are_a_failure(rows: list[Any]) -> None:
    with pytest.raises(Failure, match="nothing of use about 1 MB"):
        read_row(rows, 1.0, broker=0)


def test_an_environment_is_made_once_and_again_when_its_requirements_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Given an installer that notes what it is told
    commands: list[list[str]] = []

    def run(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        (cache / "it").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, code, "", "WARNING: slow\nno such release\n")

    code = 0
    cache = tmp_path / "cache"
    monkeypatch.setattr(environments, "REQUIREMENTS", tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    (tmp_path / "it.txt").write_text("it==1\n")

    # When it is wanted twice, then with other requirements, which then cannot be had
    assert environments.prepare("it", cache) == cache / "it" / "bin"
    environments.prepare("it", cache)
    assert len(commands) == 2
    (tmp_path / "it.txt").write_text("it==2\n")
    code = 1
    with pytest.raises(Failure, match="cannot be installed here: no such release"):
        environments.prepare("it", cache)

    # Then it is not taken for ready
    code = 0
    environments.prepare("it", cache)
    assert len(commands) == 5
