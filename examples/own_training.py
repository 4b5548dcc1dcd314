"""Your own training: FedProx (Li et al. 2020), which holds each worker close to the version it started from.

fedmq worker --task examples.own_training:ProximalWine --shard 0/3
"""

from torch import nn

from examples.own_model import Wine
from worker_client.task import Examples, TrainingContext, TrainingResult


class ProximalWine(Wine):
    mu = 0.1

    def train(self, model: nn.Module, dataset: Examples, context: TrainingContext) -> TrainingResult:
        model.train()
        start = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = self.optimizer(list(model.parameters()), context.settings)
        for _ in range(context.settings.local_epochs):
            for batch, _size in context.batches(dataset):  # on the device; ends early on SIGTERM
                optimizer.zero_grad()
                loss = self.loss(model, batch)
                pull = sum(((p - s) ** 2).sum() for p, s in zip(model.parameters(), start, strict=True))
                (loss + self.mu / 2 * pull).backward()
                optimizer.step()
        # The trained values are in the model: fedmq takes the delta from there. Or return it: tensors={...}.
        return TrainingResult(examples=len(dataset), metrics={"loss": loss.item()})
