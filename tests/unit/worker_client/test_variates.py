"""SCAFFOLD: the paper's algorithm number by number, and variates that count once over crashes and rejections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from aggregator.config import AggregatorConfig
from aggregator.core.rounds import Buffered, Synchronous
from aggregator.core.rules import Rules
from aggregator.core.snapshot import Snapshot
from aggregator.optimizers import OptimizerState, Sgd
from aggregator.staleness import constant, polynomial
from aggregator.strategies import Accumulator, Mean
from broker.errors import ConfigError, TaskError
from broker.memory import MemoryBroker
from broker.messages import Array, ModelSpec, Parameters, Reason, Role, Update, UpdateId, parameters_digest, whole
from broker.settings import CHUNK_BYTES
from broker.variates import WORKERS, like, name_of, with_variates, without_variates, zeros
from tests.support.builders import rules_of
from tests.unit.aggregator.driver import Driver
from tests.unit.worker_client.ends import Aggregator, running
from tests.unit.worker_client.models import RUN, Points, config, version_of
from worker_client.sending import Sender
from worker_client.task import Examples, Shard, Task
from worker_client.training import Trained, Trainer, initial_parameters
from worker_client.variates import FILE, PENDING, SENT, Variates

#: Curvatures and centres of four workers' losses; the sum's optimum is far from where one worker's steps go.
CURVES = np.array([[1.0, 4.0], [3.0, 0.5], [0.2, 2.0], [5.0, 1.0]])
CENTRES = np.array([[4.0, -1.0], [-2.0, 3.0], [0.5, 6.0], [1.0, -5.0]])
OPTIMUM = (CURVES * CENTRES).sum(0) / CURVES.sum(0)
STEPS, RATE = 10, 0.05


class Bowl(Task):
    """Worker i's loss is half the sum of h_i (x - b_i)^2, in double precision."""

    def model(self) -> nn.Module:
        model = nn.Module()
        model.register_parameter("x", nn.Parameter(torch.zeros(2, dtype=torch.float64)))
        return model

    def data(self, shard: Shard) -> Examples:
        return TensorDataset(torch.from_numpy(CURVES[[shard.index]]), torch.from_numpy(CENTRES[[shard.index]]))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        curve, centre = batch
        loss: Tensor = (curve * (model.get_parameter("x") - centre) ** 2).sum() / 2
        return loss

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        return {}


class Member:
    """One worker without a shell; with ``is_torch``, it trains as workers do, otherwise the same steps in numpy."""

    def __init__(self, index: int, folder: Path | None = None, *, is_torch: bool = False, **settings: Any) -> None:
        self.index, self.is_torch = index, is_torch
        values = {"local_steps": STEPS, "learning_rate": RATE, **settings}
        self.config = config(name=f"w{index}", shard=f"{index}/4", **values)
        self.trainer = Trainer(Bowl(), self.config)
        self.folder = folder
        self.sender = Sender(RUN, f"w{index}", "i", Role.TRAINER)
        self.live()
        self.seq = 0

    def live(self) -> None:
        """Begin (again) with what is in the folder."""
        self.variates = Variates(self.folder, self.config, self.trainer.spec)

    def train(self, base: Parameters) -> Trained:
        shift = self.variates.shift(base)
        trained = self.trainer.train(base, shift=shift) if self.is_torch else self.steps(base, shift)
        return trained if shift is None else self.variates.complete(trained, base, shift)

    def steps(self, base: Parameters, shift: Mapping[str, Array] | None) -> Trained:
        x = whole(base.tensors["x"])
        y = x
        for _ in range(STEPS):
            y = y - RATE * (CURVES[self.index] * (y - CENTRES[self.index]) + (shift["x"] if shift else 0.0))
        return Trained(tensors={"x": y - x}, examples=1, metrics={}, seconds=0.0, steps=STEPS, effort=STEPS)

    def update(self, base: Parameters) -> Update:
        """Trained and recorded, as if it was just about to be sent."""
        trained = self.train(base)
        id_ = UpdateId(self.config.name, "i", self.seq)
        self.seq += 1
        update = self.sender.update(id_, base, trained, trained.model or self.trainer.spec)
        self.variates.record(update)
        return update

    def own(self) -> dict[str, Array]:
        return self.variates._own


def beginning(*, variates: bool = True) -> Snapshot:
    model, tensors = initial_parameters(Bowl())
    if variates:
        model = with_variates(model)
        tensors |= zeros(model)
    return Snapshot(
        run=RUN,
        model=model,
        epoch=1,
        version=0,
        parameters=tensors,
        digest=parameters_digest(tensors),
        optimizer=OptimizerState({}),
        accumulator=Accumulator(),
    )


