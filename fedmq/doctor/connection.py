"""What the doctor makes of how a broker greets, and of what was tried on it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence

from broker.addresses import is_loopback
from broker.amqp.trial import Examination, Greeting, Role, Trial
from broker.errors import AccessRefused, BrokerUnreachable, TopologyMismatch
from broker.permissions import commands as commands_for
from broker.permissions import rights_of
from fedmq.doctor.findings import Finding, Level, note, ok, problem

__all__ = ["TESTED", "of_greeting", "of_power", "of_sizes", "of_trials", "without_advice_of_power"]

#: What all tests run on, as docs/rabbitmq-versions.md says.
TESTED = ((3, 10, 8), (4, 0, 5))
#: A connection has a handful of channels, and one more for each thing that is looked at.
CHANNELS = 16
FRAME_BYTES = 131072
SLOW_SECONDS = 1.0
#: What lets a user into the admin UI, the most powerful first.
TAGS = ("administrator", "policymaker", "monitoring", "management")
#: Time enough to renew a certificate.
EXPIRES_SOON_DAYS = 21
#: Of operations that were refused, so many are named.
NAMED = 4


def of_greeting(greeting: Greeting, *, heartbeat: int) -> list[Finding]:
    """Version, and what was agreed on; ``heartbeat`` is what was asked for."""
    if greeting.error is not None:
        advice = "look at broker.url, the firewall, and whether RabbitMQ runs there"
        if not isinstance(greeting.error, BrokerUnreachable):
            advice = ""
        return [problem("broker", f"no connection: {greeting.error}", advice)]
    found = [_of_version(greeting), *_of_line(greeting)]
    if not greeting.heartbeat:
        found.append(
            problem(
                "time-outs",
                f"{greeting.address} has switched heartbeats off: a connection that breaks silently is never noticed",
                f"heartbeat = {heartbeat} in its rabbitmq.conf",
            )
        )
    else:
        found.append(ok("time-outs", f"heartbeat of {greeting.heartbeat} s: silence is noticed after two of them"))
    if 0 < greeting.channel_max < CHANNELS:
        found.append(
            problem(
                "limits",
                f"{greeting.address} allows {greeting.channel_max} channels in a connection; fedmq needs {CHANNELS}",
                f"channel_max = {max(64, CHANNELS)} or more in its rabbitmq.conf",
            )
        )
    if 0 < greeting.frame_max < FRAME_BYTES:
        found.append(
            note(
                "limits",
                f"{greeting.address} takes frames of {greeting.frame_max:,} bytes: large messages travel slowly",
                f"frame_max = {FRAME_BYTES} in its rabbitmq.conf",
            )
        )
    if greeting.seconds > SLOW_SECONDS:
        found.append(
            note(
                "broker",
                f"it took {greeting.seconds:.1f} s to connect to {greeting.address}",
                "look at the line, at name servers, and at the broker's load",
            )
        )
    return found


def _of_line(greeting: Greeting) -> list[Finding]:
    """Whether others can read along, and how long the certificate still holds."""
    if greeting.tls is None:
        if is_loopback(greeting.address.rpartition(":")[0]):
            return [ok("tls", f"{greeting.address} is on this machine: no TLS, and none needed")]
        text = f"{greeting.address} is spoken to without TLS: passwords and models can be read and altered on the way"
        return [note("tls", text, "amqps:// in broker.url (docs/tls.md); without broker.allow_plain it is refused")]
    tls = greeting.tls
    text = f"{tls.version} with {tls.cipher}; the broker's certificate expires in {tls.days_left:.0f} days"
    if tls.days_left < EXPIRES_SOON_DAYS:
        return [note("tls", text, "renew it: from then on nobody connects any more, and what stands is not ended")]
    return [ok("tls", text)]


def _of_version(greeting: Greeting) -> Finding:
    text = f"{greeting.product} at {greeting.address}, connected in {1000 * greeting.seconds:.0f} ms"
    if greeting.version in TESTED:
        return ok("broker", text)
    tested = " and ".join(".".join(map(str, version)) for version in TESTED)
    return note(
        "broker", f"{text}: tests run on {tested}", "docs/rabbitmq-versions.md says what differs between versions"
    )


def of_trials(
    examination: Examination, run: str, worker: str, *, roles: Sequence[Role], is_asked: bool
) -> list[Finding]:
    """Permissions by role, and objects of the run that are otherwise than they should be.

    Of two roles one is enough, unless it was asked for (``is_asked``): a worker's account need not be able to do what
    an aggregator does.
    """
    greeting = next((one for one in examination.greetings if one.error is None), None)
    if greeting is None:
        return []
    refused = {role: [t for t in examination.trials if t.role == role and _is_refused(t)] for role in roles}
    enough = not is_asked and any(not trials for trials in refused.values())
    found = [
        _of_role(role, refused[role], examination.trials, greeting, (run, worker), enough=enough) for role in roles
    ]
    if examination.is_blocked:
        text = "whether this user may publish was not tried, since the broker takes no messages for now"
        found.append(note("permissions", text, "again when the alarm is over"))
    for trial in examination.trials:
        if isinstance(trial.error, TopologyMismatch):
            found.append(problem("objects", str(trial.error)))
        elif trial.error is not None and trial.was_tried and not _is_refused(trial):
            found.append(problem("permissions", f"{trial.what}: {trial.error}", "look at the broker's log"))
    if examination.left:
        found.append(
            note("objects", f"made for the trial and in use meanwhile: {', '.join(examination.left)}", "nothing to do")
        )
    return found


def _of_role(
    role: Role,
    refused: Sequence[Trial],
    trials: Sequence[Trial],
    greeting: Greeting,
    names: tuple[str, str],
    *,
    enough: bool,
) -> Finding:
    run, worker = names
    who = f"user {greeting.user!r}"
    tried = [trial for trial in trials if trial.role == role and trial.was_tried]
    untried = [trial for trial in trials if trial.role == role and not trial.was_tried]
    a_role = "an aggregator" if role == "aggregator" else "a worker"
    if refused:
        named = ", ".join(trial.what for trial in refused[:NAMED])
        more = f" and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
        level = Level.NOTE if enough else Level.PROBLEM
        text = f"{who} may not be {a_role} of run {run!r}: refused are {named}{more}"
        rights = rights_of(role, greeting.user, run=run, worker=worker if role == "worker" else "")
        commands = commands_for(rights, greeting.vhost, greeting.user)
        if not any("topic" in str(trial.error).partition("topic):")[2] for trial in refused):
            commands = commands[:1]
        return Finding("permissions", level, text, " && ".join(commands))
    if untried:
        named = ", ".join(trial.what for trial in untried[:NAMED])
        return note(
            "permissions",
            f"{who} may do what could be tried of {a_role} ({len(tried)} operations); not tried, since no aggregator "
            f"has declared run {run!r} yet: {named}" + (" …" if len(untried) > NAMED else ""),
            "again when the aggregator has been started, or as the aggregator's user",
        )
    return ok("permissions", f"{who} may do all that {a_role} of run {run!r} does ({len(tried)} operations tried)")


def of_power(examination: Examination, worker: str, tags: Collection[str]) -> list[Finding]:
    """Whether a worker's account can do more than work.

    Args:
        examination: as a worker alone.
        worker: the worker's name.
        tags: the account's, as the management API tells them; none if it does not.
    """
    greeting = next((one for one in examination.greetings if one.error is None), None)
    if greeting is None:
        return []
    found: list[Finding] = []
    excess = list(examination.excess)
    if ruling := next((tag for tag in TAGS if tag in tags), ""):
        excess.insert(0, f"log in to the admin UI as {ruling}")
    if excess:
        found.append(
            note(
                "permissions",
                f"user {greeting.user!r} may do more than a worker needs: {', '.join(excess)}. Whoever has this "
                "machine's address may do so, too",
                f"an account of its own: fedmq broker add-worker {worker} --vhost {shlex.quote(greeting.vhost)}",
            )
        )
    elif not examination.is_blocked:
        found.append(ok("permissions", f"user {greeting.user!r} may do nothing that a worker does not need"))
    if greeting.user != worker:
        found.append(
            note(
                "permissions",
                f"user {greeting.user!r} is not called as worker {worker!r}: its updates are rejected as wrong-user, "
                "unless the aggregator logs in as that user, too",
                f"fedmq broker add-worker {worker} --vhost {shlex.quote(greeting.vhost)}, or --name {greeting.user}",
            )
        )
    return found


def without_advice_of_power(findings: Sequence[Finding]) -> list[Finding]:
    """Of what the management API told a worker: that it told nothing is as it should be, and no reason for a tag."""
    is_told_off = any(
        finding.area == "management" and "may not use the admin UI" in finding.text for finding in findings
    )
    if not is_told_off:
        return list(findings)
    text = "no login for a worker, as it should be; fedmq doctor as the monitor looks at queues, policies and alarms"
    return [finding for finding in findings if finding.area != "management"] + [ok("management", text)]


def _is_refused(trial: Trial) -> bool:
    return isinstance(trial.error, AccessRefused)


def of_sizes(examination: Examination, *, chunk_bytes: int) -> list[Finding]:
    """Whether a chunk fits into a message, and whether messages are taken at all."""
    found: list[Finding] = []
    if examination.is_blocked:
        found.append(
            problem(
                "broker",
                "the broker takes no messages for now: a memory or disk alarm. Updates wait with the workers",
                "rabbitmq-diagnostics alarms; then give it memory (vm_memory_high_watermark) or disk space",
            )
        )
    if examination.largest is None:
        return found
    if examination.limit is None:
        return [*found, ok("limits", f"a message of {examination.largest:,} bytes (a chunk) is taken")]
    fits = max(65536, 2 ** (examination.limit.bit_length() - 1) // 2)
    text = f"the broker takes messages of {examination.limit:,} bytes, broker.chunk_bytes is {chunk_bytes:,}"
    advice = f"broker.chunk_bytes = {fits} on the aggregator and all workers, or max_message_size in its rabbitmq.conf"
    if examination.limit < 2 * 65536:
        return [*found, problem("limits", f"{text}: too little for fedmq", "max_message_size in its rabbitmq.conf")]
    return [*found, note("limits", f"{text}: the first message of each connection is refused, and cut anew", advice)]
