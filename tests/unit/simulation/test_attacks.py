"""Attacks against their formulae."""

from __future__ import annotations

import numpy as np
import pytest

from broker.errors import ConfigError
from fedmq.simulation.attacks import ATTACKS, Scene, alie_deviations, attack_of, bad_workers, flip_labels, flips_labels


def scene(honest: int = 20, bad: int = 5, size: int = 50) -> Scene:
    generator = np.random.default_rng(3)
    rows = generator.normal(1.0, 2.0, (honest, size)).astype(np.float32)
    return Scene(generator.normal(1.0, 2.0, size).astype(np.float32), rows, bad, generator)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_gives_an_update_of_the_right_kind_and_changes_nothing_else(name: str) -> None:
    seen = scene()
    own, honest = seen.own.copy(), seen.honest.copy()

    sent = attack_of(name)(seen)

    assert (sent.shape, sent.dtype) == (own.shape, own.dtype)
    assert np.isfinite(sent).all()
    assert np.array_equal(seen.own, own)
    assert np.array_equal(seen.honest, honest)
    assert attack_of(name)(seen).shape == own.shape


def test_flips_point_the_other_way() -> None:
    seen = scene()
    mean = seen.honest.mean(axis=0, dtype=np.float64)

    assert np.array_equal(attack_of("sign-flip")(seen), -seen.own)
    np.testing.assert_allclose(attack_of("scaled-flip")(seen), -10 * mean, rtol=1e-6)
    np.testing.assert_allclose(attack_of("scaled-flip:3")(seen), -3 * mean, rtol=1e-6)
    np.testing.assert_allclose(attack_of("ipm")(seen), -0.1 * mean, rtol=1e-6)
    np.testing.assert_allclose(attack_of("ipm:1.5")(seen), -1.5 * mean, rtol=1e-6)
    assert not attack_of("zero")(seen).any()


def test_noise_has_the_deviation_that_it_was_given() -> None:
    seen = scene(size=200_000)

    added = attack_of("gaussian:30")(seen) - seen.own

    assert abs(added.std() / 30 - 1) < 0.01
    assert abs(added.mean()) < 0.5


def test_alie_hides_within_the_spread_of_the_honest() -> None:
    seen = scene()
    mean, spread = seen.honest.mean(axis=0), seen.honest.std(axis=0)

    np.testing.assert_allclose(attack_of("alie:1.5")(seen), mean - 1.5 * spread, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(attack_of("alie")(seen), mean - 0.2533471 * spread, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("workers", "bad", "expected"), [(25, 5, 0.2533), (10, 2, 0.0), (50, 24, 1.4261), (50, 12, 0.3360)]
)
def test_alies_distance_is_the_papers(workers: int, bad: int, expected: float) -> None:
    """Equation 2; for n = 50 with m = 24 and 12 the quantiles of 24/26 and 24/38, by hand."""
    assert alie_deviations(workers - bad, bad) == pytest.approx(expected, abs=1e-3)


def test_mimic_copies_one_honest_worker() -> None:
    seen = scene()

    assert np.array_equal(attack_of("mimic")(seen), seen.honest[0])
    assert np.array_equal(attack_of("mimic:7")(seen), seen.honest[7])


def test_labels_are_counted_from_the_other_end() -> None:
    assert flip_labels(np.array([0, 3, 9], np.int64), 10).tolist() == [9, 6, 0]
    assert flips_labels("label-flip")
    assert not flips_labels("sign-flip")


@pytest.mark.parametrize("text", ["signflip", "ipm:", "ipm:x", "ipm:-1", "ipm:nan", "zero:1", ""])
def test_what_is_no_attack_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"attack"):
        attack_of(text)


def test_a_near_name_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean sign-flip"):
        attack_of("signflip")


def test_a_share_is_what_it_says() -> None:
    assert bad_workers(0.29, 100) == range(71, 100)
    assert bad_workers(0.25, 10) == range(8, 10)
    assert not bad_workers(0.09, 10)