def rules(*, size: int | None = None, rate: float = 1.0, variates: bool = True) -> Rules:
    rounds = Synchronous(minimum=4) if size is None else Buffered(size=size, max_staleness=100)
    strategy = Mean("uniform", constant() if size is None else polynomial(0.5))
    return rules_of(rounds=rounds, strategy=strategy, optimizer=Sgd(rate), control_variates=variates)


def now(driver: Driver) -> Parameters:
    sent = driver.broadcasts[-1]
    return Parameters(
        run=RUN,
        epoch=sent.epoch,
        version=sent.version,
        plan=sent.plan,
        digest=sent.digest,
        model=sent.model,
        tensors=sent.parameters,
    )


def synchronous(rounds: int, *, variates: bool = True, rate: float = 1.0, is_torch: bool = False) -> Driver:
    driver = Driver(rules(variates=variates, rate=rate), beginning(variates=variates))
    members = [Member(index, is_torch=is_torch) for index in range(4)]
    driver.hello(*(member.config.name for member in members))
    for _ in range(rounds):
        base = now(driver)
        for member in members:
            driver.update(member.update(base))
    assert driver.machine.version == rounds
    return driver


def test_synchronous_rounds_are_the_papers_algorithm() -> None:
    """Algorithm 1 with option II, full participation and global step size 0.8, in numpy."""
    x, c, own = np.zeros(2), np.zeros(2), np.zeros((4, 2))
    for _ in range(5):
        deltas, changes = [], []
        for i in range(4):
            y = x.copy()
            for _ in range(STEPS):
                y = y - RATE * (CURVES[i] * (y - CENTRES[i]) - own[i] + c)
            new = own[i] - c + (x - y) / (STEPS * RATE)
            deltas.append(y - x)
            changes.append(new - own[i])
            own[i] = new
        x, c = x + 0.8 * np.mean(deltas, axis=0), c + np.mean(changes, axis=0)

    driver = synchronous(5, rate=0.8, is_torch=True)

    np.testing.assert_allclose(driver.parameters["x"], x, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(driver.parameters[name_of("x")] / 4, c, rtol=1e-11, atol=1e-12)
    assert driver.parameters[WORKERS] == 4.0


def test_it_reaches_the_optimum_that_fedavg_drifts_away_from() -> None:
    drifted = np.linalg.norm(synchronous(150, variates=False).parameters["x"] - OPTIMUM)
    reached = np.linalg.norm(synchronous(150).parameters["x"] - OPTIMUM)

    assert drifted > 0.1
    assert reached < 1e-3


def test_buffered_rounds_keep_the_sum_exact_and_reach_the_optimum_too() -> None:
    """Two updates a version; a slow worker's updates come several versions late."""
    driver = Driver(rules(size=2, rate=0.5), beginning())
    members = [Member(index) for index in range(4)]
    late: list[Update] = []
    for turn in range(600):
        base = now(driver)
        for index, member in enumerate(members[:3]):
            if (turn + index) % 3:
                driver.update(member.update(base))
        if turn % 4 == 0:
            late.append(members[3].update(base))
        if turn % 4 == 3:
            driver.update(late.pop())

    assert driver.machine.version > 500
    assert max(entry.staleness for record in driver.records for entry in record.updates) > 3
    total = sum(member.own()[name_of("x")] for member in members)
    pending = sum(whole(update.tensors[name_of("x")]) for update in late)
    buffered = driver.disk.accumulator.tensors.get(name_of("x"), 0.0)
    np.testing.assert_allclose(driver.parameters[name_of("x")] + buffered + pending, total, atol=1e-9)
    assert np.linalg.norm(driver.parameters["x"] - OPTIMUM) < 0.02


def test_who_comes_later_counts_from_its_first_update_on() -> None:
    driver = Driver(rules(size=1), beginning())
    first, second = Member(0), Member(1)
    for member, count in ((first, 1), (first, 1), (second, 2), (first, 2)):
        driver.update(member.update(now(driver)))
        assert driver.parameters[WORKERS] == count


def test_float32_models_have_variates_in_float32() -> None:
    model, tensors = initial_parameters(Points())
    full = with_variates(model)
    assert {t.dtype for t in full.tensors} == {"float32", "float64"}
    assert [t.dtype for t in full.tensors if t.name == WORKERS] == ["float64"]
    trainer = Trainer(Points(), config())
    variates = Variates(None, config(), trainer.spec)
    base = version_of(full, {**tensors, **zeros(full)})
    shift = variates.shift(base)
    assert shift is not None
    trained = variates.complete(trainer.train(base, shift=shift), base, shift)
    assert {n: a.dtype.name for n, a in trained.tensors.items()} == {t.name: t.dtype for t in full.tensors}
    # The first variate is the mean gradient of the steps.
    name = "0.weight"
    expected = -trained.tensors[name] / (trained.steps * config().learning_rate)
    np.testing.assert_allclose(trained.tensors[name_of(name)], expected, rtol=1e-6)


# -------------------------------------------------------------------------------------- once, and not twice


def test_a_crash_before_the_update_was_put_in_place_forgets_it(tmp_path: Path) -> None:
    driver, member = Driver(rules(size=1), beginning()), Member(0, tmp_path)
    driver.update(member.update(now(driver)))
    member.variates.confirm(UpdateId("w0", "i", 0))
    before = {name: array.copy() for name, array in member.own().items()}

    member.train(now(driver))
    assert any(np.any(member.own()[name] != array) for name, array in before.items())
    member.live()

    assert member.variates.pending is None
    assert all(np.array_equal(member.own()[name], array) for name, array in before.items())


@pytest.mark.parametrize("is_behind", [False, True])
def test_a_crash_after_it_was_put_in_place_sends_it_again_and_counts_it_once(tmp_path: Path, is_behind: bool) -> None:
    driver, member = Driver(rules(size=1), beginning()), Member(0, tmp_path)
    driver.update(member.update(now(driver)))
    member.variates.confirm(UpdateId("w0", "i", 0))
    before = (tmp_path / FILE).read_bytes()
    update = member.update(now(driver))
    after = {name: array.copy() for name, array in member.own().items()}
    if is_behind:  # the crash was between the two files
        (tmp_path / FILE).write_bytes(before)

    for _ in range(2):
        member.live()
        pending = member.variates.pending
        assert pending is not None
        assert pending.id == update.id
        assert parameters_digest(pending.tensors) == parameters_digest(update.tensors)
        assert all(np.array_equal(member.own()[name], array) for name, array in after.items())

    driver.update(update)
    assert pending is not None
    driver.update(pending)
    np.testing.assert_array_equal(driver.parameters[name_of("x")], after[name_of("x")])


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_rejected_change_is_taken_back_once(tmp_path: Path, on_disk: bool) -> None:
    member = Member(0, tmp_path if on_disk else None)
    driver = Driver(rules(size=1), beginning())
    driver.update(member.update(now(driver)))
    before = member.own()[name_of("x")].copy()
    driver.update(member.update(now(driver)))
    driver.update(member.update(now(driver)))
    rejected = member.update(now(driver))
    member.variates.confirm(rejected.id)

    member.variates.reject(rejected.id)
    member.variates.reject(rejected.id)

    np.testing.assert_allclose(member.own()[name_of("x")], driver.parameters[name_of("x")], rtol=1e-15)
    assert np.any(member.own()[name_of("x")] != before)
    if on_disk:
        member.live()
        member.variates.reject(rejected.id)
        np.testing.assert_allclose(member.own()[name_of("x")], driver.parameters[name_of("x")], rtol=1e-15)


def test_a_rejection_that_comes_too_late_is_told(caplog: pytest.LogCaptureFixture) -> None:
    member, driver = Member(0), Driver(rules(size=1), beginning())
    first = member.update(now(driver))
    driver.update(first)
    driver.update(member.update(now(driver)))
    member.variates.reject(first.id)
    assert "counts nowhere now" in caplog.text


def test_a_training_that_diverged_leaves_the_variate_alone() -> None:
    driver, member = Driver(rules(size=1), beginning()), Member(0)
    driver.update(member.update(now(driver)))
    before = {name: array.copy() for name, array in member.own().items()}
    shift = member.variates.shift(now(driver))
    assert shift is not None
    trained = member.trainer.train(now(driver), shift=shift)
    trained = replace(trained, tensors={"x": np.array([np.nan, 1.0])})

    done = member.variates.complete(trained, now(driver), shift)

    assert all(np.array_equal(member.own()[name], array) for name, array in before.items())
    assert not np.any(done.tensors[name_of("x")])


def test_a_damaged_update_is_not_sent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    driver, member = Driver(rules(size=1), beginning()), Member(0, tmp_path)
    member.update(now(driver))
    content = (tmp_path / PENDING).read_bytes()
    (tmp_path / PENDING).write_bytes(content[: len(content) // 2])

    member.live()

    assert member.variates.pending is None
    assert "is not sent" in caplog.text


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("settings", [{"optimizer": "adam"}, {"momentum": 0.5}])
def test_another_local_optimiser_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"worker\.optimizer = 'sgd'"):
        Member(0, **settings).update(now(Driver(rules(size=1), beginning())))


def test_a_training_of_ones_own_must_shift_its_steps() -> None:
    class Own(Bowl):
        def train(self, model: nn.Module, dataset: Examples, context: Any) -> Any:
            from worker_client.context import TrainingResult  # noqa: PLC0415

            return TrainingResult(examples=1)

    member = Member(0, is_torch=True)
    member.trainer = Trainer(Own(), member.config)
    with pytest.raises(TaskError, match=r"call context\.adjust"):
        member.update(now(Driver(rules(size=1), beginning())))


def test_a_run_goes_on_as_it_began() -> None:
    for began in (True, False):
        with pytest.raises(ConfigError, match="control_variates"):
            Driver(rules(variates=not began), beginning(variates=began))


def test_settings_that_do_not_go_with_it_are_refused() -> None:
    for settings in ({"mode": "gradient"}, {"mode": "parameters"}, {"proximal": 0.1}):
        with pytest.raises(ValueError, match="control_variates"):
            AggregatorConfig.model_validate({"control_variates": True, **settings})
    assert AggregatorConfig(control_variates=True).rules().settings["control_variates"] is True


def test_a_name_that_becomes_too_long_is_refused() -> None:
    model = initial_parameters(Points())[0]
    long = ModelSpec((replace(model.tensors[0], name="n" * 250),))
    with pytest.raises(ConfigError, match="too long a name"):
        with_variates(long)


def test_the_model_is_what_is_left_without_variates() -> None:
    model, tensors = initial_parameters(Points())
    full = with_variates(model)
    assert without_variates({**tensors, **zeros(full)}).keys() == tensors.keys()
    assert like(model, full) == full
    assert like(model, model) == model


# -------------------------------------------------------------------------------------------- with the shell


@pytest.mark.parametrize("size", [CHUNK_BYTES, 128])
def test_a_worker_that_was_killed_publishes_its_last_update_again_under_its_id(tmp_path: Path, size: int) -> None:
    task = Points()
    broker = MemoryBroker()
    aggregator = Aggregator(broker, task, chunk_bytes=size)
    aggregator.model = with_variates(aggregator.model)
    aggregator.tensors |= zeros(aggregator.model)
    with running(broker, task, folder=tmp_path, chunk_bytes=size):
        aggregator.broadcast(0)
        [first] = aggregator.wait_for(lambda: aggregator.of(Update))
    # Given that it was killed before it heard of the confirm
    (tmp_path / SENT).replace(tmp_path / PENDING)

    with running(broker, task, folder=tmp_path, chunk_bytes=size) as worker:
        again = aggregator.wait_for(lambda: len(found := aggregator.of(Update)) >= 2 and found)[1]
        aggregator.broadcast(1)
        third = aggregator.wait_for(lambda: aggregator.of(Update, base_version=1))[0]
        aggregator.broadcast(2, done=True)
        assert worker.result(20).reason == "done"

    assert again.id == first.id
    assert parameters_digest(again.tensors) == parameters_digest(first.tensors)
    assert third.id.incarnation != first.id.incarnation
    assert (float(whole(first.tensors[WORKERS])), float(whole(third.tensors[WORKERS]))) == (1.0, 0.0)
    # The second variate is the first and its change; the aggregator here never moved, so c is 0.
    moved = whole(third.tensors["0.weight"]) / (third.steps * config().learning_rate)
    own = whole(first.tensors[name_of("0.weight")])
    np.testing.assert_allclose(own + whole(third.tensors[name_of("0.weight")]), own - moved, rtol=1e-4, atol=1e-5)


def test_a_notice_takes_the_change_back(tmp_path: Path) -> None:
    task, broker = Points(), MemoryBroker()
    aggregator = Aggregator(broker, task)
    aggregator.model = with_variates(aggregator.model)
    aggregator.tensors |= zeros(aggregator.model)
    with running(broker, task, folder=tmp_path) as worker:
        aggregator.broadcast(0)
        [first] = aggregator.wait_for(lambda: aggregator.of(Update))
        aggregator.notify("w0", reason=Reason.TOO_STALE.value, update=str(first.id), detail="")
        aggregator.broadcast(1)
        second = aggregator.wait_for(lambda: aggregator.of(Update, base_version=1))[0]
        aggregator.broadcast(2, done=True)
        worker.result(20)

    # It has none again, as before the first.
    assert second.tensors[WORKERS] == 1.0
