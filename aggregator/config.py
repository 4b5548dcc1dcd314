"""``[aggregator]``: how a run goes. Everything that shapes the training is said here and travels to the workers."""

from __future__ import annotations

import difflib

from pydantic import ValidationError, model_validator

from aggregator.consistency import require_consistent
from aggregator.core.fairness import MOST, Fairness
from aggregator.core.rounds import Buffered, RoundRule, Synchronous
from aggregator.core.rules import CommitPolicy, Rules
from aggregator.core.screen import NormLimits
from aggregator.core.snapshot import Changes
from aggregator.core.standing import QuarantinePolicy
from aggregator.gate import GateLimits
from aggregator.schedules import schedule_of
from aggregator.staleness import weight_of
from aggregator.strategies import stepping, strategy_of
from aggregator.table import MAX, AggregatorTable
from broker.errors import ConfigError, first_problem
from broker.messages import Mode, Rounds, Scalar, Work
from broker.parts import FROM_WIRE

__all__ = ["LIVE", "AggregatorConfig"]

#: A checkpoint in mid-round writes the model twice: less often than every so many updates it must not.
LEAST_IN_COMMIT = 8

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
        "local_steps_max",
        "local_steps_min",
        "max_examples",
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
        "update_seconds",
        "updates_per_version",
        "warmup_rounds",
        "weight_decay",
        "weighting",
        "worker_momentum",
        "worker_share",
        "worker_timeout",
    }
)

#: Settings of what workers do that the history tells of where they are not 0.
OF_WORK = ("control_variates", "proximal", "update_seconds", "worker_momentum")


class AggregatorConfig(AggregatorTable):
    """``[aggregator]``: how a run goes; what concerns the workers travels to them with each version."""

    @model_validator(mode="after")
    def _consistent(self) -> AggregatorConfig:
        require_consistent(self)
        return self

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
            most_per_worker=self.most_per_worker,
            weight=weight_of(self.recipe()),
        )

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

    def gate_limits(self) -> GateLimits:
        """What each worker may send."""
        return GateLimits(self.worker_updates_per_second, self.worker_bytes_per_second)

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
                update_seconds=self.update_seconds or 0.0,
                steps_min=self.local_steps_min,
                steps_max=self.local_steps_max,
            ),
            control_variates=self.control_variates,
            codec=self.update_codec,
            stop_after_rounds=self.stop_after_rounds,
            commit=CommitPolicy(
                self.in_flight(model_bytes), max(self.commit_bytes, LEAST_IN_COMMIT * model_bytes), self.commit_seconds
            ),
            fairness=self._fairness(),
            norms=NormLimits(self.max_norm, self.norm_factor),
            max_examples=self.max_examples,
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
