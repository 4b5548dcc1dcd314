"""Your own model and data: fedmq worker --task examples.own_model:Wine --shard 0/3"""

import torch
from sklearn.datasets import load_wine
from torch import nn
from torch.utils.data import TensorDataset

from worker_client.task import Shard, Task


class Wine(Task):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(13), nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 3))

    def data(self, shard: Shard) -> TensorDataset:  # each worker's own data: here, a part of one file
        inputs, targets = self.read(held_out=False)
        return TensorDataset(inputs[shard.index :: shard.count], targets[shard.index :: shard.count])

    def test_data(self) -> TensorDataset:
        return TensorDataset(*self.read(held_out=True))

    def read(self, *, held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = (torch.from_numpy(array) for array in load_wine(return_X_y=True))
        chosen = (torch.arange(len(targets)) % 5 == 0) == held_out
        return inputs[chosen].float(), targets[chosen]
