"""A worker whose account is another's finds out before it trains in vain."""

from __future__ import annotations

import pytest

from broker.errors import AccessRefused, ConfigError
from worker_client.reading import explained, require_account


@pytest.mark.parametrize(
    ("account", "theirs"),
    [("w1", "aggregator"), ("shared", "shared"), ("", "aggregator"), ("other", "")],
    ids=["its own", "shared with the aggregator", "not connected", "a broker that does not say"],
)
def test_these_may_be_heard(account: str, theirs: str) -> None:
    require_account(account, "w1", theirs)


def test_another_worker_s_account_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"called 'w1' and its account at the broker 'w2'.*worker\.name = 'w2'"):
        require_account("w2", "w1", "aggregator")


def test_a_refusal_by_the_broker_says_whose_account_it_is() -> None:
    refused = AccessRefused("no right to declare queue 'q'")
    assert explained(refused, "w1", "w1") is refused
    assert explained(ConfigError("else"), "w2", "w1").args == ("else",)
    text = str(explained(refused, "w2", "w1"))
    assert text.startswith("no right to declare queue 'q'. This worker is called 'w1' and its account 'w2'")
    assert "fedmq broker add-worker w1" in text
