"""Robust rules against their formulae, written down again for whole arrays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from aggregator.strategies.rules import (
    PRE_AGGREGATIONS,
    RULES,
    Chain,
    Occasion,
    Rule,
    RuleSettings,
    pre_aggregations_of,
)
from aggregator.strategies.rules.bucketing import random_order
from aggregator.strategies.rules.geometry import combined, squared_distances, squared_norms
from broker.errors import ConfigError
from broker.messages import Array
from fedmq.simulation.attacks import Scene, attack_of
from tests.support.rows import rows_of

K, BAD, SIZE = 11, 2, 30_000
SETTINGS = RuleSettings(byzantine=BAD)


def rule(name: str, before: str = "", settings: RuleSettings = SETTINGS) -> Chain:
    return Chain(pre_aggregations_of(before, settings), RULES[name](settings))


def updates(count: int = K, size: int = SIZE, seed: int = 0) -> Array:
    generator = np.random.default_rng(seed)
    return generator.normal(0.5, 1.0, (count, size))


def nearest(values: Array, count: int) -> list[Array]:
    """For each row, its ``count`` nearest, itself first."""
    away = ((values[:, None] - values[None]) ** 2).sum(axis=2)
    return [np.argsort(row)[:count] for row in away]


def trimmed_mean(x: Array) -> Array:
    return np.asarray(np.sort(x, axis=0)[BAD : K - BAD].mean(axis=0))


def krum_order(x: Array) -> Array:
    away = ((x[:, None] - x[None]) ** 2).sum(axis=2)
    scores: Array = np.sort(away, axis=1)[:, 1 : K - BAD - 1].sum(axis=1)
    order: Array = np.argsort(scores)
    return order


def krum(x: Array) -> Array:
    return np.asarray(x[krum_order(x)[0]])


def multi_krum(x: Array) -> Array:
    return np.asarray(x[krum_order(x)[: K - BAD]].mean(axis=0))


def geometric_median(x: Array) -> Array:
    z: Array = x.mean(axis=0)
    for _ in range(200):
        w = 1 / np.linalg.norm(x - z, axis=1)
        z = (w[:, None] * x).sum(axis=0) / w.sum()
    return z


def centered_clipping(x: Array) -> Array:
    v = np.zeros(x.shape[1])
    for _ in range(3):
        away = np.linalg.norm(x - v, axis=1)
        v = v + ((x - v) * np.minimum(1, np.median(away) / away)[:, None]).mean(axis=0)
    return v


def norm_clipping(x: Array) -> Array:
    norms = np.linalg.norm(x, axis=1)
    return np.asarray((x * np.minimum(1, np.median(norms) / norms)[:, None]).mean(axis=0))


FORMULAE: dict[str, Callable[[Array], Array]] = {
    "centered-clipping": centered_clipping,
    "geometric-median": geometric_median,
    "krum": krum,
    "multi-krum": multi_krum,
    "norm-clipping": norm_clipping,
    "trimmed-mean": trimmed_mean,
}


@pytest.mark.parametrize("name", FORMULAE)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_rule_is_its_formula_in_blocks_as_at_once(name: str, dtype: str) -> None:
    values = updates()
    values[:BAD] *= 40

    result = rule(name)(rows_of(values.astype(dtype)), Occasion())

    assert (result.shape, result.dtype) == ((SIZE,), np.dtype(dtype))
    np.testing.assert_allclose(result, FORMULAE[name](values), rtol=1e-5, atol=1e-5 if dtype == "float32" else 1e-9)


@pytest.mark.parametrize("name", FORMULAE)
def test_nearest_neighbours_are_mixed_before_the_rule(name: str) -> None:
    values = updates(size=500)
    mixed = np.stack([values[near].mean(axis=0) for near in nearest(values, K - BAD)])

    result = rule(name, "nnm")(rows_of(values), Occasion())

    np.testing.assert_allclose(result, FORMULAE[name](mixed), rtol=1e-6, atol=1e-9)


def test_what_is_longer_than_the_median_is_cut_to_it_before_groups_are_made() -> None:
    values = updates(size=400)
    values[:BAD] *= -1000
    norms = np.linalg.norm(values, axis=1)
    cut = values * np.minimum(1, np.median(norms) / norms)[:, None]
    order = random_order(K, 0, 0)
    groups = np.stack([cut[order[i : i + 2]].mean(axis=0) for i in range(0, K, 2)])

    result = rule("geometric-median", "clip,bucketing:2")(rows_of(values), Occasion())

    np.testing.assert_allclose(result, geometric_median(groups), rtol=1e-6, atol=1e-9)


def test_groups_are_averaged_before_the_rule_the_last_one_of_what_is_left() -> None:
    values = updates(size=400)
    order = random_order(K, 5, 9)
    groups = np.stack([values[order[i : i + 2]].mean(axis=0) for i in range(0, K, 2)])

    result = rule("geometric-median", "bucketing:2")(rows_of(values), Occasion(seed=5, version=9))

    np.testing.assert_allclose(result, geometric_median(groups), rtol=1e-6, atol=1e-9)


def test_the_order_of_groups_is_the_same_for_ever_and_another_in_each_version() -> None:
    assert random_order(8, 0, 1) == [3, 0, 4, 6, 5, 2, 1, 7]
    assert sorted(random_order(1000, 1, 1)) == list(range(1000))
    assert random_order(1000, 1, 1) != random_order(1000, 1, 2) != random_order(1000, 2, 2)


def test_clipping_begins_with_the_last_aggregate_and_takes_the_radius_that_it_is_given() -> None:
    values = updates(size=300)
    previous = np.full(300, 0.4)
    v = previous.copy()
    for _ in range(2):
        away = np.linalg.norm(values - v, axis=1)
        v = v + ((values - v) * np.minimum(1, 3.0 / away)[:, None]).mean(axis=0)
    made = RULES["centered-clipping"](RuleSettings(1, clip_radius=3.0, clip_iterations=2))

    assert made.remembers
    np.testing.assert_allclose(made(rows_of(values), Occasion(previous=previous)), v, rtol=1e-9)


def test_distances_and_sums_go_with_blocks_that_are_cut_anywhere() -> None:
    """More than one block of rows, which is no multiple of what is worked on at a time."""
    values = updates(size=300_000).astype(np.float32)
    point = np.full(300_000, 0.5, np.float32)
    every = np.vstack([values, point]).astype(np.float64)
    expected = [[float(np.square(one - other).sum()) for other in every] for one in every]
    weights = np.linspace(-1, 1, K + 1)

    found = squared_distances(rows_of(values), point=point, has_point=True)

    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(combined(rows_of(values), weights, point=point), weights @ every, atol=1e-5)
    np.testing.assert_allclose(squared_norms(rows_of(values)), np.square(every[:K]).sum(axis=1), rtol=1e-9)


def test_the_weights_of_stale_updates_shorten_them() -> None:
    values = updates(size=300)
    weights = [1.0, 0.5] * 5 + [0.25]

    result = rule("geometric-median")(rows_of(values, weights), Occasion())

    np.testing.assert_allclose(result, geometric_median(values * np.array(weights)[:, None]), rtol=1e-6)


EVERY = [
    *((name, "") for name in RULES),
    ("krum", "clip"),
    ("geometric-median", "bucketing:2"),
    ("centered-clipping", "nnm"),
]


@pytest.mark.parametrize("factor", [1e4, 1e9, 1e15])
@pytest.mark.parametrize(("name", "before"), EVERY)
def test_however_large_the_bad_ones_are_the_result_stays_with_the_good(name: str, before: str, factor: float) -> None:
    values = updates(size=500)
    good = values[BAD:].mean(axis=0)
    values[:BAD] *= -factor

    result = rule(name, before)(rows_of(values.astype(np.float32)), Occasion())

    # Half of the longest good one's way is what no attacker must be able to do alone.
    assert np.linalg.norm(result - good) < 1.2 * np.sqrt(500)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize(("name", "before"), [*EVERY, ("trimmed-mean", "nnm")])
def test_fewer_rows_than_it_needs_are_taken_as_they_are(name: str, before: str, count: int) -> None:
    values = np.tile(updates(1, 50), (count, 1))

    result = rule(name, before)(rows_of(values), Occasion())

    limit = np.linalg.norm(values[0])
    assert np.isfinite(result).all()
    assert np.linalg.norm(result) <= limit * (1 + 1e-9)
    np.testing.assert_allclose(result / np.linalg.norm(result), values[0] / limit, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "before"), EVERY)
def test_zeros_give_zeros(name: str, before: str) -> None:
    assert not rule(name, before)(rows_of(np.zeros((K, 20), np.float32)), Occasion()).any()


@pytest.mark.parametrize(("name", "before"), EVERY)
def test_the_same_rows_give_the_same_bits_and_are_not_written_into(name: str, before: str) -> None:
    values = updates(size=1000).astype(np.float32)
    rows = rows_of(values)

    one, two = rule(name, before)(rows, Occasion(1, 2)), rule(name, before)(rows, Occasion(1, 2))

    assert one.tobytes() == two.tobytes()
    assert np.array_equal(rows.block(0, 1000), values)


@pytest.mark.parametrize(
    ("name", "before", "least"),
    [
        ("trimmed-mean", "", 5),
        ("krum", "", 7),
        ("multi-krum", "", 7),
        ("centered-clipping", "", 5),
        ("centered-clipping", "bucketing:2", 9),
        ("multi-krum", "bucketing:3", 19),
        ("trimmed-mean", "bucketing:2,nnm", 9),
        ("krum", "nnm", 7),
    ],
)
def test_what_a_chain_needs_at_least(name: str, before: str, least: int) -> None:
    assert rule(name, before).least() == least


@pytest.mark.parametrize("text", ["buckets", "bucketing:1", "bucketing:x", "nnm:2", "nnm,,nnm", ","])
def test_what_is_no_pre_aggregation_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="nnm and bucketing:SIZE"):
        pre_aggregations_of(text, SETTINGS)
    assert set(PRE_AGGREGATIONS) == {"bucketing", "clip", "nnm"}


#: ||result - mean of the honest|| / sqrt(d): 25 workers of which 5 are bad, honest ones mu + N(0, 1) with
#: ||mu|| = sqrt(d) / 2 and d = 2000. The figures of an independent program, means of 10 seeds.
TABLE_ATTACKS = [
    "none",
    "scaled-flip:1",
    "scaled-flip:10",
    "gaussian:30",
    "zero",
    "ipm:0.1",
    "ipm:1.5",
    "alie",
    "alie:1.5",
]
TABLE = {
    "norm-clipping": [0.004, 0.223, 0.336, 0.150, 0.114, 0.125, 0.278, 0.051, 0.213],
    "trimmed-mean": [0.074, 0.269, 0.384, 0.181, 0.181, 0.193, 0.294, 0.106, 0.382],
    "krum": [0.947, 1.095, 0.943, 0.943, 0.547, 0.602, 0.943, 0.253, 0.943],
    "multi-krum": [0.101, 0.292, 0.000, 0.000, 0.170, 0.181, 0.000, 0.117, 0.000],
    "geometric-median": [0.003, 0.251, 0.251, 0.109, 0.251, 0.251, 0.251, 0.244, 0.251],
    "centered-clipping": [0.002, 0.221, 0.254, 0.110, 0.110, 0.121, 0.254, 0.051, 0.255],
    "bucketing:2 geometric-median": [0.016, 0.244, 0.437, 0.197, 0.153, 0.163, 0.281, 0.099, 0.297],
}


def error(made: Rule, attack: str, seed: int) -> float:
    bad, count, size = 5, 25, 2000
    generator = np.random.default_rng(seed)
    mu = generator.normal(size=size)
    mu *= 0.5 * np.sqrt(size) / np.linalg.norm(mu)
    honest = mu + generator.normal(size=(count - bad, size))
    own = np.zeros(size) if attack.startswith("gaussian") else mu + generator.normal(size=size)
    if attack == "none":
        honest = np.vstack([honest, mu + generator.normal(size=(bad, size))])
        rows = honest
    else:
        rows = np.vstack([honest, *(attack_of(attack)(Scene(own, honest, bad, generator)) for _ in range(bad))])
    return float(np.linalg.norm(made(rows_of(rows), Occasion(seed)) - honest.mean(axis=0)) / np.sqrt(size))


@pytest.mark.parametrize("name", TABLE)
def test_the_table_of_rules_and_attacks(name: str) -> None:
    before, _, last = name.rpartition(" ")
    made = rule(last, before, RuleSettings(byzantine=5))

    figures = [np.mean([error(made, attack, seed) for seed in range(10)]) for attack in TABLE_ATTACKS]

    # Where a random order decides how many groups are bad, seeds differ more.
    np.testing.assert_allclose(figures, TABLE[name], atol=0.05 if before else 0.02)
