"""The settings of ``[aggregator]``, and what follows from those that are not set."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from aggregator.optimizers import OPTIMIZERS, default_rate
from aggregator.recipe import Recipe
from aggregator.schedules import SCHEDULES
from aggregator.staleness import STALENESSES
from aggregator.strategies import STRATEGIES, strategy_of
from aggregator.strategies.base import gathers
from aggregator.tracking import checked
from broker.codecs import codec_of
from broker.errors import ConfigError
from broker.messages import Mode, Rounds
from broker.parts import Name
from broker.settings import Table, listed

__all__ = ["MAX", "AggregatorTable"]

#: Far more than makes sense, and what every part of the system can hold.
MAX = 2**40

Positive = Annotated[int, Field(ge=1, le=MAX)]
Seconds = Annotated[float, Field(gt=0)]


def _checked_codec(text: str) -> str:
    try:
        return codec_of(text).name if text else ""
    except ConfigError as error:
        raise ValueError(str(error)) from None


class AggregatorTable(Table):
    """``[aggregator]`` as it is written; whether it makes sense is checked in :mod:`aggregator.consistency`."""

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
    """What goes before a robust strategy: ``clip`` (no update is longer than the median), ``nnm`` (each becomes the
    mean of those nearest to it), ``bucketing:2`` (means of random groups of two), or several: ``clip,bucketing:2``."""
    clip_radius: Annotated[float, Field(gt=0)] | None = None
    """``centered-clipping``, ``norm-clipping``: how far an update counts; if not set, the median of the round."""
    clip_iterations: Annotated[int, Field(ge=1, le=100)] = 3
    """``centered-clipping``: iterations in a round."""
    max_norm: Annotated[float, Field(gt=0)] | None = None
    """The longest update that is taken: the Euclidean norm of all its parameters together; without it, any."""
    norm_factor: Annotated[float, Field(gt=1)] | None = None
    """Updates so many times as long as is usual are rejected; without it, none. Usual is the median over the last 101
    workers of each one's last five updates. 10 is a good value. What is in half precision or in a codec is read once
    more for it."""
    max_examples: Positive | None = None
    """The most examples that an update may claim to be made of, where updates weigh as many; without it, any."""
    worker_updates_per_second: Annotated[float, Field(gt=0)] | None = None
    """What each worker may send in the long run, and ten seconds' worth at once; without it, any. What is beyond is
    refused unread, and not kept: ``too-many``. For workers that have accounts of their own."""
    worker_bytes_per_second: Annotated[float, Field(gt=0)] | None = None
    """The same in bytes of updates."""
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

    update_seconds: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Deltas: the rhythm at which each worker's updates should come. It makes as many local steps as fit, by what its
    last updates took; if not set, what ``[worker]`` says."""
    local_steps_min: Annotated[int, Field(ge=1, le=10_000_000)] = 1
    """With ``update_seconds``: the fewest local steps, also of the slowest worker."""
    local_steps_max: Annotated[int, Field(ge=1, le=10_000_000)] = 10_000
    """With ``update_seconds``: the most local steps, also of the fastest worker."""

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
    commit_count: Annotated[int, Field(ge=1, le=1000)] = 128
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
    tracking: Annotated[str, AfterValidator(checked)] = ""
    """Where else the run's numbers go: ``tensorboard``, ``mlflow``, ``wandb``, separated by commas; each needs the
    extra of its name. See docs/tracking.md."""
    keep_updates: bool = False
    """Keep every applied update on disk, so that ``fedmq replay`` can rebuild any version. Takes the size of the
    model for each update."""
    trusted_users: Annotated[tuple[str, ...], BeforeValidator(listed)] = ()
    """Accounts of the broker that may speak in any worker's name and give commands, besides the aggregator's own: of
    the operators who publish dead letters again. All others may speak only for the worker that is called as they are;
    an account called ``operator`` may give commands, too."""
    signing_key_file: Path | None = None
    """Private key with which versions, notices and events are signed. See docs/signatures.md."""
    worker_keys_file: Path | None = None
    """Public keys of workers and evaluators: only what one of these has signed is taken. Read again when it changes."""
    operator_keys_file: Path | None = None
    """Public keys of operators: only commands that one of these has signed are executed. Read again when it changes."""

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

    @property
    def most_per_worker(self) -> int | None:
        """Updates of one worker in a buffer; None for any number."""
        # 0.29 of 100 are 29, and not 28.999999999999996.
        return None if self.worker_share is None else int(self.buffer_size * self.worker_share + 1e-9)
