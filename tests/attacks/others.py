"""Attacks with the accounts of a monitor, an operator, and an aggregator whose time is over; and of sheer size."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial

import pika
import pika.exceptions
from pika.adapters.blocking_connection import BlockingChannel

from broker.messages import Action, Command, Parameters, Plan, Reason, parameters_digest
from broker.topology import CONTROL, DEAD, EVENTS, UPDATES
from broker.wire import encode
from tests.attacks.harness import Account, Run, answer_of, initial
from tests.attacks.outsiders import in_the_api
from tests.attacks.table import attack
from tests.attacks.workers import BY_NAME, BY_USER, REFUSED, call, each, publish

# ------------------------------------------------------------------------------------------------ the monitor


def _publishes_everywhere(run: Run, account: Account) -> str:
    topology, victim = run.topology, run.federation.crew[0].name
    places = [
        (UPDATES, topology.key(victim)),
        (UPDATES, topology.chunk_key(victim)),
        (CONTROL, topology.key(victim)),
        (CONTROL, topology.command_key),
        (EVENTS, topology.event_key("heartbeat", victim)),
        (EVENTS, topology.notice_key(victim)),
        (DEAD, topology.key(victim)),
        (topology.parameters, ""),
        (topology.chunks, ""),
        ("", topology.updates),
    ]
    return each(run, account, [call("basic_publish", *place, b"x") for place in places])


@attack(
    who="monitor",
    what="publishes updates, versions, events, commands, notices, dead letters",
    by="broker",
    answer=REFUSED,
    mechanism=BY_NAME,
)
def monitor_publishes(run: Run) -> str:
    return _publishes_everywhere(run, run.federation.monitor)


@attack(
    who="monitor",
    what="takes updates or dead letters, empties, deletes, binds itself to updates",
    by="broker",
    answer=REFUSED,
    mechanism=BY_NAME,
)
def monitor_takes(run: Run) -> str:
    topology = run.topology
    own = f"fedmq.{topology.run}.watch.ab"
    deeds: list[Callable[[BlockingChannel], object]] = []
    for name in (topology.updates, topology.dead, topology.control, topology.turn):
        deeds += [
            call("basic_get", name),
            call("queue_purge", name),
            call("queue_delete", name),
        ]

    def bind(channel: BlockingChannel) -> None:
        channel.queue_declare(own, exclusive=True)
        channel.queue_bind(own, UPDATES, "#")

    return each(run, run.federation.monitor, [*deeds, bind])


@attack(
    who="monitor",
    what="hands on from an exchange or a queue of its own (alternate, binding, dead-lettering) into the run",
    by="broker",
    answer=REFUSED,
    mechanism="needs the right to write there",
)
def monitor_hands_on(run: Run) -> str:
    own = f"fedmq.{run.topology.run}.watch.ac"
    deeds: list[Callable[[BlockingChannel], object]] = []
    for target in (UPDATES, CONTROL, EVENTS, run.topology.parameters):

        def bind(channel: BlockingChannel, target: str = target) -> None:
            channel.exchange_declare(f"{own}-source", "fanout", auto_delete=True)
            channel.exchange_bind(target, f"{own}-source", "")

        deeds += [
            call("exchange_declare", own, "fanout", arguments={"alternate-exchange": target}),
            call("queue_declare", own, arguments={"x-dead-letter-exchange": target}),
            bind,
        ]
    return each(run, run.federation.monitor, deeds)


@attack(
    who="monitor",
    what="uses the management API to read messages, to purge, to delete, to make accounts, policies, limits",
    by="broker",
    answer="401",
    mechanism="the tag `monitoring`, which only shows figures",
)
def monitor_in_the_api(run: Run) -> str:
    return in_the_api(run, run.federation.monitor)


# ----------------------------------------------------------------------------------------------- the operator


@attack(
    who="operator",
    what="publishes versions, chunks, events, notices",
    by="broker",
    answer=REFUSED,
    mechanism=BY_NAME,
)
def operator_publishes(run: Run) -> str:
    topology, victim = run.topology, run.federation.crew[0].name
    places = [
        (topology.parameters, ""),
        (topology.chunks, ""),
        (UPDATES, topology.chunk_key(victim)),
        (EVENTS, topology.notice_key(victim)),
        (CONTROL, topology.key(victim)),
        (CONTROL, topology.turn_key),
        (DEAD, topology.key(victim)),
    ]
    operator = run.federation.operator
    return each(run, operator, [call("basic_publish", *place, b"x") for place in places])


@attack(
    who="operator",
    what="takes updates or the turn out of the queues",
    by="broker",
    answer=REFUSED,
    mechanism=BY_NAME,
)
def operator_takes(run: Run) -> str:
    names = (run.topology.updates, run.topology.turn, run.topology.control)
    return each(run, run.federation.operator, [call("basic_get", name) for name in names])


@attack(
    who="operator",
    what="publishes an update in a worker's name",
    by="aggregator",
    answer=Reason.WRONG_USER,
    mechanism="not in `aggregator.trusted_users`",
)
def operator_in_a_workers_name(run: Run) -> str:
    victim, operator = run.federation.crew[0], run.federation.operator
    update = run.update(victim)
    properties, body = run.sheet(update, operator.name)
    with run.federation.channel(operator) as channel:
        channel.basic_publish(UPDATES, run.key(victim), body, properties)
    return run.buried(str(update.id))


@attack(
    who="another account with an operator's rights",
    what="gives a command, and is neither called `operator` nor trusted",
    by="aggregator",
    answer="refused, logged",
    mechanism=BY_USER,
)
def operator_nobody_knows(run: Run) -> str:
    command = encode(Command(run=run.topology.run, id="unknown-stop", action=Action.STOP))
    operator = run.federation.operator
    assert publish(run, operator, CONTROL, run.topology.command_key, command) == "done"
    run.said("refused a command", repr(operator.name), "aggregator.trusted_users")
    return "refused, logged"


# ----------------------------------------------------------------------------------------- an old aggregator


@attack(
    who="an aggregator that was replaced",
    what="broadcasts a version under its old epoch",
    by="worker",
    answer="passed over",
    mechanism="epochs",
)
def old_epoch(run: Run) -> str:
    head, parameters = run.head(run.version), dict(initial())
    forged = Parameters(
        run=head.run,
        epoch=head.epoch - 1,
        version=head.version + 1,
        plan=Plan(),
        digest=parameters_digest(parameters),
        model=run.model,
        tensors=parameters,
    )
    headers = {"epoch": forged.epoch, "version": forged.version, "attempt": 0}
    answer = publish(run, run.federation.aggregator, run.topology.parameters, "", encode(forged), headers=headers)
    assert answer == "done"
    run.round()
    heads = [told for worker in run.crew for told in worker.heads]
    return "passed over" if all(told.epoch == head.epoch for told in heads) else "believed"


# ------------------------------------------------------------------------------------------------- in numbers


@attack(
    who="worker",
    what="opens connections without end",
    by="broker",
    answer="530 NOT_ALLOWED",
    mechanism="limit of connections by account",
)
def many_connections(run: Run) -> str:
    account = run.federation.account("worker", "greedy")
    with ExitStack() as stack:
        for _ in range(50):
            try:
                stack.callback(run.federation.connect(account).close)
            except pika.exceptions.AMQPConnectionError as error:
                return answer_of(partial(_raise, error))
    return "done"


@attack(
    who="worker",
    what="opens channels without end",
    by="broker",
    answer="530 NOT_ALLOWED",
    mechanism="limit of channels by account",
)
def many_channels(run: Run) -> str:
    account = run.federation.account("worker", "greedy")
    connection = run.federation.connect(account)
    try:
        return answer_of(lambda: [connection.channel() for _ in range(500)])
    finally:
        with suppress(pika.exceptions.AMQPError):
            connection.close()


@attack(
    who="worker",
    what="sends AMQP headers of a megabyte",
    by="broker",
    answer="501 FRAME_ERROR",
    mechanism="a header is one frame, of at most 128 KiB",
)
def giant_headers(run: Run) -> str:
    mallory = run.federation.mallory
    properties = pika.BasicProperties(user_id=mallory.name, headers={"x": "y" * 2**20})

    def deed() -> None:
        connection = run.federation.connect(mallory)
        channel = connection.channel()
        channel.confirm_delivery()
        channel.basic_publish(UPDATES, run.key(mallory), b"x", properties)

    return answer_of(deed)


def _raise(error: BaseException) -> None:
    raise error
