"""Flower 1.8's plain gRPC server: address, number of values, rounds, workers, file for the starts of rounds."""

import sys
import time
from pathlib import Path

import flwr
import numpy as np
from flwr.common import FitIns, Parameters
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy

address, values, rounds, workers, stamps = sys.argv[1:]


class Stamped(flwr.server.strategy.FedAvg):
    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        if server_round == 1:  # the first round is timed from when all are there
            client_manager.wait_for(int(workers))
        with Path(stamps).open("a") as file:
            file.write(f"{time.monotonic()}\n")
        return super().configure_fit(server_round, parameters, client_manager)


flwr.server.start_server(
    server_address=address,
    config=flwr.server.ServerConfig(num_rounds=int(rounds)),
    strategy=Stamped(
        fraction_evaluate=0.0,
        min_fit_clients=int(workers),
        min_available_clients=int(workers),
        initial_parameters=flwr.common.ndarrays_to_parameters([np.zeros(int(values), np.float32)]),
    ),
)
