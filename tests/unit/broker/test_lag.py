"""How far behind a reader of versions is, whatever the two clocks say."""

from __future__ import annotations

import pytest

from broker.amqp.versions import Lag


@pytest.mark.parametrize("skew", [0.0, -3600.0, 1e6])
def test_lag_is_what_the_delay_grew_by_and_not_what_clocks_differ_by(skew: float) -> None:
    lag = Lag()
    assert lag.add(100, 100.4 + skew) == 0
    assert lag.add(101, 104.4 + skew) == pytest.approx(3)
    assert lag.add(110, 110.2 + skew) == 0
    assert lag.add(111, 116.2 + skew) == pytest.approx(5)


def test_an_old_message_that_comes_first_is_no_lag_of_the_next() -> None:
    lag = Lag()
    assert lag.add(100, 9000.0) == 0
    assert lag.add(9000, 9000.5) == 0


def test_a_message_without_a_time_says_nothing() -> None:
    lag = Lag()
    assert lag.add(None, 5.0) == 0
    assert lag.add(5, 5.0) == 0
