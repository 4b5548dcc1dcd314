"""The table of attacks, done to a run that goes on.

After each attack the honest workers make a round. Its version must be the one that the same round makes in a run that
nobody attacks, bit by bit: so an attack that had an effect is known by its name.
"""

from __future__ import annotations

import pytest

from tests.attacks.harness import Federation, Run
from tests.attacks.table import ATTACKS

pytestmark = pytest.mark.broker


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_stopped_and_changes_nothing(name: str, siege: Run, digests: list[str]) -> None:
    attack = ATTACKS[name]
    assert attack.deed is not None

    answer = attack.deed(siege)

    assert answer == attack.answer
    assert siege.round() == digests[siege.version]


def test_the_attacked_run_ends_as_the_other(siege: Run, digests: list[str], federation: Federation) -> None:
    version = siege.version

    siege.stop()

    kept = siege.site.store.load()
    assert (kept.version, kept.digest) == (version, digests[version])
    assert siege.site.epochs() == [1], "the aggregator was never replaced"
    believed = {
        update["worker"] for line in siege.site.history if line["kind"] == "version" for update in line["updates"]
    }
    assert believed == {account.name for account in federation.crew}
