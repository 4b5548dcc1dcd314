"""``fedmq set | pause | resume | stop | release``: change a run while it goes on, through the broker."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from aggregator.config import AggregatorConfig
from broker.amqp.operator import Operator
from broker.console import (
    BrokerOption,
    ConfigOption,
    RunOption,
    VerboseOption,
    errors,
    guard,
    parse_flags,
    say,
    set_up_logging,
)
from broker.errors import ConfigError
from broker.messages import NAME_PATTERN, Action, Command, Scalar
from broker.settings import Settings, load
from broker.signing import COMMAND, Keyring, Signer, sealing_of
from broker.topology import Topology

__all__ = ["pause", "release", "resume", "set_", "stop"]

#: What the field calls it, and what it is called here.
ALIASES = {"server_lr": "learning_rate", "lr": "learning_rate"}

#: Exit code for a command that waits in the run's queue.
UNANSWERED = 6


WaitOption = Annotated[float, typer.Option("--wait", min=0.0, help="Seconds to wait for the aggregator's answer.")]
KeyOption = Annotated[
    Path | None, typer.Option("--key", help="Sign it with this private key; see aggregator.operator_keys_file.")
]
KeysOption = Annotated[
    Path | None,
    typer.Option("--aggregator-keys", help="Believe only an answer that one of these public keys has signed."),
]
WorkerArgument = Annotated[str, typer.Argument(metavar="WORKER", help="Its name.")]
ChangesArgument = Annotated[list[str], typer.Argument(metavar="NAME=VALUE...", help="Settings of the aggregator.")]


def set_(
    changes: ChangesArgument,
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    broker: BrokerOption = None,
    key: KeyOption = None,
    aggregator_keys: KeysOption = None,
    wait: WaitOption = 10.0,
    verbose: VerboseOption = 0,
) -> None:
    """Change settings of a running run, from its next round on.

    They stay over restarts and go before the settings file, until they are changed again; NAME= with nothing
    behind it takes a change back. The run's history tells of each change, and which settings made which version.

    Exit code 6: the command waits in the run's queue, and no aggregator has answered yet.

    Example: fedmq set --run digits buffer_size=16 learning_rate=0.5
    """
    with guard():
        set_up_logging(verbose, quiet=not verbose)
        _give(Action.SET, _settings(config, run, broker), Trust(key, aggregator_keys), wait, _parsed(changes))


@dataclass(frozen=True, slots=True)
class Trust:
    """Files: as whom an operator speaks, and whom they believe."""

    key: Path | None
    aggregator_keys: Path | None


def _plain(action: Action, text: str) -> Callable[..., None]:
    """A command without settings; ``text`` is its help."""

    def command(
        *,
        config: ConfigOption = None,
        run: RunOption = None,
        broker: BrokerOption = None,
        key: KeyOption = None,
        aggregator_keys: KeysOption = None,
        wait: WaitOption = 10.0,
        verbose: VerboseOption = 0,
    ) -> None:
        with guard():
            set_up_logging(verbose, quiet=not verbose)
            _give(action, _settings(config, run, broker), Trust(key, aggregator_keys), wait)

    command.__doc__ = text
    return command


def release(
    worker: WorkerArgument,
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    broker: BrokerOption = None,
    key: KeyOption = None,
    aggregator_keys: KeysOption = None,
    wait: WaitOption = 10.0,
    verbose: VerboseOption = 0,
) -> None:
    """End a worker's quarantine now. Its score is half of what leads there, so that it comes back sooner.

    Nothing happens if it is in none. 'fedmq workers' shows who is. Exit code 6: the command waits in the run's queue,
    and no aggregator has answered yet.

    Example: fedmq release w3 --run digits
    """
    with guard():
        set_up_logging(verbose, quiet=not verbose)
        if not re.fullmatch(NAME_PATTERN, worker):
            raise ConfigError(f"{worker!r} cannot be a worker's name: letters, digits, dash and underscore, up to 64")
        _give(Action.RELEASE, _settings(config, run, broker), Trust(key, aggregator_keys), wait, {"worker": worker})


pause = _plain(
    Action.PAUSE,
    """Have the workers stop training after what they have in hand; no round closes until 'fedmq resume'.

    Exit code 6: the command waits in the run's queue, and no aggregator has answered yet.

    Example: fedmq pause --run digits
    """,
)
resume = _plain(
    Action.RESUME,
    """Go on after 'fedmq pause'.

    Exit code 6: the command waits in the run's queue, and no aggregator has answered yet.

    Example: fedmq resume --run digits
    """,
)
stop = _plain(
    Action.STOP,
    """End the run: what is in the buffer makes its last version, workers leave, the aggregator exits.

    To go on with it later: 'fedmq aggregator --drop-changes', and then the workers. Exit code 6: the command waits in
    the run's queue, and no aggregator has answered yet.

    Example: fedmq stop --run digits
    """,
)


def _settings(config: ConfigOption, run: RunOption, broker: BrokerOption) -> Settings:
    return load({}, file=config, flags=parse_flags([], run=run, broker__url=broker))


def _parsed(pairs: list[str]) -> dict[str, Scalar]:
    changes: dict[str, Scalar] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        name = name.strip().removeprefix("aggregator.")
        name = ALIASES.get(name, name)
        if not equals:
            raise ConfigError(f"{pair!r}: give it as NAME=VALUE, like buffer_size=16; NAME= takes a change back")
        changes[name] = value.strip() or None
        AggregatorConfig.check(name, changes[name])
    return changes


def _give(
    action: Action, settings: Settings, trust: Trust, wait: float, changes: dict[str, Scalar] | None = None
) -> None:
    sealing = sealing_of(Signer.load(trust.key, settings.run, "--key"), COMMAND)
    keys = Keyring.load(trust.aggregator_keys, settings.run, "--aggregator-keys")
    command = Command(run=settings.run, id=secrets.token_hex(8), action=action, changes=changes or {}, time=time.time())
    with Operator(settings.broker, Topology(settings.run), keys) as operator:
        answer = operator.give(command, wait=wait, sealing=sealing)
    if answer is None:
        text = (
            f"no aggregator of run {settings.run!r} has answered in {wait:g} s: it is away, or cannot write its "
            "checkpoint (its log says so). The command waits in the run's queue, and is executed when it can be"
        )
        errors.print(text, highlight=False, soft_wrap=True, style="yellow")
        raise typer.Exit(UNANSWERED)
    if answer.accepted:
        say(answer.text)
    else:
        raise ConfigError(f"refused: {answer.text}")
