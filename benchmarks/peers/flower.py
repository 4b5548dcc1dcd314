"""Flower: the newest release in its deployment mode, and 1.8's plain gRPC."""

from __future__ import annotations

import shutil
import socket
import urllib.error
import urllib.request
from pathlib import Path

from benchmarks.peers.trial import System, Trial, free_port

__all__ = ["FLOWER", "FLOWER_GRPC"]

APPS = Path(__file__).parent / "apps"
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
CONFIGURATION = """\
[superlink]
default = "bench"

[superlink.bench]
address = "127.0.0.1:{port}"
insecure = true
"""


def start_deployment(trial: Trial) -> None:
    """A SuperLink, SuperNodes, and the run submitted to them by ``flwr run``."""
    app = trial.folder / "app"
    shutil.copytree(APPS / "flower_app", app)
    port = free_port()
    home = trial.folder / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(CONFIGURATION.format(port=port))
    environment = {**trial.environment, "FLWR_HOME": str(home)}
    superlink = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
    # The app needs nothing that would have to be installed.
    superlink.append("--disable-runtime-dependency-installation")
    trial.group.start(
        "superlink", [trial.programs / superlink[0], *superlink[1:]], side="server", environment=environment
    )
    trial.wait(lambda: _is_up(f"http://127.0.0.1:{port}/health"), trial.plan.start_limit, "the SuperLink")
    for number in range(trial.plan.workers):
        supernode = ["--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
        trial.group.start(
            f"supernode-{number}",
            [trial.programs / "flower-supernode", *supernode],
            side="client",
            environment={**environment, "FLWR_HOME": str(trial.folder / f"flwr-{number}")},
        )
    settings = {
        "values": trial.values,
        "rounds": trial.plan.starts,
        "workers": trial.plan.workers,
        "stamps": f'"{trial.stamps}"',
    }
    line = " ".join(f"{key}={value}" for key, value in settings.items())
    trial.group.start(
        "run",
        [trial.programs / "flwr", "run", app, "bench", "--run-config", line],
        side="client",
        environment=environment,
    )
    trial.finish("run", trial.plan.start_limit)


def start_grpc(trial: Trial) -> None:
    """``start_server``, then ``start_client`` as often as there are workers."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    python = trial.programs / "python"
    plan = [trial.values, trial.plan.starts, trial.plan.workers, trial.stamps]
    trial.group.start(
        "server",
        [python, APPS / "flower_grpc" / "server.py", address, *map(str, plan)],
        side="server",
        environment=trial.environment,
    )
    trial.wait(lambda: _accepts(port), trial.plan.start_limit, "the server")
    for number in range(trial.plan.workers):
        trial.group.start(
            f"client-{number}",
            [python, APPS / "flower_grpc" / "client.py", address],
            side="client",
            environment=trial.environment,
        )


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


def _is_up(url: str) -> bool:
    try:
        # Always on loopback, so never through a proxy.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


FLOWER = System(
    name="flower",
    title="Flower {version}, deployment",
    how="SuperLink, 4 SuperNodes, `flwr run`; HTTP without TLS on loopback; FedAvg without evaluation; defaults",
    package="flwr",
    requirements="flower",
    start=start_deployment,
    settings=QUIET,
)
FLOWER_GRPC = System(
    name="flower-1.8",
    title="Flower {version}, plain gRPC",
    how="`start_server`, 4 `start_client`; gRPC without TLS on loopback; FedAvg without evaluation; defaults",
    package="flwr",
    requirements="flower-1.8",
    start=start_grpc,
    settings=QUIET,
)
