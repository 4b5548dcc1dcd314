"""``fedmq track``: a run's numbers for a tracker, whether the run is over or goes on."""

from __future__ import annotations

import tomllib
from typing import Annotated, Any

import typer

from aggregator.checkpoint import CheckpointStore
from aggregator.checkpoints import require_some
from aggregator.cli import FolderOption, checkpoint_folder, run_folder
from aggregator.config import AggregatorConfig
from aggregator.tracking import trackers_of
from aggregator.tracking.follow import Follower
from broker.console import (
    ConfigOption,
    RunOption,
    SetOption,
    VerboseOption,
    bar,
    guard,
    parse_flags,
    say,
    set_up_logging,
)
from broker.errors import FedmqError
from broker.settings import Settings, load, plain

__all__ = ["track"]


def track(
    tracker: Annotated[str, typer.Argument(help="tensorboard, mlflow, wandb, or one of your own.")],
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    folder: FolderOption = None,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Hand a run's numbers to a tracker, from where that stands: TensorBoard, MLflow, Weights & Biases.

    An aggregator with aggregator.tracking does so by itself while the run goes on; use this for a run that was made
    without, or whose tracker could not be reached.

    Example: fedmq track tensorboard --run digits
    """
    with guard():
        set_up_logging(verbose, quiet=not verbose)
        flags = parse_flags(settings or [], run=run, aggregator__folder=folder)
        read = load({"aggregator": AggregatorConfig}, file=config, flags=flags)
        store = CheckpointStore(checkpoint_folder(read), read.run)
        require_some(read, store)
        store.head()  # of this run?
        (opens,) = trackers_of([tracker]).values()
        getattr(opens, "require", lambda: None)()
        follower = Follower(tracker, opens, run=read.run, folder=run_folder(read), settings=_settings(read))
        with bar(f"handing over to {tracker}"):
            count = _all(follower)
        say(f"{count:,} lines of the history of run {read.run!r} are new to {tracker}")


def _all(follower: Follower) -> int:
    """Raises :class:`FedmqError`."""
    total = 0
    try:
        while count := follower.step():
            total += count
    except FedmqError:
        raise
    except Exception as error:
        raise FedmqError(f"{follower.name}: {type(error).__name__}: {error}") from error
    finally:
        follower.close()
    return total


def _settings(read: Settings) -> dict[str, Any]:
    """Those that the run's aggregator had, if they are known; else those of now."""
    try:
        return tomllib.loads((run_folder(read) / "config.toml").read_text())
    except (OSError, ValueError):
        return plain(read)
