"""The server's side: FedAvg without evaluation; the start of each round is noted."""

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class Stamped(FedAvg):
    stamps: Path

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        with self.stamps.open("a") as file:
            file.write(f"{time.monotonic()}\n")
        return super().configure_train(server_round, arrays, config, grid)


@app.main()
def main(grid: Grid, context: Context) -> None:
    workers = int(context.run_config["workers"])
    strategy = Stamped(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=workers, min_available_nodes=workers)
    strategy.stamps = Path(str(context.run_config["stamps"]))
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord([np.zeros(int(context.run_config["values"]), np.float32)]),
        num_rounds=int(context.run_config["rounds"]),
    )
