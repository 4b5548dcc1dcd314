"""Several scenarios in one file: computed once, kept, and told as tables and pictures."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aggregator.recipe import Recipe
from aggregator.strategies import Mean
from broker.errors import ConfigError, FedmqError
from fedmq.simulation.figures import figures, require_matplotlib
from fedmq.simulation.report import summaries, write_report
from fedmq.simulation.run import simulate
from fedmq.simulation.sweep import Outcome, load_sweep, run_cells
from fedmq.simulation.tables import write_tables
from tests.support.commands import ROOT
from tests.support.scenarios import written

TWO: dict[str, Any] = {
    "run.updates": 60,
    "run.metric": "gap",
    "run.target": 0.5,
    "sweep.seeds": [0, 1],
    "sweep.variants": {"few": {"aggregator.buffer_size": 3}, "many": {"aggregator.buffer_size": 6}},
}


def computed(folder: Path, changes: dict[str, Any] | None = None) -> tuple[list[Outcome], list[bool]]:
    """All outcomes of :data:`TWO`, and of each whether it had been there."""
    was_there: list[bool] = []
    sweep = load_sweep(written(folder, TWO | (changes or {})))
    outcomes, failed = run_cells(sweep, folder / "cells", jobs=1, done=lambda _, known: was_there.append(known))
    assert not failed
    return outcomes, was_there


def test_every_variant_is_simulated_with_every_seed(tmp_path: Path) -> None:
    outcomes, _ = computed(tmp_path)

    assert [(o.variant, o.seed) for o in outcomes] == [("few", 0), ("few", 1), ("many", 0), ("many", 1)]
    assert outcomes[0].result == json.loads(
        json.dumps(simulate(load_sweep(tmp_path / "scenario.toml").cells[0].scenario).plain())
    )
    assert len({o.result["digest"] for o in outcomes}) == 4


def test_a_grid_multiplies_the_variants(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path, TWO | {"sweep.grid": {"population.workers": [5, 9], "run.updates": [60]}}))

    names = dict.fromkeys(cell.variant for cell in sweep.cells)
    assert list(names) == [f"{v} workers={w} updates=60" for v in ("few", "many") for w in (5, 9)]
    assert len(sweep.cells) == 8


def test_what_was_computed_is_kept_and_what_changed_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = computed(tmp_path)
    (tmp_path / "cells" / "few-seed1.json").write_text("{ torn")

    again, was_there = computed(tmp_path)
    _, after_change = computed(tmp_path, {"population.workers": 13})
    monkeypatch.setattr("fedmq.simulation.sweep._release", lambda: "another")
    _, after_upgrade = computed(tmp_path, {"population.workers": 13})

    assert sorted(was_there) == [False, True, True, True]
    assert [o.result for o in again] == [o.result for o in first]
    assert after_change == after_upgrade == [False] * 4


def mortal(recipe: Recipe) -> Mean:
    """A mean that, if it is told so, takes a sweep's process with it, as the system does where memory is short."""
    if multiprocessing.parent_process() is not None and recipe.options == "die":
        os._exit(9)
    return Mean.of(recipe)


def test_processes_give_what_one_process_gives_with_parts_of_ones_own(tmp_path: Path) -> None:
    one, _ = computed(tmp_path, {"aggregator.strategy": f"{__name__}:mortal"})

    several, failed = run_cells(
        load_sweep(tmp_path / "scenario.toml"), tmp_path / "again", jobs=2, done=lambda *_: None
    )

    assert not failed
    assert [o.result for o in several] == [o.result for o in one]


def test_a_process_that_is_killed_is_told_and_what_was_computed_is_kept(tmp_path: Path) -> None:
    own = {"aggregator.strategy": f"{__name__}:mortal"}
    variants = {"good": own, "bad": {**own, "aggregator.options": "die"}, "worse": {**own, "aggregator.options": "die"}}
    sweep = load_sweep(written(tmp_path, TWO | {"sweep.variants": variants, "sweep.seeds": [3]}))
    run_cells(replace(sweep, cells=sweep.cells[:1]), tmp_path / "cells", jobs=1, done=lambda *_: None)

    with pytest.raises(FedmqError, match=r"was killed, .* 2 cells are not computed: bad, seed 3; worse, seed 3"):
        run_cells(sweep, tmp_path / "cells", jobs=2, done=lambda *_: None)

    assert [file.name for file in (tmp_path / "cells").iterdir()] == ["good-seed3.json"]


