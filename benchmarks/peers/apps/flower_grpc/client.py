"""Flower 1.8's client, which sends the parameters back: address."""

import sys

import flwr
from flwr.common import NDArrays, Scalar


class Echo(flwr.client.NumPyClient):
    def fit(self, parameters: NDArrays, config: dict[str, Scalar]) -> tuple[NDArrays, int, dict[str, Scalar]]:  # noqa: ARG002
        return parameters, 1, {}


flwr.client.start_client(server_address=sys.argv[1], client=Echo().to_client())
