"""A worker whose account is another's finds out before it trains in vain."""

from __future__ import annotations

import pytest

from broker.errors import ConfigError
from worker_client.reading import require_account


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
