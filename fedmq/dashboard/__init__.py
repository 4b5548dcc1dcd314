"""The live page of a run: a small web server on this machine, fed by :mod:`fedmq.monitoring` and the run's folder."""
