"""Dead letters over a real RabbitMQ: looked at, published again, dropped, and never lost."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext

import pika
import pytest

from broker.amqp import deadletters
from broker.amqp.deadletters import DeadLetterQueue, Outcome, Wish
from broker.amqp.node import PrivateNode
from broker.amqp.publisher import Publisher
from broker.amqp.session import Channel
from broker.errors import AccessRefused, BrokerError, BrokerUnreachable, ConnectionLost
from broker.letters import DeadLetter, Origin, RawLetter
from broker.topology import DEAD, UPDATES, Topology
from broker.wire import encode
from tests.support.letters import TIME, bury, declared, ids_in, take, update
from tests.support.node import add_user, admin_of, channel, config_of, fresh_topology, ready
from tests.support.waiting import PATIENCE, wait_for

pytestmark = pytest.mark.broker

#: More than the delivery limit that the run's quorum queue of updates declares.
RETURNS = 1001


@pytest.fixture
def topology(node: PrivateNode) -> Topology:
    return declared(node)


def letters(node: PrivateNode, topology: Topology) -> list[DeadLetter]:
    """All letters; they stay."""
    found: list[DeadLetter] = []

    def look(letter: DeadLetter, _raw: RawLetter) -> Wish:
        found.append(letter)
        return Wish.KEEP

    DeadLetterQueue(config_of(node), topology, what="list").work(look)
    return found


def do(node: PrivateNode, topology: Topology, wish: Wish, *, only: str = "", alone: bool = True) -> Counter[Outcome]:
    """Replay or drop all, or those whose id ends with ``only``; what became of them."""
    outcomes: Counter[Outcome] = Counter()

    def decide(letter: DeadLetter, _raw: RawLetter) -> Wish:
        return wish if str(letter.id).endswith(only) else Wish.KEEP

    def report(_letter: DeadLetter, outcome: Outcome, _detail: str) -> None:
        outcomes[outcome] += 1

    DeadLetterQueue(config_of(node), topology, what="test").work(decide, report, alone=alone)
    return outcomes


def publish(node: PrivateNode, topology: Topology, seq: int, **properties: object) -> bytes:
    """Publish an update of w1, confirmed, as a worker does; its body."""
    one = update(topology, seq)
    body = encode(one)
    facts = pika.BasicProperties(
        delivery_mode=2, message_id=str(one.id), type="update", headers={"worker": "w1"}, **properties
    )
    with channel(node) as inside:
        inside.confirm_delivery()
        inside.basic_publish(UPDATES, topology.key("w1"), body, facts, mandatory=True)
    return body


# -------------------------------------------------------------------------------------------- look, and order


def test_what_is_only_looked_at_stays_as_it_was(node: PrivateNode, topology: Topology) -> None:
    one = update(topology, 1)
    bury(node, topology, one)
    for _ in range(2):
        (letter,) = letters(node, topology)
        assert (letter.id, letter.worker, letter.reason, letter.detail) == (one.id, "w1", "not-finite", "a test")
        assert letter.time is not None
        assert letter.time.timestamp() == TIME
        wait_for(lambda: ready(node, topology.dead) == 1, what="the letter back in its queue")
    ((properties, body),) = take(node, topology.dead)
    assert body == encode(one)
    assert properties.headers["reason"] == "not-finite"


def test_an_empty_queue_has_no_letters(node: PrivateNode, topology: Topology) -> None:
    assert letters(node, topology) == []


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
@pytest.mark.parametrize("share", [256, 7], ids=["one consumer", "many consumers"])
def test_the_letters_keep_their_order(
    node: PrivateNode, queue_type: str, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = declared(node, queue_type=queue_type)
    monkeypatch.setattr(deadletters, "SHARE", share)
    expected = list(range(100))
    bury(node, topology, *(update(topology, seq) for seq in expected))
    for _ in range(3):
        assert [letter.id.seq for letter in letters(node, topology) if letter.id] == expected
        wait_for(lambda: ready(node, topology.dead) == 100, what="all letters back")
    assert do(node, topology, Wish.REPLAY, only="3") == {Outcome.REPLAYED: 10}
    assert do(node, topology, Wish.DROP, only="5") == {Outcome.DROPPED: 10}
    left = [seq for seq in expected if seq % 10 not in {3, 5}]
    wait_for(lambda: ready(node, topology.dead) == 80, what="the others back")
    assert [letter.id.seq for letter in letters(node, topology) if letter.id] == left
    wait_for(lambda: ready(node, topology.updates) == 10, what="the replayed")
    assert ids_in(node, topology.updates) == [f"w1/i/{seq}" for seq in expected if seq % 10 == 3]


# ---------------------------------------------------------------------------------------------------- replay


def test_a_replay_publishes_the_update_as_it_was(node: PrivateNode, topology: Topology) -> None:
    one = update(topology, 1, worker="w7")
    bury(node, topology, one)
    assert do(node, topology, Wish.REPLAY) == {Outcome.REPLAYED: 1}
    assert ready(node, topology.dead) == 0
    with channel(node) as inside:
        method, properties, body = next(inside.consume(topology.updates, inactivity_timeout=PATIENCE))
        assert method is not None
        assert (method.exchange, method.routing_key) == (UPDATES, topology.key("w7"))
        assert body == encode(one)
        assert (properties.message_id, properties.delivery_mode, properties.type) == ("w7/i/1", 2, "update")
        facts = {"run": topology.run, "worker": "w7", "base_version": 0, "examples": 32}
        assert properties.headers == {**facts, "former_reasons": "not-finite"}


def test_no_more_is_on_its_way_than_there_is_room_for(
    node: PrivateNode, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadletters, "ON_WAY", 2)
    monkeypatch.setattr(deadletters, "ON_WAY_BYTES", 10)  # less than one
    bury(node, topology, *(update(topology, seq) for seq in range(20)))
    assert do(node, topology, Wish.REPLAY) == {Outcome.REPLAYED: 20}
    wait_for(lambda: ready(node, topology.updates) == 20, what="the replayed")


def test_what_is_rejected_again_meanwhile_is_not_met_twice(node: PrivateNode, topology: Topology) -> None:
    bury(node, topology, *(update(topology, seq) for seq in range(50)))
    with rejecting(node, topology) as rejected:
        assert do(node, topology, Wish.REPLAY) == {Outcome.REPLAYED: 50}
        wait_for(lambda: len(rejected) == 50, what="all rejected again")
    # Quorum queues dead-letter at least once: there may be copies.
    again: set[str] = set()

    def all_again() -> bool:
        again.update(ids_in(node, topology.dead))
        return len(again) == 50

    wait_for(all_again, what="all dead again")
    assert again == {f"w1/i/{seq}" for seq in range(50)}


@contextmanager
def rejecting(node: PrivateNode, topology: Topology) -> Iterator[list[str]]:
    """A consumer of the updates that rejects each; the ids that it has met."""
    rejected: list[str] = []
    stop = threading.Event()

    def work() -> None:
        with channel(node) as inside:
            for method, properties, _ in inside.consume(topology.updates, inactivity_timeout=0.05):
                if method is not None:
                    inside.basic_reject(method.delivery_tag, requeue=False)
                    rejected.append(properties.message_id)
                elif stop.is_set():
                    return

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield rejected
    finally:
        stop.set()
        thread.join()


def test_poison_comes_back_with_its_bytes_and_does_no_harm(node: PrivateNode, topology: Topology) -> None:
    poison = b"\x00\xffFdMQ\x01" * 50
    with channel(node) as inside:
        inside.confirm_delivery()
        # No headers at all, a time that no calendar has, a nested table.
        inside.basic_publish(DEAD, topology.key("w1"), poison, pika.BasicProperties(), mandatory=True)
        strange = pika.BasicProperties(headers={"time": 2**62, "x-death": ["no table"], "reason": {"a": [1]}})
        inside.basic_publish(DEAD, topology.key("w2"), b"", strange, mandatory=True)
    first, second = letters(node, topology)
    assert (first.id, first.worker, first.origin, first.bytes) == (None, "w1", Origin.OTHER, len(poison))
    assert (second.id, second.worker, second.time) == (None, "w2", None)
    wait_for(lambda: ready(node, topology.dead) == 2, what="both back")
    assert do(node, topology, Wish.REPLAY) == {Outcome.REPLAYED: 2}
    wait_for(lambda: ready(node, topology.updates) == 2, what="both replayed")
    assert [body for _, body in take(node, topology.updates)] == [poison, b""]


def test_what_has_no_body_left_cannot_be_replayed_and_stays(node: PrivateNode, topology: Topology) -> None:
    bury(node, topology, update(topology, 1), body=b"", headers={"body": "99999999 bytes, left out"})
    bury(node, topology, update(topology, 2))
    assert do(node, topology, Wish.REPLAY) == {Outcome.REPLAYED: 1, Outcome.REFUSED: 1}
    wait_for(lambda: ready(node, topology.dead) == 1, what="the letter back")
    assert ids_in(node, topology.dead) == ["w1/i/1"]
    assert ids_in(node, topology.updates) == ["w1/i/2"]


def test_what_finds_no_queue_is_returned_and_stays(node: PrivateNode, topology: Topology) -> None:
    bury(node, topology, update(topology, 1), update(topology, 2))
    admin_of(node).delete_queue(topology.updates)
    assert do(node, topology, Wish.REPLAY) == {Outcome.RETURNED: 2}
    wait_for(lambda: ready(node, topology.dead) == 2, what="both back")


def test_what_a_full_queue_refuses_stays(node: PrivateNode, topology: Topology) -> None:
    limit = {"max-length": 0, "overflow": "reject-publish"}
    policy = {"pattern": f"^{topology.updates}$", "definition": limit, "apply-to": "queues"}
    admin_of(node).put(f"/policies/%2F/{topology.run}", policy)
    wait_for(lambda: _refuses(node, topology), what="the limit in force")
    taken = ready(node, topology.updates)
    bury(node, topology, *(update(topology, seq) for seq in range(5)))
    outcomes = do(node, topology, Wish.REPLAY)
    # A quorum queue may take a few more than its limit; those are not dead any more.
    assert outcomes[Outcome.REFUSED] + outcomes[Outcome.REPLAYED] == 5
    assert outcomes[Outcome.REFUSED] >= 1
    wait_for(lambda: ready(node, topology.dead) == outcomes[Outcome.REFUSED], what="the refused back")
    assert ready(node, topology.updates) == taken + outcomes[Outcome.REPLAYED]


def _refuses(node: PrivateNode, topology: Topology) -> bool:
    try:
        publish(node, topology, 99)
    except pika.exceptions.NackError:
        return True
    return False


def test_a_message_larger_than_this_broker_takes_stays_and_the_others_go(node: PrivateNode, topology: Topology) -> None:
    bury(node, topology, update(topology, 1), body=bytes(70_000))
    bury(node, topology, update(topology, 2))
    outcomes: Counter[Outcome] = Counter()
    queue = DeadLetterQueue(config_of(node, max_message_bytes=65536), topology, what="test")
    queue.work(lambda _letter, _raw: Wish.REPLAY, lambda _letter, outcome, _detail: outcomes.update([outcome]))
    assert outcomes == {Outcome.REFUSED: 1, Outcome.REPLAYED: 1}
    wait_for(lambda: ready(node, topology.dead) == 1, what="the large one back")


# ------------------------------------------------------------------------------------- what RabbitMQ gives up on


def given_up(node: PrivateNode, topology: Topology) -> DeadLetter:
    """The one letter that RabbitMQ itself puts there, once it has; of a quorum queue it may be there twice."""
    wait_for(lambda: ready(node, topology.dead), what="a dead letter of RabbitMQ's own")
    first, *copies = letters(node, topology)
    assert {copy.id for copy in copies} <= {first.id}
    wait_for(lambda: ready(node, topology.dead), what="the letter back in its queue")
    return first


def test_what_expired_in_the_queue_is_listed_and_can_be_replayed(node: PrivateNode, topology: Topology) -> None:
    body = publish(node, topology, 1, expiration="1")
    letter = given_up(node, topology)
    assert (letter.origin, letter.reason, letter.worker) == (Origin.BROKER, "broker: expired", "w1")
    assert letter.time is not None
    assert str(letter.id) == "w1/i/1"
    assert topology.updates in letter.detail
    assert do(node, topology, Wish.REPLAY).keys() == {Outcome.REPLAYED}
    # It does not expire a second time.
    wait_for(lambda: ready(node, topology.updates) >= 1, what="the update")
    with channel(node) as inside:
        method, properties, again = next(inside.consume(topology.updates, inactivity_timeout=PATIENCE))
        assert method is not None
        assert method.routing_key == topology.key("w1")
        assert (again, properties.message_id, properties.expiration) == (body, "w1/i/1", None)
        assert "x-death" not in properties.headers


def test_what_somebody_rejected_by_hand_is_listed(node: PrivateNode, topology: Topology) -> None:
    publish(node, topology, 1)
    with channel(node) as inside:
        method, _, _ = next(inside.consume(topology.updates, inactivity_timeout=PATIENCE))
        assert method is not None
        inside.basic_reject(method.delivery_tag, requeue=False)
    assert given_up(node, topology).reason == "broker: rejected"


@pytest.mark.parametrize("queue_type", ["auto", "quorum"])
def test_an_update_that_comes_back_for_ever_is_never_dropped_silently(node: PrivateNode, queue_type: str) -> None:
    topology = declared(node, queue_type=queue_type)
    body = publish(node, topology, 1)
    returns = 0
    with channel(node) as inside:
        for method, _, _ in inside.consume(topology.updates, inactivity_timeout=1):
            if method is None:
                if ready(node, topology.dead):
                    break
                continue
            if returns == RETURNS:
                break
            inside.basic_reject(method.delivery_tag, requeue=True)
            returns += 1
    if returns == RETURNS and not ready(node, topology.dead):
        # A classic queue has no such limit.
        assert queue_type == "auto"
        wait_for(lambda: ready(node, topology.updates) == 1, what="the update")
        return
    assert returns > 21
    letter = given_up(node, topology)
    assert (letter.reason, letter.worker, str(letter.id)) == ("broker: delivery-limit", "w1", "w1/i/1")
    assert do(node, topology, Wish.REPLAY).keys() == {Outcome.REPLAYED}
    wait_for(lambda: ready(node, topology.updates) >= 1, what="the update")
    with channel(node) as inside:
        assert next(inside.consume(topology.updates, inactivity_timeout=PATIENCE))[2] == body


# ------------------------------------------------------------------------------------------------- disturbances


def test_who_reads_the_queue_as_well_is_seen(node: PrivateNode, topology: Topology) -> None:
    bury(node, topology, update(topology, 1), update(topology, 2))
    with channel(node) as inside:
        inside.basic_qos(prefetch_count=1)
        assert next(inside.consume(topology.dead, inactivity_timeout=PATIENCE))[0] is not None
        looked = DeadLetterQueue(config_of(node), topology, what="list").work(lambda _letter, _raw: Wish.KEEP)
        assert (looked.letters, looked.others) == (1, 1)
        with pytest.raises(BrokerError, match=r"somebody else reads .*try again"):
            do(node, topology, Wish.DROP)
    wait_for(lambda: ready(node, topology.dead) == 2, what="both back")


def test_letters_that_somebody_takes_away_meanwhile_are_not_waited_for(node: PrivateNode, topology: Topology) -> None:
    bury(node, topology, *(update(topology, seq) for seq in range(10)))
    queue = DeadLetterQueue(config_of(node), topology, what="list")
    met = []

    def look(letter: DeadLetter, _raw: RawLetter) -> Wish:
        met.append(letter.number)
        return Wish.KEEP

    with pytest.MonkeyPatch.context() as patch:
        look_at = deadletters._look

        async def too_many(channel: Channel, name: str) -> tuple[int, int]:
            waiting, others = await look_at(channel, name)
            return (waiting + 5 if not met else waiting), others

        patch.setattr(deadletters, "_look", too_many)
        assert queue.work(look).letters == 10
    wait_for(lambda: ready(node, topology.dead) == 10, what="all back")


@pytest.mark.parametrize("which", ["reads", "publishes"])
def test_a_connection_that_is_closed_in_the_middle_loses_nothing(
    node: PrivateNode, topology: Topology, which: str
) -> None:
    bury(node, topology, *(update(topology, seq) for seq in range(200)))
    admin = admin_of(node)
    name = f"fedmq dead test · run {topology.run}" + (" · publish" if which == "publishes" else "")

    def named() -> list[str]:
        return [c["name"] for c in admin.connections() if c.get("client_properties", {}).get("connection_name") == name]

    def decide(letter: DeadLetter, _raw: RawLetter) -> Wish:
        if letter.number == 100:
            # The admin UI learns of a connection after some seconds.
            for one in wait_for(named, what="the connection in the admin UI"):
                admin.close_connection(one, "a test")
        return Wish.REPLAY

    outcomes: Counter[Outcome] = Counter()
    queue = DeadLetterQueue(config_of(node, heartbeat=60), topology, what="test")
    with pytest.raises(ConnectionLost) if which == "reads" else nullcontext():
        queue.work(decide, lambda _letter, outcome, _detail: outcomes.update([outcome]))
    assert set(outcomes) <= {Outcome.REPLAYED, Outcome.UNCERTAIN}
    everything = {f"w1/i/{seq}" for seq in range(200)}
    wait_for(lambda: ready(node, topology.dead) + ready(node, topology.updates) >= 200, what="all letters somewhere")
    assert set(ids_in(node, topology.dead)) | set(ids_in(node, topology.updates)) == everything


@pytest.mark.parametrize("count", [1, 5], ids=["at the end", "when there is no room"])
def test_a_broker_that_confirms_nothing_is_not_waited_for_for_ever(
    node: PrivateNode, topology: Topology, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bury(node, topology, *(update(topology, seq) for seq in range(count)))
    monkeypatch.setattr(deadletters, "ON_WAY", 2)
    monkeypatch.setattr(deadletters, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(Publisher, "publish", lambda *_arguments, **_more: Future())
    with pytest.raises(BrokerUnreachable, match="has confirmed nothing for 1 s"):
        do(node, topology, Wish.REPLAY)
    wait_for(lambda: ready(node, topology.dead) == count, what="all back")


def test_a_decision_that_fails_leaves_all_in_its_place(node: PrivateNode, topology: Topology) -> None:
    bury(node, topology, update(topology, 1), update(topology, 2))

    def decide(letter: DeadLetter, _raw: RawLetter) -> Wish:
        if letter.number == 2:
            raise BrokenPipeError
        return Wish.KEEP

    with pytest.raises(BrokenPipeError):
        DeadLetterQueue(config_of(node), topology, what="test").work(decide)
    wait_for(lambda: ready(node, topology.dead) == 2, what="both back")


# ------------------------------------------------------------------------------------------------- refusals


def test_a_run_that_nobody_declared_is_told(node: PrivateNode) -> None:
    topology = fresh_topology("nobody")
    with pytest.raises(BrokerError, match=rf"no queue '{topology.dead}'.*no aggregator has declared run"):
        letters(node, topology)


def test_nobody_there_is_unreachable(topology: Topology, node: PrivateNode) -> None:
    config = config_of(node, url="amqp://u:secret@127.0.0.1:1/")
    with pytest.raises(BrokerUnreachable, match="is RabbitMQ running there") as caught:
        DeadLetterQueue(config, topology, what="list").work(lambda _letter, _raw: Wish.KEEP)
    assert "secret" not in str(caught.value)


def test_who_may_not_read_is_told_which_permission(node: PrivateNode, topology: Topology) -> None:
    bury(node, topology, update(topology, 1))
    config = config_of(node, url=add_user(node, configure=".*", write=".*", read=""))
    with pytest.raises(AccessRefused, match=f"read permission to consume from queue '{topology.dead}'"):
        DeadLetterQueue(config, topology, what="list").work(lambda _letter, _raw: Wish.KEEP)


def test_who_may_not_publish_is_told_and_the_letters_stay(node: PrivateNode, topology: Topology) -> None:
    bury(node, topology, update(topology, 1), update(topology, 2))
    config = config_of(node, url=add_user(node, configure="", write="", read=".*"))
    with pytest.raises(AccessRefused, match="write permission to publish"):
        DeadLetterQueue(config, topology, what="replay").work(lambda _letter, _raw: Wish.REPLAY)
    wait_for(lambda: ready(node, topology.dead) == 2, what="both back")
