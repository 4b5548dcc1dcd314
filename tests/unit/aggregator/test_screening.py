"""The layer before any rule: norms, one update a worker, scores and quarantine."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.core.norms import LEAST, LONGEST, OWN, NormWindow
from aggregator.core.rounds import Buffered, Synchronous
from aggregator.core.screen import NormLimits, measured
from aggregator.core.standing import MOST, QuarantinePolicy, Standing, Standings
from broker.messages import Action, Reason, Role, Values
from broker.transport import Token
from tests.support.builders import rules_of, snapshot_of, update_of, vector
from tests.unit.aggregator.driver import Driver

ONE = {"w": vector(3, 4)}
BAD = {"w": vector(math.nan, 0)}


def driver_of(size: int = 4, **rules: Any) -> Driver:
    rounds = rules.pop("rounds", None) or Buffered(size=size, max_staleness=100)
    return Driver(rules_of(rounds=rounds, **rules), snapshot_of({"w": vector(0, 0)}))


def quarantine(score: float = 1.5, seconds: float = 100.0, half_life: int = 10) -> QuarantinePolicy:
    return QuarantinePolicy(score, seconds, half_life)


class Encoded:
    """A tensor in pieces that cannot be anything but finite."""

    shape, dtype, is_finite, reads = (4,), np.dtype(np.float32), True, 0

    def pieces(self) -> Any:
        self.reads += 1
        yield vector(1, 1)
        yield vector(1, 1)


# ------------------------------------------------------------------------------------------------------ norms


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_the_norm_is_that_of_all_parameters_together_and_of_nothing_else(dtype: Any) -> None:
    tensors = {
        "a": np.full((3, 3), 2.0, dtype),
        "b": np.array(8.0, dtype),
        "running": np.full(4, 1e6, np.float32),
        "steps": np.array([1000]),
    }

    update = update_of(tensors, buffers=("running", "steps"))

    assert measured(update, needs_norm=True) == pytest.approx(10.0)


def test_what_cannot_be_but_finite_is_not_read_unless_its_norm_is_needed() -> None:
    encoded = Encoded()
    tensors: dict[str, Values] = {"w": encoded}
    update = update_of({"w": np.zeros(4, np.float32)})
    update = type(update)(**{**{f: getattr(update, f) for f in update.__slots__}, **_heads(update), "tensors": tensors})

    assert measured(update, needs_norm=False) is None
    assert encoded.reads == 0
    assert measured(update, needs_norm=True) == 2.0
    assert encoded.reads == 1


def _heads(update: Any) -> dict[str, Any]:
    return {name: getattr(update, name) for name in type(update).__dataclass_fields__}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("buffers", [(), ("w",)])
def test_what_is_not_finite_is_named_wherever_it_is(value: float, dtype: Any, buffers: tuple[str, ...]) -> None:
    tensors = {"ok": np.ones(3, dtype), "w": np.array([1, 2, value, 3], dtype)}

    for needs_norm in (False, True):
        found = measured(update_of(tensors, buffers=buffers), needs_norm=needs_norm)
        assert found == (Reason.NOT_FINITE, "w holds NaN or infinity")


def test_an_update_that_is_too_long_is_rejected_with_the_figures() -> None:
    driver = driver_of(norms=NormLimits(most=4.9))

    driver.update(update_of(ONE))

    assert driver.reasons == [Reason.NORM_TOO_LARGE]
    assert driver.told[0].detail == "its norm is 5; aggregator.max_norm is 4.9"
    assert driver.machine.rejected == {"norm-too-large": 1}
    driver.update(update_of({"w": vector(2, 1)}, seq=1))
    assert driver.machine.fill == 1


def test_an_unusual_norm_is_one_many_times_the_median_of_what_has_come() -> None:
    driver = driver_of(size=1, norms=NormLimits(factor=10.0))
    for seq in range(LEAST):  # the first are taken as they come
        driver.update(update_of({"w": vector(1 if seq else 1000, 0)}, seq=seq, base_version=seq))

    driver.update(update_of({"w": vector(10.5, 0)}, seq=LEAST, base_version=LEAST))
    driver.update(update_of({"w": vector(10, 0)}, seq=LEAST + 1, base_version=LEAST))

    assert driver.reasons == [Reason.NORM_UNUSUAL]
    assert driver.told[0].detail == (
        "its norm is 10.5, 10.5 times the median of the last ones, 1; aggregator.norm_factor is 10"
    )
    assert driver.disk.worker_norms == {"w0": (1.0, 1.0, 1.0, 10.5, 10.0)}
    again = Driver(driver.machine.rules, driver.disk)
    again.update(update_of({"w": vector(99, 0)}, seq=50, base_version=LEAST + 1))
    assert again.reasons == [Reason.NORM_UNUSUAL], "a restart knows what is usual"


def test_after_zeros_everything_else_is_unusual_and_zeros_are_not() -> None:
    limits = NormLimits(factor=10.0)

    assert limits.refusal(0.0, 0.0) is None
    refused = limits.refusal(1e-3, 0.0)
    assert refused is not None
    assert refused[0] is Reason.NORM_UNUSUAL
    assert "inf times" in refused[1]


@given(st.lists(st.tuples(st.integers(0, 2 * LONGEST), st.floats(0, 1e6)), max_size=4 * LONGEST))
def test_the_median_is_that_of_the_workers_heard_last(norms: list[tuple[int, float]]) -> None:
    window, every = NormWindow(), dict[str, list[float]]()
    for number, norm in norms:
        window.add(str(number), norm)
        every[str(number)] = [*every.pop(str(number), []), norm][-OWN:]
        every = dict(list(every.items())[-LONGEST:])  # who fell out begins anew

    votes = sorted(sorted(own)[len(own) // 2] for own in every.values())
    assert window.to_plain() == {worker: tuple(own) for worker, own in every.items()}
    assert window.median == (votes[len(votes) // 2] if sum(map(len, every.values())) >= LEAST else None)
    assert NormWindow(window.to_plain()).median == window.median


@pytest.mark.parametrize("first", [0.0, 1e-6, 1e6])
def test_who_is_first_does_not_say_what_is_usual(first: float) -> None:
    """Three fast workers fill several rounds before seven honest ones answer, and go on at ten times their rate."""
    driver = driver_of(size=1, norms=NormLimits(factor=10.0))
    bad = [f"bad{number}" for number in range(3)]
    seqs = Counter[str]()

    def send(worker: str, norm: float) -> None:
        driver.update(
            update_of({"w": vector(norm, 0)}, worker=worker, seq=seqs[worker], base_version=driver.machine.version)
        )
        seqs[worker] += 1

    for worker in bad * 5:
        send(worker, first)
    for number in range(3 * 7):
        for worker in bad:
            send(worker, first)
        send(f"good{number % 7}", 1.0)

    refused = [fact.update for fact in driver.facts if isinstance(fact, do.Rejected)]
    good = [(update.worker, update.seq) for update in refused if update is not None and update.worker not in bad]
    taken = [fact.entry for fact in driver.facts if isinstance(fact, do.Folded)]
    # Until those that are good are the majority of those who were heard.
    assert good == ([("good0", 0), ("good1", 0), ("good2", 0)] if first < 1 else [])
    assert not any(entry.norm == 1e6 for entry in taken[30:])


def test_the_history_has_the_norm_of_each_update() -> None:
    driver = driver_of(size=2)
    driver.update(update_of(ONE))
    driver.update(update_of({"w": vector(0, 2)}, seq=1))

    assert [entry.norm for entry in driver.records[0].updates] == [5.0, 2.0]


# --------------------------------------------------------------------------------------------- one per worker


def test_one_update_of_each_worker_in_a_buffer() -> None:
    driver = driver_of(rounds=Buffered(size=2, max_staleness=5, one_per_worker=True))

    driver.update(update_of(ONE))
    driver.update(update_of(ONE, seq=1))

    assert driver.reasons == [Reason.SECOND_IN_ROUND]
    assert "2 workers to fill it" in driver.told[0].detail
    assert driver.broadcasts[0].plan.updates_per_version == 1
    driver.update(update_of(ONE, worker="w1"))
    driver.update(update_of(ONE, seq=2))
    assert (driver.machine.version, driver.machine.fill) == (1, 1)


def test_a_buffer_that_the_workers_here_cannot_fill_is_told_once() -> None:
    driver = driver_of(rounds=Buffered(size=3, max_staleness=5, one_per_worker=True))

    def waits(worker: str) -> None:
        driver.send(on.Seen(worker, "i", Role.TRAINER, 1, waiting=0))

    driver.hello("w0", "w1")
    driver.update(update_of(ONE, worker="w0"))
    waits("w0")
    driver.tick(10)
    waits("w0")
    assert not [fact for fact in driver.facts if isinstance(fact, do.Warn)], "w1 is training"

    driver.update(update_of(ONE, worker="w1"))
    for _ in range(4):
        for worker in ("w0", "w1"):
            waits(worker)
        driver.tick(4)

    (warning,) = [fact.text for fact in driver.facts if isinstance(fact, do.Warn)]
    assert "2 of 3 updates, and the 2 workers that are here have sent what they may" in warning


# ------------------------------------------------------------------------------------------------- quarantine


def test_a_worker_above_the_score_is_kept_out_told_and_let_in_again() -> None:
    driver = driver_of(quarantine=quarantine())
    driver.update(update_of(BAD, seq=0))
    driver.update(update_of(BAD, seq=1))

    (fact,) = [fact for fact in driver.facts if isinstance(fact, do.Quarantined)]
    assert (fact.worker, fact.score, fact.until) == ("w0", 2.0, 100.0)
    assert driver.told[-1] == do.Tell("w0", Reason.QUARANTINED, "w0 is in quarantine for 100 s more")
    driver.update(update_of(ONE, seq=2))
    driver.update(update_of(ONE, worker="w1"))
    assert driver.reasons == [Reason.NOT_FINITE, Reason.NOT_FINITE, Reason.QUARANTINED]
    assert driver.told[-1].detail == "w0 is in quarantine for 100 s more"
    assert driver.machine.fill == 1

    driver.tick(90)
    assert driver.wake_at == 100.0, "nobody else will say that it is over"
    driver.tick(10)
    assert do.Released("w0", 0) in driver.facts
    driver.update(update_of(ONE, seq=3))
    assert driver.machine.fill == 2
    driver.update(update_of(BAD, seq=4))
    assert driver.machine.screening.standings.until("w0") == 200.0, "half of the score was left"


def test_what_lies_in_time_or_in_the_network_is_nobodys_fault() -> None:
    driver = driver_of(rounds=Buffered(size=1, max_staleness=0), quarantine=quarantine(0.5))
    driver.update(update_of(ONE))

    driver.update(update_of(ONE, worker="w1", base_version=0))
    driver.send(on.Unreadable(Token(1, 99), Reason.INCOMPLETE, "", "w1", None))

    assert driver.reasons == [Reason.TOO_STALE, Reason.INCOMPLETE]
    assert not driver.machine.screening.standings.kept_out
    assert driver.machine.screening.standings.to_plain(1)["w1"].rejected == {"too-stale": 1, "incomplete": 1}


def test_a_restart_and_a_standby_know_who_is_in_quarantine_and_until_when() -> None:
    driver = driver_of(quarantine=quarantine())
    for seq in range(2):
        driver.update(update_of(BAD, seq=seq))
    assert driver.disk.standings["w0"] == Standing(2.0, 0, 100.0, {"not-finite": 2}), "though nothing was folded"

    again = Driver(driver.machine.rules, driver.disk, now=40.0)
    again.update(update_of(ONE, seq=2))

    assert again.reasons == [Reason.QUARANTINED]
    assert "60 s more" in again.told[0].detail
    again.tick(61)
    again.update(update_of(ONE, seq=3))
    assert again.machine.fill == 1


def test_an_operator_ends_a_quarantine_by_a_command_that_is_durable_before_it_is_acknowledged() -> None:
    driver = driver_of(quarantine=quarantine())
    for seq in range(2):
        driver.update(update_of(BAD, seq=seq))

    token = Token(1, 1000)
    driver.send(on.Ordered(token, "c1", Action.RELEASE, worker="w0"))

    assert driver.acked[-1] == token
    assert driver.disk.standings["w0"].until is None
    assert do.Executed("c1", 0, is_pending=False) in driver.facts
    driver.update(update_of(ONE, seq=2))
    assert driver.machine.fill == 1
    driver.send(on.Ordered(Token(1, 1001), "c2", Action.RELEASE, worker="nobody"))
    assert do.Executed("c2", 0, is_pending=False) in driver.facts
    assert len([fact for fact in driver.facts if isinstance(fact, do.Released)]) == 1


def test_a_synchronous_round_does_not_wait_for_who_is_in_quarantine() -> None:
    driver = driver_of(rounds=Synchronous(), quarantine=quarantine(0.5))
    driver.hello("w0", "w1")
    driver.update(update_of(BAD))

    driver.update(update_of(ONE, worker="w1"))
    driver.update(update_of(ONE, worker="w1", seq=1, base_version=1))

    assert driver.machine.version == 2


def test_with_all_in_quarantine_nobody_is_asked_again_and_again() -> None:
    driver = driver_of(quarantine=quarantine(0.5))
    driver.hello("w0")
    driver.update(update_of(BAD))
    before = len(driver.broadcasts)

    for _ in range(5):
        driver.tick(10)

    assert len(driver.broadcasts) == before


def test_a_lower_limit_in_mid_run_is_in_force() -> None:
    standings = Standings(QuarantinePolicy(None), {})
    assert standings.reject("w0", Reason.NOT_FINITE, 0, 5.0) is None

    standings.policy = quarantine(1.5)

    assert standings.reject("w0", Reason.NOT_FINITE, 0, 5.0) == 105.0
    assert standings.reject("w0", Reason.QUARANTINED, 0, 6.0) is None, "it began once"


def test_a_score_falls_to_one_half_in_its_half_life_and_is_forgotten() -> None:
    standings = Standings(QuarantinePolicy(10.0, half_life=10), {})
    standings.blame("w0", 1.0, 5, 0.0)

    assert standings.score("w0", 5) == 1.0
    assert standings.score("w0", 15) == 0.5
    standings.blame("w0", 1.0, 15, 0.0)
    assert standings.score("w0", 15) == 1.5
    assert standings.score("unknown", 15) == 0.0
    assert set(standings.to_plain(15)) == {"w0"}
    assert not standings.to_plain(1000)


def test_what_is_known_of_workers_has_a_limit_and_quarantines_stay() -> None:
    standings = Standings(quarantine(0.5), {})
    standings.reject("bad", Reason.NOT_FINITE, 0, 0.0)
    for number in range(MOST + 10):
        standings.reject(f"w{number}", Reason.TOO_STALE, 0, 0.0)

    known = standings.to_plain(0)
    assert len(known) <= MOST + 1
    assert "bad" in known
    assert f"w{MOST + 9}" in known
