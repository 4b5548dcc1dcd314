"""Whole runs in lossy codes, in chunks, over a real broker: they learn as the run without does."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from aggregator.checkpoint import CheckpointStore
from aggregator.config import AggregatorConfig
from aggregator.results import Outcome
from aggregator.service import AggregatorService
from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpAggregatorTransport, AmqpWorkerTransport
from tests.support.node import config_of, fresh_topology
from worker_client.client import run_evaluator, run_worker
from worker_client.config import WorkerConfig
from worker_client.task import Shard, Task
from worker_client.training import initial_parameters

pytestmark = pytest.mark.broker

CHUNK = 65_536
ROUNDS = 12


class Wide(Task):
    """A linear model of 60,000 parameters, most of which matter."""

    seed = 5

    def model(self) -> nn.Module:
        return nn.Linear(300, 200)

    def data(self, shard: Shard) -> TensorDataset:
        random = torch.Generator().manual_seed(shard.index)
        truth = torch.randn(300, 200, generator=torch.Generator().manual_seed(99)) / 17
        inputs = torch.randn(256, 300, generator=random)
        return TensorDataset(inputs, inputs @ truth)

    def test_data(self) -> TensorDataset:
        return self.data(Shard("test", 77, 78))

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])


def run_of(node: PrivateNode, folder: Path, *, pack: bool = False, **settings: object) -> float:
    """The last version's loss on the held-out data."""
    topology, task = fresh_topology("codec"), Wide()
    model, parameters = initial_parameters(task)
    store = CheckpointStore(folder / "checkpoints", topology.run)
    store.create(model, parameters, now=0.0)
    config = AggregatorConfig.model_validate(
        {"rounds": "synchronous", "minimum_updates": 2, "stop_after_rounds": ROUNDS, "linger": 20.0, **settings}
    )
    service = AggregatorService(
        folder=folder, run=topology.run, config=config, store=store, chunk_bytes=CHUNK, pack_chunks=pack
    )
    errors: list[BaseException] = []

    def live(name: str, index: int) -> None:
        own = WorkerConfig(
            name=name, shard=f"{index}/2", device="cpu", learning_rate=10.0, local_epochs=2, folder=folder / name
        )
        live_as = run_evaluator if name == "e" else run_worker
        try:
            transport = AmqpWorkerTransport(config_of(node), topology, worker=name)
            live_as(own, topology.run, transport, task, chunk_bytes=CHUNK, pack_chunks=pack)
        except BaseException as error:  # noqa: BLE001 (handed to the test)
            errors.append(error)

    threads = [threading.Thread(target=live, args=pair, daemon=True) for pair in (("w0", 0), ("w1", 1), ("e", 0))]
    for thread in threads:
        thread.start()
    transport = AmqpAggregatorTransport(config_of(node), topology, model_bytes=model.nbytes, prefetch=8)
    outcome: Outcome | None = service.run(transport)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert errors == []
    assert outcome is not None
    assert outcome.version == ROUNDS
    assert outcome.rejected == {}
    assert outcome.applied == 2 * ROUNDS
    assert outcome.evaluated == ROUNDS
    return float(outcome.metrics["loss"])


@pytest.fixture(scope="module")
def plain(node: PrivateNode, tmp_path_factory: pytest.TempPathFactory) -> float:
    loss = run_of(node, tmp_path_factory.mktemp("plain"))
    assert loss < 0.7
    return loss


@pytest.mark.parametrize("codec", ["bf16", "fp16", "int8", "eden:4", "topk:0.25"])
def test_a_run_whose_updates_are_in_a_code_learns(node: PrivateNode, tmp_path: Path, plain: float, codec: str) -> None:
    loss = run_of(node, tmp_path, update_codec=codec, pack=codec.startswith("topk"))
    assert np.isfinite(loss)
    assert loss < (1.3 if codec.startswith("topk") else 1.1) * plain
    assert (tmp_path / "w0" / "residual.safetensors").exists() is codec.startswith("topk")


@pytest.mark.parametrize("codec", ["int8", "eden:4"])
def test_a_run_whose_versions_come_by_deltas_learns(
    node: PrivateNode, tmp_path: Path, plain: float, codec: str
) -> None:
    loss = run_of(node, tmp_path, version_codec=codec, update_codec=codec)
    assert loss < 1.1 * plain
