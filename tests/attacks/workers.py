"""Attacks of a worker that belongs to the federation, or of somebody who has its password."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pika
from pika.adapters.blocking_connection import BlockingChannel

from broker.messages import Action, Command, Event, EventKind, Goodbye, Reason, Update, UpdateId
from broker.topology import CONTROL, DEAD, EVENTS, UPDATES
from broker.transport import Source
from broker.wire import encode
from tests.attacks.harness import WIDTH, Account, Run, answer_of, update_of
from tests.attacks.table import attack

REFUSED = "403 ACCESS_REFUSED"
BY_NAME = "rights to names of exchanges and queues"
BY_KEY = "rights to routing keys (`{username}`)"
BY_USER = "RabbitMQ's validated `user_id`"


def call(method: str, *arguments: Any, **more: Any) -> Callable[[BlockingChannel], object]:
    """A deed: one method of a channel."""
    return lambda channel: getattr(channel, method)(*arguments, **more)


def _ignore(*_message: object) -> None:
    pass


def publish(run: Run, account: Account, exchange: str, key: str, body: bytes = b"x", **properties: Any) -> str:
    """What comes of a message that ``account`` publishes; with its own user id, if nothing else is said."""
    facts = pika.BasicProperties(**{"user_id": account.name, "delivery_mode": 2, **properties})
    with run.federation.channel(account) as channel:
        return answer_of(lambda: channel.basic_publish(exchange, key, body, facts))


def each(run: Run, account: Account, deeds: Sequence[Callable[[BlockingChannel], object]]) -> str:
    """The one answer to all ``deeds``, each on a channel of its own; or all answers."""
    answers = []
    for deed in deeds:
        with run.federation.channel(account) as channel:
            answers.append(answer_of(partial(deed, channel)))
    return answers[0] if len(set(answers)) == 1 else str(answers)


def _send(run: Run, update: Update, *, user: str | None = "", key: str = "") -> str:
    """The reason for which the aggregator rejects an update that mallory publishes under its own key."""
    mallory = run.federation.mallory
    properties, body = run.sheet(update, mallory.name if user == "" else user)
    with run.federation.channel(mallory) as channel:
        answer = answer_of(lambda: channel.basic_publish(UPDATES, key or run.key(mallory), body, properties))
    return run.buried(str(update.id)) if answer == "done" else answer


# ------------------------------------------------------------------------------------- in somebody else's name


@attack(who="worker", what="publishes an update under another's key", by="broker", answer=REFUSED, mechanism=BY_KEY)
def anothers_key(run: Run) -> str:
    victim = run.federation.crew[0]
    return _send(run, run.update(victim), key=run.key(victim))


@attack(
    who="worker",
    what="publishes an update under its own key that says it is another's, in body and headers",
    by="aggregator",
    answer=Reason.WRONG_USER,
    mechanism=BY_USER,
)
def anothers_name(run: Run) -> str:
    return _send(run, run.update(run.federation.crew[0]))


@attack(who="worker", what="sets another's `user_id`", by="broker", answer="406 PRECONDITION_FAILED", mechanism=BY_USER)
def anothers_user_id(run: Run) -> str:
    victim = run.federation.crew[0]
    return _send(run, run.update(victim), user=victim.name)


@attack(
    who="worker",
    what="sets the aggregator's `user_id`",
    by="broker",
    answer="406 PRECONDITION_FAILED",
    mechanism=BY_USER,
)
def the_aggregators_user_id(run: Run) -> str:
    return _send(run, run.update(run.federation.crew[0]), user=run.federation.aggregator.name)


@attack(
    who="worker", what="sets no `user_id`", by="aggregator", answer=Reason.NO_USER, mechanism="a user id is asked for"
)
def no_user_id(run: Run) -> str:
    return _send(run, run.update(run.federation.mallory), user=None)


@attack(
    who="worker",
    what="publishes under its own key, and by the header `CC` under another's, the aggregator's or the operator's",
    by="aggregator",
    answer=Reason.WRONG_USER,
    mechanism="the user id counts, not the key; RabbitMQ from 4.0.3 on refuses it",
)
def carbon_copy(run: Run) -> str:
    victim = run.federation.crew[0]
    update = run.update(victim)
    properties, body = run.sheet(update, run.federation.mallory.name)
    properties.headers = {**(properties.headers or {}), "CC": [run.key(victim), run.topology.key("aggregator")]}
    with run.federation.channel(run.federation.mallory) as channel:
        channel.basic_publish(UPDATES, run.key(run.federation.mallory), body, properties)
    return run.buried(str(update.id))


@attack(
    who="worker",
    what="gets a command into the queue of commands by the header `CC`",
    by="aggregator",
    answer="not executed",
    mechanism="a command counts only under its own key and from an operator's account",
)
def command_by_carbon_copy(run: Run) -> str:
    command = Command(run=run.topology.run, id="cc-stop", action=Action.STOP)
    mallory = run.federation.mallory
    answer = publish(
        run, mallory, CONTROL, run.key(mallory), encode(command), headers={"CC": [run.topology.command_key]}
    )
    assert answer == "done"
    return _after_a_hello(run)


def _after_a_hello(run: Run) -> str:
    """``not executed`` if the aggregator still runs once it has taken in what was sent before this."""
    run.round()
    with run.federation.channel(run.federation.administrator) as channel:
        run.wait_for(
            lambda: not channel.queue_declare(run.topology.control, passive=True).method.message_count,
            "no control left",
        )
    assert run.process.poll() is None
    return "not executed" if not any(line["kind"] == "command" for line in run.site.history) else "executed"


@attack(
    who="worker",
    what="puts chunks into another's outbox",
    by="broker",
    answer=REFUSED,
    mechanism=BY_KEY,
)
def anothers_outbox(run: Run) -> str:
    victim = run.federation.crew[0]
    return publish(run, run.federation.mallory, UPDATES, run.topology.chunk_key(victim.name))


@attack(
    who="worker",
    what="puts forged chunks of another's next update into its outbox, by the header `CC`",
    by="aggregator",
    answer="dropped",
    mechanism="chunks count from the worker's own account; RabbitMQ from 4.0.3 on refuses it",
)
def chunks_by_carbon_copy(run: Run) -> str:
    victim, mallory = run.federation.crew[0], run.federation.mallory
    of = str(UpdateId(victim.name, "life", run.version))
    for index in range(2):
        answer = publish(
            run,
            mallory,
            UPDATES,
            run.key(mallory),
            bytes(1000),
            message_id=f"{of}#{index}",
            headers={"CC": [run.topology.chunk_key(victim.name)]},
        )
        assert answer == "done"
    run.round()  # which takes the victim's next update, whole
    with run.federation.channel(run.federation.administrator) as channel:
        outbox = run.topology.outbox(victim.name)
        return "dropped" if not channel.queue_declare(outbox, passive=True).method.message_count else "there"


@attack(
    who="worker",
    what="says hello, goodbye, heartbeat and evaluation under another's key",
    by="broker",
    answer=REFUSED,
    mechanism=BY_KEY,
)
def anothers_events(run: Run) -> str:
    victim, topology = run.federation.crew[0].name, run.topology
    keys = [(CONTROL, topology.key(victim))]
    keys += [(EVENTS, topology.event_key(kind, victim)) for kind in ("heartbeat", "progress", "evaluation", "check")]
    deeds = [call("basic_publish", *where, b"x") for where in keys]
    return each(run, run.federation.mallory, deeds)


@attack(
    who="worker",
    what="says another's goodbye under its own key",
    by="aggregator",
    answer="ignored, logged",
    mechanism=BY_USER,
)
def anothers_goodbye(run: Run) -> str:
    # One of its own, since the log tells of each account only so often.
    victim, mallory, topology = run.federation.crew[0], run.federation.account("worker", "eve"), run.topology
    goodbye = Goodbye(run=topology.run, worker=victim.name, incarnation="life", reason="forged")
    assert publish(run, mallory, CONTROL, run.key(mallory), encode(goodbye)) == "done"
    run.said("ignored a control message", repr(mallory.name), repr(victim.name))
    return "ignored, logged"


@attack(
    who="worker",
    what="tells another's heartbeat and evaluation under its own key",
    by="aggregator",
    answer="ignored, logged",
    mechanism=BY_USER,
)
def anothers_heartbeat(run: Run) -> str:
    victim, mallory, topology = run.federation.crew[1], run.federation.account("worker", "eve"), run.topology
    for kind in (EventKind.EVALUATION, EventKind.HEARTBEAT):
        event = Event(run=topology.run, kind=kind, source=victim.name, time=0.0, data={"version": 1, "loss": 0.0})
        key = topology.event_key(kind, mallory.name)
        assert publish(run, mallory, EVENTS, key, encode(event)) == "done"
    run.said("ignored a event message", repr(mallory.name), repr(victim.name))
    return "ignored, logged"


# --------------------------------------------------------------------------------- as aggregator, as operator


@attack(who="worker", what="publishes a version of its own", by="broker", answer=REFUSED, mechanism=BY_NAME)
def forged_version(run: Run) -> str:
    topology = run.topology
    deeds = [call("basic_publish", name, "", b"x") for name in (topology.parameters, topology.chunks)]
    return each(run, run.federation.mallory, deeds)


@attack(
    who="worker",
    what="writes into streams and queues directly, through the default exchange",
    by="broker",
    answer=REFUSED,
    mechanism=BY_NAME,
)
def default_exchange(run: Run) -> str:
    topology = run.topology
    names = (topology.parameters, topology.updates, topology.control, topology.turn, topology.dead)
    deeds = [call("basic_publish", "", name, b"x") for name in names]
    return each(run, run.federation.mallory, deeds)


@attack(
    who="worker",
    what="publishes to `fedmq.dead`, `amq.topic`, `amq.direct`, `amq.fanout`",
    by="broker",
    answer=REFUSED,
    mechanism=BY_NAME,
)
def other_exchanges(run: Run) -> str:
    names = (DEAD, "amq.topic", "amq.direct", "amq.fanout", "amq.headers")
    deeds = [call("basic_publish", name, run.key(run.federation.mallory), b"x") for name in names]
    return each(run, run.federation.mallory, deeds)


@attack(
    who="worker",
    what="gives an operator's command (`stop`), or puts a turn into the queue of turns",
    by="broker",
    answer=REFUSED,
    mechanism=BY_KEY,
)
def command(run: Run) -> str:
    stop = encode(Command(run=run.topology.run, id="stop-it", action=Action.STOP))
    keys = (run.topology.command_key, run.topology.turn_key)
    deeds = [call("basic_publish", CONTROL, key, stop) for key in keys]
    return each(run, run.federation.mallory, deeds)


@attack(
    who="worker",
    what="takes the turn, which makes the active aggregator",
    by="broker",
    answer=REFUSED,
    mechanism=BY_NAME,
)
def stolen_turn(run: Run) -> str:
    turn = run.topology.turn
    deeds: list[Callable[[BlockingChannel], object]] = [
        call("basic_consume", turn, _ignore),
        call("basic_get", turn),
        call("queue_purge", turn),
        call("queue_delete", turn),
    ]
    return each(run, run.federation.mallory, deeds)


@attack(
    who="worker",
    what="sends another worker a notice, or tells a status as the aggregator",
    by="broker",
    answer=REFUSED,
    mechanism=BY_KEY,
)
def forged_notice(run: Run) -> str:
    topology = run.topology
    keys = (topology.notice_key(run.federation.crew[0].name), topology.event_key("status", "aggregator"))
    deeds = [call("basic_publish", EVENTS, key, b"x") for key in keys]
    return each(run, run.federation.mallory, deeds)


@attack(
    who="worker",
    what="sends another worker a notice by the header `CC`",
    by="worker",
    answer="not believed, logged",
    mechanism="notices count from the account that publishes the versions; RabbitMQ from 4.0.3 on refuses it",
)
def notice_by_carbon_copy(run: Run) -> str:
    victim, mallory, topology = run.crew[0], run.federation.mallory, run.topology
    key = topology.event_key("heartbeat", mallory.name)
    headers = {"CC": [topology.notice_key(victim.account.name)]}
    notices = len(victim.inbox.deliveries(Source.EVENT))
    refused = victim.guard.refused
    assert publish(run, mallory, EVENTS, key, b"x", headers=headers) == "done"
    run.wait_for(lambda: victim.guard.refused > refused, "a notice that is not believed")
    assert len(victim.inbox.deliveries(Source.EVENT)) == notices
    return "not believed, logged"


# ------------------------------------------------------------------------------- what belongs to others


def _queues(run: Run) -> list[str]:
    topology, victim = run.topology, run.federation.crew[0].name
    return [
        topology.outbox(victim),
        topology.outbox(run.federation.mallory.name),
        topology.notices(victim),
        topology.updates,
        topology.control,
        topology.dead,
    ]


@attack(
    who="worker",
    what="consumes others' updates: outboxes, the queue of updates, dead letters, notices, control",
    by="broker",
    answer=REFUSED,
    mechanism=BY_NAME,
)
def read_queues(run: Run) -> str:
    deeds: list[Callable[[BlockingChannel], object]] = []
    for name in _queues(run):
        deeds += [
            call("basic_consume", name, _ignore),
            call("basic_get", name),
        ]
    return each(run, run.federation.mallory, deeds)


@attack(who="worker", what="empties or deletes them", by="broker", answer=REFUSED, mechanism=BY_NAME)
def delete_queues(run: Run) -> str:
    deeds: list[Callable[[BlockingChannel], object]] = []
    for name in _queues(run):
        deeds += [
            call("queue_purge", name),
            call("queue_delete", name),
        ]
    deeds.append(call("queue_delete", run.topology.parameters))
    return each(run, run.federation.mallory, deeds)


@attack(who="worker", what="deletes exchanges", by="broker", answer=REFUSED, mechanism=BY_NAME)
def delete_exchanges(run: Run) -> str:
    names = (UPDATES, CONTROL, EVENTS, DEAD, run.topology.parameters, run.topology.chunks)
    return each(run, run.federation.mallory, [call("exchange_delete", name) for name in names])


@attack(
    who="worker",
    what="declares queues and exchanges, of any name: to listen, to fill the broker",
    by="broker",
    answer=REFUSED,
    mechanism="no right to configure anything",
)
def declare(run: Run) -> str:
    name = run.federation.mallory.name
    names = (
        "mine",
        f"fedmq.{run.topology.run}.notice.{name}.ab",
        run.topology.notices(f"{name}x"),
        "fedmq.mine.updates",
    )
    deeds: list[Callable[[BlockingChannel], object]] = [
        call("queue_declare", ""),
        call("queue_declare", "", exclusive=True),
    ]
    for name in names:
        deeds += [
            call("queue_declare", name, durable=True),
            call("exchange_declare", name, "fanout"),
        ]
    return each(run, run.federation.mallory, deeds)


@attack(
    who="worker",
    what="declares an exchange of its own whose alternate is `fedmq.control`, which goes round rights to keys",
    by="broker",
    answer=REFUSED,
    mechanism="no right to configure anything",
)
def alternate_exchange(run: Run) -> str:
    names = (f"fedmq.{run.topology.run}.notice.{run.federation.mallory.name}.ab", run.topology.notices("x"), "mine")
    arguments = {"alternate-exchange": CONTROL}
    deeds = [call("exchange_declare", name, "fanout", arguments=arguments) for name in names]
    return each(run, run.federation.mallory, deeds)


@attack(
    who="worker",
    what="declares a queue that dead-letters to `fedmq.control` under the key of commands, or to the versions",
    by="broker",
    answer=REFUSED,
    mechanism="no right to configure anything",
)
def dead_letter_exchange(run: Run) -> str:
    own = f"fedmq.{run.topology.run}.notice.{run.federation.mallory.name}.ab"
    deeds = []
    for name in (own, "", "mine"):
        for exchange in (CONTROL, run.topology.parameters):
            arguments = {"x-dead-letter-exchange": exchange, "x-dead-letter-routing-key": run.topology.command_key}
            deeds.append(call("queue_declare", name, arguments=arguments))
    return each(run, run.federation.mallory, deeds)


@attack(
    who="worker",
    what="binds queues to the updates, to `#` of all events, to dead letters, to another's notices",
    by="broker",
    answer=REFUSED,
    mechanism=BY_NAME,
)
def eavesdrop(run: Run) -> str:
    topology, mallory = run.topology, run.federation.mallory.name
    wanted = ((UPDATES, "#"), (EVENTS, "#"), (DEAD, "#"), (EVENTS, topology.notice_key(run.federation.crew[0].name)))
    queues = (topology.notices(mallory), topology.outbox(mallory), topology.control)
    deeds = [call("queue_bind", queue, *where) for queue in queues for where in wanted]
    return each(run, run.federation.mallory, deeds)


@attack(
    who="worker",
    what="binds exchanges to one another, or takes a binding away",
    by="broker",
    answer=REFUSED,
    mechanism=BY_NAME,
)
def bind_exchanges(run: Run) -> str:
    topology = run.topology
    pairs = [(CONTROL, UPDATES), (UPDATES, EVENTS), (EVENTS, UPDATES), (topology.parameters, UPDATES), (DEAD, EVENTS)]
    deeds: list[Callable[[BlockingChannel], object]] = [call("exchange_bind", *pair, "#") for pair in pairs]
    deeds.append(call("queue_unbind", topology.updates, UPDATES, f"{topology.run}.*"))
    deeds.append(call("queue_unbind", topology.parameters, topology.parameters, ""))
    return each(run, run.federation.mallory, deeds)


@attack(
    who="worker",
    what="empties the stream of versions, which it may read",
    by="broker",
    answer="540 NOT_IMPLEMENTED",
    mechanism="streams cannot be purged",
)
def purge_stream(run: Run) -> str:
    return each(run, run.federation.mallory, [call("queue_purge", run.topology.parameters)])


# ----------------------------------------------------------------------------------- updates that are not news


@attack(
    who="worker",
    what="replays a captured update of another, byte for byte",
    by="aggregator",
    answer=Reason.WRONG_USER,
    mechanism=BY_USER,
)
def captured_update(run: Run) -> str:
    head = run.head(run.version)
    run.round()
    return _send(run, update_of(head, run.model, run.federation.crew[0].name, 0))


@attack(
    who="worker",
    what="sends an update from a version that does not exist yet",
    by="aggregator",
    answer=Reason.FUTURE_VERSION,
    mechanism="the base version",
)
def future_version(run: Run) -> str:
    return _send(run, run.update(run.federation.mallory, base_version=run.version + 1000))


@attack(
    who="worker",
    what="sends an update of another run under this run's key",
    by="aggregator",
    answer=Reason.WRONG_RUN,
    mechanism="the run's name in the header",
)
def another_run(run: Run) -> str:
    return _send(run, run.update(run.federation.mallory, run="other"))


@attack(
    who="worker",
    what="sends an update for other tensors than the model's",
    by="aggregator",
    answer=Reason.MODEL_MISMATCH,
    mechanism="names, shapes and dtypes must be the model's",
)
def other_tensors(run: Run) -> str:
    good = run.update(run.federation.mallory)
    model = replace(good.model, tensors=(replace(good.model.tensors[0], shape=(WIDTH + 1,)), *good.model.tensors[1:]))
    tensors = {**good.tensors, good.model.tensors[0].name: np.zeros(WIDTH + 1, dtype=np.float32)}
    return _send(run, replace(good, model=model, tensors=tensors))
