"""NVIDIA FLARE in its proof-of-concept deployment: a server, clients and job processes of their own, with TLS."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from benchmarks.peers.trial import System, Trial, free_port

__all__ = ["NVFLARE", "NVFLARE_TUNED"]

APPS = Path(__file__).parent / "apps"
PROJECT = """\
api_version: 3
name: bench
description: made by a benchmark
participants:
- {{name: server, type: server, org: bench, default_host: localhost, fed_learn_port: {port}}}
- {{name: admin@nvidia.com, type: admin, org: bench, role: project_admin}}
{clients}
builders:
- path: nvflare.lighter.impl.workspace.WorkspaceBuilder
  args: {{template_file: [master_template.yml]}}
- path: nvflare.lighter.impl.static_file.StaticFileBuilder
  args: {{config_folder: config}}
- path: nvflare.lighter.impl.cert.CertBuilder
- path: nvflare.lighter.impl.signature.SignatureBuilder
"""


def start(trial: Trial, how: str) -> None:
    """``nvflare poc prepare``, each site's own start script, and the job submitted by ``nvflare job submit``.

    Args:
        trial: what to run.
        how: ``default`` or ``tuned``, see ``apps/nvflare_job/job.py``.
    """
    environment = {**trial.environment, "NVFLARE_POC_WORKSPACE": str(trial.folder / "poc")}
    sites = [f"site-{number}" for number in range(1, trial.plan.workers + 1)]
    clients = "\n".join(f"- {{name: {site}, type: client, org: bench}}" for site in sites)
    project = trial.folder / "project.yml"
    project.write_text(PROJECT.format(port=free_port(), clients=clients))
    command = trial.programs / "nvflare"
    limit = trial.plan.start_limit
    trial.group.start("prepare", [command, "poc", "prepare", "-i", project], side="client", environment=environment)
    trial.finish("prepare", limit)
    source = trial.folder / "job"
    shutil.copytree(APPS / "nvflare_job", source)
    plan = [trial.values, trial.plan.starts, trial.plan.workers, trial.stamps, how]
    trial.group.start(
        "job",
        [trial.programs / "python", "job.py", trial.folder / "jobs", *map(str, plan)],
        side="client",
        environment=environment,
        folder=source,
    )
    trial.finish("job", limit)
    kits = trial.folder / "poc" / "bench" / "prod_00"
    for site in ["server", *sites]:
        trial.group.start(
            site,
            ["bash", kits / site / "startup" / "sub_start.sh", "--once"],
            side="server" if site == "server" else "client",
            environment=environment,
        )
    submit: list[str | Path] = [command, "job", "submit", "--job-folder", trial.folder / "jobs" / "echo"]
    submit += ["--startup-kit", kits / "admin@nvidia.com"]
    trial.wait(lambda: _are_ready(trial, ["server", *sites]), limit, "the registration of all sites")
    trial.group.start("submit", submit, side="client", environment=environment)
    trial.finish("submit", limit)


def _are_ready(trial: Trial, names: list[str]) -> bool:
    return all("Successfully registered" in _log(trial, name) for name in names if name != "server")


def _log(trial: Trial, name: str) -> str:
    return (trial.folder / f"{name}.log").read_text(errors="replace")


NVFLARE = System(
    name="nvflare",
    title="NVFlare {version}",
    how="POC deployment with mutual TLS as provisioned; FedAvg, in-process Client API (what `NumpyFedAvgRecipe` "
    "makes); defaults",
    package="nvflare",
    requirements="nvflare",
    start=partial(start, how="default"),
)
NVFLARE_TUNED = System(
    name="nvflare-tuned",
    title="NVFlare {version}, tuned",
    how="the same with an Executor instead of the Client API, and `task_request_interval` (2 s by default), "
    "`default_task_fetch_interval` and `task_check_period` (0.5 s) at 0.05 s",
    package="nvflare",
    requirements="nvflare",
    start=partial(start, how="tuned"),
)