def test_who_interrupts_a_sweep_waits_for_no_cell(tmp_path: Path) -> None:
    variants = {"quick": {}, "endless": {"run.updates": 10**9}, "other": {"run.updates": 10**9}}
    sweep = load_sweep(written(tmp_path, TWO | {"sweep.variants": variants, "sweep.seeds": [3], "run.target": None}))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cells(sweep, tmp_path / "cells", jobs=2, done=interrupt)

    assert not multiprocessing.active_children()
    assert [file.name for file in (tmp_path / "cells").iterdir()] == ["quick-seed3.json"]


def test_a_cell_that_fails_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    changes = {"sweep.variants": {"good": {}, "bad": {"population.dropout": 0.9, "aggregator.buffer_size": 50}}}
    sweep = load_sweep(written(tmp_path, TWO | changes | {"sweep.seeds": [3], "run.target": None}))

    outcomes, failed = run_cells(sweep, tmp_path / "cells", jobs=1, done=lambda *_: None)

    assert [o.variant for o in outcomes] == ["good"]
    (problem,) = failed
    assert "bad, seed 3: the scenario comes to a standstill" in str(problem)
    assert problem.exit_code == ConfigError.exit_code


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sweep.variants": {"odd": {"aggregator.bufer_size": 3}}}, "variant odd: unknown key 'aggregator.bufer_size'"),
        ({"sweep.variants": {"odd": {"aggregator.buffer_size": 0}}}, "variant odd: aggregator.buffer_size = 0"),
        ({"sweep.seeds": [1, 1]}, "give each seed and each value once"),
        (
            {"sweep.variants": {"odd": {"run.seed": 3}}},
            "run.seed in a variant or in sweep.grid has no effect: set sweep.s",
        ),
        ({"sweep.grid": {"run.seed": [3, 4]}}, "run.seed in a variant or in sweep.grid has no effect: set sweep.seeds"),
        ({"sweep.variants": {"odd": {"sweep.seeds": 3}}}, "sweep.seeds in a variant .* has no effect"),
        ({"sweep.grid": {"run.updates": []}}, "sweep.grid has no value for run.updates"),
        ({"sweep.variants": {"odd": {"run.metric": "loss"}, "even": {}}}, "measure different things"),
        ({"sweep.sedes": [1]}, r"unknown key 'sweep.sedes' \(did you mean 'seeds'\?\)"),
    ],
)
def test_what_is_wrong_in_a_sweep_is_refused_before_anything_is_computed(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_sweep(written(tmp_path, TWO | changes))


def test_a_seed_that_would_have_no_effect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.seed has no effect: \[sweep\]"):
        load_sweep(written(tmp_path, TWO), [("run.seed", "7")])


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "simulation").glob("*.toml")), ids=lambda file: file.stem)
def test_the_examples_are_scenarios(file: Path) -> None:
    assert load_sweep(file).cells


def test_the_tables_hold_one_observation_a_row(tmp_path: Path) -> None:
    outcomes, _ = computed(tmp_path)

    files = {file.name: file for file in write_tables(outcomes, tmp_path)}

    with files["summary.csv"].open() as handle:
        summary = list(csv.DictReader(handle))
    assert [(row["variant"], row["seed"]) for row in summary] == [(o.variant, str(o.seed)) for o in outcomes]
    with files["staleness.csv"].open() as handle:
        counted = sum(int(row["updates"]) for row in csv.DictReader(handle))
    assert counted == sum(o.result["updates"] for o in outcomes)
    with files["curves.csv"].open() as handle:
        curves = list(csv.DictReader(handle))
    assert len(curves) == sum(len(o.result["points"]) * 2 for o in outcomes)
    assert "split.csv" not in files


def test_the_report_has_its_figures_inside(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    outcomes, _ = computed(tmp_path)
    outcomes[0] = Outcome("few", 0, outcomes[0].result, [[3, 1], [0, 4]])

    pictures = figures(outcomes)
    write_report(tmp_path / "r.html", title="a <b>", outcomes=outcomes, figures=pictures, scenario="x < 1")

    assert len(pictures) == 6
    assert all(png.startswith(b"\x89PNG") for png in pictures.values())
    page = (tmp_path / "r.html").read_text()
    assert page.count('src="data:image/png;base64,') == 6
    assert "a &lt;b&gt;" in page
    assert "x &lt; 1" in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_summary_shows_the_spread(tmp_path: Path) -> None:
    row = summaries(computed(tmp_path)[0])[0]

    assert (row["variant"], row["seeds"], row["reached"]) == ("few", "2", "2 of 2")
    low, high = (float(x) for x in row["seconds to gap 0.5"].partition("[")[2].rstrip("]").split(","))
    assert low < high


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(ConfigError, match=r'pip install "fedmq\[simulate\]", or say --no-figures'):
        require_matplotlib()
