"""``fedmq``: one command for everything. Each one is imported when it is used, see ``fedmq.lazy``."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from fedmq.lazy import Command, LazyGroup

__all__ = ["EXIT_CODES", "app", "main"]

#: What the shell is told, by code; with more words in docs/operating.md.
EXIT_CODES = {
    0: "done",
    1: "anything else, or doctor has found a problem",
    2: "a setting or an option is wrong",
    3: "the task",
    4: "the broker refused, or cannot be reached",
    5: "the run's folder",
    6: "the aggregator has not answered yet",
}


#: All commands, in the order in which they are shown. The summary is the first paragraph of the command's own help.
COMMANDS = {
    "demo": Command(
        "fedmq.begin:demo",
        "Train on handwritten digits: an aggregator, an evaluator and four workers on this machine.",
    ),
    "init": Command(
        "fedmq.begin:init",
        "Make a run's first checkpoint: version 0, with the parameters of the task's model.",
    ),
    "config": Command("fedmq.showconfig:config", "Show the settings in force, and where each one was set."),
    "aggregator": Command(
        "aggregator.cli:aggregator",
        "Buffer updates, apply them, make them durable, broadcast new versions, until the run is done.",
    ),
    "worker": Command(
        "worker_client.cli:worker",
        "Train on this machine's data for a run, until the run is over or SIGTERM.",
    ),
    "evaluate": Command(
        "worker_client.cli:evaluate",
        "Evaluate each version of a run on the task's held-out data, until the run is over or SIGTERM.",
    ),
    "set": Command("fedmq.control:set_", "Change settings of a running run, from its next round on."),
    "release": Command(
        "fedmq.control:release",
        "End a worker's quarantine now. Its score is half of what leads there, so that it comes back sooner.",
    ),
    "pause": Command(
        "fedmq.control:pause",
        "Have the workers stop training after what they have in hand; no round closes until 'fedmq resume'.",
    ),
    "resume": Command("fedmq.control:resume", "Go on after 'fedmq pause'."),
    "stop": Command(
        "fedmq.control:stop",
        "End the run: what is in the buffer makes its last version, workers leave, the aggregator exits.",
    ),
    "status": Command(
        "fedmq.status:status",
        "Show how a run is doing: rates, staleness, workers and what is wrong with them, queues, alarms, disk.",
    ),
    "history": Command(
        "fedmq.lineage:history",
        "Show how a run's versions came to be: updates, staleness, weights, digests, settings, commands, evaluations.",
    ),
    "replay": Command(
        "fedmq.lineage:replay",
        "Rebuild a version from the updates that were kept (aggregator.keep_updates), and check each one on the way.",
    ),
    "rollback": Command(
        "fedmq.lineage:rollback",
        "Make an earlier version the run's newest, under a new number; the run may go on meanwhile.",
    ),
    "compress": Command(
        "fedmq.compress:compress",
        "Show what each codec makes of a model's tensors: bytes, error, and GB of float32 a second on one core.",
    ),
    "contribution": Command(
        "fedmq.contribution:contribution",
        "Calculate what each worker brought, from kept updates (aggregator.keep_updates) and the task's held-out data.",
    ),
    "dashboard": Command(
        "fedmq.dashboard.command:dashboard",
        "Serve a page on this machine that shows a run as it goes on: curves, workers, queues, events.",
    ),
    "workers": Command(
        "fedmq.workers:workers",
        "Show the workers of a run: updates, pace, staleness, agreement, rejections, score, quarantine, contribution.",
    ),
    "report": Command(
        "fedmq.report:report",
        "Tell of a run on one page of HTML, with figures: loss, metrics, staleness, workers, lineage, settings.",
    ),
    "runs": Command(
        "fedmq.runs:runs",
        "List the runs on a broker: version, aggregators, workers, what waits, dead letters, bytes.",
    ),
    "doctor": Command(
        "fedmq.doctor.command:doctor",
        "Examine broker, run, machine and settings: what is well, what is not, and what to change.",
    ),
    "track": Command(
        "fedmq.track:track",
        "Hand a run's numbers to a tracker, from where that stands: TensorBoard, MLflow, Weights & Biases.",
    ),
    "simulate": Command(
        "fedmq.simulate:simulate",
        "Let a federation happen in virtual time: the real aggregation code, with workers and faults that are made up.",
    ),
    "keys": Command("fedmq.keys:app", "Keys for signatures: make them, and say whose are believed."),
    "checkpoint": Command(
        "aggregator.checkpoints:app",
        "A run's checkpoints: list them, look into one, verify them, export the model.",
    ),
    "dead": Command(
        "broker.dead:app",
        "A run's rejected updates: look at them, publish them again, drop them.",
    ),
    "broker": Command(
        "broker.cli:app",
        "Look at a RabbitMQ, set it up for a federation: accounts, certificates, policies; or run a private one.",
    ),
}


class Commands(LazyGroup):
    """The commands of :data:`COMMANDS`."""

    table = COMMANDS


app = typer.Typer(
    cls=Commands,
    help="Asynchronous federated learning over RabbitMQ: nothing lost, nothing counted twice.",
    epilog="Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        try:
            known = version("fedmq")
        except PackageNotFoundError:
            known = "(not installed; run from its source)"
        typer.echo(f"fedmq {known}")
        raise typer.Exit


@app.callback()
def _main(
    *,
    version_: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None:
    del version_


def main() -> None:
    """The console script."""
    app(prog_name="fedmq")


if __name__ == "__main__":
    main()
