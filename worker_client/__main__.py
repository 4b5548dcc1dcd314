"""``python -m worker_client``."""

from worker_client.cli import main

main()
