"""A run of SCAFFOLD from its first checkpoint to its model."""

from __future__ import annotations

from pathlib import Path

from safetensors.numpy import load_file

from aggregator.config import AggregatorConfig
from aggregator.results import write_model
from broker.settings import Table, load
from broker.variates import WORKERS, has_variates, name_of
from fedmq.initialise import initialise
from worker_client.config import WorkerConfig
from worker_client.loading import load_task
from worker_client.training import load_model

TASK = "tests.support.tasks:Line"


def test_a_run_begins_with_variates_of_zeros_and_its_model_has_none(tmp_path: Path) -> None:
    (tmp_path / "fedmq.toml").write_text(
        f'run = "r"\n[aggregator]\ncontrol_variates = true\nfolder = "{tmp_path}/runs"\n[worker]\ntask = "{TASK}"\n'
    )
    kinds: dict[str, type[Table]] = {"aggregator": AggregatorConfig, "worker": WorkerConfig}

    snapshot = initialise(load(kinds, file=tmp_path / "fedmq.toml", environment={}))

    assert has_variates(snapshot.model)
    assert snapshot.parameters[WORKERS] == 0.0
    assert not snapshot.parameters[name_of("weight")].any()
    write_model(tmp_path / "model.safetensors", "r", snapshot.parameters)
    assert load_file(tmp_path / "model.safetensors").keys() == {"weight", "bias"}
    load_model(load_task(TASK), tmp_path / "model.safetensors")
