"""Which answers an operator believes."""

from __future__ import annotations

from pathlib import Path

from broker.amqp.operator import Answer, Operator
from broker.messages import Event, EventKind
from broker.settings import BrokerConfig
from broker.signing import COMMAND, EVENT
from broker.topology import Topology
from broker.transport import Delivery, Source
from broker.wire import encode
from tests.support.signing import Keys, keyring, signer

RUN = "digits"


def test_an_answer_is_believed_if_the_aggregator_has_signed_it(tmp_path: Path) -> None:
    keys = Keys(tmp_path)
    ring = keyring(keys.enrolled("aggregator"), RUN)
    asking, open_ = (Operator(BrokerConfig(), Topology(RUN), which) for which in (ring, None))
    data = {"what": "command", "id": "c1", "accepted": True, "text": "done"}
    event = Event(run=RUN, kind=EventKind.PROGRESS, source="aggregator", time=1.0, data=data)  # type: ignore[arg-type]
    own = signer(keys.private("aggregator"), RUN)

    def told(body: bytes, operator: Operator) -> Answer | None:
        operator._answers.clear()
        operator._take(Delivery(source=Source.EVENT, body=body))
        return operator._answers.get("c1")

    good = encode(event, own.sealing(EVENT))
    assert told(good, asking) == told(good, open_) == told(encode(event), open_) == Answer(accepted=True, text="done")
    assert told(encode(event), asking) is None
    assert told(encode(event, own.sealing(COMMAND)), asking) is None
    assert told(encode(event, signer(keys.private("w1"), RUN).sealing(EVENT)), asking) is None
