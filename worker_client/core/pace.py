"""How many local steps a worker makes, so that its updates come at the rhythm that the run asks for.

FedCompass (Li et al. 2024, arXiv 2309.14675) has the server estimate each client's speed and give it as many local
steps as bring it back together with its group. Here the plan says the rhythm, and each worker derives its steps from
what its own last updates took. No list of workers travels, and nothing waits for a group: every worker comes once in
the same number of seconds, at times of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from broker.messages import Work

__all__ = ["Pace", "steps_for"]

#: Share of the newest update in the estimate: a machine that becomes slower is noticed after two or three updates, and
#: one odd measurement is halved each time.
NEWEST = 0.5


@dataclass(frozen=True, slots=True)
class Pace:
    """What an update of a worker takes."""

    step: float
    """Seconds for one local step."""
    rest: float
    """Seconds for everything else between two updates, whatever the number of steps."""

    def after(self, steps: int, stepping: float, rest: float) -> Pace:
        """The estimate after one more update, of so many ``steps`` in ``stepping`` seconds, and ``rest`` beside."""
        newest = Pace.of(steps, stepping, rest)
        return Pace(
            self.step + NEWEST * (newest.step - self.step),
            self.rest + NEWEST * (newest.rest - self.rest),
        )

    @classmethod
    def of(cls, steps: int, stepping: float, rest: float) -> Pace:
        """The estimate from a single update."""
        return cls(max(0.0, stepping) / max(1, steps), max(0.0, rest))


def steps_for(work: Work, pace: Pace | None) -> int | None:
    """Local steps of the next update; None if the run leaves them to the worker.

    As many as fit into the rhythm, within the bounds. The fewest while no pace is known.
    """
    if not work.update_seconds:
        return None
    if pace is None:
        return work.steps_min
    room = max(0.0, work.update_seconds - pace.rest)
    fitting = int(min(room / pace.step, 2.0**53)) if pace.step else work.steps_max
    return min(work.steps_max, max(work.steps_min, fitting))
