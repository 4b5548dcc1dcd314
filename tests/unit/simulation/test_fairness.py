"""What fairness is for: workers of unlike speed whose optima lie apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedmq.simulation.run import simulate
from tests.support.scenarios import scenario_of

UNFAIR: dict[str, Any] = {
    "population.workers": 8,
    "population.spread": 1.2,
    "objective.heterogeneity": 3.0,
    "run.updates": 1000,
    "run.wire": False,
    "aggregator.buffer_size": 8,
    "aggregator.max_staleness": 1000,
    "aggregator.staleness": "constant",
    "aggregator.learning_rate": 0.5,
}


def test_fair_weights_and_shares_lead_to_the_optimum_of_all(tmp_path: Path) -> None:
    """Three simulations, a second together; the gap is the excess loss, in units of that of the beginning."""

    def gap(**settings: Any) -> float:
        changes = {f"aggregator.{name}": value for name, value in settings.items()}
        return simulate(scenario_of(tmp_path, UNFAIR | changes)).points[-1].metrics["gap"]

    unfair = gap()

    assert unfair > 3e-3
    assert gap(fairness="inverse-rate", fairness_window=200) < unfair / 5
    assert gap(worker_share=0.125) < unfair / 5
