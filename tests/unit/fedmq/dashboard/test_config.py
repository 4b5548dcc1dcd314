"""``[dashboard]``: what can be set."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from fedmq.dashboard.config import DashboardConfig, names_of


def test_names_of_hosts_are_a_list_with_commas() -> None:
    config = DashboardConfig(host_names="page.example, other-1.example ,")

    assert names_of(config.host_names) == ["page.example", "other-1.example"]


@pytest.mark.parametrize(
    "wrong", [{"host_names": "a b"}, {"host_names": "*"}, {"host_names": "http://x"}, {"port": -1}]
)
def test_what_cannot_be_a_name_or_a_port_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DashboardConfig.model_validate(wrong)


def test_only_this_machine_reaches_it_unless_it_is_told_otherwise_and_then_it_warns() -> None:
    assert DashboardConfig().exposure() == ""
    for address in ("127.0.0.1", "127.3.2.1", "::1", "localhost"):
        assert DashboardConfig(address=address).exposure() == ""
    for address in ("0.0.0.0", "::", "192.168.0.1", "example.org"):  # noqa: S104 (not listened at)
        assert f"whoever can reach {address} " in DashboardConfig(address=address).exposure()
