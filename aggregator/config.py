"""``[aggregator]``: how a run goes. Everything that shapes the training is said here and travels to the workers."""

from __future__ import annotations

import difflib
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from aggregator.core.fairness import MOST, Fairness
from aggregator.core.rounds import Buffered, RoundRule, Synchronous
from aggregator.core.rules import CommitPolicy, Rules
from aggregator.core.screen import NormLimits
from aggregator.core.snapshot import Changes
from aggregator.core.standing import QuarantinePolicy
from aggregator.optimizers import OPTIMIZERS, default_rate
from aggregator.recipe import Recipe
from aggregator.schedules import SCHEDULES, schedule_of
from aggregator.staleness import STALENESSES, weight_of
from aggregator.strategies import STRATEGIES, Gather, Strategy, stepping, strategy_of
from aggregator.strategies.base import gathers, scaled
from broker.codecs import codec_of
from broker.errors import ConfigError, first_problem
from broker.messages import Mode, Rounds, Scalar, Work
from broker.parts import FROM_WIRE, Name
from broker.settings import Table

__all__ = ["LIVE", "AggregatorConfig"]

#: Far more than makes sense, and what every part of the system can hold.
MAX = 2**40

#: A checkpoint in mid-round writes the model twice: less often than every so many updates it must not.
LEAST_IN_COMMIT = 8

Positive = Annotated[int, Field(ge=1, le=MAX)]
Seconds = Annotated[float, Field(gt=0)]

#: What ``fedmq set`` may change on a running run. Not what workers have taken for granted (the mode, the kind of
#: rounds), and not what the connection was made with (commits, which the prefetch follows).
LIVE = frozenset(
    {
        "beta2",
        "buffer_size",
        "byzantine",
        "clip_iterations",
        "clip_radius",
        "deadline",
        "epsilon",
        "evaluate_every",
        "fairness",
        "fairness_window",
        "fraction",
        "learning_rate",
        "linger",
        "max_norm",
        "max_staleness",
        "minimum_updates",
        "momentum",
        "nesterov",
        "norm_factor",
        "normalize_staleness",
        "one_per_worker",
        "optimizer",
        "options",
        "personalise_steps",
        "proximal",
        "pre_aggregation",
        "quarantine_score",
        "quarantine_seconds",
        "schedule",
        "schedule_decay",
        "schedule_floor",
        "schedule_rounds",
        "score_half_life",
        "staleness",
        "staleness_decay",
        "staleness_exponent",
        "staleness_slope",
        "staleness_threshold",
        "stop_after_rounds",
        "strategy",
        "update_codec",
        "updates_per_version",
        "warmup_rounds",
        "weight_decay",
        "weighting",
        "worker_momentum",
        "worker_share",
        "worker_timeout",
    }
)


#: Strategies that know what to do with control variates.
WITH_VARIATES = ("mean", "fednova")

#: Settings of what workers do that the history tells of where they are not 0.
OF_WORK = ("control_variates", "proximal", "worker_momentum")


def _checked_codec(text: str) -> str:
    try:
        return codec_of(text).name if text else ""
    except ConfigError as error:
        raise ValueError(str(error)) from None


