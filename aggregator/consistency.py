"""Whether the settings of ``[aggregator]`` go together, and make a run that can come to its end."""

from __future__ import annotations

from aggregator.schedules import schedule_of
from aggregator.strategies import STRATEGIES, Gather, Strategy, stepping, strategy_of
from aggregator.strategies.base import scaled
from aggregator.table import AggregatorTable
from broker.codecs import codec_of
from broker.errors import ConfigError
from broker.messages import Mode, Rounds

__all__ = ["require_consistent"]

#: Strategies that know what to do with control variates.
WITH_VARIATES = ("mean", "fednova")


def require_consistent(table: AggregatorTable) -> None:
    """Raise ValueError with what does not go together, and what to do about it."""
    if table.rounds is Rounds.BUFFERED and table.minimum_updates > table.buffer_size:
        raise ValueError("minimum_updates is larger than buffer_size, so that a deadline could never close a round")
    if table.mode is Mode.PARAMETERS:
        _check_parameters(table)
    if table.rounds is Rounds.BUFFERED and table.most_per_worker == 0:
        raise ValueError(
            f"worker_share = {table.worker_share} of a buffer of {table.buffer_size} is less than one update"
        )
    if table.fairness != "none" and table.rounds is Rounds.SYNCHRONOUS:
        raise ValueError("fairness is for buffered rounds; in synchronous ones all workers answer equally often")
    if table.normalize_staleness and table.strategy in STRATEGIES.own and table.strategy != "mean":
        raise ValueError(f"normalize_staleness is for strategy = 'mean', and not for {table.strategy!r}")
    if table.nesterov and not (table.optimizer == "sgd" and table.momentum):
        raise ValueError("nesterov is for optimizer = 'sgd' with a momentum")
    if table.optimizer == "adagrad" and table.momentum:
        raise ValueError("adagrad has no momentum; take yogi, or leave momentum at 0")
    _check_work(table)
    _check_schedule(table)
    try:
        strategy = strategy_of(table.recipe())
        scaled(strategy, 1.0 if table.fairness == "none" else 0.5)
        stepping(table.recipe())
        schedule_of(table.recipe())
    except ConfigError as error:
        raise ValueError(str(error)) from None
    _check_strategy(table, strategy)


def _check_work(table: AggregatorTable) -> None:
    if table.mode is Mode.GRADIENT:
        _require_deltas(table)
    if table.local_steps_min > table.local_steps_max:
        raise ValueError(f"local_steps_min is larger than local_steps_max = {table.local_steps_max}")
    if table.personalise_steps and not table.evaluate_every:
        raise ValueError("personalise_steps is part of what evaluate_every asks for: set that, too")
    if table.control_variates and table.strategy not in WITH_VARIATES:
        raise ValueError(f"control_variates goes with strategy {' or '.join(WITH_VARIATES)}, which add them up")
    if table.control_variates and table.proximal:
        raise ValueError("control_variates and proximal correct the same drift twice: set one of them")


def _require_deltas(table: AggregatorTable) -> None:
    if table.strategy == "fednova":
        raise ValueError('strategy = "fednova" goes by local steps, and a gradient has none: set mode = "delta"')
    if table.control_variates:
        raise ValueError('control_variates corrects local steps, and a gradient has none: set mode = "delta"')
    if table.update_seconds:
        raise ValueError('update_seconds chooses local steps, and a gradient has none: set mode = "delta"')
    if table.proximal:
        raise ValueError('proximal pulls at local steps, and a gradient has none: set mode = "delta"')


def _check_parameters(table: AggregatorTable) -> None:
    if table.optimizer == "sgd" and table.effective_learning_rate > 1:
        raise ValueError("with mode = 'parameters', learning_rate is how far to go towards them: at most 1")
    if table.normalize_staleness:
        raise ValueError("with mode = 'parameters', staleness says how far to go; normalize_staleness undoes it")
    if table.strategy in STRATEGIES.own and table.strategy != "mean":
        raise ValueError(f"strategy = {table.strategy!r} takes steps: set mode = 'delta'")
    if table.worker_momentum:
        raise ValueError("worker_momentum is an average of changes: set mode = 'delta'")
    if table.control_variates:
        raise ValueError("control_variates are made of changes: set mode = 'delta'")
    if table.update_codec and codec_of(table.update_codec).feedback:
        raise ValueError(f"update_codec = {table.update_codec!r} leaves most of an update out; parameters need all")


def _check_schedule(table: AggregatorTable) -> None:
    length = table.effective_schedule_rounds
    if table.schedule in ("step", "cosine") and length is None:
        also = " or stop_after_rounds" if table.schedule == "cosine" else ""
        raise ValueError(f"schedule = {table.schedule!r} needs schedule_rounds{also}")
    if table.schedule == "cosine" and length is not None and length <= table.warmup_rounds:
        raise ValueError(f"the cosine ends at version {length}, which is within the warm-up; raise schedule_rounds")


def _check_strategy(table: AggregatorTable, strategy: Strategy) -> None:
    if isinstance(strategy, Gather):
        _require_enough(table, strategy.rule.least())
    elif table.pre_aggregation and table.strategy in STRATEGIES.own:
        raise ValueError(f"pre_aggregation goes before a robust rule, and strategy = {table.strategy!r} is none")


def _require_enough(table: AggregatorTable, least: int) -> None:
    """Raise :class:`ValueError` if a rule over all updates of a round could be given fewer than ``least``."""
    if table.weighting == "examples":
        raise ValueError(
            f"strategy {table.strategy!r} does not go with weighting 'examples', which workers could lie about: "
            "leave it out, or say 'uniform'"
        )
    before = f" and pre_aggregation = {table.pre_aggregation!r}" if table.pre_aggregation else ""
    what = f"with byzantine = {table.byzantine}{before}, strategy {table.strategy!r} is of no use below {least} updates"
    if table.rounds is Rounds.BUFFERED and table.buffer_size < least:
        raise ValueError(f"{what}: raise buffer_size")
    if (table.rounds is Rounds.SYNCHRONOUS or table.deadline is not None) and table.minimum_updates < least:
        raise ValueError(f"{what}, and a round could close with {table.minimum_updates}: raise minimum_updates")
