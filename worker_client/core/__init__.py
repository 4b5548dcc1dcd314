"""The rules a worker follows, without I/O: events in, effects out."""

from worker_client.core.evaluator import EvaluatorMachine
from worker_client.core.machine import State, WorkerMachine

__all__ = ["EvaluatorMachine", "State", "WorkerMachine"]