class AggregatorConfig(Table):
    """``[aggregator]``: how a run goes; what concerns the workers travels to them with each version."""

    folder: Path | None = None
    """Where checkpoints and the history are kept; ``runs/<run>`` if not set."""

    mode: Mode = Mode.DELTA
    """What workers send: ``delta`` or ``parameters`` after local training, or ``gradient`` at the version."""
    rounds: Rounds = Rounds.BUFFERED
    """When a round closes: ``buffered`` at ``buffer_size`` updates, ``synchronous`` when all have answered."""
    stop_after_rounds: Annotated[int, Field(ge=0, le=MAX)] | None = None
    """The run is done at this version; without it, it goes on until it is stopped."""

    buffer_size: Positive = 10
    """Buffered rounds: updates in a round (K)."""
    max_staleness: Annotated[int, Field(ge=0, le=MAX)] = 20
    """Buffered rounds: updates that started more versions ago are rejected."""
    updates_per_version: Positive | None = None
    """Buffered rounds: updates that one worker may send from one version; ``buffer_size`` if not set. Below it,
    a run with few workers waits for more."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Synchronous rounds: the share of workers that take part; each decides for itself."""
    minimum_updates: Positive = 1
    """Updates without which a round does not close, except at a full buffer."""
    deadline: Seconds | None = None
    """Seconds after which a round closes with ``minimum_updates``."""

    strategy: Annotated[str, AfterValidator(Name(STRATEGIES))] = "mean"
    """How updates become one: their weighted ``mean``; ``fednova``, the mean per local step, for workers that make
    different numbers of them; a robust rule over all updates of a round (``median``, ``trimmed-mean``, ``krum``,
    ``multi-krum``, ``geometric-median``, ``centered-clipping``, ``norm-clipping``); or that of another package. See
    docs/algorithms.md, docs/robustness.md, docs/extending.md."""
    weighting: Literal["examples", "uniform"] | None = None
    """By number of examples or all the same; if not set, uniform for buffered rounds (FedBuff) and by examples
    for synchronous ones (FedAvg)."""
    staleness: Annotated[str, AfterValidator(Name(STALENESSES))] = "polynomial"
    """Weight of a stale update. See docs/algorithms.md."""
    staleness_exponent: Annotated[float, Field(ge=0, le=10)] = 0.5
    """``polynomial``: ``(1 + staleness) ** -staleness_exponent``; FedBuff's is one half."""
    staleness_threshold: Annotated[int, Field(ge=0, le=MAX)] = 4
    """``hinge`` and ``cutoff``: the largest staleness of full weight. ``cutoff`` rejects what is beyond."""
    staleness_slope: Annotated[float, Field(ge=0)] = 10.0
    """``hinge``: beyond the threshold, ``1 / (staleness_slope * (staleness - staleness_threshold) + 1)``."""
    staleness_decay: Annotated[float, Field(ge=0)] = 0.3
    """``exponential``: ``exp(-staleness_decay * staleness)``."""
    normalize_staleness: bool = False
    """Divide a round by the sum of its weights, and not by the number of its updates: stale updates count less beside
    fresh ones, but the step does not become shorter."""

    worker_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Buffered rounds: the greatest part of a buffer that one worker may fill, rounded down; takes at least
    ``1 / worker_share`` workers."""
    fairness: Literal["none", "inverse-rate"] = "none"
    """Buffered rounds: ``inverse-rate`` weighs each update by the inverse of how often its worker's come."""
    fairness_window: Annotated[int, Field(ge=2, le=10_000)] = 100
    """``inverse-rate``: by how many of the last updates rates are told."""

    byzantine: Annotated[int, Field(ge=0, le=MAX)] = 1
    """Robust strategies: bad updates that a round may have. It decides how many are cut off, and how many a round must
    have at least."""
    pre_aggregation: str = ""
    """What goes before a robust strategy: ``nnm`` (each update becomes the mean of those nearest to it),
    ``bucketing:2`` (the means of random groups of two), or both, as ``bucketing:2,nnm``."""
    clip_radius: Annotated[float, Field(gt=0)] | None = None
    """``centered-clipping``, ``norm-clipping``: how far an update counts; if not set, the median of the round."""
    clip_iterations: Annotated[int, Field(ge=1, le=100)] = 3
    """``centered-clipping``: iterations in a round."""
    max_norm: Annotated[float, Field(gt=0)] | None = None
    """The longest update that is taken: the Euclidean norm of all its parameters together; without it, any."""
    norm_factor: Annotated[float, Field(gt=1)] | None = None
    """Updates so many times as long as the median of the last 101 that were taken are rejected; without it, none.
    10 is usual. What is in half precision or in a codec is read once more for it."""
    one_per_worker: bool = False
    """Buffered rounds: one update of each worker in a round, so that a fast one cannot fill it; takes at least
    ``buffer_size`` workers."""
    quarantine_score: Annotated[float, Field(gt=0)] | None = None
    """Updates of a worker whose score is above this are rejected for ``quarantine_seconds``; without it, never. Each
    update that is rejected for what it holds is one point, and with a robust strategy one that points against its
    round's aggregate is up to one. See docs/operating.md."""
    quarantine_seconds: Seconds = 3600.0
    """How long a worker is in quarantine, unless ``fedmq release`` ends it."""
    score_half_life: Positive = 20
    """Versions in which a worker's score falls to one half."""

    optimizer: Annotated[str, AfterValidator(Name(OPTIMIZERS))] = "sgd"
    """Server optimiser. See docs/algorithms.md."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Of the server; if not set, 1 for deltas, 0.1 for gradients and 0.6 for parameters, where it is FedAsync's alpha;
    with adagrad 0.1 (gradients 0.01), with the others 0.01 (0.001)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the server's sgd; for adam, adamw, yogi and lamb it is beta1, 0.9 if not set."""
    nesterov: bool = False
    """Nesterov's momentum, for the server's sgd."""
    beta2: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of the server's adam, adamw and lamb (0.999 if not set) and yogi (0.99)."""
    epsilon: Annotated[float, Field(gt=0)] | None = None
    """Added to the root in the denominator: 1e-8 for adam and adamw if not set, 1e-6 for lamb, 1e-3 for yogi and
    adagrad, where it is the papers' tau."""
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Of the server: adamw and lamb take it off the parameters, the others add it to the gradient (L2)."""
    schedule: Annotated[str, AfterValidator(Name(SCHEDULES))] = "constant"
    """How the server's learning rate changes over the run: ``step``, or ``cosine``. See docs/algorithms.md."""
    schedule_rounds: Positive | None = None
    """``step``: versions after which the rate falls, each time. ``cosine``: the version at which it is at its lowest;
    ``stop_after_rounds`` if not set."""
    schedule_decay: Annotated[float, Field(gt=0, le=1)] = 0.1
    """``step``: what the rate is multiplied by."""
    schedule_floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """``cosine``: the lowest rate, as a part of ``learning_rate``."""
    warmup_rounds: Annotated[int, Field(ge=0, le=MAX)] = 0
    """Versions over which the rate rises to its height, before the schedule begins."""
    options: str = ""
    """Text for strategies, optimisers and the like of other packages, which read it as they like."""

    update_codec: Annotated[str, AfterValidator(_checked_codec)] = ""
    """In which lossy code workers send updates: ``bf16``, ``fp16``, ``int8``, ``eden:1`` to ``eden:4``, ``topk:0.01``;
    empty for none. See docs/compression.md."""

    version_codec: Annotated[str, AfterValidator(_checked_codec)] = ""
    """In which lossy code workers get what a version changes: as ``update_codec``. Those who have missed one get the
    whole version. Takes two more models' worth of the aggregator's memory."""

    proximal: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Deltas: how hard each local step is pulled back to the version that the worker started from (FedProx's mu)."""
    worker_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Workers send an exponential average of their own updates: the share that those before have in it."""

    evaluate_every: Annotated[int, Field(ge=0, le=MAX)] = 0
    """Workers that hold data out (``worker.validation_fraction``) evaluate a version on them whenever so many have
    passed, and the last one; 0 for never. Their figures are put together by examples, with the spread over workers."""
    personalise_steps: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    """And once more after so many local steps from there, as ``personal/…``: what the version is worth to each worker
    as a place to start from."""

    control_variates: bool = False
    """Deltas: workers correct their local steps by how their own gradients differ from everybody's (SCAFFOLD). Updates
    and versions take twice the bytes. Must be the same from ``fedmq init`` on."""

    seed: Annotated[int, Field(ge=0, le=2**53)] = 0
    """From which workers are sampled."""
    commit_count: Annotated[int, Field(ge=1, le=1000)] = 32
    """Unacknowledged updates at which a checkpoint is written in mid-round."""
    commit_bytes: Annotated[int, Field(ge=2**20)] = 256 * 2**20
    """Bytes of unacknowledged updates at which a checkpoint is written in mid-round; for large models, the bytes of
    eight updates."""
    commit_seconds: Annotated[float, Field(gt=0, le=900)] = 60.0
    """Age of the oldest unacknowledged update at which a checkpoint is written in mid-round."""
    worker_timeout: Annotated[float, Field(ge=1)] = 15.0
    """Seconds of silence after which a worker counts as gone (until it is heard again); several times the workers'
    ``heartbeat_seconds``."""
    linger: Annotated[float, Field(ge=0)] = 30.0
    """Seconds that a finished run waits for goodbyes and last evaluations."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Checkpoint files that stay: the newest, and those to fall back to or to go back to."""
    keep_updates: bool = False
    """Keep every applied update on disk, so that ``fedmq replay`` can rebuild any version. Takes the size of the
    model for each update."""

    @model_validator(mode="after")
    def _consistent(self) -> AggregatorConfig:
        if self.rounds is Rounds.BUFFERED and self.minimum_updates > self.buffer_size:
            raise ValueError("minimum_updates is larger than buffer_size, so that a deadline could never close a round")
        if self.mode is Mode.PARAMETERS:
            self._check_parameters()
        if self.rounds is Rounds.BUFFERED and self._most_per_worker() == 0:
            raise ValueError(
                f"worker_share = {self.worker_share} of a buffer of {self.buffer_size} is less than one update"
            )
        if self.fairness != "none" and self.rounds is Rounds.SYNCHRONOUS:
            raise ValueError("fairness is for buffered rounds; in synchronous ones all workers answer equally often")
        if self.normalize_staleness and self.strategy in STRATEGIES.own and self.strategy != "mean":
            raise ValueError(f"normalize_staleness is for strategy = 'mean', and not for {self.strategy!r}")
        if self.nesterov and not (self.optimizer == "sgd" and self.momentum):
            raise ValueError("nesterov is for optimizer = 'sgd' with a momentum")
        if self.optimizer == "adagrad" and self.momentum:
            raise ValueError("adagrad has no momentum; take yogi, or leave momentum at 0")
        self._check_work()
        self._check_schedule()
        try:
            strategy = strategy_of(self.recipe())
            scaled(strategy, 1.0 if self.fairness == "none" else 0.5)
            stepping(self.recipe())
            schedule_of(self.recipe())
        except ConfigError as error:
            raise ValueError(str(error)) from None
        self._check_strategy(strategy)
        return self

    def _check_work(self) -> None:
        if self.mode is Mode.GRADIENT:
            self._require_deltas()
        if self.personalise_steps and not self.evaluate_every:
            raise ValueError("personalise_steps is part of what evaluate_every asks for: set that, too")
        if self.control_variates and self.strategy not in WITH_VARIATES:
            raise ValueError(f"control_variates goes with strategy {' or '.join(WITH_VARIATES)}, which add them up")
        if self.control_variates and self.proximal:
            raise ValueError("control_variates and proximal correct the same drift twice: set one of them")

    def _require_deltas(self) -> None:
        if self.strategy == "fednova":
            raise ValueError('strategy = "fednova" goes by local steps, and a gradient has none: set mode = "delta"')
        if self.control_variates:
            raise ValueError('control_variates corrects local steps, and a gradient has none: set mode = "delta"')
        if self.proximal:
            raise ValueError('proximal pulls at local steps, and a gradient has none: set mode = "delta"')

    def _check_parameters(self) -> None:
        if self.optimizer == "sgd" and self.effective_learning_rate > 1:
            raise ValueError("with mode = 'parameters', learning_rate is how far to go towards them: at most 1")
        if self.normalize_staleness:
            raise ValueError("with mode = 'parameters', staleness says how far to go; normalize_staleness undoes it")
        if self.strategy in STRATEGIES.own and self.strategy != "mean":
            raise ValueError(f"strategy = {self.strategy!r} takes steps: set mode = 'delta'")
        if self.worker_momentum:
            raise ValueError("worker_momentum is an average of changes: set mode = 'delta'")
        if self.control_variates:
            raise ValueError("control_variates are made of changes: set mode = 'delta'")
        if self.update_codec and codec_of(self.update_codec).feedback:
            raise ValueError(f"update_codec = {self.update_codec!r} leaves most of an update out; parameters need all")

    def _check_schedule(self) -> None:
        length = self.effective_schedule_rounds
        if self.schedule in ("step", "cosine") and length is None:
            also = " or stop_after_rounds" if self.schedule == "cosine" else ""
            raise ValueError(f"schedule = {self.schedule!r} needs schedule_rounds{also}")
        if self.schedule == "cosine" and length is not None and length <= self.warmup_rounds:
            raise ValueError(f"the cosine ends at version {length}, which is within the warm-up; raise schedule_rounds")

    def _check_strategy(self, strategy: Strategy) -> None:
        if isinstance(strategy, Gather):
            self._require_enough(strategy.rule.least())
        elif self.pre_aggregation and self.strategy in STRATEGIES.own:
            raise ValueError(f"pre_aggregation goes before a robust rule, and strategy = {self.strategy!r} is none")

    def _require_enough(self, least: int) -> None:
        """Raise :class:`ValueError` if a rule over all updates of a round could be given fewer than ``least``."""
        if self.weighting == "examples":
            raise ValueError(
                f"strategy {self.strategy!r} does not go with weighting 'examples', which workers could lie about: "
                "leave it out, or say 'uniform'"
            )
        before = f" and pre_aggregation = {self.pre_aggregation!r}" if self.pre_aggregation else ""
        what = (
            f"with byzantine = {self.byzantine}{before}, strategy {self.strategy!r} is of no use below {least} updates"
        )
        if self.rounds is Rounds.BUFFERED and self.buffer_size < least:
            raise ValueError(f"{what}: raise buffer_size")
        if (self.rounds is Rounds.SYNCHRONOUS or self.deadline is not None) and self.minimum_updates < least:
            raise ValueError(f"{what}, and a round could close with {self.minimum_updates}: raise minimum_updates")

    @property
    def effective_schedule_rounds(self) -> int | None:
        """The schedule's length, after defaults."""
        return self.schedule_rounds or (self.stop_after_rounds if self.schedule == "cosine" else None)

    @property
    def effective_learning_rate(self) -> float:
        """The server's learning rate, after defaults."""
        return default_rate(self.optimizer, self.mode) if self.learning_rate is None else self.learning_rate

    def recipe(self) -> Recipe:
        """What decides the numbers of the versions to come."""
        uniform: Literal["uniform", "examples"] = "uniform" if self.rounds is Rounds.BUFFERED else "examples"
        computed = {
            "weighting": self.weighting or uniform,
            "learning_rate": self.effective_learning_rate,
            "schedule_rounds": self.effective_schedule_rounds,
        }
        named = {field.name: getattr(self, field.name) for field in fields(Recipe)}
        recipe = Recipe(**named | computed)
        if self.weighting is None and gathers(strategy_of(recipe)):
            return replace(recipe, weighting="uniform")
        return recipe

    def round_rule(self) -> RoundRule:
        """The kind of round."""
        if self.rounds is Rounds.SYNCHRONOUS:
            return Synchronous(self.fraction, self.minimum_updates, self.deadline)
        return Buffered(
            size=self.buffer_size,
            max_staleness=self.max_staleness,
            minimum=self.minimum_updates,
            deadline=self.deadline,
            updates_per_version=self.updates_per_version,
            one_per_worker=self.one_per_worker,
            most_per_worker=self._most_per_worker(),
            weight=weight_of(self.recipe()),
        )

    def _most_per_worker(self) -> int | None:
        # 0.29 of 100 are 29, and not 28.999999999999996.
        return None if self.worker_share is None else int(self.buffer_size * self.worker_share + 1e-9)

    def _fairness(self) -> Fairness:
        # Beyond the parameters that a worker sends there is nothing to go to.
        limit = 1.0 if self.mode is Mode.PARAMETERS else MOST
        return Fairness(0 if self.fairness == "none" else self.fairness_window, limit)

    def in_flight(self, model_bytes: int) -> int:
        """Updates of this size that a commit covers at most: by count, and by bytes."""
        return min(self.commit_count, max(LEAST_IN_COMMIT, self.commit_bytes // max(1, model_bytes)))

    def prefetch(self, model_bytes: int) -> int:
        """Unacknowledged updates that the broker may hand out.

        Twice what a commit covers: one half is being made durable while the other is folded. It must be more
        than a commit covers, since a commit is what acknowledges; if not, nothing would ever go on.
        """
        return 2 * self.in_flight(model_bytes)

    def rules(self, model_bytes: int = 0) -> Rules:
        """What the round machine goes by, for a model of this size."""
        recipe = self.recipe()
        return Rules(
            mode=self.mode,
            rounds=self.round_rule(),
            strategy=strategy_of(recipe),
            optimizer=stepping(recipe),
            schedule=schedule_of(recipe),
            seed=self.seed,
            work=Work(
                proximal=self.proximal,
                momentum=self.worker_momentum,
                evaluate_every=self.evaluate_every,
                personalise_steps=self.personalise_steps,
            ),
            control_variates=self.control_variates,
            codec=self.update_codec,
            stop_after_rounds=self.stop_after_rounds,
            commit=CommitPolicy(
                self.in_flight(model_bytes), max(self.commit_bytes, LEAST_IN_COMMIT * model_bytes), self.commit_seconds
            ),
            fairness=self._fairness(),
            norms=NormLimits(self.max_norm, self.norm_factor),
            quarantine=QuarantinePolicy(self.quarantine_score, self.quarantine_seconds, self.score_half_life),
            worker_timeout=self.worker_timeout,
            linger_seconds=self.linger,
            settings={
                **recipe.settings(),
                "rounds": self.rounds.value,
                **{name: value for name in OF_WORK if (value := getattr(self, name))},
            },
        )

    @classmethod
    def check(cls, name: str, value: Scalar) -> None:
        """Raise :class:`ConfigError` if ``name`` cannot be changed on a running run, or not to ``value``.

        As far as that can be told without the run's other settings; None takes a change back.
        """
        _require_live(name)
        if value is not None:
            enough = {"buffer_size": MAX}
            need = {"minimum_updates": enough, "worker_share": enough, "schedule": {"schedule_rounds": MAX}}
            others = need.get(name, {})
            cls(**others).changed({name: value})

    def normal(self, changes: Changes) -> dict[str, Scalar]:
        """``changes`` as the types that the settings have, without those that are None, which takes one back.

        Raises as :meth:`changed`.
        """
        kept = {name: value for name, value in changes.items() if value is not None or name not in LIVE}
        values = self.changed(kept).model_dump(mode="json")
        return {name: values[name] for name in kept}

    def changed(self, changes: Changes) -> AggregatorConfig:
        """This table with ``changes`` made on the running run.

        Raises :class:`ConfigError` for a setting that cannot be changed then, or to this value. They may have come
        over the wire, so they import nothing.
        """
        for name in changes:
            _require_live(name)
        try:
            return AggregatorConfig.model_validate({**self.model_dump(), **changes}, context=FROM_WIRE)
        except ValidationError as error:
            where, what = first_problem(error)
            raise ConfigError(f"aggregator.{where or 'these changes'}: {what}") from None


def _require_live(name: str) -> None:
    if name in LIVE:
        return
    near = difflib.get_close_matches(name, LIVE, 1)
    known = f"did you mean {near[0]}?" if near else f"these can: {', '.join(sorted(LIVE))}"
    what = "cannot be changed while the run goes on" if name in AggregatorConfig.model_fields else "is no setting"
    raise ConfigError(f"aggregator.{name} {what}; {known}")
