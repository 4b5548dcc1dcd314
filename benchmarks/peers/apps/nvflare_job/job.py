"""Write a job: folder, number of values, rounds, workers, file for the starts of rounds, ``tuned`` or ``default``."""

import sys
from pathlib import Path

import numpy as np
from echo import Echo
from nvflare.app_common.np.np_model_persistor import NPModelPersistor
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.client.config import ExchangeFormat
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import FrameworkType, ScriptRunner
from starts import Starts

folder, values, rounds, workers, stamps, how = sys.argv[1:]
model = Path(folder).absolute() / "model.npy"
model.parent.mkdir(parents=True, exist_ok=True)
np.save(model, np.zeros(int(values), np.float32))

job = FedJob(name="echo", min_clients=int(workers))
job.to_server(NPModelPersistor(source_ckpt_file_full_name=str(model)), id="persistor")
job.to_server(Starts(stamps), id="starts")
if how == "tuned":
    job.to_server(FedAvg(num_clients=int(workers), num_rounds=int(rounds), task_check_period=0.05))
    # Seconds until a client asks again: 2 by default; in their reference of time-outs, under "ServerRunner Timeouts".
    job.to_server({"server": {"task_request_interval": 0.05}})
    job.to_clients({"default_task_fetch_interval": 0.05})
    job.to_clients(Echo())
else:  # what NumpyFedAvgRecipe puts together
    job.to_server(FedAvg(num_clients=int(workers), num_rounds=int(rounds)))
    job.to_clients(
        ScriptRunner(script="client.py", framework=FrameworkType.NUMPY, server_expected_format=ExchangeFormat.NUMPY)
    )
job.export_job(folder)
